"""The benchmarks of speed, at toy size, and the table that `make bench` makes of their numbers."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from warm_python import run_python

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__


def test_growth_measures_both_models_and_draws_the_curves(benchmark, monkeypatch, capsys, tmp_path):
    growth = benchmark("growth")
    monkeypatch.setattr(growth.subprocess, "run", lambda command, **_: run_python(*command[1:]))
    sizes = ["--preset", "tiny", "--lengths", "8", "--new_tokens", "3"]
    monkeypatch.setattr("sys.argv", ["growth.py", *sizes, "--json", "--output", str(tmp_path / "growth.png")])
    growth.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    points = [(row["kind"], row["size"], row["model"]) for row in result["rows"]]
    assert points == [
        ("train", 8, "transformers"),
        ("train", 8, "scratch_gpt2"),
        ("decode", 3, "transformers"),
        ("decode", 3, "scratch_gpt2"),
        ("decode", 3, "scratch_gpt2 optimized"),
    ]
    assert all(row["seconds"] > 0 and row["peak_mb"] > 50 for row in result["rows"])
    assert json.loads((tmp_path / "growth.json").read_text()) == result["rows"]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_slopes_are_seconds_per_additional_token(benchmark):
    points = {"transformers": [(100, 1.0), (200, 3.0)], "scratch_gpt2": [(100, 1.0), (200, 1.5), (300, 2.0)]}
    rows = [
        {"kind": "train", "model": name, "size": size, "seconds": seconds}
        for name, curve in points.items()
        for size, seconds in curve
    ]
    slopes = benchmark("growth").slopes(rows)
    assert slopes["train"] == pytest.approx({"transformers": 0.02, "scratch_gpt2": 0.005})
    assert slopes["decode"] == {}
    for row in rows:
        row["peak_mb"] = 10 * row["seconds"]
    assert benchmark("growth").slopes(rows, "peak_mb")["train"]["transformers"] == pytest.approx(0.2)


def test_growth_refuses_other_work(benchmark):
    growth = benchmark("growth")
    growth.check_same_work("train", 8, [[4.0, 3.0], [4.00001, 3.0]])
    with pytest.raises(RuntimeError, match="The work of train 8 differs"):
        growth.check_same_work("train", 8, [[4.0, 3.0], [4.0, 3.001]])
    with pytest.raises(RuntimeError, match="The work of decode 3 differs"):
        growth.check_same_work("decode", 3, [[5, 6, 7], [5, 6, 8]])


@pytest.fixture
def run_all(benchmark, monkeypatch):
    """Without the versions, which change, and on a CPU that does not compute bfloat16."""
    module = benchmark("run_all")
    monkeypatch.setattr(module, "version", lambda name: "1.2")
    monkeypatch.setattr(module, "cpu_computes_bfloat16", lambda: False)
    return module


def table_of(run_all, *repetitions) -> list[str]:
    return run_all.as_table(run_all.merge(repetitions), nanogpt="/no/checkout").splitlines()[2:]


def options(**values) -> SimpleNamespace:
    defaults = dict.fromkeys(("nanogpt", "sms", "text", "hellaswag", "instructions", "output"))
    return SimpleNamespace(**defaults | {"preset": "gpt2"} | values)


MODELS = {
    "transformers": {"seconds": 6.0, "peak_mb": 3000.0},
    "scratch_gpt2": {"seconds": 4.0, "peak_mb": 1500.0},
    "nanogpt": {"seconds": 5.0, "peak_mb": 2900.0},
}


def training(**changes) -> dict:
    return {"options": {"batch": 4, "length": 256, "dtype": "float32", "masked": 0.0} | changes, "models": MODELS}


def test_training_is_compared_with_every_peer(run_all):
    assert run_all.as_table([]).splitlines() == [
        "| what | ours | peer | which peer | ratio | goal |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    what = "training step, 4 x 256 tokens, float32"
    assert table_of(run_all, run_all.training_rows(training())) == [
        f"| {what} | 4 s | 6 s | transformers 1.2 | 1.50x | 1.3x |",
        f"| {what} | 4 s | 5 s | nanoGPT | 1.25x | 1.3x |",
        f"| peak memory of a {what} | 1500 MB | 3000 MB | transformers 1.2 | 2.00x | - |",
    ]


def test_masked_and_bfloat16_training_have_goals_of_their_own(run_all):
    masked = table_of(run_all, run_all.training_rows(training(masked=0.7)))
    what = "training step, 4 x 256 tokens, float32, 70% of a row masked"
    assert masked[0] == f"| {what} | 4 s | 6 s | transformers 1.2 | 1.50x | 1.5x |"
    memory = table_of(run_all, run_all.training_rows(training(dtype="bf16", length=1024)))
    what = "training step, 4 x 1024 tokens, bf16"
    assert memory[0] == f"| {what} | 4 s | 6 s | transformers 1.2 | 1.50x | - |"
    assert memory[2] == f"| peak memory of a {what} | 1500 MB | 3000 MB | transformers 1.2 | 2.00x | 1.82x |"


def decoding(**changes) -> dict:
    seconds = {"transformers": 2.0, "scratch_gpt2": 1.6, "scratch_gpt2 optimized": 0.8, "scratch_gpt2 int8": 0.5}
    seconds |= {"ctranslate2": 1.2, "ctranslate2 int8": 0.4, "onnxruntime": 1.0}
    seconds |= {"transformers bf16": 1.0, "scratch_gpt2 bf16": 0.5}
    contenders = {name: {"seconds": value} for name, value in seconds.items()}
    return {"batch": 1, "prompt": 16, "new_tokens": 32, "contenders": contenders} | changes


def test_decoding_compares_exact_with_exact_and_int8_with_int8(run_all):
    assert table_of(run_all, run_all.decode_rows(decoding())) == [
        "| generating 32 tokens, as loaded | 1.6 s | 2 s | transformers 1.2 | 1.25x | - |",
        "| generating 32 tokens, optimized | 0.8 s | 2 s | transformers 1.2 | 2.50x | 2x |",
        "| generating 32 tokens, optimized | 0.8 s | 1.2 s | ctranslate2 1.2 | 1.50x | 1x |",
        "| generating 32 tokens, optimized | 0.8 s | 1 s | onnxruntime 1.2 | 1.25x | - |",
        "| generating 32 tokens, int8 | 0.5 s | 2 s | transformers 1.2 | 4.00x | - |",
        "| generating 32 tokens, int8 | 0.5 s | 0.4 s | ctranslate2 1.2 int8 | 0.80x | 1x |",
        "| generating 32 tokens, bf16 | 0.5 s | 1 s | transformers 1.2 bf16 | 2.00x | 2x |",
    ]
    batch = table_of(run_all, run_all.decode_rows(decoding(batch=8, new_tokens=16)))
    assert batch[1].endswith("for each of 8 prompts, optimized | 0.8 s | 2 s | transformers 1.2 | 2.50x | 1.5x |")
    assert batch[2].endswith("ctranslate2 1.2 | 1.50x | - |")
    prefill = table_of(run_all, run_all.decode_rows(decoding(prompt=512, new_tokens=1)))
    assert prefill[1] == "| reading a prompt of 512 tokens, optimized | 0.8 s | 2 s | transformers 1.2 | 2.50x | - |"


def test_growth_and_loading_shall_not_be_worse(run_all):
    slopes = {kind: {"transformers": 0.004, "scratch_gpt2": 0.005} for kind in ("train", "decode")}
    memory = {
        "train": {"transformers": 3.0, "scratch_gpt2": 2.0},
        "decode": {"transformers": 0.1, "scratch_gpt2": -0.01},
    }
    slopes["decode"]["scratch_gpt2 optimized"] = 0.002
    rows = run_all.growth_rows({"slopes": slopes, "memory_slopes": memory})
    assert table_of(run_all, rows) == [
        "| time of each additional token of a training step | 5 ms | 4 ms | transformers 1.2 | 0.80x | 1x |",
        "| time of each additional token to generate | 5 ms | 4 ms | transformers 1.2 | 0.80x | 1x |",
        "| time of each additional token to generate, optimized | 2 ms | 4 ms | transformers 1.2 | 2.00x | 1x |",
        "| peak memory of each additional token of a training step | 2 MB | 3 MB | transformers 1.2 | 1.50x | 1x |",
        "| peak memory of each additional token to generate | -0.01 MB | 0.1 MB | transformers 1.2 | infx | 1x |",
    ]
    measured = {"seconds": 2.0, "peak_gb": 1.0}
    loading = {"size": "gpt2", "scratch_gpt2": measured, "transformers": {"seconds": 3.0, "peak_gb": 0.9}}
    loading["scratch_gpt2, own checkpoint"] = {"seconds": 1.0, "peak_gb": 0.9}
    assert table_of(run_all, run_all.loading_rows(loading)) == [
        "| loading its own checkpoint of gpt2 | 1 s | 3 s | transformers 1.2 | 3.00x | 1x |",
        "| peak memory of loading its own checkpoint of gpt2 | 0.9 GB | 0.9 GB | transformers 1.2 | 1.00x | 1x |",
        "| loading transformers' checkpoint of gpt2 | 2 s | 3 s | transformers 1.2 | 1.50x | 1x |",
        "| peak memory of loading transformers' checkpoint of gpt2 | 1 GB | 0.9 GB | transformers 1.2 | 0.90x | 1x |",
    ]


def test_rows_of_the_benchmarks_with_data(run_all):
    trainings = {"cached": 2.0, "uncached": 4.0, "transformers": 5.0}
    results = [{"model": name, "seconds": seconds} for name, seconds in trainings.items()]
    what = "classification epoch, last block, states"
    assert table_of(run_all, run_all.classification_rows({"results": results})) == [
        f"| {what} cached | 2 s | 5 s | transformers 1.2 | 2.50x | - |",
        f"| {what} uncached | 4 s | 5 s | transformers 1.2 | 1.25x | - |",
    ]
    times = {("scratch_gpt2", 1): 2.0, ("pool of 2 processes", 1): 3.0}
    times |= {("scratch_gpt2", 16): 20.0, ("pool of 2 processes", 16): 25.0}
    contenders = [{"name": name, "megabytes": mb, "seconds": seconds} for (name, mb), seconds in times.items()]
    assert table_of(run_all, run_all.tokenization_rows({"contenders": contenders})) == [
        "| tokenizing 1 MB of text | 2 s | 3 s | tiktoken 1.2, pool of 2 processes | 1.50x | - |",
        "| tokenizing 16 MB of text | 20 s | 25 s | tiktoken 1.2, pool of 2 processes | 1.25x | - |",
    ]
    ways = {name: {"seconds_per_example": seconds} for name, seconds in {"loop": 3, "four rows": 2, "ours": 1}.items()}
    assert table_of(run_all, run_all.hellaswag_rows({"ways": ways})) == [
        "| HellaSwag, an example | 1 s | 3 s | transformers 1.2, a plain loop | 3.00x | - |",
        "| HellaSwag, an example | 1 s | 2 s | transformers 1.2, build-nanogpt's four rows | 2.00x | - |",
    ]


def test_repetitions_become_medians_with_the_spread_of_the_ratio(run_all):
    times = [(1.0, 2.0), (1.0, 3.0), (2.0, 5.0)]
    repetitions = [[run_all.row("work", "s", "transformers", ours, theirs, 1.5)] for ours, theirs in times]
    assert table_of(run_all, *repetitions) == ["| work | 1 s | 3 s | transformers 1.2 | 2.50x (2.00 to 3.00) | 1.5x |"]


def test_what_is_not_measured_is_said(run_all, monkeypatch):
    monkeypatch.setattr(run_all, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert run_all.left_out(options(nanogpt="nanoGPT", text=["emma.txt"])) == [
        "bfloat16 (training, its memory, generation): this CPU does not compute it.",
        "a classification epoch: no --sms was given.",
        "HellaSwag: no --hellaswag was given.",
        "instruction tuning beside TRL: no --instructions was given.",
        "onnxruntime in generation: it is not installed (pip install onnxruntime onnx onnxscript).",
    ]


def test_the_short_set_measures_what_it_is_given(run_all, monkeypatch, tmp_path):
    always = ["training", "sft", "decode", "decode_batch_8", "prefill", "loading", "growth"]
    assert list(run_all.short_set(options(), tmp_path)) == always
    data = options(sms="sms", text=["emma.txt"], hellaswag="h.jsonl", instructions="i.json", nanogpt="nano")
    runs = run_all.short_set(data, tmp_path)
    assert list(runs) == [*always, "classification", "tokenization", "hellaswag", "instructions"]
    training = ["train_step.py", "--preset", "gpt2", "--steps", "1", "--rounds", "2", "--nanogpt", "nano"]
    assert runs["sft"] == [*training, "--dtype", "float32", "--length", "256", "--masked", "0.7"]
    monkeypatch.setattr(run_all, "cpu_computes_bfloat16", lambda: True)
    assert list(run_all.short_set(options(), tmp_path))[2:4] == ["training_bf16", "memory_bf16"]


@pytest.fixture
def small(benchmark, monkeypatch):
    """A GPT-2 with few tokens and blocks, as a preset of the benchmarks."""
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    monkeypatch.setitem(benchmark("decode").PRESETS, "small", sizes | {"bos_token_id": 0, "eos_token_id": 0})
    return "small"


PEERS = {"ctranslate2": ["ctranslate2"], "onnxruntime": ["onnxruntime", "onnxscript"]}
PEERS |= {"openvino": ["openvino", "onnxscript"], "llama.cpp F32": ["xllamacpp", "gguf"]}


@pytest.mark.parametrize("peer", PEERS)
def test_the_peers_of_decoding_write_the_same_tokens(peer, benchmark, small, tmp_path):
    for package in PEERS[peer]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    decode = benchmark("decode")
    decode.write_weights(tmp_path, small, [peer])
    ids = torch.randint(0, 257, (2, 5), generator=torch.Generator().manual_seed(0))
    expected = decode.make_writer("transformers", tmp_path, batch=2, positions=11)(ids, 6)
    assert expected.shape == (2, 6)
    assert torch.equal(decode.make_writer(peer, tmp_path, batch=2, positions=11)(ids, 6), expected)
    assert torch.equal(decode.make_writer("scratch_gpt2 optimized", tmp_path, batch=2, positions=11)(ids, 6), expected)


def test_a_static_cache_writes_the_same_tokens(benchmark, small, tmp_path):
    decode = benchmark("decode")
    decode.write_weights(tmp_path, small, [])
    ids = torch.randint(0, 257, (2, 5), generator=torch.Generator().manual_seed(0))
    expected = decode.make_writer("transformers", tmp_path, batch=2, positions=11)(ids, 6)
    for name in decode.STATIC:
        assert name in decode.contender_names(static=True) and name not in decode.contender_names(static=False)
        assert torch.equal(decode.make_writer(name, tmp_path, batch=2, positions=11)(ids, 6), expected)


def test_training_steps_do_the_same_masked_work(benchmark, small, tmp_path):
    train_step = benchmark("train_step")
    benchmark("decode").write_weights(tmp_path, small, [])
    args = SimpleNamespace(weights=str(tmp_path), batch=2, length=8, dtype="float32", steps=1)
    runs = [train_step.train(name, args, masked=0.5) for name in ("transformers", "scratch_gpt2")]
    assert runs[1]["losses"] == pytest.approx(runs[0]["losses"], rel=1e-5)
    assert all(len(run["seconds"]) == len(run["cpu_seconds"]) == 1 for run in runs)
    assert train_step.train("scratch_gpt2", args)["losses"][0] != pytest.approx(runs[0]["losses"][0], rel=1e-3)


def test_a_step_is_counted_in_tokens_and_flops(benchmark, monkeypatch):
    """A token of GPT-2 in rows of 256: 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 256 = 769,503,744."""
    monkeypatch.setattr("scratch_gpt2.hardware.known_peak_flops", lambda: 1e13)
    runs = [
        {"model": name, "seconds": [seconds], "cpu_seconds": [3.0], "peak_mb": 100.0, "losses": [11.0]}
        for name, seconds in (("transformers", 2.0), ("scratch_gpt2", 1.0))
    ]
    options = SimpleNamespace(batch=4, length=256, preset="gpt2")
    ours = benchmark("train_step").summarise(runs, options)["scratch_gpt2"]
    assert (ours["tokens_per_second"], ours["speed"]) == (1024, 2)
    assert ours["tflops_per_second"] == pytest.approx(0.787971833856)
    assert ours["mfu"] == pytest.approx(0.0787971833856)


def test_time_to_loss_finds_where_a_curve_reaches_the_reference(benchmark):
    time_to_loss = benchmark("time_to_loss")
    points = [{"tokens": tokens, "loss": loss} for tokens, loss in ((1, 5.0), (100, 3.0), (300, 2.0), (400, 2.5))]
    assert time_to_loss.crossing(points, 2.25, "tokens") == 250
    assert time_to_loss.crossing(points, 3.0, "tokens") == 100
    assert time_to_loss.crossing(points, 1.9, "tokens") is None


def test_time_to_loss_reads_the_same_windows_for_all_contenders(benchmark, tmp_path):
    time_to_loss = benchmark("time_to_loss")
    (tmp_path / "text").write_text("abcdefghij" * 9 + "abcdefgabc")
    args = SimpleNamespace(text=[tmp_path / "text"], vocab_size=None, data=tmp_path, length=3, eval_tokens=6)
    assert time_to_loss.read_tokens(args, tmp_path) == 10
    inputs, targets = time_to_loss.held_out_windows(args)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5]] and targets.tolist() == [[1, 2, 3], [4, 5, 6]]
    blocks = time_to_loss.training_blocks(args)
    assert blocks[1]["input_ids"].tolist() == [2, 3, 4] and len(blocks) == 44


def test_time_to_loss_tunes_without_the_held_out_text(benchmark, tmp_path):
    (tmp_path / "first").write_text("abcdefghij" * 10)
    (tmp_path / "second").write_text("klmnopqrst" * 10)
    args = SimpleNamespace(text=[tmp_path / "first", tmp_path / "second"], vocab_size=None)
    assert benchmark("time_to_loss").read_tokens(args, tmp_path) == 20
    ids = {name: np.fromfile(tmp_path / f"{name}.bin", dtype=np.uint16).tolist() for name in ("val", "tuning/val")}
    assert ids == {"val": [*range(20)], "tuning/val": [*range(1, 10), *range(11, 20)]}
    lengths = [(tmp_path / f"{name}.bin").stat().st_size // 2 for name in ("train", "tuning/train")]
    assert lengths == [180, 162]
