"""What "Look inside" shows: pieces of text, tables and plotly figures from the functions of `scratch_gpt2.inspection`.

Plotly reads labels as a kind of HTML, so every token is escaped before it becomes one.
"""

import html
from collections.abc import Iterator

import plotly.graph_objects as go
import torch
from generation import Sampling, next_chances, write_text
from limits import MAX_EXPLAINED_CHARACTERS, check_input

from scratch_gpt2.inspection import attention_maps, logit_lens, show_token

MAX_TOKENS = 64  # of a sentence to look into
LENS_POSITIONS = 10
LIKELIEST = 15
QUIET = {"margin": {"l": 10, "r": 10, "t": 40, "b": 10}, "template": "plotly_white"}


def encode_sentence(model, tokenizer, text: str) -> list[int]:
    """Its first tokens, at most MAX_TOKENS and the model's context. `<|endoftext|>` is read as plain characters.

    Raises ValueError for a text that is empty or too long.
    """
    check_input(text, MAX_EXPLAINED_CHARACTERS)
    ids = tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
    return ids[: min(MAX_TOKENS, model.config.n_positions - 1)]


def token_table(model, tokenizer, text: str) -> tuple[list[tuple[str, str]], list[list], str]:
    """The tokens in alternating colours, a row (position, token, id) for each, and one sentence about them."""
    ids = encode_sentence(model, tokenizer, text)
    shown = [show_token(tokenizer, i) for i in ids]
    colours = [(token, "AB"[position % 2]) for position, token in enumerate(shown)]
    rows = [[position, token, i] for position, (token, i) in enumerate(zip(shown, ids, strict=True))]
    whole = tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
    note = f"{len(text)} characters became {len(whole)} of the {len(tokenizer):,} tokens that this model knows."
    if len(whole) > len(ids):
        note += f" Only the first {len(ids)} are shown and used below."
    return colours, rows, note


def attention_figure(model, tokenizer, text: str, layer: int, head: int) -> go.Figure:
    """Heat map of one head. `layer` and `head` count from 1. Raises ValueError where the model has no such."""
    if not 1 <= int(layer) <= model.config.n_layer:
        raise ValueError(f"There is no layer {int(layer)}: this model has layers 1 to {model.config.n_layer}.")
    if not 1 <= int(head) <= model.config.n_head:
        raise ValueError(
            f"There is no head {int(head)}: each layer of this model has heads 1 to {model.config.n_head}."
        )
    ids = encode_sentence(model, tokenizer, text)
    weights = attention_maps(model, as_row(model, ids), int(layer) - 1)[int(head) - 1]  # (T, T)
    labels = axis_labels(tokenizer, ids)
    places = list(range(len(ids)))
    seen = [row[: query + 1] + [None] * (len(ids) - query - 1) for query, row in enumerate(weights.tolist())]
    figure = go.Figure(
        go.Heatmap(
            z=seen,
            zmin=0,
            zmax=1,
            colorscale="Blues",
            hovertemplate="from %{y}<br>to %{x}<br>%{z:.1%}<extra></extra>",
        )
    )
    figure.update_xaxes(title="is looked at", tickvals=places, ticktext=labels, tickangle=-60)
    figure.update_yaxes(title="looks", tickvals=places, ticktext=labels, autorange="reversed")
    return figure.update_layout(**QUIET, height=560, title=f"Layer {int(layer)}, head {int(head)}")


