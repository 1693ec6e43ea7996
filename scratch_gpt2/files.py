"""Files: checks of paths and outputs, atomic writes, JSON, and figures without a display."""

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Files of a model, which no command replaces in a folder that it reads.
MODEL_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "run.json"),
    *("*.safetensors", "*.safetensors.index*.json", "*.bin", "*.pt"),
    *("tokenizer*.json", "vocab.*", "merges.txt", "encoder.json", "chat_template.jinja"),
)
# Options whose values are texts.
NOT_PATHS = ("prompt", "explain", "document_separator")
# Colors whose contrast is at least 4:1 on white and on GitHub's dark page (#0d1117), for matplotlib's `rcParams`. The
# background is transparent.
INK = "#757e8a"
LINE_COLORS = ["#2f7dc4", "#c0610a", "#2e8b3d", "#8a63c9", "#d4483f"]
FIGURE_STYLE = {
    "axes.prop_cycle": f"cycler('color', {LINE_COLORS})",
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def write_atomically(file: Path, write) -> None:
    """Write a file under a temporary name and rename it, so that the final name never refers to a partial file."""
    unfinished = file.with_name(file.name + ".unfinished")
    try:
        with open(unfinished, "wb") as opened:
            write(opened)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written because the disk is full, which safetensors and PyTorch tell by errors of
    their own; PyTorch's says only that a file ends too early."""
    ends_too_early = isinstance(error, RuntimeError) and "unexpected pos" in str(error)
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error) or ends_too_early


def expand_home(options: dict[str, Any]) -> dict[str, Any]:
    """Options with a leading `~` in their paths expanded, which the shell does not do in `--output=~/x`."""

    def expanded(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [expanded(name, item) for item in value]
        return os.path.expanduser(value) if isinstance(value, str) and name not in NOT_PATHS else value

    return {name: expanded(name, value) for name, value in options.items()}


def write_json(file: str | os.PathLike, value: object) -> None:
    """Write `value` as indented JSON in UTF-8, in one step. Infinity and nan, which JSON lacks, become null."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    write_atomically(file, lambda opened: opened.write(content))


def finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); copy it again, or delete it.") from error
    return content


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_plotting() -> None:
    """Raise ImportError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib.") from error


@contextmanager
def figure_file(path: str | os.PathLike, numbers: object = None, **options) -> Iterator["Figure"]:
    """A figure to draw on, written to the PNG file `path` at the end of the `with` block. No display is needed.

    Args:
        numbers: what the figure shows, for a JSON file of the same name.
        options: arguments of matplotlib's `Figure`, such as `figsize`.

    Raises ImportError without matplotlib.
    """
    check_plotting()
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot, which would look for a display

    path = Path(path)
    with rc_context(FIGURE_STYLE):
        figure = Figure(layout="constrained", **options)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        if numbers is not None:
            write_json(path.with_suffix(".json"), numbers)
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def check_outputs(
    outputs: Iterable[str | os.PathLike], *, inputs: Iterable[str | os.PathLike] = (), overwrite: bool = False
) -> None:
    """Check before the work starts that the files can be written and that no existing file is lost.

    Args:
        outputs: files to write; their folders need not exist.
        inputs: files to read, and anything else that was given as a source, such as the name of a Hub data set.
        overwrite: replace outputs that exist. An output that is also an input is refused in any case.

    Raises:
        ValueError: an output is also an input, or a file of a model that is one.
        FileExistsError: an output exists, and `overwrite` is False.
        OSError: an output is a folder, or cannot be created.
    """
    sources = [Path(source) for source in inputs]
    for output in map(Path, outputs):
        if any(is_same_file(output, source) or is_model_file(output, source) for source in sources):
            raise ValueError(f"{output} is an input of this command and would be replaced; choose another output.")
        if output.is_dir():
            raise IsADirectoryError(f"{output} is a folder; give the name of a file.")
        if output.exists() and not overwrite:
            raise FileExistsError(f"{output} exists; choose another name, or add --overwrite to replace it.")
        check_writable(output)


def is_same_file(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def is_model_file(file: Path, folder: Path) -> bool:
    """Whether `file` exists in `folder` and belongs to the model there."""
    named = any(file.match(pattern) for pattern in MODEL_FILES)
    return named and file.exists() and folder.is_dir() and os.path.samefile(file.parent, folder)


def check_writable(file: Path) -> None:
    """Raise OSError if a file of this name cannot be created."""
    folder = next(parent for parent in Path(os.path.abspath(file)).parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(f"{file} cannot be written ({error.strerror}); choose another folder.") from error
