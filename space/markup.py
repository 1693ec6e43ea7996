"""The only HTML of the Space that Gradio does not write: pictures of tokens and numbers, in the colours of the theme.

Every text goes through `escaped`, every number through a format. A picture is a string for `gr.HTML`; what can be
clicked carries `data-pick`, which PICK sends to the server. The colours are in `style.css`.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

INK = (37, 99, 235)  # of the heat maps: more of it is more, on white as on black
NEGATIVE_INK = (220, 38, 38)
MIN_ARC = 0.03  # lines of less attention are left out
ROW_HEIGHT, MAP_WIDTH, LABEL_WIDTH = 26, 420, 110
BANDS = (("b1", "over 75%"), ("b2", "25% to 75%"), ("b3", "5% to 25%"), ("b4", "under 5%"))

# One tab stop for all tokens: arrow keys move between them, Enter or space picks, Escape closes.
PICK = """
const picked = (event) => event.target.closest('[data-pick]');
let origin = null;  // where the focus returns to when a popover is closed
const pick = (item) => {
  if (item.dataset.pick !== 'close') origin = item.dataset.pick;
  trigger(item.dataset.pick.startsWith('write') ? 'submit' : 'select', {pick: item.dataset.pick});
};
element.addEventListener('click', (event) => { if (picked(event)) pick(picked(event)); });
element.addEventListener('keydown', (event) => {
  const item = picked(event);
  if (event.key === 'Escape' && element.querySelector('.popover')) trigger('select', {pick: 'close'});
  if (!item || item.tagName === 'BUTTON') return;
  const items = [...element.querySelectorAll('[role=button]')];
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
  if (event.key === 'Enter' || event.key === ' ') pick(item);
  else if (step) items.at((items.indexOf(item) + step) % items.length).focus();
  else return;
  event.preventDefault();
});
watch('value', () => {
  const opened = element.querySelector('[data-focus]');
  if (opened) { opened.focus({preventScroll: true}); opened.scrollIntoView({block: 'nearest'}); }
  else if (origin && document.activeElement === document.body)
    element.querySelector(`[data-pick="${origin}"]`)?.focus({preventScroll: true});
});
"""


def escaped(text: object) -> str:
    return html.escape(str(text), quote=True)


@dataclass(frozen=True)
class Bar:
    """`share` in blue; `before`, where it is given, in grey above it. Both are from 0 to 1."""

    label: str
    share: float
    before: float | None = None
    mark: str = ""
    pick: str = ""


def bars(rows: Iterable[Bar], legend: Sequence[str] = ()) -> str:
    """Horizontal bars with their numbers; `legend` names the blue ones, then the grey ones."""
    items = []
    for row in rows:
        longest = max(row.share, row.before or 0) or 1
        grey = "" if row.before is None else f'<i class="before" style="width:{100 * row.before / longest:.2f}%"></i>'
        numbers = percent(row.share) if row.before is None else f"{percent(row.before)} → {percent(row.share)}"
        inside = (
            f'<span class="name">{escaped(row.label)}</span>'
            f'<span class="track"><span class="shares" style="width:{100 * longest:.2f}%">{grey}'
            f'<i style="width:{100 * row.share / longest:.2f}%"></i></span>'
            f'<span class="number">{numbers} {escaped(row.mark)}</span></span>'
        )
        if row.pick:
            inside = f'<button class="bar" data-pick="{escaped(row.pick)}">{inside}</button>'
        items.append(f"<li>{inside}</li>" if row.pick else f'<li class="bar">{inside}</li>')
    named = "".join(
        f'<span><i class="{kind}"></i>{escaped(name)}</span>'
        for kind, name in zip(("", "before"), legend, strict=False)
    )
    return f'<div class="legend">{named}</div>' * bool(named) + f'<ul class="bars">{"".join(items)}</ul>'


def percent(share: float) -> str:
    return "0%" if share == 0 else f"{share:.1%}" if share >= 0.001 else "&lt;0.1%"


def chips(tokens: Iterable[tuple[str, int]]) -> str:
    """Tokens (text, id) side by side."""
    items = (f"<li>{escaped(text)}<small>{number}</small></li>" for text, number in tokens)
    return f'<ol class="chips">{"".join(items)}</ol>'


def stations(values: Iterable[tuple[str, str, str]]) -> str:
    """The walk in one line: (anchor, name, value) of each step, as links."""
    items = "".join(
        f'<li><a href="#{escaped(anchor)}"><b>{escaped(name)}</b><span>{escaped(value)}</span></a></li>'
        for anchor, name, value in values
    )
    return f'<nav aria-label="The steps"><ol class="stations">{items}</ol></nav>'


def picture(values: np.ndarray, alt: str, css_class: str = "") -> str:
    """A heat map (rows, columns) of numbers from -1 to 1: blue above 0, red below, and nothing at 0."""
    pixels = np.zeros((*values.shape, 4), dtype=np.uint8)
    pixels[..., :3] = np.where(values[..., None] >= 0, INK, NEGATIVE_INK)
    pixels[..., 3] = np.clip(np.abs(values) * 255, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(file, "PNG")
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img class="map {css_class}" alt="{escaped(alt)}" src="data:image/png;base64,{content}">'


def rows_of_numbers(parts: Iterable[tuple[str, np.ndarray]], labels: Sequence[str]) -> str:
    """Several heat maps of the same rows under each other's names, joined by + and =."""
    figures = "".join(
        f"<figure>{picture(values, f'{name}: one row per token')}<figcaption>{escaped(name)}</figcaption></figure>"
        for name, values in parts
    )
    names = "".join(f"<li>{escaped(label)}</li>" for label in labels)
    return (
        f'<div class="vectors" tabindex="0" role="region" aria-label="Vectors" style="--rows:{len(labels)}">'
        f"<ol>{names}</ol>{figures}</div>"
    )


