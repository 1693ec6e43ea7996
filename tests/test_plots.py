"""Every figure is readable on light and dark pages, and nothing in it is cut off."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_fixtures import recorded_figures
from PIL import Image

from scratch_gpt2.evaluation.judge import histogram, plot_scores
from scratch_gpt2.evaluation.report import Figure, draw_bars
from scratch_gpt2.files import FIGURE_STYLE, INK, LINE_COLORS, figure_file
from scratch_gpt2.training.plots import plot_confusion_matrix, plot_epochs, plot_history, plot_log

WHITE, GITHUB_DARK = "#ffffff", "#0d1117"
STEPS = [{"step": n, "loss": 3.0 - n / 50, "learning_rate": 1e-3, "grad_norm": 1.0} for n in range(0, 100, 10)]
EPOCHS = [
    {"epoch": n, "step": n, "eval_loss": 1 / n, "eval_accuracy": 0.5, "train_sample_loss": 1.0}
    | {"train_sample_accuracy": 0.5}
    for n in (1, 2, 3)
]
SUMMARY = {"histogram": histogram([5, 50, 95]), "scored": 3, "unparsable": 1, "failed": 0, "mean": 50.0}


def luminance(color):
    """WCAG 2.2, relative luminance."""
    channels = torch.tensor([int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    linear = torch.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return (linear @ torch.tensor([0.2126, 0.7152, 0.0722])).item()


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_of_known_colors():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)  # the lightest grey that WCAG AA accepts


@pytest.mark.parametrize("color", [INK, *LINE_COLORS])
def test_colors_are_readable_on_light_and_dark_pages(color):
    assert contrast(color, WHITE) >= 4 and contrast(color, GITHUB_DARK) >= 4


def bars(path):
    with figure_file(path, figsize=(5.5, 2)) as figure:
        results = {"a model with a long name": Figure(12345.678, 2), "short": Figure(9.5, 2, interval=(9.0, 13000.0))}
        draw_bars(figure.add_subplot(), "perplexity", results)


PLOTS = {
    "history": lambda path: plot_history(STEPS, path),
    "log": lambda path: plot_log(STEPS, path),
    "epochs": lambda path: plot_epochs(EPOCHS, path),
    "confusion matrix": lambda path: plot_confusion_matrix([[90, 1], [2, 30]], ["ham", "x" * 40], path),
    "scores": lambda path: plot_scores(SUMMARY, path),
    "report": bars,
}


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
def test_texts_are_whole_and_the_background_is_transparent(draw, tmp_path, monkeypatch):
    drawn = recorded_figures(monkeypatch)
    draw(tmp_path / "plot.png")
    (figure,) = drawn
    whole, size = figure.get_tightbbox(), figure.bbox_inches  # what is drawn, and the page, in inches
    assert whole.x0 >= 0 and whole.y0 >= 0 and whole.x1 <= size.x1 and whole.y1 <= size.y1
    for text in figure.axes[0].texts:  # within their panel, too
        assert text.get_window_extent().x1 <= figure.axes[0].bbox.x1, text
    with Image.open(tmp_path / "plot.png") as image:
        assert image.getpixel((0, 0))[3] == 0


def test_the_style_ends_with_the_figure(tmp_path):
    import matplotlib

    before = matplotlib.rcParams["text.color"]
    with figure_file(tmp_path / "plot.png") as figure:
        assert matplotlib.rcParams["text.color"] == FIGURE_STYLE["text.color"] != before
        figure.add_subplot()
    assert matplotlib.rcParams["text.color"] == before


def test_nothing_is_written_after_an_error(tmp_path):
    with pytest.raises(ValueError), figure_file(tmp_path / "plot.png", [1]):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def architecture():
    script = Path(__file__).resolve().parents[1] / "docs" / "draw_architecture.py"
    return SimpleNamespace(**runpy.run_path(str(script)))


@pytest.mark.parametrize("name", ["LIGHT", "DARK"])
def test_the_diagram_is_whole_and_readable(name, architecture):
    palette = getattr(architecture, name)
    figure = architecture.draw(palette)
    figure.draw_without_rendering()
    whole, size = figure.get_tightbbox(), figure.bbox_inches
    assert whole.x0 >= 0 and whole.y0 >= 0 and whole.x1 <= size.x1 and whole.y1 <= size.y1
    for fill in (palette.page, palette.stream, palette.attention, palette.feed_forward):
        assert contrast(palette.ink, fill) >= 7
