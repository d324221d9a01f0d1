"""A slider moved while a cell trains: JupyterLab may run the widget on another thread at that very moment."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import expect
from test_browser_course import run
from test_browser_widgets import browser, lab, run_all, shows, slider  # noqa: F401  (fixtures)

MOVES = ["rank →"] * 6 + ["α →"] + ["rank ←"] * 6 + ["α →"] + ["rank →"] * 6  # no setting comes twice: each move trains
PREPARE = """\
import copy, os, threading, time
os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch comes: the cell and the slider's thread have a core each
import torch
from ipykernel.comm.comm import BaseComm
# ipykernel 7.0 to 7.3 hear each move at once, on the thread the page asks for; 7.4 keeps it until the cell is done. Here: at once.
BaseComm._reply_subshell_for = lambda comm, data, default: default
from lora_helpers import LoRAExplorer, add_lora, freeze_base, load_mnist, only_digit, pretrained_base, train

mnist = load_mnist()
base = pretrained_base(mnist, progress=False)
nines = only_digit(mnist.train, 9)

def training():  # A and the order of the images come from PyTorch's global random stream
    torch.manual_seed(5)
    net = freeze_base(add_lora(copy.deepcopy(base), rank=4))
    losses = train(net, nines, max_batches=40, progress=False)
    return torch.tensor(losses), net.state_dict(), torch.rand(3)

def equal(one, other):
    same = all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    return torch.equal(one[0], other[0]) and same and torch.equal(one[2], other[2])

alone = training()
explorer = LoRAExplorer(base, mnist)
shown = {explorer.settings: explorer.result}
heard = []

def listen(change):
    heard.append((explorer.origin, threading.current_thread() is threading.main_thread(), running))
    shown[explorer.settings] = change.new

running = False
explorer.observe(listen, "result")
explorer"""
TRAIN = f"""\
running, trainings, moved, seen = True, [], time.monotonic(), 0
while len(heard) < {len(MOVES)} and time.monotonic() - moved < 120:  # seconds without a move: far more than one takes
    trainings.append(equal(training(), alone))
    if len(heard) > seen:
        moved, seen = time.monotonic(), len(heard)
running = False
print(f"trainings: {{len(trainings) > 1}}, all the same to the bit: {{all(trainings)}}")
print(f"moves while the cell ran: {{sum(meanwhile for _, _, meanwhile in heard)}}")
print("each trained:", all(origin.startswith("just trained") for origin, _, _ in heard))
print("on another thread:", not any(main for _, main, _ in heard))"""
COMPARE = """\
undisturbed = LoRAExplorer(base, mnist)
def figures(result):
    norms = torch.tensor(list(result.norms.values()))
    return [result.on.predictions, result.off.predictions, result.repaired, result.broken, norms, *result.singular_values.values()]
right = []
for settings, result in shown.items():
    undisturbed.apply(settings)
    right.append(all(map(torch.equal, figures(result), figures(undisturbed.result))))
print(f"settings: {len(right)}, all with the figures of an explorer left alone: {all(right)}")
print("the base kept its bits:", all(torch.equal(a, b) for a, b in zip(base.parameters(), pretrained_base(mnist).parameters())))"""


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """In place of the collection, one notebook that counts the moves of a slider while it trains."""
    folder = tmp_path_factory.mktemp("served")
    kernel = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}
    sources = (PREPARE, TRAIN.replace(str(len(MOVES)), "0", 1), COMPARE)  # at first, run all goes through without a move
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources], metadata=kernel), folder / "threads.ipynb")
    return folder


def test_twenty_moves_while_a_cell_trains(lab, browser):  # noqa: F811
    page = run_all(lab, browser, "threads.ipynb", height=1400)
    expect(page.get_by_text("the base kept its bits: True")).to_be_visible(timeout=120_000)
    panel = page.locator(".lora-panel").first
    shows(panel, "LoRA on · rank 1 · α 1 · 100 batches of digit 9 · ")
    said = run(page, "running, trainings", TRAIN)
    rank, alpha = 1, 1
    for move in MOVES:
        number, key = (0 if move.startswith("rank") else 1), ("ArrowRight" if move.endswith("→") else "ArrowLeft")
        slider(panel, number).press(key)
        factor = 2.0 if key == "ArrowRight" else 0.5
        rank, alpha = (round(rank * factor), alpha) if number == 0 else (rank, round(alpha * factor))
        shows(panel, f"LoRA on · rank {rank} · α {alpha} · 100 batches of digit 9 · ")
    expect(said).to_contain_text("trainings: True, all the same to the bit: True", timeout=100_000)
    expect(said).to_contain_text(f"moves while the cell ran: {len(MOVES)}")
    expect(said).to_contain_text("each trained: True")
    expect(said).to_contain_text("on another thread: True")
    compared = run(page, "undisturbed = ")
    expect(compared).to_contain_text("settings: 21, all with the figures of an explorer left alone: True", timeout=100_000)
    expect(compared).to_contain_text("the base kept its bits: True")
    assert not page.errors
    page.close()
