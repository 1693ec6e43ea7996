"""Labeled text, from files of all kinds to a folder with three splits."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from example_scripts import run_in_process

from scratch_gpt2.data.text_classification import (
    balance,
    class_weights,
    describe,
    likeness,
    load_prepared,
    prepare,
    read_labelled_hub,
    read_labelled_text,
    remove_duplicates,
    save_prepared,
    split,
    unescape,
)

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "prepare_classification.py"
run_example = partial(run_in_process, EXAMPLE)
ROWS = [
    {"text": 'He said "hi, you"', "label": "ham"},
    {"text": '"Win £5 &amp; more', "label": "spam"},
    {"text": " a\u0085b\u2028c\rd ", "label": "ham"},
]


def make_rows(**numbers):
    """The given number of different texts of each label, labels alternating while they last."""
    rows = [{"text": f"{label} {i}", "label": label} for label, number in numbers.items() for i in range(number)]
    return sorted(rows, key=lambda row: int(row["text"].split()[1]))


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    files = {
        "bare.tsv": "".join(f"{row['label']}\t{row['text']}\n" for row in ROWS),
        "SMSSpamCollection": "".join(f"{row['label']}\t{row['text']}\r\n" for row in ROWS),
        "header.tsv": "text\tn\tlabel\n" + "".join(f"{row['text']}\t7\t{row['label']}\n" for row in ROWS),
        "bom.tsv": "\ufefflabel\ttext\n\n" + "".join(f"{row['label']}\t{row['text']}\n" for row in ROWS),
        "rows.jsonl": "\n".join(json.dumps({"n": 1} | row, ensure_ascii=False) for row in ROWS),
        "rows.csv": 'text,label\r\n"He said ""hi, you""",ham\r\n"""Win £5 &amp; more",spam\r\n'
        '" a\u0085b\u2028c\rd ",ham\r\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
        assert read_labelled_text(tmp_path / name) == ROWS, name
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert read_labelled_text(tmp_path / "rows.parquet") == ROWS


def test_columns_of_other_names_and_labels_that_are_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("stars,review,text\n5,good,x\n1,bad,y\n")
    (tmp_path / "a.jsonl").write_text('{"stars": 5, "review": "good"}\n{"stars": 1, "review": "bad\\n"}\n')
    (tmp_path / "a.tsv").write_text("stars\treview\n5\tgood\n1\tbad\n")
    expected = [{"text": "good", "label": "5"}, {"text": "bad", "label": "1"}]
    for name in ("a.csv", "a.jsonl", "a.tsv"):
        assert read_labelled_text(tmp_path / name, "review", "stars") == expected


def test_a_tab_in_the_last_column_belongs_to_it(tmp_path):
    (tmp_path / "a.tsv").write_text("ham\tone\ttwo\n")
    assert read_labelled_text(tmp_path / "a.tsv") == [{"text": "one\ttwo", "label": "ham"}]


def test_the_hub_names_its_labels(tmp_path, monkeypatch):
    """The columns of ucirvine/sms_spam, whose texts end in a line break."""
    features = datasets.Features(
        {"sms": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam"])}
    )
    data = datasets.Dataset.from_dict({"sms": ["Ok lar\n", "Win\n"], "label": [0, 1]}, features)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or data)
    assert read_labelled_hub("ucirvine/sms_spam", "plain_text", text_column="sms") == [
        {"text": "Ok lar", "label": "ham"},
        {"text": "Win", "label": "spam"},
    ]
    assert asked == [(("ucirvine/sms_spam", "plain_text"), {"split": "train"})]
    with pytest.raises(
        ValueError, match=r"ucirvine/sms_spam, row 1 has no column 'text'; its columns are 'sms', 'label'"
    ):
        read_labelled_hub("ucirvine/sms_spam")
    data = datasets.Dataset.from_dict({"sms": ["Ok"], "label": [-1]}, features)
    with pytest.raises(ValueError, match="row 1 has no label in column 'label'"):
        read_labelled_hub("ucirvine/sms_spam", text_column="sms")


def test_a_data_set_that_cannot_be_downloaded():
    with pytest.raises(ConnectionError, match=r"'no/such' could not be downloaded .* or give a local file instead\.$"):
        read_labelled_hub("no/such")


def test_unescape():
    rows = [{"text": text, "label": "ham"} for text in ("I &lt;#&gt; &amp; u", "plain & simple", "&pound;5")]
    unescaped, number = unescape(rows)
    assert [row["text"] for row in unescaped] == ["I <#> & u", "plain & simple", "£5"]
    assert number == 2
    assert rows[0]["text"] == "I &lt;#&gt; &amp; u"


def test_duplicates_are_removed_and_contradictory_texts_altogether():
    rows = [
        {"text": text, "label": label}
        for text, label in [("a", "ham"), ("b", "spam"), ("a", "ham"), ("c", "ham"), ("c", "spam"), ("c", "ham")]
    ]
    rows.append({"text": "A", "label": "spam"})
    kept, duplicates, contradictory = remove_duplicates(rows)
    assert [row["text"] for row in kept] == ["a", "b", "A"]
    assert (duplicates, contradictory) == (1, 3)
    assert kept[0] is rows[0]


def test_one_text_in_two_unicode_normalizations_is_a_duplicate():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    rows = [{"text": composed, "label": "ham"}, {"text": decomposed, "label": "ham"}, {"text": "cafe", "label": "ham"}]
    kept, duplicates, contradictory = remove_duplicates(rows)
    assert ([row["text"] for row in kept], duplicates, contradictory) == ([composed, "cafe"], 1, 0)
    rows[1]["label"] = "spam"
    assert remove_duplicates(rows) == ([rows[2]], 0, 2)
    assert likeness(composed) == likeness(decomposed)
    test = describe([{"text": decomposed, "label": "ham"}], train=[{"text": composed, "label": "ham"}])
    assert (test["duplicates_of_train"], test["near_duplicates_of_train"]) == (1, 1)


SEVERAL = "a label must be one class, not a list, a one-hot vector or an object."
NO_LABEL = "FILE, line 1 has no label in column 'label'; label or remove the row."
BAD_LABELS = {  # the last list as a CSV file holds it
    '["news", "sport"]': f"FILE, line 1 has \"['news', 'sport']\" in column 'label'; {SEVERAL}",
    "[0, 1, 0]": f"FILE, line 1 has '[0, 1, 0]' in column 'label'; {SEVERAL}",
    '{"news": 1}': f"FILE, line 1 has \"{{'news': 1}}\" in column 'label'; {SEVERAL}",
    "\"['news', 'sport']\"": f"FILE, line 1 has \"['news', 'sport']\" in column 'label'; {SEVERAL}",
    '"[0, 1]"': f"FILE, line 1 has '[0, 1]' in column 'label'; {SEVERAL}",
    '"[0 1 0]"': f"FILE, line 1 has '[0 1 0]' in column 'label'; {SEVERAL}",  # NumPy's spelling
    '"[0. 1.]"': f"FILE, line 1 has '[0. 1.]' in column 'label'; {SEVERAL}",
    '"[true, false]"': f"FILE, line 1 has '[true, false]' in column 'label'; {SEVERAL}",
    "NaN": NO_LABEL,
    "null": NO_LABEL,
    '"nan"': NO_LABEL,
}


@pytest.mark.parametrize("label", BAD_LABELS)
def test_labels_that_are_not_one_class(tmp_path, label):
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "a", "label": {label}}}')
    with pytest.raises(ValueError) as error:
        read_labelled_text(file)
    assert str(error.value) == BAD_LABELS[label].replace("FILE", str(file))


def test_labels_that_are_one_class(tmp_path):
    labels = [5, 5.0, 4.5, True, "[sic]", "{", " ham ", "None"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels))
    assert [row["label"] for row in read_labelled_text(file)] == ["5", "5", "4.5", "True", "[sic]", "{", "ham", "None"]


@pytest.mark.parametrize(
    "order",
    [["-1", "0", "2", "10", "11"], ["class 2", "class 10", "class 10 b"], ["ham", "spam"], ["1.5", "2", "b", "c"]],
)
def test_classes_are_in_natural_order(order):
    rows = [{"text": f"{label} {i}", "label": label} for label in reversed(order) for i in range(3)]
    prepared = prepare(rows, "somewhere")
    assert prepared.label_names == order == list(prepared.report["labels_read"])


def test_balance_draws_as_many_of_each_in_their_original_order():
    rows = make_rows(ham=50, spam=5, other=9)
    balanced = balance(rows, seed=1)
    assert Counter(row["label"] for row in balanced) == {"ham": 5, "spam": 5, "other": 5}
    assert [row for row in rows if row in balanced] == balanced
    assert balance(rows, seed=1) == balanced != balance(rows, seed=2)


def test_split_is_stratified_and_loses_nothing():
    rows = make_rows(ham=100, spam=20, rare=3)
    splits = split(rows, seed=1)
    assert list(splits) == ["train", "validation", "test"]
    assert Counter(row["label"] for row in splits["train"]) == {"ham": 70, "spam": 14, "rare": 1}
    assert Counter(row["label"] for row in splits["validation"]) == {"ham": 10, "spam": 2, "rare": 1}
    assert Counter(row["label"] for row in splits["test"]) == {"ham": 20, "spam": 4, "rare": 1}
    texts = [row["text"] for part in splits.values() for row in part]
    assert sorted(texts) == sorted(row["text"] for row in rows)
    assert split(rows, seed=1) == splits != split(rows, seed=2)
    assert len(split(rows, 1, (0.5, 0.25, 0.25))["train"]) == 50 + 10 + 1
    for fractions in ((0.1, 0.8, 0.1), (0.1, 0.1, 0.8)):
        assert all(Counter(row["label"] for row in part)["rare"] == 1 for part in split(rows, 1, fractions).values())


def test_class_weights():
    assert class_weights(["ham"] * 6 + ["spam"] * 2) == pytest.approx([8 / (2 * 6), 8 / (2 * 2)])
    assert class_weights([2, 0, 1, 0]) == pytest.approx([4 / 6, 4 / 3, 4 / 3])


@pytest.mark.parametrize(
    ("numbers", "fractions", "message"),
    [
        ({"ham": 9}, (0.7, 0.1, 0.2), "All rows have the label 'ham'; a classifier needs at least two."),
        ({"ham": 9, "spam": 2}, (0.7, 0.1, 0.2), "The label 'spam' has only 2 of 11 rows, but train, validation and"),
        ({"ham": 9, "spam": 9}, (0.7, 0.1, 0.1), r"The fractions \(0.7, 0.1, 0.1\) must be three positive numbers"),
        ({"ham": 9, "spam": 9}, (0.8, 0.0, 0.2), "must be three positive numbers that sum to 1"),
        ({"ham": 9, "spam": 9}, (0.8, 0.2), "must be three positive numbers that sum to 1"),
    ],
)
def test_rows_that_cannot_be_split(numbers, fractions, message):
    with pytest.raises(ValueError, match=message):
        split(make_rows(**numbers), 0, fractions)


BAD_FILES = {
    "empty.tsv": (b"", "FILE has no rows; give a file with labeled text."),
    "word.docx": (b"x", "FILE has an unsupported file type; use one of .json, .jsonl, .csv, .tsv, .parquet."),
    "latin.tsv": (b"ham\tcaf\xe9\n", "FILE is not UTF-8 (byte 0xe9); convert it, e.g. with iconv."),
    "latin.csv": (b"label,text\nham,caf\xe9\n", "FILE is not UTF-8 (byte 0xe9); convert it, e.g. with iconv."),
    "blank.tsv": (b"ham\tone\nspam\t  \n", "FILE, line 2 has an empty text; remove the row."),
    "short.tsv": (b"ham\tone\nspam\n", "FILE, line 2 has no column 'text'; its columns are 'label'."),
    "other.csv": (
        b"v1,v2\nham,one\n",
        "FILE, line 2 has no column 'text' and no 'label'; its columns are 'v1', 'v2'.",
    ),
    "short.csv": (b"text,label\none\n", "FILE, line 2 has no label in column 'label'; label or remove the row."),
    "quote.csv": (b'text,label\n"one,ham\ntwo,ham\n', "FILE, line 2 is not CSV: unexpected end of data."),
    "null.jsonl": (b'{"text": null, "label": 1}', "FILE, line 1 has an empty text; remove the row."),
    "number.jsonl": (b'\n{"text": 7, "label": 1}', "FILE, line 2 has 7 in column 'text', which is not text."),
    "blank.jsonl": (b'{"text": "a", "label": " "}', "FILE, line 1 has no label in column 'label'; label or remove"),
    "half.jsonl": (b'{"text": "\\ud83d", "label": 1}', "FILE, line 1: The text is not valid Unicode"),
    "broken.jsonl": (b'{"text": ', "FILE, line 1 is not JSON: Expecting value."),
    "damaged.parquet": (b"PAR1 not", "FILE is not a Parquet file or is damaged: "),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_in_one_sentence(tmp_path, name):
    content, message = BAD_FILES[name]
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_labelled_text(file)
    assert str(error.value).startswith(message.replace("FILE", str(file)))
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_misspelt_column(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.tsv is not a file; give labeled text as \.tsv"):
        read_labelled_text(tmp_path / "absent.tsv")
    (tmp_path / "a.tsv").write_text("label\ttext\nham\tone\n")
    with pytest.raises(ValueError, match="line 2 has no column 'txt'; its columns are 'label', 'text'"):
        read_labelled_text(tmp_path / "a.tsv", "txt")


def test_a_header_that_was_taken_for_a_row_is_detected(tmp_path):
    rows = "".join(f"{row['label']}\t{row['text']}\n" for row in make_rows(ham=5, spam=5))
    (tmp_path / "a.tsv").write_text("class\tmessage\n" + rows)
    with pytest.raises(ValueError, match=r"'class' has only 1 of 11 rows.*\(a header that the columns were not named"):
        prepare(read_labelled_text(tmp_path / "a.tsv"), "somewhere")
    assert len(read_labelled_text(tmp_path / "a.tsv", "message", "class")) == 10


def test_prepare_reports_each_step():
    rows = make_rows(ham=20, spam=10)
    rows += [{"text": "ham&#32;0", "label": "ham"}, {"text": "x", "label": "ham"}, {"text": "x", "label": "spam"}]
    prepared = prepare(rows, "somewhere", 3, unescape_entities=True, balance_labels=True)
    report = prepared.report
    assert list(report) == [
        *("source", "rows_read", "labels_read", "texts_unescaped", "duplicates_removed", "contradictory_rows_removed"),
        *("rows_removed_to_balance", "seed", "fractions", "label_names", "splits"),
    ]
    assert list(report.values())[:-1] == [
        *("somewhere", 33, {"ham": 22, "spam": 11}, 1, 1, 2, 10, 3, [0.7, 0.1, 0.2], ["ham", "spam"])
    ]
    assert {name: part["labels"] for name, part in report["splits"].items()} == {
        "train": {"ham": 7, "spam": 7},
        "validation": {"ham": 1, "spam": 1},
        "test": {"ham": 2, "spam": 2},
    }
    assert prepared.label_names == ["ham", "spam"]
    # All texts of a label are alike except for the number.
    near = [part["near_duplicates_of_train"] for part in report["splits"].values()]
    assert near == [0, 2, 4]


def test_near_duplicates_differ_only_in_case_spaces_and_digits():
    assert likeness("Call  0800 12 now") == likeness(" CALL 09 7 NOW\n") == "call 0 0 now"
    assert likeness("Call 0800 now") != likeness("Call now") != likeness("Call cow")


def test_steps_that_were_not_asked_for():
    rows = [{"text": "&amp;", "label": label} for label in ("ham", "spam") for _ in range(10)]
    prepared = prepare(rows, "somewhere", keep_duplicates=True)
    steps = ("texts_unescaped", "duplicates_removed", "contradictory_rows_removed", "rows_removed_to_balance")
    assert [prepared.report[step] for step in steps] == [None] * 4
    assert sum(len(part) for part in prepared.splits.values()) == 20
    assert [part["duplicates_of_train"] for part in prepared.report["splits"].values()] == [0, 2, 4]


def test_a_folder_is_read_as_it_was_written(tmp_path):
    prepared = prepare(ROWS * 5, "somewhere", keep_duplicates=True)
    save_prepared(prepared, tmp_path / "deep" / "data")
    assert load_prepared(tmp_path / "deep" / "data") == prepared
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["data"]
    names = sorted(path.name for path in (tmp_path / "deep" / "data").iterdir())
    assert names == ["report.json", "test.jsonl", "train.jsonl", "validation.jsonl"]
    with pytest.raises(FileExistsError, match="data exists already; delete it or choose another folder"):
        save_prepared(prepared, tmp_path / "deep" / "data")


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        save_prepared(prepare(ROWS * 5, "somewhere", keep_duplicates=True), tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_damaged_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data has no report\.json; make the folder with examples/prepare_cl"):
        load_prepared(tmp_path / "data")
    damages = {
        "report.json": (b"{", "JSON|Expecting"),
        "test.jsonl": (b'{"text": "b", "label": "ham"}\n', r"test\.jsonl was changed"),
        "train.jsonl": (None, "No such file"),
    }
    for number, (name, (content, reason)) in enumerate(damages.items()):
        folder = tmp_path / str(number)
        save_prepared(prepare(ROWS * 5, "somewhere", keep_duplicates=True), folder)
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{folder} is damaged \(.*({reason}).*\); make it again with") as error:
            load_prepared(folder)
        assert "\n" not in str(error.value)
    (folder / "report.json").write_text("[]")
    with pytest.raises(ValueError, match="is damaged"):
        load_prepared(folder)


def test_the_sms_collection(shared_data, tmp_path, monkeypatch, capsys):
    """Numbers of shared/data/README.md; of the 5,171 different messages, 653 are spam."""
    file, folder = shared_data / "sms_spam_collection.tsv", tmp_path / "sms"
    rows = read_labelled_text(file)
    assert Counter(row["label"] for row in rows) == {"ham": 4827, "spam": 747}
    assert "".join(f"{row['label']}\t{row['text']}\n" for row in rows).encode() == file.read_bytes()
    code, printed, errors = run_example(monkeypatch, capsys, "--input", file, "--output", folder, "--unescape")
    assert code == 0, errors
    assert printed.split("\n") == [
        f"{file}: 5,574 rows, 4,827 ham, 747 spam",
        "  309 texts with HTML entities unescaped",
        "  403 duplicates removed",
        "  0 rows removed whose text has several labels",
        f"{folder}/train.jsonl: 3,619 rows, 3,162 ham, 457 spam",
        f"{folder}/validation.jsonl: 517 rows, 452 ham, 65 spam",
        f"{folder}/test.jsonl: 1,035 rows, 904 ham, 131 spam",
        "Positive class: spam",
        "",
    ]
    prepared = load_prepared(folder)
    texts = [row["text"] for part in prepared.splits.values() for row in part]
    assert len(texts) == len(set(texts)) == 5171
    assert not any("&lt;" in text for text in texts)


def test_the_setting_of_the_tutorials(shared_data, tmp_path, monkeypatch, capsys):
    """747 messages of each kind; with duplicates, some test messages are training messages as well."""
    file, folder = shared_data / "sms_spam_collection.tsv", tmp_path / "sms"
    options = ("--input", file, "--output", folder, "--balance", "--keep_duplicates")
    code, printed, errors = run_example(monkeypatch, capsys, *options)
    assert code == 0, errors
    assert "  4,080 rows removed to balance the labels\n" in printed
    prepared = load_prepared(folder)
    assert [len(part) for part in prepared.splits.values()] == [1046, 150, 298]
    assert [Counter(row["label"] for row in part)["spam"] for part in prepared.splits.values()] == [523, 75, 149]
    train = {row["text"] for row in prepared.splits["train"]}
    leaked = sum(row["text"] in train for row in prepared.splits["test"])
    assert leaked == prepared.report["splits"]["test"]["duplicates_of_train"] > 20
    assert f"{folder}/test.jsonl: 298 rows, 149 ham, 149 spam; {leaked} are in train too\n" in printed


def test_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
    """Neither the input nor a finished result, also where the output is given with a ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "a.tsv"
    file.write_text("".join(f"{row['label']}\t{row['text']}\n" for row in make_rows(ham=5, spam=5)))
    assert run_example(monkeypatch, capsys, "--input=~/a.tsv", "--output=~/out")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv", "out"]
    source = load_prepared(tmp_path / "out").report["source"]
    assert (source["kind"], [described["name"] for described in source["files"]]) == ("files", ["a.tsv"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for output in (file, tmp_path / "out"):
        code, _, errors = run_example(monkeypatch, capsys, "--input", file, "--output", output)
        assert code == 1 and "exists already; delete it or choose another folder." in errors
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_options_from_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.tsv").write_text("".join(f"{row['label']}\t{row['text']}\n" for row in make_rows(ham=5, spam=5)))
    (tmp_path / "options.yaml").write_text(f"input: {tmp_path}/a.tsv\noutput: {tmp_path}/out\nseed: 3\n")
    code, printed, errors = run_example(monkeypatch, capsys, tmp_path / "options.yaml", "--seed", "4")
    assert code == 0, errors
    assert "10 rows, 5 ham, 5 spam\n" in printed and "Positive class: spam\n" in printed
    assert load_prepared(tmp_path / "out").report["seed"] == 4


def test_example_ends_with_one_line_on_mistakes(tmp_path, monkeypatch, capsys):
    good, output = tmp_path / "good.tsv", tmp_path / "out"
    good.write_text("".join(f"{row['label']}\t{row['text']}\n" for row in make_rows(ham=5, spam=5)))
    (tmp_path / "one.tsv").write_text("ham\ta\nham\tb\n")
    for options, message in (
        ((), "Say where the text is: either --input with a file or --hub with a data set."),
        (("--input", good, "--hub", "x/y"), "Say where the text is"),
        (("--input", tmp_path / "one.tsv"), "All rows have the label 'ham'"),
        (("--input", good, "--label_column", "class"), "line 2 has no column 'text' and no 'class'; its columns"),
        (("--input", good, "--output", tmp_path), "exists already; delete it or choose another folder."),
        (("--hub", "no/such"), "could not be downloaded from the Hugging Face Hub"),
    ):
        code, printed, errors = run_example(monkeypatch, capsys, "--output", output, *options)
        assert (code, printed) == (1, "")
        assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.tsv", "one.tsv"]
