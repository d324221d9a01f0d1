"""The factorised form computes what the parametrization computes."""

import copy
from functools import partial
from types import MethodType

import pytest
import torch
from torch.nn.utils import parametrize

from lora_helpers import (
    RichBoyNet,
    add_lora,
    factorised,
    freeze_base,
    load_mnist,
    merge_lora,
    only_digit,
    set_lora_enabled,
    train,
)
from lora_helpers.factorisation import with_first_products


def adapted(rank, alpha):
    torch.manual_seed(0)
    net = add_lora(RichBoyNet(30, 40), rank=rank, alpha=alpha)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return freeze_base(net)


@pytest.mark.parametrize("rank, alpha", [(1, 1), (4, 16), (30, 0.5)])
def test_outputs_and_gradients_are_those_of_the_parametrization(rank, alpha):
    net = adapted(rank, alpha).double()
    twin = adapted(rank, alpha).double()
    images = torch.randn(6, 784, dtype=torch.float64)
    slow = net(images)
    slow.logsumexp(dim=1).sum().backward()
    with factorised(twin):
        fast = twin(images)
        fast.logsumexp(dim=1).sum().backward()
    assert torch.allclose(fast, slow, rtol=1e-12, atol=1e-9)
    for (name, p), q in zip(net.named_parameters(), twin.parameters()):
        assert (p.grad is None) == (q.grad is None) == (not p.requires_grad), name
        if p.grad is not None:
            assert torch.allclose(p.grad, q.grad, rtol=1e-10, atol=1e-9), name


def test_the_switch_is_obeyed_and_the_network_is_left_as_it_was():
    net = adapted(2, 1)
    images = torch.randn(6, 784)
    on = net(images)
    set_lora_enabled(net, False)
    off = net(images)
    with pytest.raises(KeyError), factorised(net):
        assert torch.equal(net(images), off)
        set_lora_enabled(net, True)
        assert torch.allclose(net(images), on, atol=1e-4)
        raise KeyError
    assert torch.equal(net(images), on) and "forward" not in vars(net.linear1)


