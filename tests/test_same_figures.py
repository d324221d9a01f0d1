"""The same figures on every screen: each notebook's compared output does not depend on threads or on
rounding."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
STARTUP = """\
import sys
sys.path.insert(0, {folder!r})
import plain_arithmetic
plain_arithmetic.{call}
open({done!r}, "w", encoding="utf-8").close()
"""


def said(outputs):
    """What nbval compares of a cell: printed text and the text of its value."""
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    return printed + "".join(o.data.get("text/plain", "") for o in outputs if "data" in o)


def differences(path, call, tmp_path, monkeypatch):
    """The cells of a notebook that say something else when it is run after `plain_arithmetic`'s `call`."""
    startup = tmp_path / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "change.py").write_text(
        STARTUP.format(folder=str(Path(__file__).parent), call=call, done=str(tmp_path / "done")),
        encoding="utf-8",
    )
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    stored = [said(cell.outputs) if cell.cell_type == "code" else "" for cell in notebook.cells]
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert (tmp_path / "done").exists(), "IPython only warns where the startup file fails"
    return [
        f"cell {place}\n{cell.source}\nstored: {before}\nnow: {said(cell.outputs)}"
        for place, (cell, before) in enumerate(zip(notebook.cells, stored))
        if cell.cell_type == "code"
        and "nbval-ignore-output" not in cell.metadata.get("tags", [])
        and said(cell.outputs) != before
    ]


def pick(*numbers):
    return [path for path in NOTEBOOKS if path.name[0] in numbers]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_two_threads_print_the_same_as_one(path, tmp_path, monkeypatch):
    found = differences(path, "use_threads(2)", tmp_path, monkeypatch)
    assert not found, "\n\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("path", pick("2", "3", "4", "5"), ids=lambda path: path.stem)
def test_plain_autograd_prints_the_same_as_the_quick_arithmetic(path, tmp_path, monkeypatch):
    found = differences(path, "use_autograd()", tmp_path, monkeypatch)
    assert not found, "\n\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("path", pick("3"), ids=lambda path: path.stem)  # of 4 see test_experiments.py
def test_plain_autograd_in_float64_prints_the_same(path, tmp_path, monkeypatch):
    found = differences(path, "use_autograd(double=True)", tmp_path, monkeypatch)
    assert not found, "\n\n".join(found)
