"""Notebook 1 shows a network and two loops before it imports ours: both compute the same."""

from pathlib import Path

import nbformat
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import lora_helpers
from lora_helpers import Mnist, evaluate, load_mnist, pretrained_base, train

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "1_mlp.ipynb"


def run_cell(cell_id, **names):
    """Runs one cell of the notebook, as it stands there, with `names` defined; returns all names after it."""
    (source,) = (cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.id == cell_id)
    names |= {"torch": torch, "nn": nn, "cross_entropy": cross_entropy}
    exec(source, names)
    return names


@pytest.fixture(scope="module")
def mnist():
    return load_mnist()


def test_the_network_that_is_shown_is_the_one_that_is_imported(mnist):
    nets = []
    for network_class in (run_cell("cell-16")["RichBoyNet"], lora_helpers.RichBoyNet):
        torch.manual_seed(0)
        nets.append(network_class())
    shown, imported = (net.state_dict() for net in nets)
    assert shown.keys() == imported.keys()
    assert all(torch.equal(shown[name], imported[name]) for name in shown)
    images = mnist.test.tensors[0][:50]
    assert torch.equal(nets[0](images), nets[1](images))


def test_the_training_loop_that_is_shown_gives_the_losses_of_train(mnist):
    # In float64 rounding cannot hide a mistake; small, so that it is quick.
    images, labels = (tensor[:2000] for tensor in mnist.train.tensors)
    small = Mnist(TensorDataset(images.double(), labels), mnist.test)

    def small_net():
        return lora_helpers.RichBoyNet(20, 30).double()

    shown = run_cell("the-loop", RichBoyNet=small_net, mnist=small)["losses"]
    torch.manual_seed(0)
    trained = train(small_net(), small.train, max_batches=100, seed=0, progress=False)
    assert len(shown) == 100 and shown[-1] < shown[0]
    assert trained == pytest.approx(shown, rel=1e-6)


def test_the_testing_loop_that_is_shown_counts_as_evaluate_does(mnist):
    base = pretrained_base()
    shown = run_cell("the-testing-loop", base=base, mnist=mnist)["wrong"]
    assert shown.tolist() == evaluate(base, mnist.test).wrong_counts
