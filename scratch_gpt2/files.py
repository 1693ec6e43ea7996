"""Files: written in one step, read as JSON, and figures without a display."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

# Options whose values are texts.
NOT_PATHS = ("prompt", "explain", "document_separator")


def write_atomically(file: Path, write) -> None:
    """Under the final name there is only ever a whole file."""
    unfinished = file.with_name(file.name + ".unfinished")
    try:
        with open(unfinished, "wb") as opened:
            write(opened)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def expand_home(options: dict[str, Any]) -> dict[str, Any]:
    """Options with a leading `~` in their paths expanded, which the shell does not do in `--output=~/x`."""

    def expanded(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [expanded(name, item) for item in value]
        return os.path.expanduser(value) if isinstance(value, str) and name not in NOT_PATHS else value

    return {name: expanded(name, value) for name, value in options.items()}


def write_json(file: str | os.PathLike, value: object) -> None:
    """Write `value` as indented JSON in UTF-8, in one step."""
    content = json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
    write_atomically(Path(file), lambda opened: opened.write(content))


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); save the model again.") from error


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def new_figure(**options):
    try:
        from matplotlib.figure import Figure  # not pyplot, which would look for a display
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib.") from error
    return Figure(layout="constrained", **options)


def save_figure(figure, path: str | os.PathLike, numbers) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(numbers, indent=1).encode() + b"\n"
    write_atomically(path.with_suffix(".json"), lambda file: file.write(content))
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
