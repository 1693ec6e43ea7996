"""What happens when a visitor clicks: inputs checked, the model found, results in the form that the page shows."""

import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import gradio as gr
import markup
import views
from classifier import RowResult, classify_rows, explained_labels, unsure_below, verdict, weigh_words
from generation import MAX_SEED, NEXT_TURN, Sampling, Step, chat_prompt, split_text, write_text
from limits import as_written, check_input, counted, for_notice, in_one_sentence, sentence_of
from models import Checkpoints
from table import read_table, write_table
from turns import in_turns

from scratch_gpt2 import ScratchGPT2ForCausalLM, ScratchGPT2ForSequenceClassification

LANGUAGE, CLASSIFIER = ScratchGPT2ForCausalLM, ScratchGPT2ForSequenceClassification
PREVIEW_ROWS = 20
SMALL_SEEDS = 10_000  # of the button for another seed: short enough to note down


@dataclass(frozen=True)
class Written:
    """A completion as it can be continued: the model's name, the prompt and its ids, what was written after it."""

    name: str
    prompt: str
    ids: list[int]
    steps: list[Step]
    text: str


@dataclass(frozen=True)
class Verdict:
    """A text message with what the tab shows about it."""

    text: str = ""
    probabilities: dict[str, float] | None = None
    note: str = ""
    words: str = ""


