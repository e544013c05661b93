"""The notebook runs from a fresh kernel, and what is stored in it is what it shows."""

import copy
import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "experiments" / "notebooks" / "losses.ipynb"


def code_cells(notebook):
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def shown(cell):
    """The kinds of output of a cell: its streams, errors and MIME types."""
    kinds = set()
    for output in cell.outputs:
        kinds |= {output.get("name", output.output_type), *output.get("data", ())}
    return kinds


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook, executed in a fresh kernel and in an empty folder."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook).values():
        cell.outputs = []
    resources = {"metadata": {"path": str(tmp_path_factory.mktemp("elsewhere"))}}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        # raises at the first cell that fails
        NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    return notebook


@pytest.mark.slow
def test_every_cell_runs_without_an_error_or_a_warning(executed):
    for name, cell in code_cells(executed).items():
        assert cell.execution_count is not None, name
        assert not shown(cell) & {"error", "stderr"}, (name, cell.outputs)


@pytest.mark.slow
def test_stored_outputs_are_of_the_kinds_that_the_cells_show(stored, executed):
    fresh = {name: shown(cell) for name, cell in code_cells(executed).items()}
    assert {name: shown(cell) for name, cell in code_cells(stored).items()} == fresh
    assert sum("image/png" in kinds for kinds in fresh.values()) == 4


def test_the_notebook_is_stored_as_executed_from_top_to_bottom(stored):
    nbformat.validate(stored)
    counts = [cell.execution_count for cell in code_cells(stored).values()]
    assert counts == list(range(1, len(counts) + 1))
    assert stored.metadata.kernelspec.name == "python3"
    assert NOTEBOOK.stat().st_size < 600_000


def test_nothing_stored_names_a_place_on_somebodys_machine(stored):
    stored = copy.deepcopy(stored)
    for cell in code_cells(stored).values():
        cell.source = ""
        for output in cell.outputs:
            output.get("data", {}).pop("image/png", None)  # base64 has slashes, and no paths
    text = json.dumps(stored)
    found = re.findall(r"(?:/(?:home|tmp|work|root|Users|usr|opt)\b|[A-Z]:\\\\).{0,40}", text)
    assert not found
