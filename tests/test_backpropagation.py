"""Adapters trained side by side: gradients written out are those of autograd, and each network ends where it would alone."""

import copy

import pytest
import torch
from torch.utils.data import TensorDataset

from lora_helpers import RichBoyNet, add_lora, freeze_base, load_mnist, only_digit, remove_lora, set_lora_enabled, train, train_side_by_side
from lora_helpers.backpropagation import Backpropagation, check_copies, transposed_weight
from lora_helpers.factorisation import frozen_backward, frozen_linear, with_first_products
from lora_helpers.lora import lora_layers


def twins(*settings, layers=None, dtype=torch.float64):
    """Copies of one small base, each with LoRA of its own rank and alpha; neither A nor B is zero."""
    torch.manual_seed(0)
    base = RichBoyNet(32, 40)
    nets = [freeze_base(add_lora(copy.deepcopy(base), rank=rank, alpha=alpha, layers=layers)).to(dtype) for rank, alpha in settings]
    for net in nets:
        for parameter in net.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
    return nets


def by_autograd(nets, images, labels):
    """The loss of each network, and the gradients left in its parameters."""
    found = []
    for net, x, y in zip(nets, images.chunk(len(nets)), labels.chunk(len(nets))):
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}))
        net.zero_grad()
    return found


def check_gradients(nets, images, labels, given=None):
    expected = by_autograd(nets, images, labels)
    losses = Backpropagation(nets)(images if given is None else given, labels)
    for net, loss, (its_loss, gradients) in zip(nets, losses.tolist(), expected):
        assert loss == pytest.approx(its_loss, rel=1e-12)
        now = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        assert now.keys() == gradients.keys() and now
        for name, gradient in gradients.items():
            assert torch.allclose(now[name], gradient, rtol=1e-9, atol=1e-12), name


MIXED = ((2, 1), (2, 3), (4, 1), (1, 2))


@pytest.mark.parametrize("layers", [None, ["linear1"], ["linear2"], ["linear3"], ["linear1", "linear3"], ["linear2", "linear3"]], ids=str)
@pytest.mark.parametrize("settings", [MIXED, MIXED[:1], ((1, 1), (2, 1), (1, 1))], ids=len)
@pytest.mark.parametrize("rows", [1, 5, 30])
def test_gradients_are_those_of_autograd(layers, settings, rows):
    nets = twins(*settings, layers=layers)
    check_copies(nets)
    images, labels = torch.randn(rows * len(nets), 784, dtype=torch.float64), torch.randint(10, (rows * len(nets),))
    check_gradients(nets, images, labels)
    for net in nets:
        net.zero_grad()
    before = with_first_products(nets[0], images)
    kept = before.clone()
    check_gradients(nets, images, labels, before)
    assert torch.equal(before, kept), "what it was given is left alone"


@pytest.mark.parametrize("layers", [None, ["linear1"], ["linear2"]], ids=str)
@pytest.mark.parametrize("settings", [MIXED, MIXED[:1]], ids=len)
@pytest.mark.parametrize("silent", [0, 7, 8, 9, 30, 32])
def test_units_that_are_silent_for_the_whole_batch_are_left_out(layers, settings, silent):
    """Once they are more than a quarter."""
    nets = twins(*settings, layers=layers)
    with torch.no_grad():
        for net in nets:
            net.linear1.bias[:silent] = -1000
            net.linear1.bias[silent:] = 100  # awake, whatever the image
            net.linear2.bias -= 1
    images, labels = torch.randn(6 * len(nets), 784, dtype=torch.float64), torch.randint(10, (6 * len(nets),))
    check_gradients(nets, images, labels)
    second = Backpropagation(nets)._layers[1]
    hidden = torch.relu(nets[0].linear1(images[:6]))
    second.forward(hidden.expand(len(nets), -1, -1) if len(nets) > 1 else hidden)
    assert (second._awake is None) == (silent <= 8)
    for net, x in zip(nets, images.chunk(len(nets))):
        assert torch.allclose(Backpropagation([net]).logits(x), net(x), rtol=1e-9)


def test_only_a_plain_layer_is_laid_out_anew():
    net = RichBoyNet(32, 40)
    assert torch.equal(transposed_weight(net), net.linear2.weight.T)
    adapted = add_lora(copy.deepcopy(net))
    assert torch.equal(transposed_weight(adapted), net.linear2.weight.T)
    net.linear2 = torch.nn.Sequential(net.linear2)
    assert transposed_weight(net) is transposed_weight(torch.nn.Linear(2, 2)) is None


def test_what_is_frozen_gets_no_gradient():
    nets = twins((2, 1), (2, 1))
    nets[1].linear2.parametrizations.weight[0].lora_A.requires_grad_(False)
    check_gradients(nets, torch.randn(6, 784, dtype=torch.float64), torch.randint(10, (6,)))


def test_of_several_adapters_the_one_in_use_learns():
    nets = twins((2, 1), (2, 1))
    for net in nets:
        freeze_base(add_lora(net, rank=3, name="another"))
    check_gradients(nets, torch.randn(6, 784, dtype=torch.float64), torch.randint(10, (6,)))
    assert nets[0].linear1.parametrizations.weight[0].lora_A.grad is None


@pytest.mark.parametrize("rows", [1, 40, 41])
@pytest.mark.parametrize("out_features", [40, 42])
def test_frozen_products_in_slices_are_the_products(rows, out_features):
    x, weight, bias = (torch.randn(*size, dtype=torch.float64) for size in ((rows, 7), (out_features, 7), (out_features,)))
    assert torch.allclose(frozen_linear(x, weight, bias), x @ weight.T + bias)
    assert torch.allclose(frozen_linear(x, weight, None), x @ weight.T)
    gradient = torch.randn(rows, out_features, dtype=torch.float64)
    assert torch.allclose(frozen_backward(gradient, weight), gradient @ weight)


