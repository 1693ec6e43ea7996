"""The benchmarks of speed, at toy size, and the table that `make bench` makes of their numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__


def test_growth_measures_both_models_and_draws_the_curves(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "growth.py"), "--preset", "tiny", "--json"]
    command += ["--lengths", "8", "16", "--new_tokens", "3", "--output", str(tmp_path / "growth.png")]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    points = [(row["kind"], row["size"], row["model"]) for row in result["rows"]]
    assert points == [
        ("train", 8, "transformers"),
        ("train", 8, "scratch_gpt2"),
        ("train", 16, "transformers"),
        ("train", 16, "scratch_gpt2"),
        ("decode", 3, "transformers"),
        ("decode", 3, "scratch_gpt2"),
    ]
    assert all(row["seconds"] > 0 and row["peak_mb"] > 50 for row in result["rows"])
    assert json.loads((tmp_path / "growth.json").read_text()) == result["rows"]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_slopes_are_seconds_for_each_further_token(benchmark):
    points = {"transformers": [(100, 1.0), (200, 3.0)], "scratch_gpt2": [(100, 1.0), (200, 1.5), (300, 2.0)]}
    rows = [
        {"kind": "train", "model": name, "size": size, "seconds": seconds}
        for name, curve in points.items()
        for size, seconds in curve
    ]
    slopes = benchmark("growth").slopes(rows)
    assert slopes["train"] == pytest.approx({"transformers": 0.02, "scratch_gpt2": 0.005})
    assert slopes["decode"] == {}


def test_growth_refuses_other_work(benchmark):
    growth = benchmark("growth")
    growth.check_same_work("train", 8, [[4.0, 3.0], [4.00001, 3.0]])
    with pytest.raises(RuntimeError, match="The work of train 8 differs"):
        growth.check_same_work("train", 8, [[4.0, 3.0], [4.0, 3.001]])
    with pytest.raises(RuntimeError, match="The work of decode 3 differs"):
        growth.check_same_work("decode", 3, [[5, 6, 7], [5, 6, 8]])


def test_the_table_compares_with_the_faster_peer(benchmark):
    run_all = benchmark("run_all")
    models = {
        "transformers": {"seconds": 6.0, "peak_mb": 3000.0},
        "scratch_gpt2": {"seconds": 4.0, "peak_mb": 1500.0},
        "nanogpt": {"seconds": 5.0, "peak_mb": 2900.0},
    }
    rows = run_all.training_rows({"batch": 4, "length": 256, "dtype": "float32", "models": models})
    assert run_all.as_table(rows).splitlines() == [
        "| what | ours | peer | ratio | goal |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| training step, 4 x 256, float32, beside nanogpt | 4 s | 5 s | 1.25x | 1.3x |",
        "| training step, 4 x 256, float32, memory | 1500 MB | 3000 MB | 2.00x | - |",
    ]


def test_the_table_compares_exact_with_exact_and_int8_with_int8(benchmark):
    seconds = {"transformers": 2.0, "scratch_gpt2": 1.6, "scratch_gpt2 optimized": 0.8, "scratch_gpt2 int8": 0.5}
    seconds |= {"ctranslate2": 1.2, "ctranslate2 int8": 0.4}
    contenders = {name: {"seconds": value} for name, value in seconds.items()}
    rows = benchmark("run_all").writing_rows({"batch": 1, "prompt": 16, "new_tokens": 32, "contenders": contenders})
    assert [(row["what"].split("after 16, ")[1], round(row["ratio"], 9), row["goal"]) for row in rows] == [
        ("scratch_gpt2, beside transformers", 1.25, None),
        ("optimized, beside transformers", 2.5, 2.0),
        ("int8, beside transformers", 4.0, None),
        ("beside ctranslate2", 1.5, 1.0),
        ("beside ctranslate2 int8", 0.8, 1.0),
    ]
