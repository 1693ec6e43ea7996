"""Throughput and memory of write_token_shards (examples/prepare_text.py), beside plain tiktoken and a process pool.

    python tests/benchmarks/tokenize_text.py --text books/*.txt
    python tests/benchmarks/tokenize_text.py --text books/*.txt --rounds 5 --json result.json

The text becomes documents of about 4,000 characters, as web pages are, in a .jsonl file. Every contender reads that
file, tokenizes it with GPT-2's BPE, ends each document with <|endoftext|> and writes uint16 .npy; ours also makes
checksums, counts bytes and syncs to disk. Each run has a process of its own, in turns, and the time excludes imports
and loading the vocabulary. The tokens must be equal. Memory is the peak of the process over what it held before,
at the size of the text and at four times that. Needs GPT-2's vocabulary: a network, or TIKTOKEN_CACHE_DIR.
"""

import argparse
import hashlib
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import tiktoken

END_OF_TEXT = 50256
SHARD_TOKENS = 500_000
DOCUMENT_CHARACTERS = 4000


def documents(file: str):
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def with_scratch_gpt2(file: str, folder: Path):
    from scratch_gpt2.data.text_sources import read_files
    from scratch_gpt2.data.token_shards import write_token_shards
    from scratch_gpt2.tokenization import load_tokenizer

    tokenizer = load_tokenizer("tiktoken:gpt2")
    tiktoken.get_encoding("gpt2")  # loads it, as the others do before the time begins
    return lambda: write_token_shards(read_files([file]), tokenizer, folder, "benchmark", SHARD_TOKENS)


def with_batches(file: str, folder: Path):
    """A loop over tiktoken's own batches, which it tokenizes in threads."""
    encoding = tiktoken.get_encoding("gpt2")

    def run():
        texts, tokens = documents(file), []
        while batch := list(islice(texts, 1024)):
            for ids in encoding.encode_ordinary_batch(batch):
                tokens.append(np.array([*ids, END_OF_TEXT], np.uint16))
        np.save(folder / "shard.npy", np.concatenate(tokens))

    return run


def encode_document(text: str) -> np.ndarray:
    return np.array([*tiktoken.get_encoding("gpt2").encode_ordinary(text), END_OF_TEXT], np.uint16)


def with_pool(file: str, folder: Path):
    """A process for each of two cores, one document after the other, as in the fineweb.py of build-nanogpt."""
    pool = multiprocessing.get_context("spawn").Pool(2)
    pool.map(encode_document, ["Load the vocabulary."] * 64, chunksize=1)

    def run():
        np.save(folder / "shard.npy", np.concatenate(list(pool.imap(encode_document, documents(file), chunksize=16))))

    return run


CONTENDERS = {
    "scratch_gpt2": with_scratch_gpt2,
    "encode_ordinary_batch": with_batches,
    "pool of 2 processes": with_pool,
}


def measure(name: str, file: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        run = CONTENDERS[name](file, Path(folder))
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
        held, cpu, start = memory_mb("VmRSS"), cpu_seconds(), time.perf_counter()
        run()
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        shards = [np.load(shard) for shard in sorted(Path(folder).glob("*.npy"))]
        return {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "cores": cpu / seconds,
            "peak_mb": memory_mb("VmHWM") - held,
            "tokens": sum(map(len, shards)),
            "sha256": hashlib.sha256(np.concatenate(shards)).hexdigest(),
        }


def memory_mb(name: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def cpu_seconds() -> float:
    """Of this process and its workers."""
    times = [process.cpu_times() for process in [psutil.Process(), *psutil.Process().children()]]
    return sum(t.user + t.system for t in times)


def run_alone(name: str, file: Path) -> dict:
    command = [sys.executable, __file__, "--only", name, "--text", str(file)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return json.loads(output.splitlines()[-1])


def compare(texts: list[str], rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        file, large = Path(folder, "text.jsonl"), Path(folder, "four_times.jsonl")
        with open(file, "w") as lines:
            for text in texts:
                for start in range(0, len(text), DOCUMENT_CHARACTERS):
                    lines.write(json.dumps({"text": text[start : start + DOCUMENT_CHARACTERS]}) + "\n")
        large.write_bytes(file.read_bytes() * 4)
        runs = {name: [] for name in CONTENDERS}
        for _ in range(rounds):
            for name, results in runs.items():
                results.append(run_alone(name, file))
        four_times = [run_alone("scratch_gpt2", large) for _ in range(rounds)]
    if len({result["sha256"] for results in runs.values() for result in results}) != 1:
        raise RuntimeError("The contenders' tokens differ.")
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    summary = {name: summarise(results, megabytes) for name, results in runs.items()}
    summary["scratch_gpt2, 4 times the text"] = summarise(four_times, 4 * megabytes)
    for result in summary.values():
        result["speed"] = result["mb_per_second"] / summary["scratch_gpt2"]["mb_per_second"]
    return {"megabytes": megabytes, "rounds": rounds, "results": summary}


def summarise(results: list[dict], megabytes: float) -> dict:
    medians = {
        key: statistics.median(result[key] for result in results)
        for key in ("seconds", "cpu_seconds", "cores", "peak_mb")
    }
    return {**medians, "tokens": results[0]["tokens"], "mb_per_second": megabytes / medians["seconds"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="text files to tokenize")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each contender")
    parser.add_argument("--json", help="file for the result")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.text[0])))
        return
    result = compare([Path(file).read_text(encoding="utf-8") for file in args.text], args.rounds)
    print(f"{result['megabytes']:.1f} MB of text, medians of {args.rounds} runs")
    for name, r in result["results"].items():
        print(
            f"{name:31} {r['seconds']:6.2f} s  {r['mb_per_second']:6.2f} MB/s  {r['speed']:5.2f} of ours  "
            f"{r['cpu_seconds']:5.2f} s of CPU  {r['cores']:4.2f} cores  peak +{r['peak_mb']:.0f} MB"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