def test_each_ends_where_it_would_alone():
    digits = only_digit(load_mnist("sample").train, 9)
    together = twins((1, 1), (4, 1), (4, 2), dtype=torch.float32)
    alone = copy.deepcopy(together)
    done = []
    train_side_by_side(together, digits, max_batches=8, seed=0, after_batch=done.append)
    assert done == list(range(1, 9))
    for net, twin in zip(together, alone):
        train(twin, digits, max_batches=8, seed=0, progress=False)
        for (name, p), q in zip(net.named_parameters(), twin.parameters()):
            assert torch.allclose(p, q, rtol=1e-3, atol=1e-4), name


class OwnNet(RichBoyNet):
    """What its class computes is not known, so it is trained by autograd."""


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.SGD])
def test_written_out_a_training_ends_where_autograd_does(optimizer_class, monkeypatch):
    digits = only_digit(load_mnist("sample").train, 9)
    for net in twins((2, 1), (4, 2), dtype=torch.float32):
        twin = copy.deepcopy(net)
        twin.__class__ = OwnNet
        its_losses = train(twin, digits, max_batches=8, seed=0, progress=False, optimizer_class=optimizer_class)
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "backward", lambda *_, **__: pytest.fail("autograd"))
            losses = train(net, digits, max_batches=8, seed=0, progress=False, optimizer_class=optimizer_class)
        assert losses == pytest.approx(its_losses, rel=1e-4)
        assert all(torch.allclose(p, q, rtol=1e-3, atol=1e-4) for p, q in zip(net.parameters(), twin.parameters()))


def change(what):
    """Twins of one base, of which one is then changed."""
    nets = twins((2, 1), (2, 1))
    if what == "a bias":
        with torch.no_grad():
            nets[1].linear3.bias += 1
    elif what == "a dtype":
        nets[1].float()
    elif what == "a buffer":
        nets[0].register_buffer("mean", torch.zeros(2))
        nets[1].register_buffer("mean", torch.ones(2))
    elif what == "a part more":
        nets[1].extra = torch.nn.Linear(2, 2).requires_grad_(False)
    elif what == "a part fewer":
        del nets[1].linear3
    elif what == "no LoRA":
        remove_lora(nets[1])
    elif what == "not frozen":
        nets[1].linear1.bias.requires_grad_(True)
    elif what == "off":
        set_lora_enabled(nets[1], False)
    elif what == "the same":
        nets[1] = nets[0]
    elif what == "strangers":
        nets[1] = freeze_base(add_lora(RichBoyNet(32, 40).double(), rank=2))
    elif what == "a hook":
        nets[1].linear2.register_forward_hook(lambda *_: None)
    elif what == "a hook on a gradient":
        nets[1].linear2.parametrizations.weight[0].lora_A.register_hook(lambda gradient: gradient)
    elif what == "a forward of its own":
        nets[1].linear2.forward = lambda x: x
    elif what == "another activation":
        nets[1].relu = torch.nn.GELU()
    elif what == "LoRA twice":
        for net in nets:
            for adapters in lora_layers(freeze_base(add_lora(net, rank=1, name="second"))).values():
                for adapter in adapters:
                    adapter.active = True
    elif what == "a shared adapter":
        nets[1] = copy.copy(nets[0])
    elif what == "nothing to train":
        nets[1].requires_grad_(False)
    elif what == "a parametrization of another kind":
        adapter = nets[1].linear1.parametrizations.weight[0]
        adapter.__class__ = type("Own", (type(adapter),), {})
    elif what == "other outputs":
        for net in nets:
            net.linear3 = torch.nn.Linear(40, 5).double().requires_grad_(False)
            net.linear3.weight.data.zero_(), net.linear3.bias.data.zero_()
    elif what == "another class":
        nets[1].__class__ = type("OwnNet", (RichBoyNet,), {})
    return nets


REFUSED = {
    "a bias": "copies of one base",
    "a dtype": "copies of one base",
    "a buffer": "copies of one base",
    "a part more": "copies of one base",
    "a part fewer": "copies of one base",
    "no LoRA": "copies of one base",
    "strangers": "copies of one base",
    "not frozen": "call freeze_base",
    "off": "LoRA is off",
    "the same": "one network twice",
    "a hook": "train each by itself",
    "a hook on a gradient": "train each by itself",
    "a forward of its own": "train each by itself",
    "another activation": "train each by itself",
    "LoRA twice": "train each by itself",
    "a shared adapter": "share an adapter",
    "nothing to train": "nothing to train",
    "a parametrization of another kind": "train each by itself",
    "other outputs": "train each by itself",
    "another class": "train each by itself",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_are_no_twins_is_refused(what):
    nets = change(what)
    with pytest.raises(ValueError, match=REFUSED[what]):
        train_side_by_side(nets, TensorDataset(torch.zeros(2, 1, 28, 28), torch.tensor([1, 2])), max_batches=1)
    assert not any(p.grad is not None for net in nets for p in net.parameters())


def test_it_takes_a_list():
    (net,) = twins((2, 1))
    for nets, kind in ((net, "RichBoyNet"), (torch.nn.Sequential(net), "Sequential"), ((n for n in [net]), "generator"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"nets is a {kind}; it must be a list of networks"):
            check_copies(nets)
