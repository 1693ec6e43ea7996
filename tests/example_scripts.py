"""Example scripts, run in the process of the tests."""

import runpy
import sys
from pathlib import Path


def run_in_process(script: Path, monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the script."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    code = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()
