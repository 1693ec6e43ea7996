"""Run the notebooks and save their outputs, for example after the embedded base was trained again.

python tests/save_notebooks.py
"""

import nbclient
import nbformat
from test_notebooks import NOTEBOOKS


def main() -> None:
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(path.parent)}}
        nbclient.NotebookClient(notebook, timeout=600, record_timing=False, resources=resources).execute()
        for cell in notebook.cells:
            if cell.cell_type == "code":  # without progress bars
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(notebook, path)
        print(path)


if __name__ == "__main__":
    main()
