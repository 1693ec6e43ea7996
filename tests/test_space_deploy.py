"""What is uploaded to a Space on the Hub, and what `make` starts."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the Space needs pip install '.[space]'")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "space"))

import deploy
import gradio as gr


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
@pytest.mark.parametrize(
    ("target", "script"), [("demo", "space/app.py"), ("quickstart", "examples/quickstart.py --overwrite")]
)
def test_make_starts_what_it_says(target, script):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", target]
    done = subprocess.run(
        command, cwd=deploy.SPACE.parent, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].endswith(f".venv/bin/python {script}")


def imported_by(name: str) -> set[str]:
    """A module of the Space, those that it imports, and so on."""
    tree = ast.parse((deploy.SPACE / name).read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    own = {f"{module}.py" for module in names if (deploy.SPACE / f"{module}.py").is_file()}
    return {name}.union(*map(imported_by, own))


def test_what_is_uploaded_to_a_space():
    files = deploy.files_to_upload()
    assert {"app.py", "README.md", "requirements.txt", "handlers.py", "scratch_gpt2/__init__.py"} <= set(files)
    assert {"checkpoints/base/model.safetensors", "style.css", "sample.csv"} <= set(files)
    assert {name for name in files if name.endswith(".py") and "/" not in name} == imported_by("app.py")
    header = files["README.md"].read_text().split("---")[1]
    assert f"sdk_version: {gr.__version__}" in header and "app_file: app.py" in header


@pytest.fixture
def space_copy(tmp_path, monkeypatch) -> Path:
    """A Space folder with its small files and a package, where files can be added."""
    for name in (*deploy.PAGE, *(f"{module}.py" for module in deploy.MODULES)):
        (tmp_path / "space").mkdir(exist_ok=True)
        shutil.copyfile(deploy.SPACE / name, tmp_path / "space" / name)
    (tmp_path / "space" / "checkpoints" / "base").mkdir(parents=True)
    (tmp_path / "space" / "checkpoints" / "base" / "config.json").write_text("{}")
    (tmp_path / "scratch_gpt2").mkdir()
    (tmp_path / "scratch_gpt2" / "__init__.py").write_text("")
    monkeypatch.setattr(deploy, "SPACE", tmp_path / "space")
    monkeypatch.setattr(deploy, "PACKAGE", tmp_path / "scratch_gpt2")
    return tmp_path


def test_nothing_else_is_uploaded(space_copy):
    expected = set(deploy.files_to_upload())
    for name in (".env", ".git/config", ".gradio/certificate.pem", ".venv/lib/x.py", "runs/sft/model.safetensors"):
        for folder in ("space", "space/checkpoints", "space/checkpoints/base", "scratch_gpt2"):
            file = space_copy / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("HF_TOKEN=x")
    unexpected = set(deploy.files_to_upload()) - expected
    assert unexpected <= {  # a model below checkpoints/, as far as it can be told
        "checkpoints/runs/sft/model.safetensors",
        "checkpoints/base/runs/sft/model.safetensors",
    }


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("space/checkpoints/base/secrets.json", "{}"),
        ("space/checkpoints/base/run.json", '{"token": "hf_' + "a" * 34 + '"}'),
        ("scratch_gpt2/judge.py", 'KEY = "sk-' + "a" * 40 + '"'),
        ("space/app.py", "-----BEGIN RSA PRIVATE KEY-----"),
        ("space/README.md", "ghp_" + "A" * 36),
    ],
)
def test_a_secret_is_not_uploaded(space_copy, name, content):
    (space_copy / name).write_text(content)
    with pytest.raises(ValueError, match="looks like a secret or is a link; remove it from the folder"):
        deploy.files_to_upload()


def test_the_list_is_shown_before_anything_is_uploaded(space_copy, monkeypatch, capsys):
    uploaded = []
    monkeypatch.setattr(deploy, "deploy", lambda api, repo, private, files: uploaded.append(repo) or "address")
    monkeypatch.setattr(sys, "argv", ["deploy.py", "--repo", "me/space"])
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(capsys.readouterr().out) or "n")
    deploy.main()
    assert "checkpoints/base/config.json" in asked[0] and f"bytes in {len(deploy.files_to_upload())} files" in asked[0]
    assert uploaded == [] and capsys.readouterr().out == "Nothing was uploaded.\n"
    monkeypatch.setattr("builtins.input", lambda question: "y")
    deploy.main()
    monkeypatch.setattr(sys, "argv", ["deploy.py", "--repo", "me/space", "--yes"])
    deploy.main()
    assert uploaded == ["me/space", "me/space"]
