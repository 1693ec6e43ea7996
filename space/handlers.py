"""What happens when a visitor clicks: inputs checked, the model found, results in the form that the page shows."""

import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import gradio as gr
from classifier import classify_rows, explain, read_texts, write_results
from generation import NEXT_TURN, Sampling, chat_prompt, write_text
from limits import as_written, check_input, in_one_sentence
from models import Checkpoints
from views import alternatives_table, attention_figure, band, grow_cache, lens_table, next_token_figure, token_table

from scratch_gpt2 import ScratchGPT2ForCausalLM, ScratchGPT2ForSequenceClassification
from scratch_gpt2.inspection import show_token

LANGUAGE, CLASSIFIER = ScratchGPT2ForCausalLM, ScratchGPT2ForSequenceClassification
SECONDS_BETWEEN_UPDATES = 0.05
SECONDS_BETWEEN_FIGURES = 0.25
PREVIEW_ROWS = 20


class Handlers:
    """Bound to the models that visitors may choose from. Every method raises gr.Error with one sentence."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    @in_one_sentence
    def chat(self, message, history, name, temperature, top_p, max_new_tokens) -> Iterator[tuple[str, str]]:
        """The answer so far, and a note where the beginning of the conversation no longer fits."""
        message = as_written(check_input(message))
        sampling = Sampling(
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            seed=time.time_ns(),  # "retry" is to give another answer
            stop_at=NEXT_TURN,
        )
        model, tokenizer = self.checkpoints.load(name, LANGUAGE)
        messages = [*plain_messages(history, tokenizer.eos_token), {"role": "user", "content": message}]
        ids, left_out = chat_prompt(tokenizer, messages, model.config.n_positions, int(max_new_tokens))
        note = ""
        if left_out:
            note = (
                f"This model reads {model.config.n_positions} tokens at once: it no longer sees the first {left_out} "
                "messages of this conversation."
            )
        answer = ""
        for answer, _ in seldom(write_text(model, tokenizer, ids, sampling), SECONDS_BETWEEN_UPDATES):
            yield answer.strip(), note
        if not answer.strip():
            yield "(The model ended its answer at once.)", note

    @in_one_sentence
    def complete(self, name, prompt, temperature, top_k, top_p, repetition_penalty, max_new_tokens, seed, stop_at):
        """Yields the text, its tokens coloured by probability, the steps for `alternatives`, and a note."""
        check_input(prompt)
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, max_new_tokens, seed, stop_at or "")
        model, tokenizer = self.checkpoints.load(name, LANGUAGE)
        ids = tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"]
        most = model.config.n_positions - min(int(max_new_tokens), model.config.n_positions // 2)
        notes = []
        if len(ids) > most:
            notes.append(f"The prompt has {len(ids):,} tokens; the model reads the last {most}.")
        if prompt[-1].isspace():
            notes.append("The prompt ends with a space: GPT-2's words bring their own, so it writes better without.")
        for text, steps in seldom(write_text(model, tokenizer, ids[-most:], sampling), SECONDS_BETWEEN_UPDATES):
            coloured = [(show_token(tokenizer, step.token), band(step.probability)) for step in steps]
            yield prompt + text, coloured, (name, steps), " ".join(notes)

    @in_one_sentence
    def alternatives(self, written, event: gr.SelectData) -> tuple[str, list[list[str]]]:
        """What else could have stood where the visitor has clicked."""
        name, steps = written
        _, tokenizer = self.checkpoints.load(name, LANGUAGE)
        position = event.index[0] if isinstance(event.index, list | tuple) else event.index
        step = steps[position]
        title = (
            f"Token {position + 1}, {show_token(tokenizer, step.token)}, had a probability of {step.probability:.2%}."
        )
        return title, alternatives_table(tokenizer, step)

    @in_one_sentence
    def classify(self, name, text) -> tuple[dict[str, float], list[tuple[str, float]], str]:
        model, tokenizer = self.checkpoints.load(name, CLASSIFIER)
        probabilities, words = explain(model, tokenizer, text)
        label = next(iter(probabilities))
        return probabilities, words, f"Red words speak for {label!r}, blue ones against it."

    @in_one_sentence
    def classify_file(self, name, path) -> Iterator[tuple[str, list[list[str]], str | None]]:
        """Yields a note, the first rows, and at the end a file with all of them."""
        if not path:
            raise ValueError("There is no file; choose a CSV file first.")
        model, tokenizer = self.checkpoints.load(name, CLASSIFIER)
        texts = read_texts(path)
        rows = []
        for rows in classify_rows(model, tokenizer, texts):
            preview = [[text, label, f"{probability:.1%}"] for text, label, probability in rows[:PREVIEW_ROWS]]
            yield f"{len(rows)} of {len(texts)} rows are done.", preview, None
        counts = {label: sum(row[1] == label for row in rows) for label in sorted({row[1] for row in rows})}
        note = f"{len(rows)} rows: " + ", ".join(f"{count} {label}" for label, count in counts.items()) + "."
        with tempfile.TemporaryDirectory() as folder:  # Gradio copies the file and deletes its copy after an hour
            results = Path(folder, "results.csv")
            write_results(results, rows)
            yield note, preview, str(results)

    @in_one_sentence
    def tokens(self, name, text):
        model, tokenizer = self.checkpoints.load(name, LANGUAGE)
        return token_table(model, tokenizer, text)

    @in_one_sentence
    def attention(self, name, text, layer, head):
        return attention_figure(*self.checkpoints.load(name, LANGUAGE), text, layer, head)

    @in_one_sentence
    def lens(self, name, text) -> dict:
        header, rows = lens_table(*self.checkpoints.load(name, LANGUAGE), text)
        return {"headers": header, "data": rows}

    @in_one_sentence
    def next_token(self, name, text, temperature, top_k, top_p):
        return next_token_figure(*self.checkpoints.load(name, LANGUAGE), text, temperature, top_k, top_p)

    @in_one_sentence
    def cache(self, name, text):
        model, tokenizer = self.checkpoints.load(name, LANGUAGE)
        yield from seldom(grow_cache(model, tokenizer, text), SECONDS_BETWEEN_FIGURES)

    @in_one_sentence
    def layers_and_heads(self, name) -> tuple[gr.Slider, gr.Slider]:
        """Sliders that end where the model does."""
        model, _ = self.checkpoints.load(name, LANGUAGE)
        layers, heads = max(2, model.config.n_layer), max(2, model.config.n_head)  # a slider needs two ends
        return gr.Slider(1, layers, value=1, step=1), gr.Slider(1, heads, value=1, step=1)


def plain_messages(history, eos_token: str) -> list[dict[str, str]]:
    """Gradio's history as the chat template takes it. What it refuses is left out, or it would for ever."""
    messages = []
    for entry in history:
        content = entry["content"]
        if not isinstance(content, str):
            content = " ".join(part.get("text") or "" for part in content)
        content = as_written(content).encode(errors="replace").decode().replace(eos_token, "")
        messages.append({"role": entry["role"], "content": content})
    return messages


def seldom(values: Iterable, seconds: float) -> Iterator:
    """The first of `values`, the last, and those in between that come at least `seconds` after the one before: a page
    that is sent every token spends more time on sending than the model on writing."""
    sent, pending = None, None
    for value in values:
        pending = value
        if sent is None or time.monotonic() - sent >= seconds:
            yield value
            sent, pending = time.monotonic(), None
    if pending is not None:
        yield pending
