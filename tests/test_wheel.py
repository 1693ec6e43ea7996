"""The contents of the wheel and the sdist that `python -m build` makes."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import scratch_gpt2

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, set[str]]:
    """The wheel, and the names of the files in the folder of the sdist."""
    pytest.importorskip("build", reason="needs pip install build")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,), (sdist,) = output.glob("*.whl"), output.glob("*.tar.gz")
    assert wheel.name == f"scratch_gpt2-{scratch_gpt2.__version__}-py3-none-any.whl"
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    return wheel, inside


def test_the_wheel_contains_the_package_and_the_scripts(built):
    wheel, _ = built
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "scratch_gpt2").rglob("*.py")}
    scripts = {f"scratch_gpt2_examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}
    scripts |= {f"scratch_gpt2_examples/accelerate/{path.name}" for path in (ROOT / "examples/accelerate").iterdir()}
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == package | scripts | {"scratch_gpt2/py.typed", "scratch_gpt2/hub/card_template.md"}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A function that runs `scratch-gpt2` of the wheel, installed into a new folder, in another folder."""
    target, workplace = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("workplace")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, built[0]]
    subprocess.run(pip, check=True, capture_output=True)

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}
        command = [target / "bin" / "scratch-gpt2", *arguments]
        return subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True)

    return run, target, workplace


def test_the_command_lists_what_it_can_do(installed):
    run, _, _ = installed
    done = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    named = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert {"prepare", "prepare-classification", "pretrain", "classify", "sft", "respond", "judge"} <= set(named)
    assert {"evaluate", "perplexity", "hellaswag", "generate", "push", "quickstart"} <= set(named)
    assert "  sft                     Turn a GPT-2 into an assistant that follows instructions.\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 120 and done.stdout == run().stdout == run("help").stdout
    assert run("--version").stdout == f"{scratch_gpt2.__version__}\n"


def test_a_mistyped_command_gets_a_suggestion(installed):
    run, _, _ = installed
    for typed, remedy in (("pretain", "did you mean pretrain?"), ("zzz", "see scratch-gpt2 --help.")):
        done = run(typed)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: {typed!r} is not a command; {remedy}\n"


def test_the_help_of_a_command_names_commands(installed):
    run, target, _ = installed
    text = run("sft", "--help").stdout
    assert text.startswith("usage: scratch-gpt2 sft [CONFIG.yaml] [--OPTION VALUE ...]\n")
    assert "    scratch-gpt2 sft --data instruction-data.json --output_dir runs/assistant\n" in text
    assert f"--config_file {target}/scratch_gpt2_examples/accelerate/ddp.yaml --num_processes 2" in text
    assert "--num_processes 2 -m scratch_gpt2_examples.sft" in text
    assert " examples/" not in text
    assert run("push", "--help").stdout == run("push-to-hub", "--help").stdout


def test_the_command_works_where_only_the_wheel_is(installed):
    run, target, workplace = installed
    (workplace / "a.txt").write_text("One fine day, a dog ran home.\n" * 40)
    done = run("prepare", "--input", "a.txt", "--output", "shards", "--train_tokenizer", "300")
    assert done.returncode == 0, done.stderr
    index = json.loads((workplace / "shards" / "index.json").read_text())
    assert sum(shard["bytes"] for shard in index["shards"]) == 1200
    code = "import importlib.util; print(importlib.util.find_spec('scratch_gpt2').origin)"
    environment = os.environ | {"PYTHONPATH": str(target)}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=workplace, capture_output=True, text=True
    )
    assert found.stdout == f"{target}/scratch_gpt2/__init__.py\n"


def test_the_sdist_can_be_built_again(built):
    _, sdist = built
    assert {"pyproject.toml", "setup.cfg", "README.md", "LICENSE", "scratch_gpt2/__init__.py"} <= sdist
    assert "scratch_gpt2/py.typed" in sdist


def test_the_version_is_defined_in_one_place():
    files = [*ROOT.glob("*.toml"), ROOT / "setup.cfg", *(ROOT / "scratch_gpt2").rglob("*.py")]
    assert [file.name for file in files if f'"{scratch_gpt2.__version__}"' in file.read_text()] == ["__init__.py"]
    assert "version = attr: scratch_gpt2.__version__" in (ROOT / "setup.cfg").read_text()
