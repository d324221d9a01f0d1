"""The network, and the stored base with the figures that everybody sees."""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_helpers import RichBoyNet, evaluate, fine_tune, pretrained_base
from lora_helpers.data import STORED
from lora_helpers.model import BASE


def test_the_network_has_the_shapes_and_parameters_of_the_lesson():
    net = RichBoyNet()
    assert sum(p.numel() for p in net.parameters()) == 2_807_010
    assert [tuple(layer.weight.shape) for layer in (net.linear1, net.linear2, net.linear3)] == [
        (1000, 784),
        (2000, 1000),
        (10, 2000),
    ]
    assert net(torch.zeros(3, 1, 28, 28)).shape == net(torch.zeros(3, 784)).shape == (3, 10)


@pytest.mark.parametrize("size", [0, -3, 2.5, True])
def test_a_hidden_size_is_a_whole_number(size):
    with pytest.raises(ValueError, match="hidden_size_2"):
        RichBoyNet(10, size)


def test_the_stored_base_gives_the_figures_of_its_page_exactly(base, mnist):
    result, page = evaluate(base, mnist.test), (STORED / "README.md").read_text(encoding="utf-8")
    counts = ", ".join(map(str, result.wrong_counts))
    assert f"- accuracy on the test images: {result.accuracy:.4f}\n" in page
    assert f"- wrong answers of the digits 0 to 9: {counts}\n" in page
    assert result.wrong_counts == [49, 15, 32, 35, 23, 29, 40, 36, 52, 102]


def test_the_base_keeps_the_rule_by_which_it_was_chosen(base, mnist):
    result, page = evaluate(base, mnist.test), (STORED / "README.md").read_text(encoding="utf-8")
    assert max(result.wrong_counts) == result.wrong_counts[9] and 0.95 <= result.accuracy <= 0.965
    before, after = map(int, re.search(r"(\d+) → (\d+) \| yes", page).groups())
    assert before == result.wrong_counts[9] and 3 * after <= before
    assert fine_tune(base, mnist).on.wrong_counts[9] == after


def test_each_call_gives_a_network_of_its_own_that_can_be_trained():
    state = torch.get_rng_state()
    with torch.inference_mode():
        one, other = pretrained_base(), pretrained_base()
    assert torch.equal(torch.get_rng_state(), state)
    one(torch.ones(1, 784)).sum().backward()
    with torch.no_grad():
        one.linear1.weight.zero_()
    assert one.linear1.weight.grad is not None and other.linear1.weight.any()


def test_a_learners_own_network_is_read_from_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    own = RichBoyNet()
    save_file(own.state_dict(), tmp_path / "my_base.safetensors")
    for path in (
        tmp_path / "my_base.safetensors",
        str(tmp_path / "my_base.safetensors"),
        "~/my_base.safetensors",
    ):
        read = pretrained_base(path)
        assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in own.state_dict().items())


def wrong_files(folder):
    state = RichBoyNet().state_dict()
    yield "small", RichBoyNet(30, 40).state_dict(), "does not hold a RichBoyNet.*linear1.bias \\(30,\\)"
    yield "half", {name: tensor.half() for name, tensor in state.items()}, "float16"
    yield "nan", {**state, "linear1.bias": state["linear1.bias"] / 0}, "NaN or infinite"
    yield "fewer", {"linear1.bias": state["linear1.bias"]}, "does not hold"
    yield "renamed", nn.Sequential(RichBoyNet()).state_dict(), "0.linear1.bias"


def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors; save a network there first"):
        pretrained_base(tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("not a network", encoding="utf-8")
    with pytest.raises(ValueError, match="text is not a safetensors file"):
        pretrained_base(tmp_path / "text")
    for name, state, words in wrong_files(tmp_path):
        save_file(state, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} .*{words}"):
            pretrained_base(tmp_path / name)


def test_a_damaged_base_is_noticed(tmp_path, monkeypatch):
    data = bytearray(BASE.read_bytes())
    data[-1] ^= 1
    (tmp_path / "base.safetensors").write_bytes(data)
    monkeypatch.setattr("lora_helpers.model.BASE", tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match="not the base that this package was made with"):
        pretrained_base()
