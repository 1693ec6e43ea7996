"""Instructions and their answers: read, split, and encoded by the tokenizer's chat template.

A row of data has one of these forms:

    {"instruction": ..., "input": ..., "output": ...}        Alpaca; the input may be missing or empty
    {"instruction": ..., "context": ..., "response": ...}    Dolly; the context may be empty
    {"prompt": ..., "completion": ...}                       an input or context may stand beside them
    {"messages": [{"role": ..., "content": ...}, ...]}       roles user and assistant, a first message may be system
    {"conversations": [{"from": ..., "value": ...}, ...]}    ShareGPT; human and gpt are user and assistant

All may also have a text `system` (or `system_prompt`), and all but the last two a `history` of earlier turns, a list
of pairs of question and answer.

The ids of a whole conversation and the labels on them come from one call of the chat template, and the ids that a
model answers to are their first ones: a model is asked with exactly the prompt that it was trained on.
"""

import json
import logging
import math
import random
import unicodedata
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from ..linear_cross_entropy import IGNORE_INDEX
from ..tokenization import check_text
from .rows import read_rows

EMPTY = (None, "")
ROLES = ("system", "user", "assistant")
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversation:
    """`messages` end with the assistant's answer. `instruction`, `input` and `output` are the columns of the row, for
    reports; without such columns, the last question and answer. `origin` names the row in errors."""

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
    """The first `max_rows` rows with an answer, from files that `read_rows` reads or the train split of a data set on
    the Hub.

    Rows whose answer is empty teach nothing; they are left out, and a warning says how many.

    Raises FileNotFoundError for a missing file, ConnectionError if the Hub cannot be reached, and ValueError,
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
        logger.warning("Rows left out because their answer is empty: %d.", empty)
    if not conversations:
        raise ValueError(f"There is no instruction with an answer in {source}.")
    return conversations


def as_conversation(row: dict[str, Any], origin: str) -> Conversation:
    """Raises ValueError for a row in none of the forms at the top of this file."""
    row = {column: None if is_missing(value) else value for column, value in row.items()}
    told = [row[column] for column in ("system", "system_prompt") if row.get(column) not in EMPTY]
    system = [{"role": "system", "content": text} for text in told]
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            turns = named_by_role(row[column])
            messages = checked_messages([*system, *turns] if isinstance(turns, list) else turns, origin, column)
            question = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
            return Conversation(messages, question, "", messages[-1]["content"], origin)
    asked, given, answered = columns_of(row, origin)
    instruction: Any = row.get(asked)
    context: Any = "" if row.get(given) is None else row[given]
    output: Any = row.get(answered)
    for name, text in ((asked, instruction), (answered, output), (given, context)):
        if not isinstance(text, str):
            columns = ", ".join(map(str, row))
            raise ValueError(
                f"{origin} has no text in {name!r}; its columns are {columns}. Use instruction, input and output, "
                "prompt and completion, messages, or conversations."
            )
    question = f"{instruction}\n\n### Input:\n{context}" if context.strip() else instruction
    messages = [*system, *earlier_turns(row.get("history"), origin)]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return Conversation(checked_messages(messages, origin), instruction, context, output, origin)


def is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # what a table holds for an empty cell


def columns_of(row: dict[str, Any], origin: str) -> tuple[str, str, str]:
    """The columns with the instruction, the text that it is about, and the answer."""
    if row.get("context") not in EMPTY and row.get("input") not in EMPTY:
        raise ValueError(f"{origin} has both an input and a context; keep one of them.")
    given = "input" if row.get("context") in EMPTY else "context"
    if "instruction" not in row:
        return "prompt", given, "completion"
    answered = "response" if "context" in row and "output" not in row else "output"
    return "instruction", given, answered


def earlier_turns(history: object, origin: str) -> list[dict[str, str]]:
    """Alpaca's `history`: pairs of a question and its answer."""
    pairs = [] if history in EMPTY else history
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{origin}: history must be a list of pairs of question and answer.")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def named_by_role(turns: Any) -> Any:
    """ShareGPT's turns, `from` and `value`, as messages; anything else as it is."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "from" in turn for turn in turns):
        return turns
    return [{"role": SPEAKERS.get(str(turn["from"]), turn["from"]), "content": turn.get("value")} for turn in turns]


def checked_messages(messages: object, origin: str, column: str = "messages") -> list[dict[str, str]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{origin}: {column} must be a list of objects with role and content.")
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


class Prompted(Protocol):
    @property
    def prompt(self) -> list[dict[str, str]]: ...


Row = TypeVar("Row", bound=Prompted)


def split(
    rows: list[Row], seed: int, fractions: tuple[float, float, float] = (0.85, 0.05, 0.1)
) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows for training, validation and test, shuffled by `seed`. Rows with the same prompt, also in another Unicode
    normalization, stay together, so that no test question has been trained on; the sizes may therefore differ from
    `fractions` by a few rows.

    Raises ValueError for fractions that do not sum to 1, or too few rows for a part whose fraction is not 0.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(
            f"The fractions {fractions} for training, validation and test must sum to 1, and none may be negative."
        )
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(unicodedata.normalize("NFC", json.dumps(row.prompt, ensure_ascii=False)), []).append(row)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)

    ends = [round(len(rows) * sum(fractions[: part + 1])) for part in range(3)]
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
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

    Raises ValueError if the chat template refuses the messages.
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

    Raises ValueError if the chat template refuses the messages, marks no answer, or does not begin the conversation
    with the prompt of `encode_prompt`.
    """
    encoded = render(tokenizer, messages, return_assistant_tokens_mask=True)
    ids, answered = encoded["input_ids"], encoded["assistant_masks"]
    prompt = encode_prompt(tokenizer, messages[:-1])
    start = len(prompt)
    if not any(answered):
        raise ValueError("The chat template does not mark the answers: put {% generation %} around their text.")
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
    """`encode_conversation` of each, and how many were dropped because `max_length` left nothing of their answers.

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
        raise ValueError(f"No answer begins within max_length {max_length}; choose a larger value.")
    return examples, len(conversations) - len(examples)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options) -> dict[str, list[int]]:
    quiet = {"verbose": False}  # what is too long is cut later
    try:
        return tokenizer.apply_chat_template(messages, return_dict=True, tokenizer_kwargs=quiet, **options)
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template of the tokenizer is damaged ({error}).") from error
    except TemplateError as error:
        raise ValueError(str(error)) from error


def show_mask(tokenizer: PreTrainedTokenizerBase, example: dict[str, list[int]], colors: bool) -> str:
    """The text of an encoded example. With `colors`, for a terminal, what is learned is green and the rest is grey;
    without, what is learned stands between >>> and <<<."""
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        learned = label != IGNORE_INDEX
        if not runs or runs[-1][0] != learned:
            runs.append((learned, []))
        runs[-1][1].append(token)
    marks = {True: ("\033[32m", "\033[0m"), False: ("\033[90m", "\033[0m")}
    if not colors:
        marks = {True: (">>>", "<<<"), False: ("", "")}
    return "".join(tokenizer.decode(ids).join(marks[learned]) for learned, ids in runs)
