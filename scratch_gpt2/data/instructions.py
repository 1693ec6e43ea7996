"""Instructions and their answers: read, split, and encoded by the tokenizer's chat template.

A row of data has one of three forms:

    {"instruction": ..., "input": ..., "output": ...}        Alpaca's; the input may be missing or empty
    {"prompt": ..., "completion": ...}
    {"messages": [{"role": ..., "content": ...}, ...]}       roles user and assistant, a first message may be system

The ids of a whole conversation and the labels on them come from one call of the chat template, and the ids that a
model answers to are their first ones: what is trained is what is later asked.
"""

import json
import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from ..linear_cross_entropy import IGNORE_INDEX
from ..tokenization import check_text
from .text_sources import json_row, reading_utf8

ROLES = ("system", "user", "assistant")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversation:
    """`messages` end with the assistant's answer. `instruction`, `input` and `output` are the fields of the row, for
    reports; without such fields, the last question and answer. `origin` names the row in errors."""

    messages: list[dict[str, str]]
    instruction: str
    input: str
    output: str
    origin: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The messages before the last answer, as `encode_prompt` takes them."""
        return self.messages[:-1]


def read_instructions(source: str | list[str], max_rows: int | None = None) -> list[Conversation]:
    """The first `max_rows` rows of .json and .jsonl files, or of the train split of a data set on the Hub.

    Rows whose answer is empty teach nothing; they are left out, and a warning says how many.

    Raises FileNotFoundError for a missing file, ConnectionError where the Hub cannot be reached, and ValueError,
    with the number of the row, for a row that is no conversation ending with an answer.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows is {max_rows} but must be at least 1.")
    conversations: list[Conversation] = []
    empty = 0
    for name in [source] if isinstance(source, str) else source:
        for row, origin in read_rows(name):
            if max_rows is not None and len(conversations) == max_rows:
                break
            conversation = as_conversation(row, origin)
            if conversation.output.strip():
                conversations.append(conversation)
            else:
                empty += 1
    if empty:
        logger.warning("%d rows were left out, because their answer is empty.", empty)
    if not conversations:
        raise ValueError(f"There is no instruction with an answer in {source}.")
    return conversations


def read_rows(name: str) -> Iterator[tuple[dict, str]]:
    """The rows of one file or data set, each with what an error calls it."""
    if Path(name).suffix in (".json", ".jsonl") and not Path(name).is_file():
        raise FileNotFoundError(f"{name} does not exist; give an existing file, or a data set of the Hub.")
    if Path(name).suffix == ".jsonl":
        with open(name, encoding="utf-8-sig") as lines, reading_utf8(name):
            for number, line in enumerate(lines, start=1):
                origin = f"{name}, line {number}"
                if row := json_row(line, origin):
                    yield row, origin
    elif Path(name).suffix == ".json":
        for number, row in enumerate(read_json(name), start=1):
            if not isinstance(row, dict):
                raise ValueError(f"{name}, row {number} is not a JSON object.")
            yield row, f"{name}, row {number}"
    elif Path(name).exists():
        raise ValueError(f"{name} is of an unknown kind; use .json or .jsonl, or a data set of the Hub.")
    else:
        for number, row in enumerate(hub_rows(name), start=1):
            yield row, f"{name}, row {number}"


def read_json(file: str) -> list:
    with open(file, encoding="utf-8-sig") as opened, reading_utf8(file):
        text = opened.read()
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}, line {error.lineno} is not JSON: {error.msg}; JSON lines need the ending .jsonl."
        ) from error
    if not isinstance(rows, list):
        raise ValueError(f"{file} holds no list of rows.")
    return rows


def hub_rows(name: str) -> Iterable[dict]:
    import datasets

    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises errors of its own, httpx's and fsspec's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConnectionError(
            f"The data set {name!r} could not be had from the Hugging Face Hub ({reason}); try again later, or give "
            "a local .json or .jsonl file."
        ) from error


def as_conversation(row: dict, origin: str) -> Conversation:
    """Raises ValueError for a row in none of the three forms; see the top of this file."""
    if "messages" in row:
        messages = checked_messages(row["messages"], origin)
        question = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
        return Conversation(messages, question, "", messages[-1]["content"], origin)
    asked, answered = ("instruction", "output") if "instruction" in row else ("prompt", "completion")
    instruction: Any = row.get(asked)
    output: Any = row.get(answered)
    given = row.get("input") or "" if asked == "instruction" else ""
    for name, text in ((asked, instruction), (answered, output), ("input", given)):
        if not isinstance(text, str):
            columns = ", ".join(map(str, row))
            raise ValueError(
                f"{origin} has no text in {name!r}; its columns are {columns}. Use instruction, input and output, "
                "prompt and completion, or messages."
            )
    question = f"{instruction}\n\n### Input:\n{given}" if given.strip() else instruction
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return Conversation(checked_messages(messages, origin), instruction, given, output, origin)


