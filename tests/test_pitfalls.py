"""The traps of torch.nn.utils.parametrize: each is shown, with what the package makes of it."""

import copy
import io
import pickle

import pytest
import torch
from stirred import stir
from torch import nn
from torch.nn.utils import parametrize

from lora_helpers import (
    LoRAParametrization,
    RichBoyNet,
    add_lora,
    count_parameters,
    freeze_base,
    load_adapter,
    lora_disabled,
    lora_layers,
    merge_lora,
    remove_lora,
    save_adapter,
    set_lora_enabled,
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


def same_bits(net, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


# A copy shares its class with the original


@pytest.mark.parametrize("undo", [merge_lora, remove_lora, lambda net: remove_lora(net, "default")])
def test_undoing_on_one_of_several_copies_leaves_all_others_whole(net, undo):
    outputs, twin = net(IMAGES), copy.deepcopy(net)
    family = [twin, copy.deepcopy(twin), copy.deepcopy(net), net]
    for done, member in enumerate(family, start=1):
        undo(member)
        assert type(member.linear1) is nn.Linear and not lora_layers(member)
        assert all(torch.equal(other(IMAGES), outputs) for other in family[done:])


def test_a_copy_takes_another_adapter_and_gives_it_back(net):
    outputs, twin = net(IMAGES), copy.deepcopy(net)
    stir(add_lora(twin, name="four"))
    remove_lora(twin, "default")
    assert torch.equal(net(IMAGES), outputs)
    remove_lora(twin)
    assert torch.equal(net(IMAGES), outputs)
    assert torch.equal(merge_lora(net)(IMAGES), outputs)


# Merging while off


def test_merging_never_discards_an_adapter_whichever_way_it_is_off(net):
    state, adapter = copy.deepcopy(net.state_dict()), net.linear2.parametrizations.weight[0]
    with lora_disabled(net), pytest.raises(ValueError, match="LoRA is off.*set_lora_enabled"):
        merge_lora(net)
    adapter.enabled = False
    with pytest.raises(ValueError, match="LoRA is off"):
        merge_lora(net)
    adapter.enabled, adapter.active = True, False
    with pytest.raises(ValueError, match="not in use"):
        merge_lora(net)
    assert same_bits(net, state)


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
            with pytest.raises(ValueError, match="cached.*before or after that block"):
                call(net)
    assert torch.equal(net(IMAGES), outputs) and same_bits(net, state)


# What PyTorch does to `.weight` does not reach the stored weight


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


def test_initialisers_and_assignment_do_not_reach_the_weight(net):
    outputs = net(IMAGES)
    nn.init.zeros_(net.linear1.weight)
    for value in (nn.Parameter(torch.zeros(30, 784)), torch.zeros(30, 784)):
        with pytest.raises((KeyError, RuntimeError, NotImplementedError)):
            net.linear1.weight = value
    assert torch.equal(net(IMAGES), outputs)


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


def test_a_state_dict_does_not_carry_alpha_and_an_adapters_file_does(net, tmp_path):
    fresh = add_lora(RichBoyNet(30, 40), rank=2, alpha=1)
    assert fresh.load_state_dict(net.state_dict()).missing_keys == [], "PyTorch says that all keys match"
    scales = [one.linear1.parametrizations.weight[0].scale for one in (net, fresh)]
    assert scales == [3 / 2, 1 / 2] and not torch.equal(fresh(IMAGES), net(IMAGES))
    loaded = load_adapter(remove_lora(fresh), save_adapter(net, tmp_path))
    assert torch.equal(loaded(IMAGES), net(IMAGES))


# Other parametrizations, and LoRA registered by hand


class Double(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


def test_a_parametrized_bias_is_left_as_it_is_on_a_copy_too(base):
    parametrize.register_parametrization(base.linear1, "bias", Double())
    before, state = base(IMAGES), list(base.state_dict())
    for undo in (remove_lora, merge_lora):
        twin = copy.deepcopy(base)
        outputs = stir(add_lora(twin))(IMAGES)
        assert torch.equal(base(IMAGES), before)
        assert torch.equal(undo(twin)(IMAGES), before if undo is remove_lora else outputs)
        assert sorted(twin.state_dict()) == sorted(state)


def test_beside_another_parametrization_nothing_is_merged_or_removed(net):
    parametrize.register_parametrization(net.linear2, "weight", Double())
    outputs = net(IMAGES)
    for undo in (merge_lora, remove_lora):
        with pytest.raises(ValueError, match="linear2 has another parametrization.*remove_parametrizations"):
            undo(net)
    assert torch.equal(net(IMAGES), outputs)


def test_lora_registered_by_hand_is_switched_merged_and_removed_like_any_other(base):
    before, state = base(IMAGES), copy.deepcopy(base.state_dict())
    for layer in (base.linear1, base.linear2, base.linear2, base.linear3):  # two on linear2
        adapter = LoRAParametrization(layer.in_features, layer.out_features)
        parametrize.register_parametrization(layer, "weight", adapter)
    first, second = stir(base).linear2.parametrizations.weight
    assert torch.equal(base.linear2.weight, state["linear2.weight"] + first.delta + second.delta)
    with lora_disabled(base):
        assert torch.equal(base(IMAGES), before)
    outputs = base(IMAGES)
    assert torch.equal(merge_lora(copy.deepcopy(base))(IMAGES), outputs)
    assert same_bits(remove_lora(base), state)


# Bits, and the small last layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_come_back_by_keeping_them_not_by_subtracting(base, dtype):
    kept = base.to(dtype).linear2.weight.detach().clone()
    delta = stir(add_lora(base)).linear2.parametrizations.weight[0].delta.detach()
    merged = merge_lora(copy.deepcopy(base)).linear2.weight.detach()
    assert not torch.equal(merged - delta, kept), "adding and subtracting rounds twice"
    assert torch.equal(remove_lora(base).linear2.weight, kept)


def test_from_rank_10_on_the_adapter_of_linear3_is_larger_than_its_weight():
    for rank, larger in ((9, False), (10, True)):
        count = count_parameters(add_lora(RichBoyNet(), rank=rank, layers=["linear3"]))
        assert (count.lora > 2000 * 10) is larger
    net = add_lora(RichBoyNet(), rank=64)
    assert net.linear3.parametrizations.weight[0].lora_B.shape == (10, 64), "other layers can have rank 64"
