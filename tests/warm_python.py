"""`python SCRIPT ...` in a process that has imported PyTorch before it starts, which takes most of a script's first
seconds. The process is forked from a server that has imported PyTorch and nothing of Hugging Face, whose libraries
read environment variables when they are imported.

Tests that are about imports, signals, encodings or several processes start a new interpreter instead.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

MODULES = ("torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "scipy.optimize")
TESTS = str(Path(__file__).parent)
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(list(MODULES))


def run_python(
    script: str | Path, *arguments: object, cwd: str | Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """The finished process, with what it wrote. `script` is a file or, if it has several lines, code."""
    with tempfile.TemporaryDirectory() as folder:
        if "\n" in str(script):
            code, script = script, Path(folder, "code.py")
            script.write_text(code, encoding="utf-8")
        command = [str(script), *map(str, arguments)]
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        target = (command, os.fspath(cwd or os.getcwd()), dict(os.environ if env is None else env), files)
        process = processes.Process(target=become_script, args=target)
        process.start()
        process.join()
        outputs = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return subprocess.CompletedProcess([sys.executable, *command], process.exitcode, *outputs)


def become_script(command: list[str], cwd: str, environment: dict[str, str], files: list[Path]) -> None:
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    added = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    others = [entry for entry in sys.path if entry not in ("", TESTS)]
    sys.path[:] = [str(Path(command[0]).resolve().parent), *added, *others]
    runpy.run_path(command[0], run_name="__main__")
