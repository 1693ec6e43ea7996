"""Text that comes with every Python, to train on without a download: its reference and its docstrings."""

import ast
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data"}


def python_documents(docstrings: bool) -> list[str]:
    """The language reference, topic by topic, and the docstrings of the standard library, module by module.

    The modules are read, not imported. Paragraphs of interpreter sessions are left out, as they are hardly prose, and
    so are repeated paragraphs, as in topics that contain others: no validation text may occur in the training text.
    """
    documents = list(topics.values())
    if docstrings:
        library = Path(sysconfig.get_path("stdlib"))
        files = sorted(library.rglob("*.py"))
        documents += [read_docstrings(f) for f in files if not NOT_THE_LIBRARY & set(f.relative_to(library).parts)]
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
    nodes = [node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, described)]
    return "\n\n".join(docstring for node in nodes if (docstring := ast.get_docstring(node)))