def checked_messages(messages: object, origin: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{origin}: messages must be a list of objects with role and content.")
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"{origin} has a message of the unknown role {role!r}; use {', '.join(ROLES)}.")
        if not isinstance(content, str):
            raise ValueError(f"{origin} has a message of the {role} whose content is not a string.")
        try:
            check_text(content)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
    roles = [message["role"] for message in messages]
    if not roles or roles[-1] != "assistant":
        end = f"ends with the {roles[-1]}" if roles else "is empty"
        raise ValueError(f"{origin}: the conversation {end}; its last message must be the assistant's answer.")
    if "user" not in roles:
        raise ValueError(f"{origin}: the conversation has no message of the user.")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def split(
    rows: list[Conversation], seed: int, fractions: tuple[float, float, float] = (0.85, 0.05, 0.1)
) -> tuple[list[Conversation], list[Conversation], list[Conversation]]:
    """Rows for training, validation and test, shuffled by `seed`. Rows with the same prompt stay together, so that no
    question of the test has been trained on; the sizes may therefore differ from `fractions` by a few rows.

    Raises ValueError for fractions that do not sum to 1, or too few rows for a part that shall have some.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(
            f"The fractions {fractions} for training, validation and test must sum to 1, and none may be negative."
        )
    groups: dict[str, list[Conversation]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row.prompt), []).append(row)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)

    ends = [round(len(rows) * sum(fractions[: part + 1])) for part in range(3)]
    parts: tuple[list[Conversation], list[Conversation], list[Conversation]] = ([], [], [])
    done = 0
    for group in shuffled:
        parts[next(part for part in range(3) if done < ends[part])].extend(group)
        done += len(group)
    for part, fraction in zip(parts, fractions, strict=True):
        if fraction > 0 and not part:
            raise ValueError(f"{len(rows)} rows are too few to split by {fractions}; give more rows.")
    return parts


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Ids after which a model is to answer: the first ids of `encode_conversation` with that answer.

    Raises ValueError where the chat template refuses the messages.
    """
    return render(tokenizer, messages, add_generation_prompt=True)["input_ids"]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    max_length: int,
    train_on_prompt: bool = False,
) -> dict[str, list[int]]:
    """`input_ids` and `labels`, both cut to `max_length`. The labels are the ids of the assistant's answers, each
    with the eos token that ends it, and -100 elsewhere; or all the ids with `train_on_prompt`.

    Raises ValueError where the chat template refuses the messages, marks no answer, or writes an answer otherwise
    than after the prompt of `encode_prompt`.
    """
    encoded = render(tokenizer, messages, return_assistant_tokens_mask=True)
    ids, answered = encoded["input_ids"], encoded["assistant_masks"]
    prompt = encode_prompt(tokenizer, messages[:-1])
    start = len(prompt)
    if not any(answered):
        raise ValueError("The chat template marks no answer; it needs {% generation %} around what the model says.")
    if ids[:start] != prompt or answered[start - 1 : start + 1] != [0, 1]:
        raise ValueError(
            "The chat template does not fit: the ids of the prompt are not the first ids of the conversation, up to "
            "its last answer."
        )
    labels = ids if train_on_prompt else [i if mine else IGNORE_INDEX for i, mine in zip(ids, answered, strict=True)]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[Conversation],
    max_length: int,
    train_on_prompt: bool = False,
) -> tuple[list[dict[str, list[int]]], int]:
    """`encode_conversation` of each, and how many were dropped since `max_length` left nothing of their answers.

    Raises ValueError, with the number of the row, for what `encode_conversation` refuses, and where no row is left.
    """
    examples = []
    for conversation in conversations:
        try:
            example = encode_conversation(tokenizer, conversation.messages, max_length, train_on_prompt)
        except ValueError as error:
            raise ValueError(f"{conversation.origin}: {error}") from error
        if any(label != IGNORE_INDEX for label in example["labels"][1:]):  # nothing precedes the first token
            examples.append(example)
    if conversations and not examples:
        raise ValueError(f"Within max_length {max_length} no answer begins; choose a larger one.")
    return examples, len(conversations) - len(examples)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options) -> dict[str, list[int]]:
    quiet = {"verbose": False}  # what is too long is cut later
    try:
        return tokenizer.apply_chat_template(messages, return_dict=True, tokenizer_kwargs=quiet, **options)
    except TemplateError as error:
        raise ValueError(str(error)) from error


def show_mask(tokenizer: PreTrainedTokenizerBase, example: dict[str, list[int]]) -> str:
    """The text of an encoded example for a terminal: what is learned in green, the rest in grey."""
    green, grey, plain = "\033[32m", "\033[90m", "\033[0m"
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        learned = label != IGNORE_INDEX
        if not runs or runs[-1][0] != learned:
            runs.append((learned, []))
        runs[-1][1].append(token)
    return "".join(f"{green if learned else grey}{tokenizer.decode(ids)}{plain}" for learned, ids in runs)
