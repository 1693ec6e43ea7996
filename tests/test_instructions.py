"""Instruction data: what is read, how it is split, and ids with labels worked out by hand and on real rows."""

import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from scratch_gpt2.data.instructions import (
    encode_conversation,
    encode_conversations,
    encode_prompt,
    read_instructions,
    show_mask,
    split,
)
from scratch_gpt2.tokenization import load_tokenizer

EOT = 50256
# "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PREAMBLE = [21106, 318, 281, 12064, 326, 8477, 257, 4876, 13, 19430, 257, 2882, 326, 20431, 32543, 262, 2581, 13]
INSTRUCTION, RESPONSE = [198, 198, 21017, 46486, 25, 198], [198, 198, 21017, 18261, 25, 198]
CAPITAL = [{"role": "user", "content": "Capital of Italy?"}, {"role": "assistant", "content": "Rome."}]
CAPITAL_PROMPT = [*PREAMBLE, *INSTRUCTION, 39315, 286, 8031, 30, *RESPONSE]
ROME = [49, 462, 13, EOT]
REAL_FILES = ["instruction-data.json", "alpaca_random_2000.json", "alpaca_cherry_5pct.json"]


@pytest.fixture
def write(tmp_path):
    def write_rows(rows, name="rows.json"):
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(json.dumps(row) for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_rows


# Reading


def test_the_three_forms(write):
    messages = [{"role": "system", "content": "Be brief."}, *CAPITAL]
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Say hi.", "output": "Hi."},
        {"prompt": "Say no.", "completion": "No."},
        {"messages": [message | {"name": "x"} for message in messages]},
    ]
    add, hi, no, chat = read_instructions(write(rows))
    assert add.messages == [
        {"role": "user", "content": "Add.\n\n### Input:\n1, 2"},
        {"role": "assistant", "content": "3"},
    ]
    assert (add.instruction, add.input, add.output) == ("Add.", "1, 2", "3")
    assert add.prompt == add.messages[:1]
    assert hi.prompt == [{"role": "user", "content": "Say hi."}] and hi.input == ""
    assert no.messages == [{"role": "user", "content": "Say no."}, {"role": "assistant", "content": "No."}]
    assert chat.messages == messages
    assert (chat.instruction, chat.output) == ("Capital of Italy?", "Rome.")


def test_the_forms_of_dolly_and_of_alpaca_with_history(write):
    rows = [
        {"instruction": "Who?", "context": "Rome fell.", "response": "Rome.", "category": "closed_qa"},
        {"instruction": "Why?", "context": "", "response": "Because."},
        {"instruction": "When?", "context": "In 476.", "output": "476."},
        {
            "instruction": "And?",
            "input": "",
            "output": "c",
            "system": "Be brief.",
            "history": [["a?", "a"], ["b?", "b"]],
        },
        {"instruction": "Zero?", "input": "0", "output": "0", "system": "", "history": []},
    ]
    who, why, when, after, zero = read_instructions(write(rows))
    assert who.messages == [
        {"role": "user", "content": "Who?\n\n### Input:\nRome fell."},
        {"role": "assistant", "content": "Rome."},
    ]
    assert (who.instruction, who.input, who.output) == ("Who?", "Rome fell.", "Rome.")
    assert (why.prompt, why.output) == ([{"role": "user", "content": "Why?"}], "Because.")
    assert when.prompt == [{"role": "user", "content": "When?\n\n### Input:\nIn 476."}]
    assert [message["content"] for message in after.messages] == ["Be brief.", "a?", "a", "b?", "b", "And?", "c"]
    assert [message["role"] for message in after.messages] == ["system", *["user", "assistant"] * 3]
    assert zero.prompt == [{"role": "user", "content": "Zero?\n\n### Input:\n0"}] and len(zero.messages) == 2


def test_no_column_beside_prompt_and_completion_is_dropped(write):
    rows = [
        {"prompt": "Who?", "completion": "Rome.", "context": "Rome fell."},
        {"prompt": "Who?", "completion": "Rome.", "input": "Rome fell.", "system_prompt": "Be brief."},
    ]
    first, second = read_instructions(write(rows))
    assert first.prompt == [{"role": "user", "content": "Who?\n\n### Input:\nRome fell."}]
    assert second.prompt == [{"role": "system", "content": "Be brief."}, *first.prompt]


