"""Every notebook runs from top to bottom, offline, on the embedded base, and its saved outputs are small."""

import asyncio
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("notebooks")  # one worker: they share a process
NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "examples" / "notebooks").glob("*.ipynb"))


def test_there_are_six_notebooks():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.fixture(scope="module")
def kernel():
    """One process for all notebooks, which imports the libraries once. Each notebook begins with no names defined."""
    pytest.importorskip("nbclient")
    jupyter_client = pytest.importorskip("jupyter_client")
    manager = jupyter_client.AsyncKernelManager()
    asyncio.run(manager.start_kernel(cwd=str(NOTEBOOKS[0].parent)))
    yield manager
    asyncio.run(manager.shutdown_kernel(now=True))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, kernel):
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    for cell in notebook.cells:
        cell.source = cell.source.replace("STEPS, BATCH, PEAK = 200,", "STEPS, BATCH, PEAK = 125,")
    done = nbclient.NotebookClient(notebook, timeout=300, km=kernel).execute()  # raises at the first cell that fails
    assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_saved_with_its_outputs(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_a_goal_and_five_exercises(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    first, last = notebook.cells[0].source, notebook.cells[-1].source
    assert first.startswith(f"# {int(path.stem[:2])}. ")
    assert "\n**Goal.** " in first and "\n**Prerequisites.** " in first
    exercises, solutions = last.split("<details><summary>Solutions</summary>")
    assert exercises.startswith("## Exercises\n") and solutions.endswith("</details>")
    for part in (exercises, solutions):
        assert re.findall(r"^(\d)\. ", part, flags=re.MULTILINE) == ["1", "2", "3", "4", "5"]
