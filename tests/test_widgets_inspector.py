"""The inspector: its tensors are those of a really trained layer."""

import pytest
import torch
from torch import nn

from lora_helpers import ParametrizationInspector
from lora_helpers.widgets.inspector import inspect


def test_the_inspected_tensors_are_those_of_a_trained_layer():
    torch.manual_seed(1)
    layer = nn.Linear(8, 6)
    kept, state = layer.weight.detach().clone(), torch.get_rng_state()
    shown = inspect(layer, rank=2, alpha=6, steps=40)
    assert all(torch.equal(t, kept) for t in (shown.weight, layer.weight, shown.effective_off))
    assert torch.allclose(shown.update, 3 * shown.lora_B @ shown.lora_A)
    assert torch.equal(shown.effective, shown.weight + shown.update)
    assert torch.linalg.matrix_rank(shown.update) == 2 and shown.loss < shown.loss_before
    start = inspect(layer, rank=2, alpha=6, steps=0)
    assert not start.lora_B.any() and start.lora_A.any() and torch.equal(start.effective, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_higher_rank_comes_nearer_to_the_task():
    torch.manual_seed(0)
    losses = [inspect(nn.Linear(8, 6), rank=rank, steps=200).loss for rank in (1, 2, 4)]
    assert losses[0] > losses[1] > losses[2]


def test_the_summary_says_what_is_learned_stored_and_used():
    panel = ParametrizationInspector()
    assert panel.summary.startswith("LoRA on · rank 1 · α 1 · α/r 1 · ‖ΔW‖ ")
    panel.rank = 3
    assert "of rank 3 · stored: 48 frozen in W, 42 trained in A and B" in panel.summary
    assert "learns to give the outputs of another random layer: loss " in panel.summary
    panel.fields["enabled"].set_state({"value": False})
    assert panel.summary.startswith("LoRA off · rank 3 · α 1 · α/r 0.333 · the weight is W, to the bit · ")
    words = [word for _, _, word, *_ in panel._picture._words]
    assert "not added: LoRA is off" in words and "B   6×3" in words and "A   3×8" in words


def test_a_layer_that_cannot_be_shown_is_refused():
    for layer, error in (
        (nn.Linear(784, 10), ValueError),
        (nn.Linear(8, 6).double(), TypeError),
        (nn.ReLU(), TypeError),
    ):
        with pytest.raises(error, match="must"):
            ParametrizationInspector(layer)
    assert ParametrizationInspector(nn.Linear(4, 8)).result.weight.shape == (8, 4)
