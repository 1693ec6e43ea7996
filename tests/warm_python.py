"""`python SCRIPT ...` in a process that has imported libraries before it starts, which takes most of a script's first
seconds. The process is forked from one of two servers. The first one has imported PyTorch. The second one is forked
from the first one and has imported Hugging Face's libraries too. They read environment variables when they are
imported; a script with other values of these variables is forked from the first server.

Tests that are about imports, signals or encodings start a new interpreter instead.
"""

import atexit
import contextlib
import functools
import importlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

MODULES = ("torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "scipy.optimize")
MODULES += ("pandas", "networkx", "bitsandbytes")  # which Hugging Face's libraries import
LIBRARIES = ("transformers.trainer", "datasets", "peft", "evaluate", "matplotlib.backends.backend_agg")
READ_BY_LIBRARIES = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "HOME", "XDG_", "PYTHON", "MPL")
ON_THE_PROCESSOR = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TESTS = str(Path(__file__).parent)
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(list(MODULES))


def run_python(
    script: str | Path, *arguments: object, cwd: str | Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """The finished process, with what it wrote. `script` is a file or, if it has several lines, code."""
    return run_jobs([script, *arguments], cwd, [dict(os.environ if env is None else env)])[0]


def run_two(
    script: str | Path, *arguments: object, variables: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess]:
    """Two processes of one run on the processor, as `accelerate launch` or `torchrun` starts them."""
    shared = os.environ | ON_THE_PROCESSOR | {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | (variables or {})
    return run_jobs([script, *arguments], None, [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"])


def accelerate_launch(config: Path, *command: object) -> subprocess.CompletedProcess:
    """Two new interpreters, started by `accelerate launch` with a configuration of examples/accelerate."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    launch += ["--mixed_precision", "no", "--main_process_port", free_port(), *command]
    environment = os.environ | ON_THE_PROCESSOR
    return subprocess.run(list(map(str, launch)), env=environment, capture_output=True, text=True, timeout=300)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


def run_jobs(command: list, cwd: str | Path | None, environments: list[dict]) -> list[subprocess.CompletedProcess]:
    """A process for each of the environments, all at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        script = str(command[0])
        if "\n" in script:
            Path(folder, "code.py").write_text(script, encoding="utf-8")
            script = os.path.join(folder, "code.py")
        command = [script, *map(str, command[1:])]
        jobs = []
        for number, environment in enumerate(environments):
            files = [Path(folder, f"{name}-{number}") for name in ("stdout", "stderr")]
            jobs.append((command, os.fspath(cwd or os.getcwd()), environment, files))
        if read_by_libraries(environments[0]) == read_by_libraries(os.environ):
            server = libraries_server(tuple(read_by_libraries(os.environ).items()))
            server.send(jobs)
            codes = server.recv()
        else:
            codes = exit_codes(processes, jobs)
        outputs = [[file.read_text(encoding="utf-8", errors="replace") for file in job[-1]] for job in jobs]
    command = [sys.executable, *command]
    return [subprocess.CompletedProcess(command, code, *texts) for code, texts in zip(codes, outputs, strict=True)]


def exit_codes(context, jobs: list[tuple]) -> list[int]:
    running = [context.Process(target=become_script, args=job) for job in jobs]
    for process in running:
        process.start()
    for process in running:
        process.join()
    return [process.exitcode for process in running]


def read_by_libraries(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_BY_LIBRARIES)}


@functools.cache
def libraries_server(variables: tuple[tuple[str, str], ...]) -> Connection:
    """To the second server, which ends when the connection is closed."""
    ours, theirs = multiprocessing.Pipe()
    processes.Process(target=serve, args=(theirs, dict(os.environ))).start()
    theirs.close()
    atexit.register(ours.close)  # before multiprocessing waits for its processes
    return ours


def serve(connection: Connection, environment: dict[str, str]) -> None:
    set_environment(environment)
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(EOFError):
        while True:
            connection.send(exit_codes(multiprocessing.get_context("fork"), connection.recv()))


def set_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    added = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [*added, *(entry for entry in sys.path if entry not in ("", TESTS, *added))]


def become_script(command: list[str], cwd: str, environment: dict[str, str], files: list[Path]) -> None:
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    os.chdir(cwd)
    set_environment(environment)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).resolve().parent))
    runpy.run_path(command[0], run_name="__main__")
