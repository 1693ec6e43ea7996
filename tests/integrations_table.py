"""Write the table of docs/integrations.md from the results of the tests.

    python -m pytest tests/test_integrations.py tests/test_gguf_export.py tests/test_trl_peft.py \\
        tests/test_judge_script.py tests/test_registration.py tests/test_generation.py --junitxml results.xml
    python tests/integrations_table.py results.xml
"""

import importlib.metadata
import sys
import xml.etree.ElementTree as ET

# Library, the package that gives the version, the tests that decide, what they run.
ROWS = [
    ("`pipeline`", "transformers", ["test_pipelines_run_without_complaint"], "four tasks, single and batched"),
    ("question answering", "transformers", ["test_question_answering"], "the head; transformers 5 has no pipeline"),
    ("`transformers serve`", "openai", ["test_transformers_serve"], "`export_gpt2`, then an OpenAI client"),
    ("torch.export", "torch", ["test_exported_with_any_length"], "equal logits at any length"),
    ("ONNX", "onnxruntime", ["test_onnx"], "`transformers.exporters`; equal logits at any length"),
    ("torchao", "torchao", ["test_torchao"], "int8 and int4 weights, saved and loaded"),
    ("dynamic int8", "torch", ["test_dynamic_int8"], "close logits, `generate`"),
    ("CTranslate2", "ctranslate2", ["test_ctranslate2"], "`export_gpt2`; equal greedy text, int8 smaller"),
    ("llama.cpp", "xllamacpp", ["test_the_bfloat16_base_writes_the_same_text", "test_llama_cpp_writes_the_same",
                                "test_dtypes", "test_texts_are_encoded_alike", "test_chat"],
     "`export_gguf`; equal text, tokens and chat prompts; log-probabilities within 0.01"),
    ("GGUF in transformers", "gguf", ["test_transformers_reads_it_back"], "`export_gguf`; equal logits"),
    ("Accelerate", "accelerate", ["test_disk_offload"], '`device_map="auto"` with disk; equal logits'),
    ("PEFT", "peft", ["test_lora_without_named_targets", "test_peft_trains_saves_and_generates"],
     "LoRA, IA3, prefix, prompt"),
    ("TRL", "trl", ["test_trl_trains_as_we_do", "test_trl_dpo"], "SFT as our trainer, DPO as on transformers' GPT-2"),
    ("vLLM", None, ["test_vllm_requirements"], "its documented requirements; vLLM itself was not run"),
]  # fmt: skip


def outcomes(file: str) -> dict[str, set[str]]:
    """What happened to each test function, over its parameters."""
    found = {}
    for case in ET.parse(file).iter("testcase"):
        kinds = {child.tag for child in case}
        result = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found.setdefault(case.get("name").split("[")[0], set()).add(result)
    return found


def result_of(tests: list[str], found: dict[str, set[str]]) -> str:
    """The worst of the results; a test that the file does not have was not run."""
    results = set.union(*(found.get(test, {"not run"}) for test in tests))
    return next(result for result in ("failed", "not run", "skipped", "passed") if result in results)


def version_of(package: str | None) -> str:
    try:
        return importlib.metadata.version(package) if package else "-"
    except importlib.metadata.PackageNotFoundError:
        return "-"


def main(file: str) -> None:
    found = outcomes(file)
    print("| library | what was run | version | result |\n| --- | --- | --- | --- |")
    for library, package, tests, what in ROWS:
        print(f"| {library} | {what} | {version_of(package)} | {result_of(tests, found)} |")


if __name__ == "__main__":
    main(sys.argv[1])
