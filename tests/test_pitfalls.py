"""The traps of torch.nn.utils.parametrize: each is shown, and what the package makes of it. More stand in test_lora.py."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lora_helpers import (
    LoRAParametrization,
    RichBoyNet,
    add_lora,
    count_parameters,
    evaluate,
    freeze_base,
    load_adapter,
    load_mnist,
    lora_disabled,
    lora_layers,
    merge_lora,
    only_digit,
    remove_lora,
    save_adapter,
    set_lora_enabled,
    train,
    use_adapter,
)

IMAGES = torch.randn(5, 784, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return RichBoyNet(30, 40)


@pytest.fixture
def net(base):
    return stir(add_lora(base, rank=2, alpha=3))


def stir(net):
    """As if trained: B is not zero."""
    with torch.no_grad():
        for adapters in lora_layers(net).values():
            for adapter in adapters:
                adapter.lora_B.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return net


@pytest.fixture(scope="module")
def nines():
    return only_digit(load_mnist("sample").train, 9)


# A copy shares its class with the original


@pytest.mark.parametrize("undo", [merge_lora, remove_lora, lambda net: remove_lora(net, "default")])
def test_undoing_on_one_of_several_copies_leaves_all_others_whole(net, undo):
    outputs, state = net(IMAGES), net.state_dict()
    twin = copy.deepcopy(net)
    family = [twin, copy.deepcopy(twin), copy.deepcopy(net), net]
    for done, member in enumerate(family, start=1):
        undo(member)
        assert type(member.linear1) is nn.Linear and not lora_layers(member)
        for other in family[done:]:
            assert torch.equal(other(IMAGES), outputs) and other.state_dict().keys() == state.keys()


def test_a_copy_takes_another_adapter_and_gives_it_back(net):
    outputs, twin = net(IMAGES), copy.deepcopy(net)
    stir(add_lora(twin, name="four"))
    remove_lora(twin, "default")
    assert torch.equal(net(IMAGES), outputs)
    remove_lora(twin)
    assert torch.equal(net(IMAGES), outputs)
    merge_lora(net)
    assert torch.equal(net(IMAGES), outputs)


def test_a_network_built_anew_with_the_state_loaded_is_a_copy_too(net):
    fresh = add_lora(RichBoyNet(30, 40), rank=2, alpha=3)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(IMAGES), net(IMAGES))
    parametrize.remove_parametrizations(fresh.linear1, "weight")
    assert torch.equal(net.linear1.weight, fresh.linear1.weight), "it has a class of its own"


# Merging while off


def test_merging_never_discards_an_adapter_whichever_way_it_is_off(net):
    state = copy.deepcopy(net.state_dict())
    with lora_disabled(net), pytest.raises(ValueError, match="LoRA is off"):
        merge_lora(net)
    net.linear2.parametrizations.weight[0].enabled = False
    with pytest.raises(ValueError, match="LoRA is off"):
        merge_lora(net)
    net.linear2.parametrizations.weight[0].enabled = True
    net.linear3.parametrizations.weight[0].active = False
    with pytest.raises(ValueError, match="Not in use"):
        merge_lora(net)
    net.linear3.parametrizations.weight[0].active = True
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    merged = {name: net.get_submodule(name).weight.detach() for name in lora_layers(net)}
    merge_lora(net)
    assert all(torch.equal(net.get_submodule(name).weight, weight) for name, weight in merged.items())


# parametrize.cached()


def test_what_would_act_on_old_weights_is_refused_inside_cached(net):
    outputs, state = net(IMAGES), copy.deepcopy(net.state_dict())
    calls = [
        freeze_base,
        merge_lora,
        remove_lora,
        lambda net: use_adapter(net, "default"),
        lambda net: set_lora_enabled(net, False),
        lambda net: lora_disabled(net).__enter__(),
        lambda net: add_lora(net, name="more"),
    ]
    with parametrize.cached():
        net(IMAGES)
        for call in calls:
            with pytest.raises(ValueError, match="cached"):
                call(net)
    assert torch.equal(net(IMAGES), outputs) and all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    with lora_disabled(net):
        assert not torch.equal(net(IMAGES), outputs)


def test_training_inside_cached_trains_all_the_same(base, nines):
    torch.manual_seed(0)
    freeze_base(add_lora(base))
    twin = copy.deepcopy(base)
    losses = train(base, nines, max_batches=5, seed=0, progress=False)
    with parametrize.cached(), torch.no_grad():
        weight = twin.linear1.weight  # first read without gradient: PyTorch's cache would keep it so
        with torch.enable_grad():
            assert train(twin, nines, max_batches=5, seed=0, progress=False) == losses
        assert twin.linear1.weight is weight, "the cache itself is stale now"
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), twin.parameters()))


# Off, the weight is the original


def test_an_in_place_edit_reaches_the_base_only_while_lora_is_off(net):
    original = net.linear1.parametrizations.weight.original
    before = original.detach().clone()
    with torch.no_grad():
        net.linear1.weight.add_(1)
        assert torch.equal(original, before), "on, it was a computed tensor, thrown away at once"
        with lora_disabled(net):
            assert net.linear1.weight is original
            net.linear1.weight.add_(1)
    assert torch.equal(original, before + 1)


# Saving


def test_a_parametrized_network_is_saved_by_its_state_alone(net):
    with pytest.raises((RuntimeError, pickle.PicklingError)):
        torch.save(net, io.BytesIO())
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = add_lora(RichBoyNet(30, 40), rank=2, alpha=3)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(IMAGES), net(IMAGES))
    torch.save(merge_lora(net), io.BytesIO())  # merged, it is an ordinary network


def test_checkpoints_from_before_and_after_do_not_fit_each_other(net):
    plain = RichBoyNet(30, 40)
    with pytest.raises(RuntimeError, match="linear1.parametrizations.weight.original"):
        net.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="linear1.weight"):
        plain.load_state_dict(net.state_dict())
    plain.load_state_dict(merge_lora(net).state_dict())


def test_a_state_dict_carries_neither_alpha_nor_scaling_and_a_file_does(net, base, tmp_path):
    fresh = add_lora(RichBoyNet(30, 40), rank=2, alpha=1)
    assert fresh.load_state_dict(net.state_dict()).missing_keys == [], "PyTorch says that all keys match"
    scales = [next(iter(lora_layers(n).values()))[0].scale for n in (net, fresh)]
    assert scales == [3 / 2, 1 / 2] and not torch.equal(fresh(IMAGES), net(IMAGES))
    loaded = load_adapter(remove_lora(fresh), save_adapter(net, tmp_path))
    assert torch.equal(loaded(IMAGES), net(IMAGES))


# Moved after it was made


@pytest.mark.parametrize("move", [lambda net: net.double(), lambda net: net.to(torch.bfloat16), lambda net: net.float()])
def test_moved_after_lora_was_added_a_and_b_stay_parameters_and_learn(base, nines, move):
    net = move(freeze_base(add_lora(base, rank=2)))
    dtype = net.linear1.bias.dtype
    adapters = [adapter for found in lora_layers(net).values() for adapter in found]
    assert {p.dtype for adapter in adapters for p in adapter.parameters()} == {dtype}
    assert count_parameters(net).trainable == count_parameters(net).lora == 2 * (784 + 30 + 30 + 40 + 40 + 10)
    data = torch.utils.data.TensorDataset(nines.tensors[0].to(dtype), nines.tensors[1])
    train(net, data, max_batches=3, progress=False)
    assert all(adapter.lora_B.any() for adapter in adapters)


# What PyTorch does to `.weight` does not reach the stored one


def test_the_class_changes_and_initialisers_and_assignment_do_not_reach_the_weight(net):
    assert type(net.linear1) is not nn.Linear and isinstance(net.linear1, nn.Linear)
    outputs = net(IMAGES)
    bias = net.linear1.bias.detach().clone()
    nn.init.zeros_(net.linear1.weight)
    net.linear1.reset_parameters()
    with torch.no_grad():
        net.linear1.bias.copy_(bias)
    for value in (nn.Parameter(torch.zeros(30, 784)), torch.zeros(30, 784)):
        with pytest.raises((KeyError, RuntimeError, NotImplementedError)):
            net.linear1.weight = value
    assert torch.equal(net(IMAGES), outputs)


# Removing from many layers


def test_all_of_many_nested_layers_are_merged_and_removed():
    def nested():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))}))

    for undo in (merge_lora, remove_lora):
        net = nested()
        state = copy.deepcopy(net.state_dict())
        stir(add_lora(net, name="one"))
        remove_lora(stir(add_lora(net, name="two")), "two")
        use_adapter(net, "one")
        assert len(lora_layers(net)) == 7
        undo(net)
        assert not any(parametrize.is_parametrized(module) for module in net.modules())
        assert list(net.state_dict()) == list(state)
        assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items()) == (undo is remove_lora)


def test_a_parametrized_bias_is_left_as_it_is(base):
    class Double(nn.Module):
        def forward(self, bias):
            return 2 * bias

    parametrize.register_parametrization(base.linear1, "bias", Double())
    before, state = base(IMAGES), list(base.state_dict())
    for undo in (remove_lora, merge_lora):
        stir(add_lora(base))
        outputs = base(IMAGES)
        undo(base)
        assert torch.equal(base(IMAGES), before if undo is remove_lora else outputs)
        assert sorted(base.state_dict()) == sorted(state)


def test_lora_on_a_copy_of_a_network_with_a_parametrized_bias_leaves_the_original_whole(base):
    class Double(nn.Module):
        def forward(self, bias):
            return 2 * bias

    parametrize.register_parametrization(base.linear1, "bias", Double())
    before = base(IMAGES)
    stir(add_lora(copy.deepcopy(base)))
    assert torch.equal(base(IMAGES), before)


# Bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_come_back_by_keeping_them_not_by_subtracting(base, dtype):
    base.to(dtype)
    kept = base.linear2.weight.detach().clone()
    stir(add_lora(base))
    delta = base.linear2.parametrizations.weight[0].delta.detach()
    merged = merge_lora(copy.deepcopy(base)).linear2.weight.detach()
    assert not torch.equal(merged - delta, kept), "adding and subtracting rounds twice"
    assert torch.equal(remove_lora(base).linear2.weight, kept)


# The small last layer


def test_at_rank_10_the_adapter_of_linear3_is_larger_than_its_weight():
    for rank, larger in ((9, False), (10, True)):
        count = count_parameters(add_lora(RichBoyNet(), rank=rank, layers=["linear3"]))
        assert (count.lora > 20_000) == larger and count.lora == rank * (2000 + 10)


# Stacked by hand


def test_lora_registered_by_hand_is_switched_tested_and_removed_like_any_other(base):
    mnist = load_mnist("sample")
    before, state = evaluate(base, mnist.test), copy.deepcopy(base.state_dict())
    for layer in (base.linear1, base.linear2, base.linear3):
        parametrize.register_parametrization(layer, "weight", LoRAParametrization(layer.in_features, layer.out_features))
    stir(base)
    with lora_disabled(base):
        assert torch.equal(evaluate(base, mnist.test).predictions, before.predictions)
    assert not torch.equal(evaluate(base, mnist.test).predictions, before.predictions)
    remove_lora(base)
    assert all(torch.equal(t, state[name]) for name, t in base.state_dict().items())
