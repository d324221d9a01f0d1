"""The written-out arithmetic gives autograd's losses, gradients and answers; anything else takes plain
autograd."""

import copy

import pytest
import torch
from stirred import stir
from torch import nn
from torch.nn import functional as F

from lora_helpers import (
    RichBoyNet,
    add_lora,
    evaluate,
    freeze_base,
    lora_layers,
    set_lora_enabled,
    train,
    use_adapter,
)
from lora_helpers.data import TensorDataset
from lora_helpers.fast import Fast, ImagesToTest, is_plain, is_trainable_plain
from lora_helpers.lora import frozen_twin

DRAW = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(30, 1, 28, 28, generator=DRAW), torch.arange(30) % 10
DATA = TensorDataset(IMAGES, LABELS)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return RichBoyNet(60, 50).double()  # in float64, where only a wrong formula shows


def by_autograd(net):
    net.zero_grad()
    loss = F.cross_entropy(net(IMAGES[:10].double()), LABELS[:10])
    loss.backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return loss, found


def close(one, other):
    return torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def check(nets):
    wanted = [by_autograd(net) for net in nets]
    n = len(nets)
    fast, x = Fast(nets), IMAGES[:10].flatten(1).double().expand(n, 10, 784)
    for products in (None, fast.first_products(x)):
        losses = fast.backpropagate(x, LABELS[:10].expand(n, 10), products)
        for net, loss, (right, gradients) in zip(nets, losses, wanted):
            assert close(loss, right)
            found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
            assert found.keys() == gradients.keys()
            assert all(close(found[name], gradients[name]) for name in found)


@pytest.mark.parametrize(
    "layers", [["linear1"], ["linear2"], ["linear3"], ["linear1", "linear3"], None], ids=str
)
def test_gradients_of_adapters_are_those_of_autograd(small, layers):
    check([freeze_base(stir(add_lora(small, rank=3, alpha=5, layers=layers)))])


def test_gradients_of_a_network_without_lora_are_those_of_autograd(small):
    check([small])


def test_copies_of_one_base_with_different_adapters_are_each_as_if_alone(small):
    nets = [
        freeze_base(stir(add_lora(frozen_twin(small), rank=r, alpha=2, rank_stabilised=r > 2)))
        for r in (1, 3, 8)
    ]
    check(nets)


@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0], ids=["most units silent", "half of them", "none"])
def test_whichever_units_are_silent(small, shift):
    with torch.no_grad():
        small.linear1.bias += shift
    net = freeze_base(stir(add_lora(copy.deepcopy(small), rank=2)))
    check([small])
    check([net])


def test_on_the_stored_base_units_are_left_out(base, mnist):
    fast = Fast([base])
    fast.backpropagate(mnist.test.tensors[0][:10].flatten(1)[None], mnist.test.tensors[1][:10][None])
    assert 0 < len(fast.layers[1].awake) < 500  # of 1000


def test_answers_are_those_of_the_network_in_the_images_own_order(base, mnist):
    net = stir(add_lora(base, rank=4))
    images, labels = mnist.test.tensors[0][:1500], mnist.test.tensors[1][:1500]
    shared = ImagesToTest(base, images.flatten(1))
    for enabled in (True, False):
        set_lora_enabled(net, enabled)
        with torch.no_grad():
            plain = net(images).argmax(dim=1)
        assert torch.equal(shared.answers(net), plain)
        assert torch.equal(evaluate(net, TensorDataset(images, labels)).predictions, plain)


def hooked(net):
    net.linear2.register_forward_hook(lambda *_: None)


def subclassed(net):
    net.linear1.__class__ = type(
        "MyLinear", (nn.Linear,), {"forward": lambda self, x: -nn.Linear.forward(self, x)}
    )


def foreign(net):
    nn.utils.parametrizations.weight_norm(net.linear2)


def test_what_is_not_a_plain_richboynet_takes_autograd():
    assert is_plain(RichBoyNet(8, 9)) and is_plain(add_lora(RichBoyNet(8, 9)))
    for change in (hooked, subclassed, foreign):
        net = RichBoyNet(8, 9)
        change(net)
        assert not is_plain(net) and not is_trainable_plain(net)
        twin = copy.deepcopy(net)
        assert torch.equal(evaluate(net, DATA).predictions, twin(IMAGES).argmax(dim=1))
    assert not is_plain(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))


def test_a_bias_left_trainable_is_trained_not_forgotten():
    net = freeze_base(add_lora(RichBoyNet(8, 9)))
    net.linear2.bias.requires_grad_(True)
    before = net.linear2.bias.detach().clone()
    assert not is_trainable_plain(net)
    train(net, DATA, max_batches=2, progress=False)
    assert not torch.equal(net.linear2.bias, before)


def test_only_the_adapter_in_use_gets_gradients():
    net = add_lora(add_lora(RichBoyNet(8, 9), name="nine"), rank=2, name="four")
    use_adapter(net, "nine")
    freeze_base(net)
    train(net, DATA, max_batches=2, progress=False)
    for nine, four in lora_layers(net).values():
        assert nine.lora_B.any() and not four.lora_B.any()