def test_sharegpt(write):
    turns = [("human", "Capital of Italy?"), ("gpt", "Rome."), ("human", "Sure?"), ("gpt", "Yes.")]
    turns = [{"from": speaker, "value": text} for speaker, text in turns]
    rows = [
        {"id": "1", "conversations": turns},
        {"conversations": turns[:2], "system": "Be brief."},
        {"conversations": [{"from": "system", "value": "Be brief."}, *turns[:2]]},
        {"messages": None, "conversations": CAPITAL},  # a table has all columns in every row
    ]
    first, second, third, fourth = read_instructions(write(rows))
    assert [message["role"] for message in first.messages] == ["user", "assistant"] * 2
    assert first.messages[:2] == fourth.messages == CAPITAL
    assert (first.instruction, first.output) == ("Sure?", "Yes.")
    assert second.messages == third.messages == [{"role": "system", "content": "Be brief."}, *CAPITAL]


def test_instructions_in_tables(write, tmp_path):
    """An empty cell of a table of numbers or texts is nan, None or an empty text."""
    (tmp_path / "a.csv").write_text('instruction,input,output\n"Add, please.","1, 2",3\nSay hi.,,Hi.\n')
    table = pyarrow.table({"instruction": ["a", "b"], "input": [float("nan"), None], "output": ["c", "d"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    add, hi, a, b = read_instructions([str(tmp_path / "a.csv"), str(tmp_path / "a.parquet")])
    assert (add.instruction, add.input, add.output) == ("Add, please.", "1, 2", "3")
    assert [row.input for row in (hi, a, b)] == ["", "", ""]


def test_json_lines_several_files_and_max_rows(write):
    rows = [{"instruction": str(n), "output": "x"} for n in range(5)]
    files = [write(rows[:3]), write(rows[3:], "more.jsonl")]
    assert [row.instruction for row in read_instructions(files)] == ["0", "1", "2", "3", "4"]
    assert [row.instruction for row in read_instructions(files, max_rows=4)] == ["0", "1", "2", "3"]
    assert read_instructions(files)[4].origin == f"{files[1]}, line 2"


def test_rows_with_an_empty_answer_are_left_out(write, caplog):
    rows = [{"instruction": "a", "output": " \n"}, {"instruction": "b", "output": "x"}]
    assert [row.instruction for row in read_instructions(write(rows))] == ["b"]
    assert "Rows left out because their answer is empty: 1." in caplog.text


def chat(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "input": "b"}, "row 2 has no text in 'output'; its columns are instruction, input"),
        ({"instruction": "a", "output": None}, "row 2 has no text in 'output'"),
        ({"instruction": "a", "input": 3, "output": "b"}, "row 2 has no text in 'input'"),
        ({"instruction": "a", "input": 0, "output": "b"}, "row 2 has no text in 'input'"),
        ({"instruction": "a", "input": 0.0, "output": "b"}, "row 2 has no text in 'input'"),
        ({"instruction": "a", "input": False, "output": "b"}, "row 2 has no text in 'input'"),
        ({"instruction": "a", "context": 0, "response": "b"}, "row 2 has no text in 'context'"),
        ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "row 2 has both an input and a context"),
        (
            {"instruction": "a", "output": "b", "history": "c"},
            "row 2: history must be a list of pairs of question and",
        ),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "row 2: history must be a list of pairs"),
        ({"instruction": "a", "output": "b", "history": [["c", 1]]}, "row 2 has a message of the assistant whose con"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "row 2 has a message of the unknown role 'robot'"),
        ({"conversations": [{"from": ["x"], "value": "a"}]}, "row 2 has a message of the unknown role"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "row 2: the conversation ends with the user"),
        ({"conversations": "a"}, "row 2: conversations must be a list of objects"),
        ({"prompt": "a"}, "row 2 has no text in 'completion'"),
        ({"text": "a"}, "row 2 has no text in 'prompt'; its columns are text. Use instruction, input and output"),
        ("a", "row 2 is not a JSON object"),
        (chat("user", "robot"), "row 2 has a message of the unknown role 'robot'; use system, user, assistant"),
        (chat("user", "assistant", "user"), "row 2: the conversation ends with the user; its last message must be"),
        (chat(), "row 2: the conversation is empty"),
        (chat("assistant"), "row 2: the conversation has no message of the user"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "row 2 has a message of the user whose content is not"),
        ({"messages": "x"}, "row 2: messages must be a list of objects"),
        ({"instruction": "a\ud800", "output": "b"}, "row 2: .*half of a surrogate pair"),
    ],
)
def test_bad_rows(write, row, message):
    with pytest.raises(ValueError, match=message):
        read_instructions(write([{"instruction": "a", "output": "b"}, row]))


