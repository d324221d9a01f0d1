"""Pictures: each has words for those who cannot see it, and can be read."""

import math

import matplotlib
import pytest
import torch

from lora_helpers import (
    Setting,
    evaluate,
    plot_confusion,
    plot_losses,
    plot_wrong_counts,
    scaling_plots,
    show_digits,
)
from lora_helpers.data import TensorDataset
from lora_helpers.experiments import sweep
from lora_helpers.plots import ink, plot_luck
from lora_helpers.scaling import ladder


@pytest.fixture(scope="module")
def runs(mnist):
    from lora_helpers import pretrained_base

    settings = ladder(ranks=(1, 4), seeds=(0, 1), batches=5)
    return sweep(pretrained_base(), mnist, settings, stops=(1,), progress=False)


def test_words_stand_beside_every_picture(base, mnist, runs):
    result = evaluate(base, mnist.test)
    said = {
        show_digits(mnist.test, [0, 9]).alt: "Digits: 7, 9",
        plot_losses([2.0, 1.0]).alt: "Loss of 2 batches, from 2.00 to 1.00",
        plot_confusion(result).alt: "wrong answers of digits 0 to 9: [49, 15",
        plot_wrong_counts(result, result).alt: "LoRA off [49, 15",
        plot_luck({"rank 1": runs[:2]}).alt: "rank 1: ",
        scaling_plots.plot_by_rank(runs).alt: "at rank 4",
        scaling_plots.plot_exponents({"Adam": runs}).alt: "after 5",
        scaling_plots.plot_rates(runs, {0.001: [0.5, 0.6]}).alt: "α/√r, rank 4: the best rate is 0.001",
    }
    for alt, words in said.items():
        assert words in alt


def test_a_picture_is_shown_with_its_words():
    data, metadata = plot_losses([2.0, 1.0])._repr_mimebundle_()
    assert data["text/plain"] == metadata["image/png"]["alt"] == "Loss of 2 batches, from 2.00 to 1.00"
    assert f'<img alt="{data["text/plain"]}"' in data["text/html"] and data["image/png"] in data["text/html"]


@pytest.mark.parametrize("colors", ["Blues", "PuOr", "cividis"])
def test_numbers_on_a_heat_map_can_be_read(colors):
    """Their contrast is at least 4.5, as WCAG asks of text."""
    for ground in matplotlib.colormaps[colors](range(256)):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in ground[:3]]
        light = sum(part * share for part, share in zip(linear, (0.2126, 0.7152, 0.0722)))
        assert (1.05 / (light + 0.05) if ink(ground) == "white" else (light + 0.05) / 0.05) >= 4.5


NO_PICTURES = {
    "no indices": lambda data: show_digits(data, 5),
    "a text for an index": lambda data: show_digits(data, ["x"]),
    "no losses": lambda data: plot_losses(5),
    "a text for a loss": lambda data: plot_losses(["x"]),
    "no evaluation": lambda data: plot_confusion(5),
    "no evaluations": lambda data: plot_wrong_counts("x", "y"),
}


@pytest.mark.parametrize("draw", NO_PICTURES.values(), ids=NO_PICTURES)
def test_what_cannot_be_drawn_is_named(mnist, draw):
    with pytest.raises(TypeError, match="must be"):
        draw(mnist.test)


def test_out_of_range_is_refused(mnist):
    for indices in ([], [10_000]):
        with pytest.raises(ValueError, match="it must name at least one image, from 0 to 9999"):
            show_digits(mnist.test, indices)
    with pytest.raises(ValueError, match="2 titles for 1 images"):
        show_digits(mnist.test, [0], titles=["a", "b"])
    for losses, window in (([], 50), ([1.0], 0)):
        with pytest.raises(ValueError):
            plot_losses(losses, window)


def test_flat_images_and_losses_that_diverged_can_be_drawn(mnist):
    flat = TensorDataset(mnist.test.tensors[0].flatten(start_dim=1), mnist.test.tensors[1])
    assert show_digits(flat, torch.tensor([0, 9999])).alt == "Digits: 7, 6"
    assert plot_losses([1.0, math.nan]).png()


def test_a_setting_that_diverged_is_marked_in_a_grid(base, mnist):
    wild = sweep(base, mnist, [Setting(rank=4, optimizer="SGD", lr=1e30, batches=3)], progress=False)
    assert "diverged" in scaling_plots.plot_grids({"SGD": wild}).alt
