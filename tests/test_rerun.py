"""Cells in any order, and twice: each notebook with every cell doubled and earlier cells run again, at random, after later ones.

And on any processor: what a notebook is tested for must not hang on how numbers are rounded.
"""

import random
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
TIMES = ("preflight()", "experiments.costs(", "table", "full_cost", "time_guess")  # what measures time, or comes of it
COUNTS = ("projector_mode, show_digits", "images.shape", "of each digit", "of them show")  # what counts the images


def text(outputs):
    """What a cell said, without pictures, bars and widgets."""
    said = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    return said + "".join(o.data.get("text/plain", "") for o in outputs if o.output_type == "execute_result")


def run(path, order, stored=False, free=TIMES):
    """Runs the code cells of the notebook at `path` in `order`, in one kernel; returns what went wrong, or did not come out as at first.

    With `stored`, the outputs in the file count as the first. Cells with one of the words `free` may say what they like.
    """
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    places = order(len(cells))
    client = NotebookClient(nbformat.v4.new_notebook(metadata=notebook.metadata), timeout=300, allow_errors=True, resources={"metadata": {"path": path.parent}})
    troubles, first = [], {place: text(cell.outputs) for place, cell in enumerate(cells)} if stored else {}
    with client.setup_kernel():
        for number, place in enumerate(places):
            cell = nbformat.v4.new_code_cell(cells[place].source)
            client.nb.cells.append(cell)
            client.execute_cell(cell, len(client.nb.cells) - 1)
            error = next((f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error"), None)
            exempt = any(word in cell.source for word in free) or stored and "nbval-ignore-output" in cells[place].metadata.get("tags", [])
            otherwise = not exempt and text(cell.outputs) != first.setdefault(place, text(cell.outputs))
            if error or otherwise:
                troubles.append((number, place, cell.source, error or text(cell.outputs)))
    print(f"\n{path.stem}: {len(places)} runs of {len(cells)} cells")
    return troubles


def told(troubles):
    return "\n\n".join(f"run {number}, cell {place + 1}\n{source}\n→ {what}" for number, place, source, what in troubles)


def doubled(count):
    return [place for place in range(count) for _ in range(2)]


def going_back(count, seed=0):
    """Each cell in turn; after one in three, up to three of those above it once more; at the end, all of them in a shuffled order."""
    dice, order = random.Random(seed), []
    for place in range(count):
        order.append(place)
        if dice.random() < 1 / 3:
            order += [dice.randrange(place + 1) for _ in range(dice.randint(1, 3))]
    return order + dice.sample(range(count), count)


QUICK = {("4_digit_9", doubled), ("4_digit_9", going_back)}
RUNS = [
    pytest.param(path, order, id=f"{path.stem}-{order.__name__}", marks=() if (path.stem, order) in QUICK else pytest.mark.slow)
    for path in NOTEBOOKS
    for order in (doubled, going_back)
]


@pytest.mark.parametrize("path, order", RUNS)
def test_any_order(path, order):
    troubles = run(path, order)
    assert not troubles, told(troubles)


# What another processor does, only worse: each weight starts a millionth away from where it would, and training carries that far.
OTHERWISE_ROUNDED = """\
import torch
from torch import nn

reset_parameters = nn.Linear.reset_parameters

def reset(layer):
    reset_parameters(layer)
    noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed({number}), dtype=layer.weight.dtype)
    with torch.no_grad():
        layer.weight.mul_(1 + 1e-6 * noise)

nn.Linear.reset_parameters = reset
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_stored_verdicts_hold_for_another_rounding(path, number, tmp_path, monkeypatch):
    startup = tmp_path / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "rounding.py").write_text(OTHERWISE_ROUNDED.format(number=number))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    troubles = run(path, range, stored=True)
    assert not troubles, told(troubles)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_stored_verdicts_hold_on_the_full_mnist(path, full_mnist_root, monkeypatch):
    monkeypatch.setenv("LORA_MNIST", "full")
    monkeypatch.setenv("LORA_MNIST_ROOT", str(full_mnist_root))
    troubles = run(path, range, stored=True, free=TIMES + COUNTS)
    assert not troubles, told(troubles)