class Handlers:
    """Bound to the models that visitors may choose from. Every method but `chat` raises gr.Error with one sentence."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def warm_up(self) -> None:
        """Answer once, if the assistant is there, and import what Gradio imports at its first event: otherwise the
        first visitor waits a second longer."""
        with suppress(ImportError):
            import matplotlib.pyplot  # noqa: F401
        with suppress(ValueError, OSError):
            next(self.answer("Hello", [], "assistant", temperature=0.7, top_p=0.9, max_new_tokens=1))

    @in_one_sentence
    def prepare(self, name, model_class: type) -> str:
        """Load a chosen model before it is used, and say how large it is."""
        model, _ = self.checkpoints.load(name, model_class)
        config = model.config
        return markup.notice(
            f"{name} is ready: {model.num_parameters() / 1e6:,.1f}M parameters, {counted(config.n_layer, 'layer')}, "
            f"{counted(config.n_head, 'head')} in each."
        )

    def chat(self, message, history, name, temperature, top_p, max_new_tokens) -> Iterator[tuple]:
        """Yields the message box, the conversation and a note. A refused message stays in the box, with the reason in
        the note: an exception would leave the page without an answer."""
        talk = []
        try:
            talk = [{"role": entry["role"], "content": text_of(entry)} for entry in history or []]
            for answer, note in self.answer(message, talk, name, temperature, top_p, max_new_tokens):
                question = {"role": "user", "content": as_written(message)}
                yield "", [*talk, question, {"role": "assistant", "content": answer}], markup.notice(note)
        except Exception as error:
            sentence = sentence_of(error)
            gr.Warning(for_notice(sentence))
            kept = message if isinstance(message, str) else ""
            yield kept.encode(errors="replace").decode(), talk, markup.notice(sentence)

    def answer(self, message, talk, name, temperature, top_p, max_new_tokens) -> Iterator[tuple[str, str]]:
        """The answer so far, and a note where the beginning of the conversation no longer fits."""
        message = as_written(check_input(message))
        sampling = Sampling(
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            seed=random.randint(0, MAX_SEED),  # "retry" is to give another answer
            stop_at=NEXT_TURN,
        )
        model, tokenizer = self.checkpoints.load(name, LANGUAGE)
        messages = [*plain_messages(talk, tokenizer.eos_token), {"role": "user", "content": message}]
        ids, left_out = chat_prompt(tokenizer, messages, model.config.n_positions, int(max_new_tokens))
        note = ""
        if left_out:
            note = (
                f"The model reads {model.config.n_positions} tokens at once; the first {left_out} messages of this "
                "conversation no longer fit."
            )
        answer = ""
        for answer, _ in in_turns(write_text(model, tokenizer, ids, sampling)):
            yield answer.strip(), note
        if not answer.strip():
            yield "(The model ended its answer at once; try again.)", note

    @in_one_sentence
    def retry(self, history, name, temperature, top_p, max_new_tokens) -> Iterator[tuple]:
        """Another answer to the last question."""
        talk = history or []
        asked = max((n for n, entry in enumerate(talk) if entry["role"] == "user"), default=None)
        if asked is not None:
            yield from self.chat(text_of(talk[asked]), talk[:asked], name, temperature, top_p, max_new_tokens)

    @in_one_sentence
    def edit(self, history, name, temperature, top_p, max_new_tokens, event: gr.EditData) -> Iterator[tuple]:
        """An answer to a question that has been changed; what followed it goes."""
        talk, index = history or [], field_of(event, "index")
        index = index[0] if isinstance(index, list) and index else index
        if type(index) is not int or not 0 <= index < len(talk):
            raise ValueError("There is no such message; reload the page.")
        yield from self.chat(field_of(event, "value"), talk[:index], name, temperature, top_p, max_new_tokens)

    @in_one_sentence
    def complete(self, name, prompt, temperature, top_k, top_p, repetition_penalty, max_new_tokens, seed, stop_at):
        """Yields the text, its tokens to look at, the state that the clicks need, and a note."""
        check_input(prompt)
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, max_new_tokens, seed, stop_at or "")
        model, tokenizer = self.checkpoints.load(name, LANGUAGE)
        ids = tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"]
        most = model.config.n_positions - min(int(max_new_tokens), model.config.n_positions // 2)
        notes = []
        if len(ids) > most:
            notes.append(f"The prompt has {len(ids):,} tokens; the model reads the last {most}.")
        if prompt[-1].isspace():
            notes.append("The prompt ends with a space. GPT-2's words bring their own, so it writes better without.")
        begun = Written(name, prompt, ids[-most:], [], "")
        for written in self.write(begun, sampling):
            yield *shown(written, tokenizer), markup.notice(" ".join(notes))

    @in_one_sentence
    def continue_with(
        self, written, temperature, top_k, top_p, penalty, max_new_tokens, seed, stop_at, event: gr.EventData
    ):
        """Yields what `complete` does, for the text up to a token that the visitor has replaced by an alternative."""
        number, place = picked(event, "write", 2)
        step = chosen_step(written, number)
        if place >= len(step.alternatives):
            raise ValueError("There is no such alternative; click another.")
        token, probability, chance = step.alternatives[place]
        _, tokenizer = self.checkpoints.load(written.name, LANGUAGE)
        steps = [*written.steps[:number], replace(step, token=token, probability=probability, chance=chance)]
        sampling = Sampling(temperature, top_k, top_p, penalty, max_new_tokens, seed, stop_at or "")
        for continued in self.write(replace(written, steps=steps), sampling):
            yield *shown(continued, tokenizer), ""

    def write(self, begun: Written, sampling: Sampling) -> Iterator[Written]:
        model, tokenizer = self.checkpoints.load(begun.name, LANGUAGE)
        texts = write_text(model, tokenizer, begun.ids, sampling, begun.steps)
        for text, steps in in_turns(texts):
            yield replace(begun, steps=list(steps), text=text)

    @in_one_sentence
    def open_token(self, written, event: gr.EventData) -> str:
        """The text with what else could have stood where the visitor has clicked."""
        if written is None:
            return ""
        _, tokenizer = self.checkpoints.load(written.name, LANGUAGE)
        pieces = split_text(tokenizer, written.text, written.steps)
        if field_of(event, "pick") == "close":
            return markup.written_text(written.prompt, pieces)
        (number,) = picked(event, "token", 1)
        step = chosen_step(written, number)
        return markup.written_text(written.prompt, pieces, number, views.alternatives(tokenizer, number, step))

    def another_seed(self) -> int:
        return random.randrange(SMALL_SEEDS)

    @in_one_sentence
    def classify(self, name, text) -> tuple[dict[str, float], str, str]:
        """The verdict, without the words."""
        probabilities, sentence = verdict(*self.checkpoints.load(name, CLASSIFIER), text)
        return probabilities, markup.notice(sentence), markup.notice("Weighing the words …")

    @in_one_sentence
    def words(self, name, text) -> Iterator[str]:
        """The words that decided, better estimated with each step."""
        model, tokenizer = self.checkpoints.load(name, CLASSIFIER)
        red, blue = explained_labels(model)
        for words in in_turns(weigh_words(model, tokenizer, text)):
            yield markup.weighed_words(words, red, blue) if words else markup.notice("Weighing the words …")

    def first_verdict(self, name, text) -> Verdict:
        """What the tab shows at first; nothing where the model is not there."""
        try:
            probabilities, note, _ = self.classify(name, text)
            *_, words = self.words(name, text)
        except gr.Error:
            return Verdict()
        return Verdict(text, probabilities, note, words)

    def known_limits(self, name, candidates: Iterable[tuple[str, str]]) -> tuple[float, str | None]:
        """Below which probability the classifier is unsure, and the first of `candidates`, (text, label), that it gets
        wrong. Raises ValueError or OSError where the model is not there."""
        model, tokenizer = self.checkpoints.load(name, CLASSIFIER)
        wrong = (text for text, label in candidates if next(iter(verdict(model, tokenizer, text)[0])) != label)
        return unsure_below(model), next(wrong, None)

    @in_one_sentence
    def columns(self, path, has_header) -> gr.Dropdown:
        """The columns of an uploaded file to choose from."""
        if not path:
            return gr.Dropdown([], value=None)
        table = read_table(path, has_header)
        return gr.Dropdown(table.columns, value=table.text_column())

    @in_one_sentence
    def classify_file(self, name, path, column, has_header) -> Iterator[tuple[str, dict, str | None]]:
        """Yields a note, the first rows, and at the end a file with all of them."""
        if not path:
            raise ValueError("Choose a CSV file first.")
        model, tokenizer = self.checkpoints.load(name, CLASSIFIER)
        table = read_table(path, has_header)
        texts = table.texts(column)
        header, results = ["label", "probability", "note"], []
        for results in in_turns(classify_rows(model, tokenizer, texts)):
            preview = [
                [text, row.label, row.probability, row.note]
                for text, row in zip(texts[:PREVIEW_ROWS], results, strict=False)
            ]
            shown_rows = {"headers": ["text", *header], "data": preview}
            yield markup.notice(f"{len(results)} of {counted(len(texts), 'row')} done."), shown_rows, None
        rows = ([*cells, row.label, row.probability, row.note] for cells, row in zip(table.rows, results, strict=True))
        with tempfile.TemporaryDirectory() as folder:  # Gradio copies the file and deletes its copy after an hour
            file = Path(folder, "results.csv")
            write_table(file, [*table.columns, *header], rows)
            yield markup.notice(summary(results)), shown_rows, str(file)

    def layers(self, name) -> list[int]:
        """The numbers of a model's layers, or none where it is not there."""
        try:
            model, _ = self.checkpoints.load(name, LANGUAGE)
        except (ValueError, OSError):
            return []
        return [*range(1, model.config.n_layer + 1)]

    @in_one_sentence
    def look(self, name, text, layer, head, temperature, top_k, top_p):
        """All steps of the walk for a sentence. The first value is what the other events look at until the next."""
        sentence = views.read_sentence(*self.checkpoints.load(name, LANGUAGE), text)
        layers = sentence.config.n_layer
        layer = min(int(layer or layers // 2 + 1), layers)
        head = min(int(head or views.strongest_head(sentence, layer)), sentence.config.n_head)
        return (
            (name, text),
            markup.notice(views.note(sentence)),
            views.overview(sentence),
            views.tokens(sentence),
            views.vectors(sentence),
            gr.Radio(self.layers(name), value=layer),
            head,
            *views.heads(sentence, layer, head),
            *views.neurons(sentence, layer),
            views.lens(sentence),
            *views.next_token(sentence, temperature, top_k, top_p),
            sentence.text,
            *views.cache(sentence),
        )

    def sentence(self, looked) -> views.Sentence:
        if looked is None:  # the server keeps the state of the last 200 pages
            raise ValueError("The server no longer knows this sentence; press Look.")
        name, text = looked
        return views.read_sentence(*self.checkpoints.load(name, LANGUAGE), text)

    @in_one_sentence
    def look_at_layer(self, looked, layer, head):
        sentence = self.sentence(looked)
        layer = layer or 1
        return *views.heads(sentence, layer, int(head or 1)), *views.neurons(sentence, layer)

    @in_one_sentence
    def look_at_head(self, looked, layer, event: gr.EventData):
        head = picked(event, "head", 1)[0] + 1
        return head, *views.heads(self.sentence(looked), layer or 1, head)

    @in_one_sentence
    def look_at_next(self, looked, temperature, top_k, top_p):
        return views.next_token(self.sentence(looked), temperature, top_k, top_p)

    @in_one_sentence
    def grow_cache(self, looked):
        yield from in_turns(views.grow_cache(self.sentence(looked)))


def shown(written: Written, tokenizer) -> tuple[str, str, Written]:
    pieces = split_text(tokenizer, written.text, written.steps)
    return written.prompt + written.text, markup.written_text(written.prompt, pieces), written


def field_of(event: gr.EventData, name: str) -> object:
    """A field of an event's data, which a client can replace by anything."""
    return event._data.get(name) if isinstance(event._data, dict) else None


def picked(event: gr.EventData, kind: str, count: int) -> list[int]:
    """The numbers of the `data-pick` that was clicked: [3, 0] for `write 3 0`. Raises ValueError for another kind."""
    match = re.fullmatch(kind + count * r" ([0-9]{1,6})", str(field_of(event, "pick")))
    if not match:
        raise ValueError("There is no such place to click; reload the page.")
    return [int(number) for number in match.groups()]


def chosen_step(written: Written | None, number: int) -> Step:
    """Raises ValueError where there is no such step."""
    if written is None or number >= len(written.steps):
        raise ValueError("There is no such token; write a text first.")
    return written.steps[number]


def summary(results: list[RowResult]) -> str:
    """How many rows have which label, and what was skipped or cut."""
    counts = Counter(row.label or "without text" for row in results)
    cut = sum(bool(row.label and row.note) for row in results)
    parts = ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))
    sentence = f"{counted(len(results), 'row')}: {parts}."
    return sentence + f" {counted(cut, 'text')} cut; the column note says where." * bool(cut)


def text_of(entry: dict) -> str:
    """The text of a message of Gradio's history, as it was written, without halves of an emoji."""
    content = entry["content"]
    if not isinstance(content, str):
        content = " ".join(part.get("text") or "" for part in content)
    return as_written(content).encode(errors="replace").decode()


def plain_messages(talk: list[dict], eos_token: str) -> list[dict[str, str]]:
    """A conversation as the chat template takes it. What it refuses is removed, or every later turn would fail."""
    return [{"role": entry["role"], "content": text_of(entry).replace(eos_token, "")} for entry in talk]
