"""What a script answers without doing anything: its help, and a suggestion for a mistyped option.

Standard library only: `examples/_quick.py` loads this file by its path, before the imports of a script.
"""

import ast
import builtins
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import os
import re
import shutil
import textwrap
import typing
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

# What run_clm.py, TRL and litgpt call our options: they work as aliases in the training scripts.
MODEL_ALIASES = ["--model_name_or_path", "--checkpoint_dir"]
TOKENIZER_ALIASES = ["--tokenizer_name", "--tokenizer_name_or_path"]
LENGTH_ALIASES = ["--block_size", "--max_seq_length", "--max_seq_len"]
ROW_ALIASES = ["--train_file", "--dataset_name", "--dataset"]
# Suggested where there is no such alias.
SYNONYMS = {
    "model_name_or_path": "model",
    "model_name": "model",
    "checkpoint_dir": "model",
    "tokenizer_name": "tokenizer",
    "dataset_name": "data",
    "dataset": "data",
    "train_file": "data",
    "block_size": "block_length",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "out_dir": "output_dir",
    "lr": "learning_rate",
}
# Options of those scripts that would mean something else here: an option of ours, and what to know of it.
INSTEAD = {
    "train_file": [("early_stopping", "make a folder from FILE with examples/prepare_classification.py --input FILE")],
    "dataset_name": [("early_stopping", "make a folder from it with examples/prepare_classification.py --hub NAME")],
    "validation_file": [
        ("eval_tokens", "the validation text is a part of --data, and --eval_tokens says how much of it is evaluated"),
        ("validation", "the validation rows are a share of --data, which --validation sets"),
        ("early_stopping", "the folder of --data holds the validation and test rows"),
    ],
    "validation_split_percentage": [("validation", "--validation takes a share, such as 0.05 for 5 percent")],
    "max_train_samples": [("max_rows", "--max_rows N reads the first N rows, before they are split")],
    "max_eval_samples": [
        ("eval_tokens", "--eval_tokens counts tokens"),
        ("validation", "--validation sets the share of the rows that is evaluated"),
    ],
    "config_name": [("preset", "--preset, --n_layer, --n_embd and --n_head choose the size of a new model")],
    "completion_only_loss": [("train_on_prompt", "only the answers are learned unless --train_on_prompt is given")],
    "load_in_4bit": [("qlora", "--qlora trains adapters on weights in 4 bits")],
    "load_in_8bit": [("qlora", "weights in 8 bits are not supported, and --qlora uses 4 bits")],
    "dtype": [("bf16", "the weights are trained in float32, and --bf16 computes in bfloat16")],
}
INSTEAD |= {
    "model_type": INSTEAD["config_name"],
    "model_name": INSTEAD["config_name"],
    "config_overrides": INSTEAD["config_name"],
    "dataset": INSTEAD["dataset_name"],
    "test_file": INSTEAD["validation_file"],
    "assistant_only_loss": INSTEAD["completion_only_loss"],
    "torch_dtype": INSTEAD["dtype"],
}
# Dataclasses of transformers and TRL, and where their options are.
LIBRARY = {
    "TrainingArguments": ("transformers", "training_args.py"),
    "_BaseConfig": ("trl", "trainer/base_config.py"),
    "DPOConfig": ("trl", "trainer/dpo_config.py"),
}
CONFIG_HELP = "YAML or JSON file of options; the command line overrides it."


def format_help(script: str, description: str, groups: Iterable[type], everything: bool = False) -> str:
    """The text of `--help`, or of `--help-all` with `everything`.

    Args:
        script: the script's file, such as `examples/sft.py`.
        description: the script's docstring. Its indented paragraphs are examples and come last, except after a colon.
        groups: dataclasses of the options. Of a subclass of TrainingArguments only the recipe is shown, that is, the
            defaults that the subclass sets, unless `everything` is true.
    """
    width = min(shutil.get_terminal_size().columns, 120)
    if is_installed(script):
        description = with_installed_names(description, Path(script).parent)
    paragraphs = description.strip("\n").split("\n\n")
    texts, examples = [], []
    for before, paragraph in pairwise(["", *paragraphs]):
        if not paragraph.startswith(" "):
            texts.append(textwrap.fill(" ".join(paragraph.split()), width))
        elif before.endswith(":"):
            texts.append(paragraph)
        else:
            examples.append(paragraph)
    parts = [f"usage: {called(script)} [CONFIG.yaml] [--OPTION VALUE ...]", *texts]
    own = [field for group in groups if not is_recipe(group) for field in dataclasses.fields(group)]
    rows = [option_row(field.name, described(field), default_text(field), width) for field in own]
    rows.append(option_row("config", CONFIG_HELP, None, width))
    parts.append("options:\n" + "\n".join(rows))
    if aliases := [f"{alias} = --{field.name}" for field in own for alias in field.metadata.get("aliases", [])]:
        parts.append(textwrap.fill(f"other names of options: {', '.join(aliases)}.", width, break_on_hyphens=False))
    for recipe in filter(is_recipe, groups):
        if everything:
            fields = list(dataclasses.fields(recipe))
            rows = [option_row(field.name, help_text(recipe, field), default_text(field), width) for field in fields]
            parts.append(
                "options of transformers.TrainingArguments, with the defaults of this script:\n" + "\n".join(rows)
            )
        else:
            fields = recipe_fields(recipe)
            explained = [field for field in fields if "help" in field.metadata]
            rows = [option_row(f.name, f.metadata["help"], default_text(f), width) for f in explained]
            defaults = [f"--{f.name} {default_text(f)}" for f in fields if f not in explained and default_text(f)]
            rows += textwrap.wrap(
                "  ".join(defaults), width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
            )
            title = "options of transformers.TrainingArguments work too (--help-all lists them); the recipe sets:"
            parts.append(title + "\n" + "\n".join(rows))
    if examples:
        parts.append("examples:\n" + "\n\n".join(examples))
    return "\n\n".join(parts) + "\n"


