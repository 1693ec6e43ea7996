"""The package is marked as typed (py.typed), so mypy must find no error in it."""

from pathlib import Path

from mypy import api

ROOT = Path(__file__).resolve().parents[1]


def test_mypy_finds_no_error(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    output, errors, _ = api.run(["--config-file", "pyproject.toml", "--cache-dir", str(tmp_path), "scratch_gpt2"])
    assert output.startswith("Success: no issues found in"), output + errors