def thumbnails(maps: np.ndarray, effects: Sequence[float], chosen: int) -> str:
    """The heads of a layer, (H, T, T) and how much each changes the prediction; a click chooses one."""
    items = "".join(
        f'<li><button data-pick="head {number}" aria-pressed="{str(number == chosen).lower()}">'
        f"{picture(weights, f'Attention of head {number + 1}')}Head {number + 1}"
        f"<small>{100 * effect:+.1f} points</small></button></li>"
        for number, (weights, effect) in enumerate(zip(maps, effects, strict=True))
    )
    return f'<ul class="heads">{items}</ul>'


def arcs(labels: Sequence[str], weights: np.ndarray) -> str:
    """Lines from each token (left) to the tokens that it looks at (right), (T, T). Hovering over or focusing a token
    shows its own."""
    height = ROW_HEIGHT * len(labels)
    left, right = LABEL_WIDTH, MAP_WIDTH - LABEL_WIDTH

    def y(row: int) -> float:
        return ROW_HEIGHT * (row + 0.5)

    groups, keys = [], []
    for row, label in enumerate(labels):
        seen = [(column, weights[row, column]) for column in range(row + 1) if weights[row, column] >= MIN_ARC]
        lines = "".join(
            f'<path d="M{left} {y(row)}C{left + 80} {y(row)} {right - 80} {y(column)} {right} {y(column)}" '
            f'stroke-width="{1 + 4 * weight:.2f}" opacity="{0.15 + 0.85 * weight:.2f}"/>'
            for column, weight in seen
        )
        strongest = sorted(seen, key=lambda item: -item[1])[:3]
        told = ", ".join(f"{labels[column]} {weight:.0%}" for column, weight in strongest)
        groups.append(
            f'<g class="token" tabindex="0" role="img" aria-label="{escaped(f"{label} looks at {told}")}">'
            f"<title>{escaped(f'{label} looks at {told}')}</title>"
            f'<rect x="0" y="{y(row) - ROW_HEIGHT / 2}" width="{left}" height="{ROW_HEIGHT}"/>'
            f'<text x="{left - 6}" y="{y(row) + 4}" text-anchor="end">{escaped(short(label))}</text>{lines}</g>'
        )
        keys.append(f'<text x="{right + 6}" y="{y(row) + 4}" aria-hidden="true">{escaped(short(label))}</text>')
    return f'<svg class="arcs" viewBox="0 0 {MAP_WIDTH} {height}">{"".join(groups + keys)}</svg>'