def is_installed(script: str) -> bool:
    """Whether a script is one of a wheel, which calls its folder `scratch_gpt2_examples`."""
    return Path(script).parent.name == "scratch_gpt2_examples"


def called(script: str) -> str:
    """How to call a script."""
    if is_installed(script):
        return f"scratch-gpt2 {Path(script).stem.replace('_', '-')}"
    return f"python {os.path.relpath(script)}"


def with_installed_names(text: str, folder: Path) -> str:
    """A description with the commands that a wheel has instead of the files in `examples`."""

    def command(found: re.Match) -> str:
        return f"scratch-gpt2 {found[1].replace('_', '-')}"

    text = re.sub(r"(--num_processes \d+) examples/(\w+)\.py", r"\1 -m scratch_gpt2_examples.\2", text)
    text = re.sub(r"(?:python )?examples/(\w+)\.py", command, text)
    return text.replace("examples/accelerate/", f"{folder}/accelerate/")


def described(field: dataclasses.Field) -> str:
    """A field's help, with what it can be."""
    literal = typing.get_args(field.type) if typing.get_origin(field.type) is typing.Literal else ()
    choices = field.metadata.get("choices", literal)
    return field.metadata.get("help", "") + (f" One of {', '.join(choices)}." if choices else "")


def is_recipe(group: type) -> bool:
    return any(base.__name__ == "TrainingArguments" for base in group.__mro__)


def recipe_fields(recipe: type) -> list[dataclasses.Field]:
    """The fields that subclasses of TrainingArguments add or give another default."""
    names: dict[str, None] = {}
    for base in reversed(recipe.__mro__):
        if is_recipe(base) and base.__name__ not in LIBRARY:
            names |= dict.fromkeys(inspect.get_annotations(base))
    by_name = {field.name: field for field in dataclasses.fields(recipe)}
    return [by_name[name] for name in names]


def help_text(group: type, field: dataclasses.Field) -> str | None:
    """A field's help, also where a subclass has changed its default and said no more."""
    for base in group.__mro__:
        own = base.__dict__.get("__dataclass_fields__", {}).get(field.name)
        if own is not None and "help" in own.metadata:
            return " ".join(own.metadata["help"].split())
    return None


def default_text(field: dataclasses.Field) -> str | None:
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return "required"
    else:
        default = getattr(field.default, "value", field.default)
    if default is None or default == [] or default == "":
        return None
    if isinstance(default, list):
        return " ".join(map(repr, default))
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


def option_row(name: str, text: str | None, default: str | None, width: int) -> str:
    """`  --name   text (default: ...)`, wrapped next to the name."""
    column = 28
    text = text or ""
    if default is not None:
        text += " (required)" if default == "required" else f" (default: {default})"
    lines = textwrap.wrap(text, max(width - column, 30)) or [""]
    name = f"  --{name}"
    first = f"{name:<{column}}{lines[0]}" if len(name) < column - 1 else f"{name}\n{' ' * column}{lines[0]}"
    return "\n".join([first.rstrip(), *(" " * column + line for line in lines[1:])])


def unknown_option(argument: str, known: Iterable[str]) -> str:
    """One sentence about an argument that no option of the names `known` takes."""
    known = set(known)
    name = argument.split("=")[0]
    if not name.startswith("--"):
        return f"{argument!r} belongs to no option; see --help."
    plain = name[2:].replace("-", "_")
    for ours, reason in INSTEAD.get(plain, []):
        if ours in known:
            return f"{name} is not an option: {reason}."
    match = SYNONYMS.get(plain)
    if match not in known:
        match = next(iter(difflib.get_close_matches(plain, known, n=1)), None)
    return f"{name} is not an option" + (f"; did you mean --{match}?" if match else "; see --help.")


def option_names(groups: Iterable[type]) -> list[str]:
    fields = [field for group in groups for field in dataclasses.fields(group)]
    aliases = [alias.lstrip("-") for field in fields for alias in field.metadata.get("aliases", [])]
    return [field.name for field in fields] + aliases + ["config", "help", "help_all"]


