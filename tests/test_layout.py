"""The layout of the package: which module may import which, the size of files and functions, and what an import loads.

Imports point one way, from the last of the layers below to the first; the design of the project decides their order.
"""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from scratch_gpt2.checkpoint_files import TRAVELLING_FILES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "scratch_gpt2"
# A module may import those of its own layer and of the layers before it. A folder stands for its modules.
LAYERS = [
    [
        "files",
        "hardware",
        "command_help",
        "configuration_scratch_gpt2",
        "linear_cross_entropy",
        "growing_cache",
        "cpu_kernels",
    ],
    ["checkpoint_files"],
    ["modeling_scratch_gpt2"],
    ["heads_scratch_gpt2", "openai_weights", "tokenization", "reference", "cpu_inference", "data"],
    ["prediction"],
    ["__init__"],
    ["cli", "hub"],
    ["training", "evaluation", "inspection"],
    ["gguf_export", "vllm_plugin"],
]
ALLOWED_UPWARD = {
    ("checkpoint_files", "openai_weights"),  # `from_pretrained` converts other formats if the package is there
    ("modeling_scratch_gpt2", "heads_scratch_gpt2"),  # where checkpoints of version 0.1 look for the heads
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 560, 60
LONG_FUNCTIONS = {"scratch_gpt2/evaluation/perplexity.py:perplexity"}  # 28 lines of it document its arguments
HEAVY = ("gradio", "datasets", "evaluate", "peft", "matplotlib", "sklearn", "trl")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


CODE = python_files("scratch_gpt2", "examples", "space", "tests")


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    """`data.rows` for scratch_gpt2/data/rows.py; `data` for its __init__.py, `__init__` for the package's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1]) if len(parts) > 1 and parts[-1] == "__init__" else ".".join(parts)


MODULES = {module_name(path): path for path in python_files("scratch_gpt2")}


def imported_names(node: ast.AST, name: str) -> list[str]:
    """The absolute names that an import statement of module `name` asks for; none for other statements."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = ["scratch_gpt2", *name.split(".")]
        if name == "__init__" or MODULES[name].name != "__init__.py":
            package.pop()
        base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def imports_of(name: str, statements: Iterator[ast.AST]) -> set[str]:
    """The modules of the package that `statements` of module `name` import."""
    asked = {asked for node in statements for asked in imported_names(node, name)}
    inside = {part.removeprefix("scratch_gpt2.") for part in asked if part.startswith("scratch_gpt2.")}
    found = {part for part in inside if part in MODULES}
    # `from scratch_gpt2 import X` asks for a name of the package itself, unless X is a module.
    names = inside - found - {part for part in inside if part.rpartition(".")[0] in MODULES}
    return (found | ({"__init__"} if "scratch_gpt2" in asked and names else set())) - {name}


def at_module_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Statements that run when the module is imported."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names or name.partition(".")[0] in names)


def test_every_module_has_a_layer():
    assert [name for name in MODULES if not any(name.partition(".")[0] in names for names in LAYERS)] == []
    assert [part for names in LAYERS for part in names if not any(m.partition(".")[0] == part for m in MODULES)] == []


def test_imports_point_one_way():
    """Those inside of functions too."""
    upward = {
        (name, imported)
        for name, path in MODULES.items()
        for imported in imports_of(name, ast.walk(parse(path)))
        if layer(imported) > layer(name)
    }
    assert upward == ALLOWED_UPWARD


def test_an_import_leads_back_to_no_module():
    edges = {name: imports_of(name, at_module_level(parse(path))) for name, path in MODULES.items()}
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circular import: {' -> '.join([*path, name])}"
        if name not in finished:
            for imported in edges[name]:
                visit(imported, (*path, name))
            finished.add(name)

    for name in MODULES:
        visit(name, ())


def test_the_package_does_not_know_its_examples_or_its_space():
    beside = {path.stem for path in python_files("examples", "space", "tests")}
    for name, path in MODULES.items():
        asked = {asked.partition(".")[0] for node in ast.walk(parse(path)) for asked in imported_names(node, name)}
        assert asked & (beside | {"examples", "space", "tests"}) == set(), name


@pytest.mark.parametrize("folder", ["examples", "space", "tests"])
def test_what_is_imported_from_the_package_exists(folder):
    """Lazy imports too, which fail only when a user gets there."""
    asked = {
        (node.module, alias.name)
        for path in python_files(folder)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "scratch_gpt2"
        for alias in node.names
    }
    missing = []
    for module, name in sorted(asked):
        found = importlib.import_module(module)
        if not hasattr(found, name) and f"{module}.{name}".removeprefix("scratch_gpt2.") not in MODULES:
            missing.append(f"{module}.{name}")
    assert missing == []


def test_files_that_travel_import_only_each_other_torch_and_transformers():
    """And what transformers itself depends on. The Hub's loader copies modules imported as `from .name import`."""
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors", "scratch_gpt2"}
    for file in TRAVELLING_FILES:
        tree = parse(PACKAGE / file)
        relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        assert all(node.level == 1 and f"{node.module}.py" in TRAVELLING_FILES for node in relative), file
        asked = {name.partition(".")[0] for node in ast.walk(tree) for name in imported_names(node, Path(file).stem)}
        assert {name for name in asked - allowed if name not in sys.stdlib_module_names} == set(), file


def test_files_are_short():
    sizes = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in CODE}
    assert {name for name, lines in sizes.items() if lines > MAX_FILE_LINES} == set()


def test_functions_fit_a_screen():
    sizes = {
        f"{path.relative_to(ROOT).as_posix()}:{node.name}": node.end_lineno - node.lineno + 1
        for path in CODE
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name for name, lines in sizes.items() if lines > MAX_FUNCTION_LINES} == LONG_FUNCTIONS


def test_importing_the_package_is_light():
    code = f"import json, sys, scratch_gpt2\nprint(json.dumps([n for n in {HEAVY} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.xdist_group("alone")
def test_groups_of_tests_share_a_worker(request):
    """pytest-xdist ignores groups silently where it does not know this version of pytest."""
    if hasattr(request.config, "workerinput") and request.config.getoption("dist") == "loadgroup":
        assert request.node.nodeid.endswith("@alone")
