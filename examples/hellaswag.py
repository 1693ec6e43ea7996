"""HellaSwag accuracy of a causal language model, by a protocol that others quote.

    python examples/hellaswag.py --model checkpoints/my-gpt2 --data hellaswag_val.jsonl
    python examples/hellaswag.py --model openai-community/gpt2 --results gpt2.jsonl --json gpt2.json
    python examples/hellaswag.py --model checkpoints/my-gpt2 --data hellaswag_val.jsonl --protocol build-nanogpt

Without `--data` the validation split comes from the Hub (Rowan/hellaswag); hellaswag_val.jsonl of
https://github.com/rowanz/hellaswag is the same. `--results` gets a line for each example as soon as it is computed,
and the same command goes on where a stopped one was.

Published figures of OpenAI's GPT-2 124M on all 10,042 examples: 0.2892 and normalised 0.3114 by lm-eval; 0.2859 and
0.2955 by build-nanogpt. The examples are a sample too: the intervals are Wilson's, at 95%.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import HfArgumentParser

from scratch_gpt2.cli import offline_unless_hub_answers, run_main
from scratch_gpt2.evaluation.hellaswag import (
    DATA_SET,
    PROTOCOLS,
    check_fits,
    encode_example,
    load_hellaswag,
    read_hellaswag,
    score_examples,
    summarize,
)
from scratch_gpt2.evaluation.models import load_causal_lm, weights_digest
from scratch_gpt2.evaluation.progress import ProgressFile, digest
from scratch_gpt2.files import write_json
from scratch_gpt2.tokenization import load_tokenizer


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or Hub id of a causal language model, or nanoGPT's ckpt.pt."})
    data: str | None = field(
        default=None, metadata={"help": "HellaSwag's validation data, original jsonl; by default from the Hub."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder, Hub id or tiktoken:gpt2; by default the model's."}
    )
    protocol: str = field(
        default="lm-eval",
        metadata={"help": "Whose figures the result can be compared with.", "choices": list(PROTOCOLS)},
    )
    limit: int | None = field(default=None, metadata={"help": "Only the first so many examples."})
    batch_size: int = field(default=4, metadata={"help": "Examples computed together; changes speed and memory only."})
    results: str | None = field(
        default=None, metadata={"help": "JSON lines with the result of each example; a stopped run goes on from them."}
    )
    json: str | None = field(default=None, metadata={"help": "File to write the accuracies and their protocol to."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"limit is {args.limit} but must be at least 1.")
    examples = read_examples(args.data)[: args.limit]
    offline_unless_hub_answers(args.model)
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    model = load_causal_lm(args.model).to(PartialState().device)
    encoded = [encode_example(tokenizer, example, args.protocol) for example in examples]
    check_fits(model, encoded)

    settings = {
        "model": args.model,
        "protocol": args.protocol,
        "examples": len(encoded),
        "tokens": digest([asdict(example) for example in encoded]),
        "weights": weights_digest(model),
    }
    progress = ProgressFile(args.results, settings) if args.results else None
    result = summarize(score_examples(model, encoded, args.batch_size, progress))

    print(f"HellaSwag by {args.protocol}'s protocol, {result.examples:,} examples, 95% intervals by Wilson")
    for name, share, error, (low, high) in (
        ("accuracy", result.accuracy, result.standard_error, result.interval),
        ("accuracy_norm", result.accuracy_norm, result.standard_error_norm, result.interval_norm),
    ):
        print(f"{name:<14}{share:.4f}   from {low:.4f} to {high:.4f}   standard error {error:.4f}")
    if args.json:
        write_json(Path(args.json), settings | asdict(result))


def read_examples(data: str | None):
    if data is not None:
        return read_hellaswag(data)
    offline_unless_hub_answers(DATA_SET)
    return load_hellaswag()


if __name__ == "__main__":
    run_main(main)
