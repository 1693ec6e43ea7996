"""Text that comes with every Python, to train on without a download: its reference and its docstrings."""

import ast
import math
import sysconfig
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data"}


def python_documents(docstrings: bool, seconds: float = math.inf) -> list[str]:
    """The language reference, topic by topic, and the docstrings of the standard library, module by module. After
    `seconds`, the modules that have not been read are left out.

    The modules are read, not imported. Paragraphs of interpreter sessions are left out, as they are hardly prose, and
    so are repeated paragraphs, as in topics that contain others: no validation text may occur in the training text.
    """
    documents = list(topics.values())
    if docstrings:
        library, end = Path(sysconfig.get_path("stdlib")), time.monotonic() + seconds
        for file in sorted(library.rglob("*.py")):
            if time.monotonic() > end:
                break
            if not NOT_THE_LIBRARY & set(file.relative_to(library).parts):
                documents.append(read_docstrings(file))
    seen: set[str] = set()
    kept = []
    for text in documents:
        paragraphs = [p for p in dict.fromkeys(text.split("\n\n")) if ">>>" not in p and p not in seen]
        seen.update(paragraphs)
        kept.append("\n\n".join(paragraphs))
    return [text for text in kept if text.strip()]


def read_docstrings(file: Path) -> str:
    """The docstrings of a module, its classes and their functions."""
    described = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in statements(ast.parse(file.read_bytes())) if isinstance(node, described)]
    return "\n\n".join(docstring for node in nodes if (docstring := ast.get_docstring(node)))


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """A module and its statements in the order of `ast.walk`, which takes ten times as long for the expressions."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            inner = getattr(node, name, None)  # a lambda's body is one expression
            waiting.extend(inner if isinstance(inner, list) else ())
