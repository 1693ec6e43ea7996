"""Speed of scoring HellaSwag, compared with a plain loop and the four-row batch of build-nanogpt's script.

    python tests/benchmarks/hellaswag.py --data hellaswag_val.jsonl
    python tests/benchmarks/hellaswag.py --data hellaswag_val.jsonl --examples 200 --rounds 5 --json

Three ways, in turns in one process, with one set of random weights of GPT-2 124M:

loop        transformers' GPT-2, one ending at a time, written as a plain loop
four rows   transformers' GPT-2 and https://github.com/karpathy/build-nanogpt/blob/master/hellaswag.py: the four
            endings of an example are a batch, padded to the longest, with all logits
ours        scratch_gpt2's model and `score_examples`; "ours, their model" has transformers' GPT-2 instead of ours

All follow build-nanogpt's protocol. The benchmark fails if their log-likelihoods differ.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from scratch_gpt2 import ScratchGPT2ForCausalLM
from scratch_gpt2.evaluation.hellaswag import encode_example, read_hellaswag, score_examples
from scratch_gpt2.tokenization import load_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt2_vocabulary import use_packaged_vocabulary

TOLERANCE = 1e-3  # nats, for sums in the hundreds


@torch.no_grad()
def plain_loop(model, examples) -> list[list[float]]:
    scores = []
    for example in examples:
        scores.append([])
        for ending in example.ending_ids:
            ids = torch.tensor([example.context_ids + ending])
            log_probs = model(ids).logits.log_softmax(-1)
            first = len(example.context_ids)
            picked = log_probs[0, torch.arange(first - 1, ids.shape[1] - 1), ids[0, first:]]
            scores[-1].append(picked.sum().item())
    return scores


@torch.no_grad()
def four_rows(model, examples) -> list[list[float]]:
    scores = []
    for example in examples:
        rows = [example.context_ids + ending for ending in example.ending_ids]
        tokens = torch.zeros((4, max(map(len, rows))), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, len(example.context_ids) : len(row)] = 1
        logits = model(tokens).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        sums = (losses.view(4, -1) * mask[:, 1:]).sum(1)
        scores.append((-sums).tolist())
    return scores


def ours(model, examples) -> list[list[float]]:
    return [result.log_likelihoods for result in score_examples(model, examples)]


def compare(args) -> dict[str, dict]:
    tokenizer = load_tokenizer(args.tokenizer)
    rows = read_hellaswag(args.data)
    step = max(1, len(rows) // args.examples)
    examples = [encode_example(tokenizer, row, "build-nanogpt") for row in rows[::step][: args.examples]]
    set_seed(0)
    reference = GPT2LMHeadModel(GPT2Config(n_layer=args.n_layer)).eval()
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        model = ScratchGPT2ForCausalLM.from_pretrained(folder).eval()
    ways = {
        "loop": (plain_loop, reference),
        "four rows": (four_rows, reference),
        "ours, their model": (ours, reference),
        "ours": (ours, model),
    }
    times = {name: [] for name in ways}
    cpu_times = {name: [] for name in ways}
    for score, scored in ways.values():
        score(scored, examples[:2])  # warm-up
    for _ in range(args.rounds):
        scores = {}
        for name, (score, scored) in ways.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            scores[name] = score(scored, examples)
            times[name].append(time.perf_counter() - start)
            cpu_times[name].append(time.process_time() - cpu_start)
        check_equal(scores)
    four_rows_seconds = statistics.median(times["four rows"])
    return {
        name: {
            "seconds_per_example": statistics.median(times[name]) / len(examples),
            "cpu_seconds_per_example": statistics.median(cpu_times[name]) / len(examples),
            "speed": four_rows_seconds / statistics.median(times[name]),
        }
        for name in ways
    }


def check_equal(scores: dict[str, list[list[float]]]) -> None:
    expected = torch.tensor(scores["loop"])
    for name, values in scores.items():
        difference = (torch.tensor(values) - expected).abs().max().item()
        if difference > TOLERANCE:
            raise RuntimeError(f"{name!r} differs from the loop by {difference} nats.")


def main():
    use_packaged_vocabulary()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="HellaSwag's validation data, original jsonl")
    parser.add_argument("--tokenizer", default="tiktoken:gpt2")
    parser.add_argument("--examples", type=int, default=100, help="number of examples, spread over the file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    summary = compare(args)
    if args.json:
        print(json.dumps({"examples": args.examples, "rounds": args.rounds, "ways": summary}))
        return
    print(f"{'':<18}{'s/example':>11}{'CPU s/example':>15}   beside four rows")
    for name, result in summary.items():
        print(
            f"{name:<18}{result['seconds_per_example']:>11.4f}{result['cpu_seconds_per_example']:>15.4f}"
            f"{result['speed']:>9.2f}x"
        )


if __name__ == "__main__":
    main()
