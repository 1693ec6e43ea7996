"""transformers' own test mixins, taken from the sdist of the installed version.

The wheel has no tests; the sdist has `tests/test_*.py` and nothing below, so what these files import from
`tests/exporters`, `tests/generation` and `tests/utils` is replaced by empty stand-ins.
"""

import importlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import transformers
from filelock import FileLock

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "transformers-tests"
PACKAGE = "transformers_tests"


class SdistUnavailable(Exception):
    """The sdist of the installed transformers cannot be had from the package index."""


def fetch_tests():
    """Folder with the sdist's `tests/*.py`: downloaded once per version, shared by parallel test processes."""
    folder = CACHE / transformers.__version__
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                extracted = _extract_tests(_download_sdist(scratch), Path(scratch) / "tests")
                extracted.rename(folder)
    return folder


def _download_sdist(folder):
    requirement = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    command += ["--retries", "1", "--timeout", "20", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SdistUnavailable(f"pip cannot download the sdist of {requirement}: {last_line}")
    return next(Path(folder).glob("*.tar.gz"))


def _extract_tests(sdist, folder):
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            path = Path(member.name)
            if path.parent.parts[1:] == ("tests",) and path.suffix == ".py":
                archive.extract(member.replace(name=path.name), folder, filter="data")
    return folder


class _NoMarks:
    """Stands for `pytest.mark` during import: transformers' marks are unknown to `--strict-markers`."""

    def __getattr__(self, name):
        def mark(function=None, **kwargs):
            return mark if function is None else function

        return mark


def load_tests(*names):
    """Import modules of the sdist's `tests` folder, as a package separate from this project's tests.

    Raises `SdistUnavailable` where the package index is out of reach.
    """
    package = ModuleType(PACKAGE)
    package.__path__ = [str(fetch_tests())]
    sys.modules[PACKAGE] = package
    _stub("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _stub("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _stub("utils.test_configuration_utils", config_common_kwargs={"return_dict": False, "num_labels": 5})
    with (
        tempfile.TemporaryDirectory() as tiny_models,
        mock.patch.dict(os.environ, TRANSFORMERS_TINY_MODEL_PATH=tiny_models),
        # it would execute a second copy of the library from the sdist's `src` folder
        mock.patch("transformers.utils.direct_transformers_import", return_value=transformers),
        mock.patch.object(pytest, "mark", _NoMarks()),
    ):
        summary = Path(tiny_models) / "reports" / "tiny_model_summary.json"
        summary.parent.mkdir()
        summary.write_text(json.dumps({}))
        return [importlib.import_module(f"{PACKAGE}.{name}") for name in names]


def _stub(name, **attributes):
    module = ModuleType(f"{PACKAGE}.{name}")
    vars(module).update(attributes)
    sys.modules[module.__name__] = module
