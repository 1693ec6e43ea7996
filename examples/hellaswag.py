"""HellaSwag accuracy of a causal language model, with protocols for which published results exist.

    python examples/hellaswag.py --model checkpoints/my-gpt2 --data hellaswag_val.jsonl
    python examples/hellaswag.py --model openai-community/gpt2 --results gpt2.jsonl --json gpt2.json
    python examples/hellaswag.py --model checkpoints/my-gpt2 --data hellaswag_val.jsonl --protocol build-nanogpt

Without `--data` the validation split is downloaded from the Hub (Rowan/hellaswag); hellaswag_val.jsonl of
https://github.com/rowanz/hellaswag is the same. `--results` gets a line for each example as soon as it is computed,
and the same command continues a stopped run.

Published results of OpenAI's GPT-2 124M on all 10,042 examples: 0.2892 and normalized 0.3114 with lm-eval; 0.2859
and 0.2955 with build-nanogpt. The script also prints 95% Wilson intervals, because the examples are a sample.
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

from dataclasses import asdict, dataclass, field

from accelerate import PartialState

from scratch_gpt2.cli import parse_arguments, run_main
from scratch_gpt2.evaluation.hellaswag import (
    PROTOCOLS,
    HellaSwagResult,
    check_fits,
    encode_example,
    load_hellaswag,
    read_hellaswag,
    score_examples,
    summarize,
)
from scratch_gpt2.evaluation.models import is_first_process, load_causal_lm, load_tokenizer_of, weights_digest
from scratch_gpt2.evaluation.progress import ProgressFile, digest
from scratch_gpt2.files import check_outputs, write_json
from scratch_gpt2.tokenization import load_tokenizer


@dataclass
class Arguments:
    model: str = field(
        metadata={"help": "Folder or Hub id of a causal language model or an adapter, or nanoGPT's ckpt.pt."}
    )
    data: str | None = field(
        default=None,
        metadata={"help": "HellaSwag's validation data in its original form (JSON lines); by default from the Hub."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder, Hub id or tiktoken:gpt2; by default the model's."}
    )
    protocol: str = field(
        default="lm-eval",
        metadata={"help": "Compare only results of the same protocol.", "choices": list(PROTOCOLS)},
    )
    limit: int | None = field(default=None, metadata={"help": "Use the first N examples only."})
    batch_size: int = field(default=4, metadata={"help": "Examples per batch; affects speed and memory only."})
    results: str | None = field(
        default=None,
        metadata={"help": "JSON lines with the result of each example, from which a stopped run continues."},
    )
    json: str | None = field(default=None, metadata={"help": "File to write the accuracies and their protocol to."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the file of --json if it exists."})


def main() -> None:
    (arguments,) = parse_arguments(Arguments, description=__doc__)
    if not is_first_process():
        return
    check(arguments)
    examples = read_examples(arguments.data)[: arguments.limit]
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else load_tokenizer_of(arguments.model)
    model = load_causal_lm(arguments.model).to(PartialState().device)
    encoded = [encode_example(tokenizer, example, arguments.protocol) for example in examples]
    check_fits(model, encoded)

    settings = {
        "model": arguments.model,
        "protocol": arguments.protocol,
        "examples": len(encoded),
        "tokens": digest([asdict(example) for example in encoded]),
        "weights": weights_digest(model),
    }
    progress = ProgressFile(arguments.results, settings) if arguments.results else None
    result = summarize(score_examples(model, encoded, arguments.batch_size, progress))
    report(arguments.protocol, result)
    if arguments.json:
        write_json(arguments.json, settings | asdict(result))


def check(arguments: Arguments) -> None:
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"limit is {arguments.limit} but must be at least 1.")
    sources = [arguments.model, *filter(None, [arguments.data])]
    if arguments.results:
        check_outputs([arguments.results], inputs=sources, overwrite=True)  # ProgressFile refuses other files
        sources.append(arguments.results)
    if arguments.json:
        check_outputs([arguments.json], inputs=sources, overwrite=arguments.overwrite)


def read_examples(data: str | None):
    return load_hellaswag() if data is None else read_hellaswag(data)


def report(protocol: str, result: HellaSwagResult) -> None:
    print(f"HellaSwag by {protocol}'s protocol, {result.examples:,} examples, 95% intervals by Wilson")
    for name, share, error, (low, high) in (
        ("accuracy", result.accuracy, result.standard_error, result.interval),
        ("accuracy_norm", result.accuracy_norm, result.standard_error_norm, result.interval_norm),
    ):
        print(f"{name:<14}{share:.4f}   from {low:.4f} to {high:.4f}   standard error {error:.4f}")


if __name__ == "__main__":
    run_main(main)