def lens_table(model, tokenizer, text: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the logit lens on the last tokens: a row for each layer, a column for each token."""
    ids = encode_sentence(model, tokenizer, text)
    probabilities, guesses = (part[:, -LENS_POSITIONS:, 0].tolist() for part in logit_lens(model, as_row(model, ids)))
    first = max(0, len(ids) - LENS_POSITIONS)
    header = ["after"] + [f"{first + n}: {show_token(tokenizer, i)}" for n, i in enumerate(ids[first:])]
    names = ["embeddings", *(f"layer {number}" for number in range(1, model.config.n_layer)), "last layer"]
    rows = [
        [name, *(f"{show_token(tokenizer, guess)}  {p:.0%}" for guess, p in zip(row, chances, strict=True))]
        for name, row, chances in zip(names, guesses, probabilities, strict=True)
    ]
    return header, rows


@torch.no_grad()
def next_token_figure(model, tokenizer, text: str, temperature: float, top_k: int, top_p: float) -> go.Figure:
    """Bars of the likeliest next tokens: as the model finds them, and as they are drawn with these settings."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=1)
    row = as_row(model, encode_sentence(model, tokenizer, text))
    logits = model(row, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    probabilities, chances = logits.softmax(-1)[0], next_chances(row, logits, sampling.processors())
    ids = probabilities.topk(min(LIKELIEST, len(probabilities))).indices.tolist()
    labels, places = axis_labels(tokenizer, ids), list(range(len(ids)))
    figure = go.Figure()
    for name, values, colour in (("the model", probabilities, "#b8c4d6"), ("drawn from", chances, "#1f5fbf")):
        figure.add_bar(x=places, y=[values[i].item() for i in ids], name=name, marker_color=colour)
    figure.update_xaxes(tickvals=places, ticktext=labels, tickangle=-60)
    figure.update_yaxes(tickformat=".0%")
    left = int((chances > 0).sum())
    return figure.update_layout(**QUIET, height=420, title=f"{left:,} of {len(chances):,} tokens can be drawn")


def grow_cache(model, tokenizer, text: str, new_tokens: int = 40) -> Iterator[tuple[str, go.Figure, str]]:
    """The text, a figure of the cache's size, and one sentence, after every token that the model writes."""
    ids = encode_sentence(model, tokenizer, text)
    for written, steps in write_text(model, tokenizer, ids, Sampling(max_new_tokens=new_tokens)):
        if steps:
            kilobytes = [step.cache_bytes / 1024 for step in steps]
            layers, width = model.config.n_layer, model.config.n_embd
            note = (
                f"{len(ids) + len(steps) - 1} positions x 2 (key and value) x {layers} layers x {width} numbers x 4 "
                f"bytes = {kilobytes[-1]:,.0f} KiB. Each new token adds {8 * layers * width / 1024:,.1f} KiB."
            )
            yield text + written, cache_figure(len(ids), kilobytes), note


def cache_figure(prompt_length: int, kilobytes: list[float]) -> go.Figure:
    positions = [prompt_length + number for number in range(len(kilobytes))]
    figure = go.Figure(go.Bar(x=positions, y=kilobytes, marker_color="#1f5fbf"))
    figure.update_xaxes(title="positions read")
    figure.update_yaxes(title="KiB kept", rangemode="tozero")
    return figure.update_layout(**QUIET, height=320, title="Keys and values in memory")


# HighlightedText sends a click only for tokens that have a category, not for those that have a number.
BANDS = {"over 75%": "#1f5fbf", "25% to 75%": "#5f9fdf", "5% to 25%": "#dfaf5f", "under 5%": "#df5f5f"}


def band(probability: float) -> str:
    """How sure the model was of a token: one of BANDS."""
    return list(BANDS)[sum(probability < limit for limit in (0.75, 0.25, 0.05))]


def alternatives_table(tokenizer, step) -> list[list[str]]:
    """Rows (token, the model's probability, chance to be drawn) of one step; the token that was drawn is marked."""
    rows = [(i, p, chance) for i, p, chance in step.alternatives]
    if step.token not in [i for i, _, _ in rows]:
        rows.append((step.token, step.probability, step.chance))
    return [
        [show_token(tokenizer, i), f"{p:.2%}", f"{chance:.2%}", "drawn" if i == step.token else ""]
        for i, p, chance in rows
    ]


def axis_labels(tokenizer, ids: list[int]) -> list[str]:
    return [html.escape(show_token(tokenizer, i)) for i in ids]


def as_row(model, ids: list[int]) -> torch.LongTensor:
    return torch.tensor([ids], device=model.device)