def test_other_networks_compute_as_ever():
    net = RichBoyNet(30, 40)
    images = torch.randn(6, 784)
    before = net(images)
    with factorised(net):
        assert torch.equal(net(images), before)

    class Double(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    net = adapted(2, 1)
    parametrize.register_parametrization(net.linear1, "weight", Double())
    before = net(images)
    with factorised(net):
        assert "forward" not in vars(net.linear1)
        assert torch.allclose(net(images), before, atol=1e-4)


@pytest.mark.parametrize("shape", [(784,), (3, 784), (2, 3, 784), (0, 784), (40, 784)])
def test_inputs_of_any_number_of_dimensions(shape):
    layer = adapted(2, 1).linear1
    x = torch.randn(shape)
    slow = layer(x)
    with factorised(layer):
        assert torch.allclose(layer(x), slow, rtol=1e-4, atol=1e-3) and layer(x).shape == (*shape[:-1], 30)


def test_a_weight_that_is_a_transposed_view_and_a_wrong_input():
    layer = torch.nn.Linear(6, 4)
    layer.weight = torch.nn.Parameter(torch.randn(6, 4).T)
    add_lora(layer)
    x = torch.randn(3, 6)
    slow = layer(x)
    with factorised(layer):
        assert torch.allclose(layer(x), slow, atol=1e-5)
        with pytest.raises(RuntimeError):
            layer(torch.randn(3, 3))


class Shouting(torch.nn.Linear):
    def forward(self, x):
        return 10 * super().forward(x)


@pytest.mark.parametrize("how", ["a class of its own", "a function of its own", "a method of its own"])
def test_a_layer_with_a_forward_of_its_own_computes_as_ever(how):
    net = adapted(2, 1)
    if how == "a class of its own":
        net.linear2 = add_lora(Shouting(30, 40), rank=2)
    elif how == "a function of its own":
        net.linear2.forward = lambda x: torch.zeros(len(x), 40)
    else:
        net.linear2.forward = MethodType(lambda layer, x: 2 * torch.nn.functional.linear(x, layer.weight), net.linear2)
    images, own = torch.randn(6, 784), vars(net.linear2).get("forward")
    before = net(images)
    with factorised(net):
        assert torch.allclose(net(images), before, rtol=1e-4, atol=1e-2) and "forward" in vars(net.linear1)
    assert vars(net.linear2).get("forward") is own and torch.equal(net(images), before)


@pytest.mark.parametrize("how", ["a class", "a forward", "a hook"])
def test_a_parametrization_of_another_kind_computes_as_ever(how):
    net = adapted(2, 1)
    adapter = net.linear2.parametrizations.weight[0]
    if how == "a class":
        adapter.__class__ = type("Doubled", (type(adapter),), {"forward": lambda self, weight: weight + 2 * self.delta})
    elif how == "a forward":
        adapter.forward = lambda weight: weight + 2 * adapter.delta
    else:
        adapter.register_forward_hook(lambda module, inputs, output: 2 * output)
    images = torch.randn(6, 784)
    before = net(images)
    with factorised(net):
        assert torch.allclose(net(images), before, rtol=1e-4, atol=1e-2) and "forward" not in vars(net.linear2)


def test_blocks_may_be_nested():
    net = adapted(2, 1)
    with factorised(net):
        outer = net.linear1.forward
        with factorised(net):
            pass
        assert net.linear1.forward == outer
    assert "forward" not in vars(net.linear1)


def test_merged_within_a_block_it_is_an_ordinary_layer():
    net = adapted(2, 1)
    images = torch.randn(6, 784)
    slow = net(images)
    with factorised(net):
        twin = merge_lora(copy.deepcopy(net))
        assert torch.allclose(twin(images), slow, atol=1e-3)
        merge_lora(net)
        assert torch.equal(net(images), twin(images))
    assert torch.equal(net(images), twin(images))


def test_a_copy_made_inside_is_a_network_of_its_own():
    net = adapted(2, 1)
    images = torch.randn(6, 784)
    with factorised(net):
        twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert twin(images).any()


def test_training_steps_are_those_of_pytorchs_adam():
    digits = load_mnist("sample").train
    torch.manual_seed(0)
    net = RichBoyNet(30, 40)
    twin = copy.deepcopy(net)
    losses = train(net, digits, max_batches=20, seed=0, progress=False)
    assert losses == train(twin, digits, max_batches=20, seed=0, progress=False, optimizer_class=partial(torch.optim.Adam, fused=True))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters()))


def test_the_first_products_may_come_along_with_the_images():
    net = adapted(2, 1)
    images = torch.randn(6, 1, 28, 28)
    with factorised(net):
        rows = with_first_products(net, images)
        assert rows.shape == (6, 784 + 30)
        assert torch.allclose(net(rows), net(images), rtol=1e-4, atol=1e-4)
        set_lora_enabled(net, False)
        assert torch.allclose(net(rows), net(images), atol=1e-5)


class OwnNet(RichBoyNet):
    pass


def test_where_the_first_products_may_change_or_be_seen_images_are_images():
    images = torch.randn(6, 784)
    thawed, hooked, other = adapted(2, 1), adapted(2, 1), adapted(2, 1)
    thawed.linear1.parametrizations.weight.original.requires_grad_()
    seen = []
    hooked.linear1.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].shape))
    other.__class__ = OwnNet
    for net in (thawed, hooked, other, RichBoyNet(30, 40)):
        with factorised(net):
            assert with_first_products(net, images) is images
    train(hooked, load_mnist().test, max_batches=2, progress=False)
    assert set(seen) == {(10, 784)}


def test_a_network_tested_or_copied_in_the_middle_of_its_training_answers_as_ever():
    net, nines = adapted(2, 1), only_digit(load_mnist().test, 9)
    answers = []

    def ask(done):
        twin = copy.deepcopy(net)
        twin.linear1.parametrizations.weight[0].lora_B.data.zero_()
        answers.append((net(nines.tensors[0]), twin(nines.tensors[0])))

    train(net, nines, max_batches=3, seed=0, progress=False, after_batch=ask)
    assert torch.allclose(answers[-1][0], net(nines.tensors[0]), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(*answers[-1], atol=1e-3)
