"""One report on one or several models, side by side: a table, a JSON file and a picture.

    python examples/compare_models.py --model checkpoints/my-gpt2 --text book.txt
    python examples/compare_models.py --model checkpoints/step-100 checkpoints/step-200 openai-community/gpt2 \\
        --text book.txt news.txt --hellaswag hellaswag_val.jsonl --output report
    python examples/compare_models.py --model checkpoints/spam --classification data/spam --output report
    python examples/compare_models.py --model checkpoints/my-gpt2 --smoke

Language models are measured by perplexity and bits per byte on each text, HellaSwag, and the speed and memory of
generating; classifiers by the test split of a folder that examples/prepare_classification.py has made. Each model runs
in a process of its own, one after the other. GPT-2 checkpoints of any origin are computed with our model, other
architectures, and with `--reference` GPT-2 too, with transformers' own. `--output report` writes report/report.json
and report/report.png.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from scratch_gpt2.cli import run_main
from scratch_gpt2.data.text_classification import load_prepared
from scratch_gpt2.data.text_sources import read_whole_text
from scratch_gpt2.evaluation.hellaswag import PROTOCOLS, read_hellaswag
from scratch_gpt2.evaluation.report import Plan, measure_apart, plot, table, versions, write_json

SMOKE_TEXT = "The cat sat on the mat. Where is the rat? The rat is under the hat of the cat, and that is where it sat."


@dataclass
class Arguments:
    model: list[str] = field(metadata={"help": "Folders or Hub ids of language models and classifiers."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder, Hub id or tiktoken:gpt2 for all models; by default each model's own."}
    )
    text: list[str] = field(default_factory=list, metadata={"help": "Text files in UTF-8, each measured by itself."})
    context: int | None = field(
        default=None, metadata={"help": "Tokens in a window over a text; by default the model's positions."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens by which the window moves on; by default half a window."}
    )
    hellaswag: str | None = field(default=None, metadata={"help": "HellaSwag's validation data, original jsonl."})
    hellaswag_limit: int | None = field(default=None, metadata={"help": "Only the first so many of its examples."})
    protocol: str = field(
        default="lm-eval", metadata={"help": "Of HellaSwag; see examples/hellaswag.py.", "choices": list(PROTOCOLS)}
    )
    classification: str | None = field(
        default=None, metadata={"help": "Folder of prepared labelled texts, for classifiers."}
    )
    new_tokens: int = field(default=64, metadata={"help": "Tokens to generate for the speed; 0: none."})
    batch_size: int = field(
        default=4, metadata={"help": "Windows, examples or texts computed together; changes speed and memory only."}
    )
    reference: bool = field(
        default=False, metadata={"help": "Compute GPT-2 checkpoints with transformers' GPT-2 instead of ours."}
    )
    output: str | None = field(default=None, metadata={"help": "Folder for report.json and report.png."})
    smoke: bool = field(default=False, metadata={"help": "Measure on one short sentence."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    plan = make_plan(args)
    results = {name: measure_apart(name, args.tokenizer or name, plan) for name in dict.fromkeys(args.model)}
    print(table(results))
    if args.output:
        folder = Path(args.output)
        settings = {"context": args.context, "stride": args.stride, "new_tokens": plan.new_tokens}
        write_json(folder / "report.json", {"versions": versions(), "settings": settings, "models": results})
        plot(results, folder / "report.png")
        print(f"\n{folder / 'report.json'}\n{folder / 'report.png'}")


def make_plan(args: Arguments) -> Plan:
    if args.new_tokens < 0:
        raise ValueError(f"new_tokens is {args.new_tokens} but must be at least 0.")
    if args.hellaswag_limit is not None and args.hellaswag_limit < 1:
        raise ValueError(f"hellaswag_limit is {args.hellaswag_limit} but must be at least 1.")
    texts = {path: read_whole_text(path) for path in args.text}
    return Plan(
        texts=texts | ({"smoke": SMOKE_TEXT} if args.smoke else {}),
        context=args.context,
        stride=args.stride,
        hellaswag=read_hellaswag(args.hellaswag)[: args.hellaswag_limit] if args.hellaswag else [],
        protocol=args.protocol,
        classification=load_prepared(args.classification) if args.classification else None,
        new_tokens=min(args.new_tokens, 8) if args.smoke else args.new_tokens,
        batch_size=args.batch_size,
        reference=args.reference,
    )


if __name__ == "__main__":
    run_main(main)