def short(label: str, most: int = 14) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def table(header: Sequence[str], rows: Iterable[tuple[str, Sequence[tuple[str, float]]]], name: str) -> str:
    """Cells (text, share from 0 to 1) that are the bluer the larger the share; a row's first cell is its name."""
    head = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escaped(title)}</th>'
        + "".join(
            f'<td style="--share:{share:.3f}">{escaped(text)}<small>{share:.0%}</small></td>' for text, share in cells
        )
        + "</tr>"
        for title, cells in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(name)}"><table class="lens"><thead><tr>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def columns(values: Sequence[float], begun: int, name: str) -> str:
    """A column for each value; the first `begun` are lighter."""
    most = max(values)
    bars = "".join(
        f'<i class="{"before" if number < begun else ""}" style="height:{100 * value / most:.1f}%"></i>'
        for number, value in enumerate(values)
    )
    return f'<div class="columns" role="img" aria-label="{escaped(name)}">{bars}</div>'


def written_text(
    prompt: str, pieces: Sequence[tuple[int, str, float]], opened: int | None = None, popover: str = ""
) -> str:
    """A prompt and its continuation in pieces (number, text, probability), each coloured by how probable it was and
    to be clicked; below the piece numbered `opened` stands `popover`."""
    legend = "".join(f'<span><i class="{css}"></i>{name}</span>' for css, name in BANDS)
    items = []
    for place, (number, text, probability) in enumerate(pieces):
        items.append(
            f'<span role="button" class="{band(probability)}" tabindex="{-1 if place else 0}" '
            f'data-pick="token {number}" title="{percent(probability)}"'
            f"{' aria-expanded=true' if number == opened else ''}>{escaped(text)}</span>"
        )
        if number == opened:
            items.append(f'<span class="popover" role="dialog" aria-label="Alternatives">{popover}</span>')
    return (
        f'<div class="legend">{legend}</div>'
        f'<div class="written"><span class="prompt">{escaped(prompt)}</span>{"".join(items)}</div>'
    )


def alternatives(title: str, rows: Iterable[Bar]) -> str:
    close = '<button class="close" data-pick="close" aria-label="Close">&times;</button>'
    return f'<b data-focus tabindex="-1">{escaped(title)}</b>{close}{bars(rows)}'


def band(probability: float) -> str:
    """The colour of a token by how sure the model was of it."""
    return BANDS[sum(probability < limit for limit in (0.75, 0.25, 0.05))][0]


def weighed_words(words: Iterable[tuple[str, float]], for_it: str, against: str) -> str:
    """A text in words, each with its weight from -1 to 1: red speaks for `for_it`, blue for `against`."""
    items = "".join(
        f'<span class="{"for" if weight > 0 else "against"}" style="--weight:{abs(weight):.2f}" title="{weight:+.2f}">'
        f"{escaped(word)}</span>"
        for word, weight in words
    )
    legend = (
        f'<span><i class="for"></i>speaks for {escaped(for_it)}</span>'
        f'<span><i class="against"></i>speaks for {escaped(against)}</span>'
    )
    return f'<div class="legend">{legend}</div><div class="words">{items}</div>'


def notice(sentence: str) -> str:
    """A one-sentence message; screen readers read it when it appears."""
    return f'<p class="notice" role="status">{escaped(sentence)}</p>' if sentence else ""
