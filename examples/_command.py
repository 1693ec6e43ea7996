"""The command `scratch-gpt2` of an installed wheel: `scratch-gpt2 sft ...` runs sft.py of this folder.

Standard library only, so that it answers at once.
"""

import ast
import difflib
import importlib.metadata
import runpy
import sys
import textwrap
from pathlib import Path

SHORT_NAMES = {"prepare_text": "prepare", "compare_models": "evaluate", "push_to_hub": "push"}


def commands() -> dict[str, Path]:
    """The scripts by their commands: sft for sft.py, prepare-classification for prepare_classification.py."""
    scripts = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return {SHORT_NAMES.get(path.stem, path.stem.replace("_", "-")): path for path in scripts}


def help_text(scripts: dict[str, Path]) -> str:
    width = max(map(len, scripts)) + 4
    lines = []
    for name, path in scripts.items():
        description = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first, rest = f"  {name}".ljust(width), " " * width
        line = textwrap.fill(description.splitlines()[0], 110, initial_indent=first, subsequent_indent=rest)
        lines.append(f"{line}\n")
    return (
        "usage: scratch-gpt2 COMMAND [--OPTION VALUE ...]\n\ncommands:\n"
        + "".join(lines)
        + "\nscratch-gpt2 COMMAND --help shows the options of a command and examples. `scratch-gpt2 sft` is what the\n"
        "documentation calls `python examples/sft.py`. On several devices, use\n"
        "`accelerate launch -m scratch_gpt2_examples.sft`.\n"
    )


def main() -> None:
    scripts = commands()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(help_text(scripts), end="")
        return
    if name == "--version":
        print(importlib.metadata.version("scratch_gpt2"))
        return
    by_stem = {path.stem: path for path in scripts.values()}
    script = scripts.get(name) or by_stem.get(name.replace("-", "_"))
    if script is None:
        close = difflib.get_close_matches(name, scripts, n=1)
        remedy = f"did you mean {close[0]}?" if close else "see scratch-gpt2 --help."
        print(f"error: {name!r} is not a command; {remedy}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
