"""The contents of the wheel and the sdist that `python -m build` makes."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import scratch_gpt2

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[set[str], set[str]]:
    """Names of the files in the wheel, and of those in the folder of the sdist."""
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
    return set(zipfile.ZipFile(wheel).namelist()), inside


def test_the_wheel_contains_only_the_package(built):
    wheel, _ = built
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "scratch_gpt2").rglob("*.py")}
    outside = {name for name in wheel if ".dist-info/" not in name}
    assert outside == package | {"scratch_gpt2/py.typed", "scratch_gpt2/hub/card_template.md"}


def test_the_sdist_can_be_built_again(built):
    _, sdist = built
    assert {"pyproject.toml", "setup.cfg", "README.md", "LICENSE", "scratch_gpt2/__init__.py"} <= sdist
    assert "scratch_gpt2/py.typed" in sdist


def test_the_version_is_defined_in_one_place():
    files = [*ROOT.glob("*.toml"), ROOT / "setup.cfg", *(ROOT / "scratch_gpt2").rglob("*.py")]
    assert [file.name for file in files if f'"{scratch_gpt2.__version__}"' in file.read_text()] == ["__init__.py"]
    assert "version = attr: scratch_gpt2.__version__" in (ROOT / "setup.cfg").read_text()
