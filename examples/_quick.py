"""Answers `--help` and mistyped options of a script before its imports, which take seconds.

Every script runs this file first. Ctrl-C and a missing package during the imports then end in one line too, and an
import reports nothing that does not matter here.
"""

import importlib.util
import logging
import sys
import warnings
from pathlib import Path


def answer_at_once() -> None:
    package = importlib.util.find_spec("scratch_gpt2")  # finds it without importing it
    if package is None or not package.submodule_search_locations:
        return
    file = Path(package.submodule_search_locations[0], "command_help.py")
    spec = importlib.util.spec_from_file_location("command_help", file)
    command_help = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command_help)
    script = sys.modules["__main__"].__file__  # runpy puts this file's path into sys.argv[0]
    answer = command_help.answer(script, sys.argv[1:])
    if answer is not None:
        text, code = answer
        print(text, end="", file=sys.stderr if code else sys.stdout)
        sys.exit(code)


def end_in_one_line(kind: type[BaseException], error: BaseException, traceback) -> None:
    if kind is KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    elif kind is ModuleNotFoundError and error.name and importlib.util.find_spec(error.name.split(".")[0]) is None:
        package = error.name.split(".")[0]
        print(f"error: {Path(sys.argv[0]).name} needs {package}: pip install {package}.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = end_in_one_line
# On some CPUs bitsandbytes warns that an optional kernel is missing, also where nothing is in 4 bits.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # TRL reads it
answer_at_once()
