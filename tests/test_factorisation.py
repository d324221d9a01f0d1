"""The factorised form computes what the parametrization computes."""

import copy

import pytest
import torch
from torch.nn.utils import parametrize

from lora_helpers import (
    RichBoyNet,
    add_lora,
    factorised,
    freeze_base,
    load_mnist,
    only_digit,
    set_lora_enabled,
    side_by_side,
    train,
    train_side_by_side,
)


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


def test_a_copy_made_inside_is_a_network_of_its_own():
    net = adapted(2, 1)
    images = torch.randn(6, 784)
    with factorised(net):
        twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert twin(images).any()


def test_side_by_side_ends_where_one_at_a_time_does():
    digits = only_digit(load_mnist("sample").train, 9)
    torch.manual_seed(0)
    base = RichBoyNet(30, 40)
    together = [freeze_base(add_lora(copy.deepcopy(base), rank=rank)) for rank in (1, 4)]
    alone = copy.deepcopy(together)
    train_side_by_side(together, digits, max_batches=8, seed=0)
    for net, twin in zip(together, alone):
        train(twin, digits, max_batches=8, seed=0, progress=False)
        for (name, p), q in zip(net.named_parameters(), twin.parameters()):
            assert torch.allclose(p, q, rtol=1e-3, atol=1e-5), name
        assert "forward" not in vars(net.linear1)


def test_side_by_side_refuses_networks_of_different_bases():
    nets = [add_lora(RichBoyNet(30, 40)), add_lora(RichBoyNet(30, 40))]
    with pytest.raises(ValueError, match="copies of one base"), side_by_side(nets):
        pass
    with pytest.raises(ValueError, match="copies of one base"), side_by_side([RichBoyNet(30, 40)]):
        pass


def test_training_steps_are_those_of_pytorchs_adam():
    digits = load_mnist("sample").train
    torch.manual_seed(0)
    net = RichBoyNet(30, 40)
    twin = copy.deepcopy(net)
    losses = train(net, digits, max_batches=20, seed=0, progress=False)
    assert losses == train(twin, digits, max_batches=20, seed=0, progress=False, optimizer_class=torch.optim.Adam)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters()))