def public(help_text: str, aliases: list[str] | None = None) -> dict:
    """Metadata of an option that the run record, and with it the model card, may show."""
    return {"help": help_text, "public": True, "aliases": aliases or []}


# Before the imports


def answer(script: str, arguments: list[str]) -> tuple[str, int] | None:
    """What `script` prints for `arguments` without running, and its exit code; `None` if it has to run.

    Only the dataclasses of the script are executed, with the constants that they use. They may use built-in types,
    `Literal` and `field`; where they use more, the script answers by itself.
    """
    if "--help-all" in arguments:
        return None
    try:
        groups, description = script_groups(Path(script))
    except (KeyError, ValueError):
        return None
    if "--help" in arguments or "-h" in arguments:
        return format_help(script, description, groups), 0
    known = set(option_names(groups))
    if any(map(is_recipe, groups)):
        known |= library_options(groups)
    unknown = find_unknown(arguments, known)
    return None if unknown is None else (f"error: {unknown_option(unknown, known)}\n", 2)


def find_unknown(arguments: list[str], known: Iterable[str]) -> str | None:
    """The first argument that looks like an option but begins no known name; `--no_name` is known with `name`."""
    for argument in arguments:
        name = argument.split("=")[0]
        if re.fullmatch(r"--[A-Za-z][\w-]*", name):
            plain = name[2:].replace("-", "_")
            if not any(one.startswith(plain) or f"no_{one}".startswith(plain) for one in known):
                return argument
    return None


def script_groups(script: Path) -> tuple[list[type], str]:
    """The dataclasses that a script gives to `parse_arguments`, and its docstring.

    Raises ValueError or KeyError if they cannot be told without running the script.
    """
    tree = ast.parse(script.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "parse_arguments"]
    classes: dict[str, Any] = {}
    for name in ("recipes", "preferences"):
        file = Path(__file__).parent / "training" / f"{name}.py"
        classes |= execute_dataclasses(ast.parse(file.read_text(encoding="utf-8")), classes)
    classes |= execute_dataclasses(tree)
    groups = [classes[ast.unparse(argument)] for argument in call.args]
    return groups, ast.get_docstring(tree, clean=False) or ""


def execute_dataclasses(tree: ast.Module, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """The dataclasses of a module and the constants that they use, by name; those of other modules are in `known`.

    Of what a dataclass inherits from other modules only the name is kept. Statements that need an import are left out,
    except the import of constants and of `public` from this package.
    """
    scope: dict = dict(known or {})
    scope |= {"dataclass": dataclasses.dataclass, "field": dataclasses.field, "Literal": typing.Literal}
    scope["__name__"] = __name__
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            scope |= imported_constants(node)
            continue
        if isinstance(node, ast.ClassDef) and "dataclass" in map(ast.unparse, node.decorator_list):
            for base in map(ast.unparse, node.bases):
                scope.setdefault(base, dataclasses.dataclass(type(base, (), {})))
            node.body = [part for part in node.body if isinstance(part, ast.AnnAssign)] or [ast.Pass()]
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and not is_defined(part.annotation, scope):
                    part.annotation = ast.Name("object", ast.Load())
        elif not isinstance(node, ast.Assign | ast.AnnAssign | ast.FunctionDef):
            continue
        with contextlib.suppress(Exception):
            exec(compile(ast.fix_missing_locations(ast.Module([node], [])), "options", "exec"), scope)
    return scope


def imported_constants(node: ast.ImportFrom) -> dict[str, Any]:
    wanted = [alias.name for alias in node.names if alias.name.isupper() or alias.name == public.__name__]
    name = f"scratch_gpt2.{node.module}" if node.level == 2 else node.module or ""  # `from ..module` of a sub-package
    package, _, module = name.partition(".")
    file = Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
    if package != "scratch_gpt2" or not wanted or not file.is_file():
        return {}
    scope = execute_dataclasses(ast.parse(file.read_text(encoding="utf-8")))
    return {name: scope[name] for name in wanted if name in scope}


def is_defined(expression: ast.expr, scope: dict) -> bool:
    return all(
        node.id in scope or hasattr(builtins, node.id) for node in ast.walk(expression) if isinstance(node, ast.Name)
    )


def library_options(groups: Iterable[type]) -> set[str]:
    """The fields that `groups` inherit from the dataclasses in `LIBRARY`, from their source: importing them takes
    seconds."""
    bases = {base.__name__ for group in groups for base in group.__mro__}
    bases |= {"_BaseConfig"} if "DPOConfig" in bases else set()
    names = set()
    for name, (package, file) in LIBRARY.items():
        found = importlib.util.find_spec(package) if name in bases else None
        if found is None or found.origin is None:
            continue
        tree = ast.parse(Path(found.origin).parent.joinpath(file).read_text(encoding="utf-8"))
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        fields = [node.target for node in classes[name].body if isinstance(node, ast.AnnAssign)]
        names |= {target.id for target in fields if isinstance(target, ast.Name)}
    return names
