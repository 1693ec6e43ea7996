"""Turn labeled text into the training, validation and test data of examples/classify.py.

    python examples/prepare_classification.py --input SMSSpamCollection --output data/sms --unescape
    python examples/prepare_classification.py --input reviews.csv --text_column review --label_column stars \\
        --output data/reviews
    python examples/prepare_classification.py --hub ucirvine/sms_spam --text_column sms --output data/sms

Duplicates are removed before splitting, because a text in both the training and the test data makes a model look
better than it is. Many tutorials on the SMS data use equally many messages of each class, with duplicates:

    python examples/prepare_classification.py --input SMSSpamCollection --output data/sms-balanced \\
        --balance --keep_duplicates

OUTPUT contains train.jsonl, validation.jsonl and test.jsonl, with lines {"text": ..., "label": ...}, and report.json.
Every text has one label; lists of labels are rejected. Labels are numbered in natural order (ham, spam; 2, 10). Of two
labels, the rarer one is the positive class of precision, recall and F1.
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

from dataclasses import dataclass, field

from scratch_gpt2.cli import parse_arguments, run_main
from scratch_gpt2.data.rows import describe_files, describe_hub
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
    output: str = field(metadata={"help": "Folder to create."})
    input: str | None = field(
        default=None,
        metadata={
            "help": "File: .jsonl, .json, .parquet, .csv with a header, .tsv with one or as label<TAB>text; also as "
            ".gz, .bz2, .xz or .zst."
        },
    )
    hub: str | None = field(default=None, metadata={"help": "Data set on the Hugging Face Hub."})
    hub_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    hub_split: str = field(default="train", metadata={"help": "Its split."})
    text_column: str = field(default=TEXT_COLUMN, metadata={"help": "Column with the text."})
    label_column: str = field(default=LABEL_COLUMN, metadata={"help": "Column with the label."})
    unescape: bool = field(default=False, metadata={"help": "Turn HTML entities such as &lt; into characters."})
    keep_duplicates: bool = field(
        default=False, metadata={"help": "Keep equal texts, so that test data may repeat training data."}
    )
    balance: bool = field(
        default=False, metadata={"help": "Draw as many rows of each label as the rarest label has; drop the others."}
    )
    fractions: list[float] = field(
        default_factory=lambda: list(FRACTIONS), metadata={"help": "Fractions of training, validation and test data."}
    )
    seed: int = field(default=0, metadata={"help": "Seed for drawing rows."})


def main() -> None:
    (args,) = parse_arguments(Arguments, description=__doc__)
    if bool(args.input) == bool(args.hub):
        raise ValueError("Say where the text is: either --input with a file or --hub with a data set.")
    check_new(args.output)
    if args.hub:
        rows = read_labelled_hub(args.hub, args.hub_config, args.hub_split, args.text_column, args.label_column)
        source = describe_hub(args.hub, args.hub_config, args.hub_split)
    else:
        rows = read_labelled_text(args.input, args.text_column, args.label_column)
        source = describe_files([args.input])
    prepared = prepare(
        rows,
        source,
        seed=args.seed,
        fractions=tuple(args.fractions),
        unescape_entities=args.unescape,
        keep_duplicates=args.keep_duplicates,
        balance_labels=args.balance,
    )
    save_prepared(prepared, args.output)
    print_report(prepared.report, args.input or args.hub, args.output)


def print_report(report: dict, origin: str, folder: str) -> None:
    print(f"{origin}: {report['rows_read']:,} rows, {in_words(report['labels_read'])}")
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
    if len(report["label_names"]) == 2:
        print(f"Positive class: {report['label_names'][1]}")


def in_words(labels: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {label}" for label, number in labels.items())


if __name__ == "__main__":
    run_main(main)
