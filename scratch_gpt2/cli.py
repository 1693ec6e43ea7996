"""The command line of the example scripts: options, configuration files, and how a script ends."""

import argparse
import dataclasses
import errno
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .command_help import format_help, option_names, unknown_option
from .files import expand_home, is_disk_full

# What the operating system says of a file, as the end of a sentence with the remedy.
FILE_ERRORS = {
    errno.ENOENT: "does not exist; check the path",
    errno.EISDIR: "is a folder; give a file",
    errno.ENOTDIR: "is inside a file, not a folder; check the path",
    errno.EACCES: "cannot be opened; change its permissions or give another path",
    errno.EROFS: "is on a read-only disk; give another path",
}
NOT_GIVEN = object()
GIVEN = "_given"


def parse_arguments(
    *groups: type,
    description: str,
    defaults: Callable[[argparse.Namespace], dict[str, Any]] | None = None,
    arguments: list[str] | None = None,
) -> tuple[Any, ...]:
    """Parse the command line into one instance of each dataclass in `groups`, as HfArgumentParser does.

    A YAML or JSON file of options can be the first argument, or `--config FILE`. In order of precedence: the command
    line, the file, `defaults`, the defaults of the dataclasses.

    Args:
        groups: dataclasses; a field's metadata may hold `help`, `choices` and `public`.
        description: the script's docstring, for `--help`.
        defaults: called with the options as given so far; returns the defaults that depend on them.
        arguments: instead of `sys.argv[1:]`.

    `--help` and invalid options end the process, with exit codes 0 and 2. Raises ValueError and OSError for an invalid
    configuration file, and whatever a dataclass raises.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    script = sys.argv[0] or "script.py"
    parser = Parser(groups, add_help=False)
    parser.add_argument("--config")
    if "-h" in arguments or "--help" in arguments or "--help-all" in arguments:
        print(format_help(script, description, groups, everything="--help-all" in arguments), end="")
        sys.exit(0)
    if arguments and Path(arguments[0]).suffix in (".yaml", ".yml", ".json") and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    file = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file.add_argument("--config")
    config_file = file.parse_known_args(arguments)[0].config
    config = {} if config_file is None else read_config(Path(config_file).expanduser(), parser)
    for action in parser._actions:
        action.required = action.required and action.dest not in config
    given = config | parser.given(arguments)
    values = dict(given)
    if defaults is not None:
        unset = {action.dest: parser.get_default(action.dest) for action in parser._actions}
        values = defaults(argparse.Namespace(**unset | given)) | given
    return tuple(build(group, values, given) for group in groups)


def build(group: type, values: dict[str, Any], given: Iterable[str]):
    names = {field.name for field in dataclasses.fields(group) if field.init}
    instance = group(**expand_home({name: value for name, value in values.items() if name in names}))
    setattr(instance, GIVEN, names & set(given))
    return instance


def given_options(group) -> set[str]:
    """Which fields of a dataclass from `parse_arguments` the user has set, be it to their defaults."""
    return getattr(group, GIVEN, set())


class Parser(HfArgumentParser):
    """HfArgumentParser whose fields may be marked as public, and whose errors are one line."""

    def add_argument(self, *names, public: bool = False, **options):
        return super().add_argument(*names, **options)

    def error(self, message: str):
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)

    def given(self, arguments: list[str]) -> dict[str, Any]:
        """The options in `arguments`, by their names."""
        namespace = argparse.Namespace(**{action.dest: NOT_GIVEN for action in self._actions})
        namespace, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            self.error(unknown_option(unknown[0], option_names(self.dataclass_types)))
        return {name: value for name, value in vars(namespace).items() if value is not NOT_GIVEN and name != "config"}


def read_config(file: Path, parser: Parser) -> dict[str, Any]:
    """The options in a YAML or JSON file, with the types of the command line's."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is not a valid configuration file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must contain options and their values, such as `output_dir: runs/model`.")
    with_value = [action for action in parser._actions if action.dest != "config" and action.nargs != 0]
    actions = {option.lstrip("-"): action for action in with_value for option in action.option_strings}
    for name in values:
        if name not in actions:
            raise ValueError(f"{file}: {unknown_option(f'--{name}', actions)}")
    return {actions[name].dest: convert(value, actions[name], f"{file}: {name}") for name, value in values.items()}


def convert(value: Any, action: argparse.Action, name: str) -> Any:
    """A value from YAML or JSON as the command line would give it."""
    if action.nargs == "+" and value is not None:
        items = value if isinstance(value, list) else [value]
        return [convert_one(item, action, name) for item in items]
    return convert_one(value, action, name)


def convert_one(value: Any, action: argparse.Action, name: str) -> Any:
    if value is None or isinstance(value, dict | list) or action.type is None:
        return value
    try:
        converted = action.type(value if isinstance(value, str) else json.dumps(value))  # type: ignore[operator]
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        kind = getattr(action.type, "__name__", "value").replace("string_to_bool", "bool")
        raise ValueError(f"{name} is {value!r}, which is not a valid {kind}.") from error
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"{name} is {value!r}; choose from {', '.join(map(str, action.choices))}.")
    return converted


class Stopped(KeyboardInterrupt):
    """A run that a signal has stopped after saving; the message says how to continue it."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


def run_main(main: Callable[[], object]) -> None:
    """Call `main`; end with `error: ...` on stderr and exit code 1 where it raises what a user can cause.

    Those are OSError (a file, the network), ValueError (a value, a text), ImportError (an optional package), and any
    error that a full disk causes. Ctrl-C ends with one line and exit code 130, a closed standard output silently with
    141. Any other exception is a bug and keeps its traceback. Characters that the console cannot show are replaced.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes standard output once more at its end, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except Exception as error:
        message = str(error)
        if is_disk_full(error):
            message = f"there is no space left on the disk; free some, and run the command again ({error})."
        elif isinstance(error, OSError) and error.errno in FILE_ERRORS and error.filename:
            message = f"{os.fsdecode(error.filename)} {FILE_ERRORS[error.errno]}."
        elif not isinstance(error, OSError | ValueError | ImportError):
            raise
        print("error:", " ".join(message.split()), file=sys.stderr)
        sys.exit(1)
