"""Throughput and memory of write_token_shards (examples/prepare_text.py), beside plain tiktoken and a process pool.

    python tests/benchmarks/tokenize_text.py --text books/*.txt
    python tests/benchmarks/tokenize_text.py --text books/*.txt --rounds 2 --json

The text is cut into documents of 4,000 characters, about the size of a web page, in a .jsonl file. Every contender
reads that file, tokenizes it with GPT-2's BPE, ends each document with <|endoftext|> and writes uint16 .npy files;
ours also computes checksums, counts bytes and syncs to disk. The runs take turns, each in its own process, with the
text once and sixteen times. The time excludes imports and loading the vocabulary, but ours includes passing it to
tiktoken (about 0.3 s). The benchmark fails if tokens differ. Numbers are medians; memory is the increase of the peak
during the run, without the workers of the pool. On a busy machine, compare the seconds of CPU.
Needs GPT-2's vocabulary: a network connection, or TIKTOKEN_CACHE_DIR.
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
from process_memory import memory_mb, reset_peak_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt2_vocabulary import use_packaged_vocabulary

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
    return lambda: write_token_shards(read_files([file]), tokenizer, folder, "benchmark", SHARD_TOKENS)


def with_batches(file: str, folder: Path):
    """A loop over batches, which tiktoken tokenizes in threads."""
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
    """A pool of two processes, one document at a time, as in build-nanogpt's fineweb.py."""
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
        reset_peak_memory()  # the imports have raised it
        held, cpu, start = memory_mb("VmRSS"), cpu_seconds(), time.perf_counter()
        run()
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        peak = memory_mb("VmHWM")
        shards = [np.load(shard) for shard in sorted(Path(folder).glob("*.npy"))]
        return {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "cores": cpu / seconds,
            "peak_mb": peak - held,
            "tokens": sum(map(len, shards)),
            "sha256": hashlib.sha256(np.concatenate(shards)).hexdigest(),
        }


def cpu_seconds() -> float:
    """Of this process and its workers."""
    times = [process.cpu_times() for process in [psutil.Process(), *psutil.Process().children()]]
    return sum(t.user + t.system for t in times)


def run_alone(name: str, file: Path) -> dict:
    command = [sys.executable, __file__, "--only", name, "--text", str(file)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return json.loads(output.splitlines()[-1])


def compare(texts: list[str], rounds: int) -> list[dict]:
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        file, large = Path(folder, "text.jsonl"), Path(folder, "sixteen_times.jsonl")
        with open(file, "w") as lines:
            for text in texts:
                for start in range(0, len(text), DOCUMENT_CHARACTERS):
                    lines.write(json.dumps({"text": text[start : start + DOCUMENT_CHARACTERS]}) + "\n")
        large.write_bytes(file.read_bytes() * 16)
        runs = {(name, size): [] for size in (file, large) for name in CONTENDERS}
        for _ in range(rounds):
            for (name, size), results in runs.items():
                results.append(run_alone(name, size))
    summary = []
    for size, factor in ((file, 1), (large, 16)):
        if len({result["sha256"] for name in CONTENDERS for result in runs[name, size]}) != 1:
            raise RuntimeError("The contenders' tokens differ.")
        summary += [{"name": name, **summarise(runs[name, size], factor * megabytes)} for name in CONTENDERS]
    return summary


def summarise(results: list[dict], megabytes: float) -> dict:
    keys = ("seconds", "cpu_seconds", "cores", "peak_mb")
    medians = {key: statistics.median(result[key] for result in results) for key in keys}
    return {"megabytes": megabytes, **medians, "mb_per_second": megabytes / medians["seconds"]}


def main():
    use_packaged_vocabulary()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="text files to tokenize")
    parser.add_argument("--rounds", type=int, default=5, help="processes per contender")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.text[0])))
        return
    summary = compare([Path(file).read_text(encoding="utf-8") for file in args.text], args.rounds)
    if args.json:
        print(json.dumps({"rounds": args.rounds, "contenders": summary}))
        return
    for r in summary:
        print(
            f"{r['name']:21} {r['megabytes']:5.1f} MB  {r['seconds']:6.2f} s  {r['mb_per_second']:6.2f} MB/s  "
            f"{r['cpu_seconds']:5.2f} s of CPU  {r['cores']:4.2f} cores  peak +{r['peak_mb']:.0f} MB"
        )


if __name__ == "__main__":
    main()
