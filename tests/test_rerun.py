"""Learners run cells twice and out of order: both are safe, and a cell says the same again."""

import random
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
ALL_OF_IT, LITTLE = (
    "train(mine, mnist.train, seed=seed)",
    "train(mine, mnist.train, seed=seed, max_batches=20)",
)


def text(outputs):
    """What a cell said, without pictures, bars and widgets."""
    said = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    return said + "".join(o.data.get("text/plain", "") for o in outputs if o.output_type == "execute_result")


def run(path, order):
    """Runs the code cells in `order` in one kernel; returns what went wrong or came out differently."""
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    folder = {"metadata": {"path": str(path.parent)}}
    empty = nbformat.v4.new_notebook(metadata=notebook.metadata)
    client = NotebookClient(empty, timeout=300, allow_errors=True, resources=folder)
    troubles, first = [], {}
    with client.setup_kernel():
        for place in order(len(cells)):
            cell = nbformat.v4.new_code_cell(cells[place].source.replace(ALL_OF_IT, LITTLE))
            client.nb.cells.append(cell)
            client.execute_cell(cell, len(client.nb.cells) - 1)
            error = next((f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error"), None)
            varies = "nbval-ignore-output" in cells[place].metadata.get("tags", [])
            changed = not varies and text(cell.outputs) != first.setdefault(place, text(cell.outputs))
            if error or changed:
                troubles.append(f"cell {place + 1}\n{cell.source}\n→ {error or text(cell.outputs)}")
    return troubles


def doubled(count):
    return [place for place in range(count) for _ in range(2)]


def going_back(count):
    """Each cell in turn; after one in three, up to three of those above it once more."""
    dice, order = random.Random(0), []
    for place in range(count):
        order.append(place)
        if dice.random() < 1 / 3:
            order += [dice.randrange(place + 1) for _ in range(dice.randint(1, 3))]
    return order


RUNS = [
    pytest.param(
        path,
        order,
        id=f"{path.stem}-{order.__name__}",
        marks=() if path.name[0] == "3" and order is doubled else pytest.mark.slow,
    )
    for path in NOTEBOOKS
    for order in (doubled, going_back)
]


@pytest.mark.parametrize("path, order", RUNS)
def test_cells_can_be_run_twice_and_out_of_order(path, order):
    troubles = run(path, order)
    assert not troubles, "\n\n".join(troubles)