def test_bad_files(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.json does not exist; give an existing file"):
        read_instructions(str(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match="is not a JSON list of rows"):
        read_instructions(write({"rows": []}))
    with pytest.raises(ValueError, match="no instruction with an answer"):
        read_instructions(write([]))
    (tmp_path / "lines.json").write_text('{"instruction": "a"}\n{"instruction": "b"}\n')
    with pytest.raises(ValueError, match=r"line 2 is not JSON: Extra data; JSON lines need the suffix \.jsonl"):
        read_instructions(str(tmp_path / "lines.json"))
    (tmp_path / "rows.docx").write_text("a,b\n")
    with pytest.raises(ValueError, match="max_rows is -1 but must be at least 1"):
        read_instructions(write([{"instruction": "a", "output": "b"}]), max_rows=-1)
    with pytest.raises(ValueError, match=r"rows\.docx has an unsupported file type; use one of \.json, \.jsonl,"):
        read_instructions(str(tmp_path / "rows.docx"))


def test_the_hub_without_network():
    with pytest.raises(ConnectionError, match=r"'tatsu-lab/alpaca' could not be downloaded .* or give a local file"):
        read_instructions("tatsu-lab/alpaca")


# Splitting


def test_split_is_seeded_and_keeps_equal_prompts_together(shared_data):
    rows = read_instructions(str(shared_data / "instruction-data.json"))
    parts = split(rows, seed=1)
    assert [len(part) for part in parts] == [935, 55, 110]  # 85, 5 and 10 % of 1,100
    assert Counter(row.origin for part in parts for row in part) == Counter(row.origin for row in rows)
    assert split(rows, seed=1) == parts and split(rows, seed=2) != parts
    train, validation, test = ({json.dumps(row.prompt) for row in part} for part in parts)
    assert not (train & validation or train & test or validation & test)
    assert len(train | validation | test) == 1075  # 25 of the 1,100 rows repeat a prompt


def test_one_prompt_in_two_unicode_normalizations_stays_together(write):
    prompts = [f"caf\u00e9 {n}" for n in range(10)] + [f"cafe\u0301 {n}" for n in range(10)]
    rows = read_instructions(write([{"instruction": prompt, "output": "x"} for prompt in prompts]))
    parts = split(rows, 0, (0.5, 0.25, 0.25))
    numbers = [{row.instruction[-1] for row in part} for part in parts]
    assert [len(part) for part in parts] == [10, 6, 4]
    assert [len(part) for part in numbers] == [5, 3, 2]


def test_split_sizes_by_hand(write):
    rows = read_instructions(write([{"instruction": str(n // 2), "output": str(n)} for n in range(10)]))
    assert [len(part) for part in split(rows, 0, (0.6, 0.2, 0.2))] == [6, 2, 2]
    assert [len(part) for part in split(rows, 0, (0.7, 0.3, 0.0))] == [8, 2, 0]
    with pytest.raises(ValueError, match="10 rows are too few"):
        split(rows, 0, (0.98, 0.01, 0.01))
    with pytest.raises(ValueError, match="must sum to 1"):
        split(rows, 0, (0.9, 0.05, 0.1))
    with pytest.raises(ValueError, match="none may be negative"):
        split(rows, 0, (-0.4, 0.9, 0.5))


# Encoding


def test_ids_and_labels(gpt2_tokenizer):
    encoded = encode_conversation(gpt2_tokenizer, CAPITAL, max_length=100)
    assert encoded["input_ids"] == CAPITAL_PROMPT + ROME
    assert encoded["labels"] == [-100] * 34 + ROME
    assert encode_prompt(gpt2_tokenizer, CAPITAL[:1]) == CAPITAL_PROMPT


def test_every_answer_of_a_conversation_is_learned(gpt2_tokenizer):
    messages = [*CAPITAL, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    encoded = encode_conversation(gpt2_tokenizer, messages, max_length=100)
    question, answer = [*INSTRUCTION, 19457, 30, *RESPONSE], [5297, 13, EOT]
    assert encoded["input_ids"] == CAPITAL_PROMPT + ROME + question + answer
    assert encoded["labels"] == [-100] * 34 + ROME + [-100] * 14 + answer


def test_training_on_the_prompt_too(gpt2_tokenizer):
    encoded = encode_conversation(gpt2_tokenizer, CAPITAL, max_length=36, train_on_prompt=True)
    assert encoded["labels"] == encoded["input_ids"] == CAPITAL_PROMPT + ROME[:2]


def test_truncated_answers(gpt2_tokenizer, write):
    """The prompt has 34 tokens: at 35 one token of the answer is left, at 34 none."""
    rows = [{"messages": CAPITAL}, {"prompt": "Capital of the Italian Republic?", "completion": "Rome."}]
    conversations = read_instructions(write(rows))
    examples, dropped = encode_conversations(gpt2_tokenizer, conversations, max_length=35)
    assert dropped == 1
    assert [example["labels"] for example in examples] == [[-100] * 34 + [49]]
    with pytest.raises(ValueError, match="No answer begins within max_length 34"):
        encode_conversations(gpt2_tokenizer, conversations, max_length=34)


@pytest.mark.parametrize("name", REAL_FILES)
def test_real_rows(name, shared_data, gpt2_tokenizer):
    """The ids of every answer are those of the answer alone, after the ids that the model will be asked with."""
    for row in read_instructions(str(shared_data / name)):
        encoded = encode_conversation(gpt2_tokenizer, row.messages, max_length=10_000)
        prompt = encode_prompt(gpt2_tokenizer, row.prompt)
        answer = [*gpt2_tokenizer.encode(row.output.strip()), EOT]
        assert encoded["input_ids"] == prompt + answer, row.origin
        assert encoded["labels"] == [-100] * len(prompt) + answer, row.origin


def test_end_of_text_in_a_row(gpt2_tokenizer, write):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b<|endoftext|>c"}]
    with pytest.raises(ValueError, match=r"row 2: A chat message must not contain <\|endoftext\|>"):
        encode_conversations(gpt2_tokenizer, read_instructions(write(rows)), max_length=100)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "row 1: The chat template does not mark the answers"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "row 1: The chat template does not fit: the ids of the prompt",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
            "{% else %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}",
            "row 1: The chat template does not fit: the ids of the prompt",
        ),
    ],
    ids=["no_markers", "prompt_marked", "no_prefix"],
)
def test_a_template_that_does_not_fit(template, message, tiny_tokenizer, tmp_path, write):
    tiny_tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        encode_conversations(tokenizer, read_instructions(write([{"messages": CAPITAL}])), max_length=100)


def test_the_coloured_mask(gpt2_tokenizer):
    example = encode_conversation(gpt2_tokenizer, CAPITAL, max_length=100)
    shown = show_mask(gpt2_tokenizer, example, colors=True)
    assert shown.startswith("\033[90mBelow is an instruction")
    assert shown.endswith("### Response:\n\033[0m\033[32mRome.<|endoftext|>\033[0m")
    shown = show_mask(gpt2_tokenizer, example, colors=False)
    assert "\033" not in shown and shown.endswith("### Response:\n>>>Rome.<|endoftext|><<<")
