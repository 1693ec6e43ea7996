"""Turn labelled text into the training, validation and test data of examples/classify.py.

    python examples/prepare_classification.py --input SMSSpamCollection --output data/sms --unescape
    python examples/prepare_classification.py --input reviews.csv --text_column review --label_column stars \\
        --output data/reviews
    python examples/prepare_classification.py --hub ucirvine/sms_spam --text_column sms --output data/sms

Duplicates are removed before splitting, because a text in both the training and the test data makes a model look
better than it is. The setting of many tutorials on the SMS data is as many messages of either kind, with duplicates:

    python examples/prepare_classification.py --input SMSSpamCollection --output data/sms-balanced \\
        --balance --keep_duplicates

OUTPUT holds train.jsonl, validation.jsonl, test.jsonl, each line {"text": ..., "label": ...}, and report.json.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from scratch_gpt2.cli import offline_unless_hub_answers, run_main
from scratch_gpt2.data.text_classification import (
    FRACTIONS,
    LABEL_COLUMN,
    TEXT_COLUMN,
    check_new,
    prepare,
    read_labelled_hub,
    read_labelled_text,
    save_prepared,
)


@dataclass
class Arguments:
    output: str = field(metadata={"help": "folder to make"})
    input: str | None = field(
        default=None,
        metadata={"help": "file: .jsonl, .parquet, .csv with a header, .tsv with one or as label<TAB>text"},
    )
    hub: str | None = field(default=None, metadata={"help": "data set on the Hugging Face Hub"})
    hub_config: str | None = field(default=None, metadata={"help": "its configuration"})
    hub_split: str = field(default="train", metadata={"help": "its split"})
    text_column: str = field(default=TEXT_COLUMN, metadata={"help": "column with the text"})
    label_column: str = field(default=LABEL_COLUMN, metadata={"help": "column with the label"})
    unescape: bool = field(default=False, metadata={"help": "turn HTML entities such as &lt; into characters"})
    keep_duplicates: bool = field(
        default=False, metadata={"help": "leave equal texts in, so that test data may repeat training data"}
    )
    balance: bool = field(
        default=False, metadata={"help": "draw as many rows of each label as the rarest has; the others are dropped"}
    )
    fractions: list[float] = field(
        default_factory=lambda: list(FRACTIONS), metadata={"help": "shares of training, validation and test data"}
    )
    seed: int = field(default=0, metadata={"help": "decides what is drawn"})


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__.split("\n")[0]).parse_args_into_dataclasses()
    if bool(args.input) == bool(args.hub):
        raise ValueError("Say where the text is: either --input with a file or --hub with a data set.")
    check_new(args.output)
    if args.hub:
        offline_unless_hub_answers(args.hub)
        rows = read_labelled_hub(args.hub, args.hub_config, args.hub_split, args.text_column, args.label_column)
        source = f"{args.hub}, configuration {args.hub_config}, split {args.hub_split}"
    else:
        rows = read_labelled_text(args.input, args.text_column, args.label_column)
        source = args.input
    prepared = prepare(
        rows, source, args.seed, tuple(args.fractions), args.unescape, args.keep_duplicates, args.balance
    )
    save_prepared(prepared, args.output)
    print_report(prepared.report, args.output)


def print_report(report: dict, folder: str) -> None:
    print(f"{report['source']}: {report['rows_read']:,} rows, {in_words(report['labels_read'])}")
    steps = {
        "texts_unescaped": "texts with HTML entities unescaped",
        "duplicates_removed": "duplicates removed",
        "contradictory_rows_removed": "rows removed whose text has several labels",
        "rows_removed_to_balance": "rows removed to balance the labels",
    }
    for name, meaning in steps.items():
        if report[name] is not None:
            print(f"  {report[name]:,} {meaning}")
    for name, part in report["splits"].items():
        seen = f"; {part['duplicates_of_train']} are in train too" if part["duplicates_of_train"] else ""
        print(f"{folder}/{name}.jsonl: {part['rows']:,} rows, {in_words(part['labels'])}{seen}")


def in_words(labels: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {label}" for label, number in labels.items())


if __name__ == "__main__":
    run_main(main)
