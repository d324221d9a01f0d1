"""Adapters: counts, names, shapes, and every equality that must hold to the bit."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lora_helpers import (
    LoRAParametrization,
    RichBoyNet,
    add_lora,
    count_parameters,
    freeze_base,
    lora_disabled,
    lora_layers,
    merge_lora,
    remove_lora,
    set_lora_enabled,
)

IMAGES = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return RichBoyNet(30, 40)


def perturb(net):
    """Gives B values, as training would."""
    with torch.no_grad():
        for adapters in lora_layers(net).values():
            for adapter in adapters:
                adapter.lora_B.normal_()
    return net


def test_the_reference_counts():
    net = RichBoyNet()
    assert count_parameters(net).base == 2_807_010
    assert [sum(p.numel() for p in layer.parameters()) for layer in (net.linear1, net.linear2, net.linear3)] == [
        785_000,
        2_002_000,
        20_010,
    ]
    count = count_parameters(add_lora(net))
    assert (count.base, count.lora, count.total) == (2_807_010, 6_794, 2_813_804)
    assert count_parameters(freeze_base(net)).trainable == 6_794
    assert "0.242%" in str(count)


def test_the_reference_shapes_and_names():
    net = add_lora(RichBoyNet())
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    for layer, out_features, in_features in (("linear1", 1000, 784), ("linear2", 2000, 1000), ("linear3", 10, 2000)):
        prefix = f"{layer}.parametrizations.weight"
        assert shapes[f"{prefix}.original"] == (out_features, in_features)
        assert shapes[f"{prefix}.0.lora_A"] == (1, in_features)
        assert shapes[f"{prefix}.0.lora_B"] == (out_features, 1)
        assert shapes[f"{layer}.bias"] == (out_features,)
    assert set(shapes) == set(net.state_dict())


def test_a_is_standard_normal_and_b_zero():
    adapter = LoRAParametrization(2000, 3, rank=50, generator=torch.Generator().manual_seed(0))
    assert abs(adapter.lora_A.mean()) < 0.02 and abs(adapter.lora_A.std() - 1) < 0.02
    assert torch.equal(adapter.lora_B, torch.zeros(3, 50))


@pytest.mark.parametrize("rank, alpha", [(1, 1), (4, 16), (8, 0.5)])
def test_forward_is_w_plus_scaled_ba(rank, alpha):
    adapter = LoRAParametrization(6, 9, rank=rank, alpha=alpha)
    nn.init.normal_(adapter.lora_B)
    weight = torch.randn(9, 6)
    assert torch.equal(adapter(weight), weight + (alpha / rank) * (adapter.lora_B @ adapter.lora_A))
    adapter.enabled = False
    assert adapter(weight) is weight


def test_adding_changes_nothing_until_b_moves(net):
    before = net(IMAGES)
    assert torch.equal(add_lora(net, rank=4)(IMAGES), before)
    assert not torch.equal(perturb(net)(IMAGES), before)


def test_switch_and_context(net):
    before = net(IMAGES)
    adapted = perturb(add_lora(net, rank=2))(IMAGES)
    with lora_disabled(net):
        assert torch.equal(net(IMAGES), before)
    assert torch.equal(net(IMAGES), adapted)
    set_lora_enabled(net, False)
    with pytest.raises(RuntimeError), lora_disabled(net):
        raise RuntimeError
    assert torch.equal(net(IMAGES), before), "off before the block, off after it"
    set_lora_enabled(net, True)
    assert torch.equal(net(IMAGES), adapted)


def test_freezing_finds_lora_by_class_not_by_name(net):
    net.lora_like_name = nn.Parameter(torch.zeros(3))
    freeze_base(add_lora(net, rank=2))
    assert not net.lora_like_name.requires_grad
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == {f"linear{i}.parametrizations.weight.0.lora_{m}" for i in (1, 2, 3) for m in "AB"}


def test_merge_keeps_outputs_and_gives_back_an_ordinary_network(net):
    names = list(net.state_dict())
    adapted = perturb(add_lora(net, rank=3, alpha=2))(IMAGES)
    merge_lora(net)
    assert torch.equal(net(IMAGES), adapted)
    assert type(net.linear1) is nn.Linear
    assert sorted(net.state_dict()) == sorted(names)
    assert isinstance(net.linear1.weight, nn.Parameter)


def test_remove_gives_the_base_bits_back(net):
    before = {name: t.clone() for name, t in net.state_dict().items()}
    remove_lora(perturb(add_lora(net, rank=3)))
    after = net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_merging_while_off_is_refused_and_loses_nothing(net):
    perturb(add_lora(net))
    adapted = net(IMAGES)
    set_lora_enabled(net, False)
    with pytest.raises(ValueError, match="off"):
        merge_lora(net)
    set_lora_enabled(net, True)
    assert torch.equal(net(IMAGES), adapted)


@pytest.mark.parametrize("undo", [merge_lora, remove_lora])
def test_undoing_on_a_deepcopy_leaves_the_original_whole(net, undo):
    adapted = perturb(add_lora(net, rank=2))(IMAGES)
    undo(copy.deepcopy(net))
    assert torch.equal(net(IMAGES), adapted)
    undo(net)
    assert type(net.linear1) is nn.Linear


def test_registering_twice_stacks_and_merges(net):
    add_lora(net, rank=1)
    parametrize.register_parametrization(net.linear2, "weight", LoRAParametrization(30, 40, rank=2))
    perturb(net)
    original = net.linear2.parametrizations.weight.original
    first, second = lora_layers(net)["linear2"]
    expected = original + first.delta + second.delta
    assert torch.equal(net.linear2.weight, expected)
    assert torch.equal(merge_lora(net).linear2.weight, expected)


def test_layers_can_be_chosen(net):
    add_lora(net, rank=2, layers=["linear2"])
    assert list(lora_layers(net)) == ["linear2"]
    assert count_parameters(net).lora == 2 * (30 + 40)


def test_rank_64_fits_the_network_though_linear3_has_ten_outputs():
    net = add_lora(RichBoyNet(), rank=64)
    assert net.linear3.parametrizations.weight[0].lora_B.shape == (10, 64)


def test_created_on_the_weights_device_and_dtype(net):
    net.to(torch.float64)
    assert all(p.dtype == torch.float64 for p in add_lora(net).parameters())
    on_meta = add_lora(RichBoyNet(3, 4).to("meta"))
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}
    assert "linear1.parametrizations.weight.0.lora_A" in dict(on_meta.named_parameters())


def test_a_generator_leaves_the_global_stream_alone(net):
    state = torch.get_rng_state()
    a = add_lora(net, generator=torch.Generator().manual_seed(1)).linear1.parametrizations.weight[0].lora_A
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, torch.randn(1, 784, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("rank", [0, -1, 1.5, 2.0, True, "4", None, 41])
def test_bad_rank(net, rank):
    with pytest.raises(ValueError, match="rank"):
        add_lora(net, rank=rank)
    assert not lora_layers(net), "nothing is half-added"


@pytest.mark.parametrize("number", [np.int64(2), np.float32(0.5), torch.tensor(2)])
def test_a_number_of_another_library_is_told_from_pythons_own(net, number):
    kind = type(number).__name__
    with pytest.raises(ValueError, match=f"rank is .*whole number.*{'' if kind == 'float32' else f'type {kind}: write int'}"):
        add_lora(net, rank=number)
    with pytest.raises(ValueError, match=rf"alpha is .*type {kind}: write float\(…\)"):
        add_lora(net, alpha=number)
    add_lora(net, rank=int(number) + 1, alpha=float(number))


def test_alpha_is_stored_as_a_number_of_pythons_own(net):
    for adapters in lora_layers(add_lora(net, alpha=np.sqrt(4.0))).values():
        assert type(adapters[0].alpha) is type(adapters[0].scale) is float


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda net: add_lora(net, generator=5), TypeError, "generator is 5; it must be a torch.Generator"),
        (lambda net: LoRAParametrization(3, 4, generator="seed"), TypeError, "generator is 'seed'; it must be a torch.Generator"),
        (lambda net: add_lora(net, name=5), ValueError, "name is 5; it must be a text"),
        (lambda net: LoRAParametrization(3, 4, name=5), ValueError, "name is 5; it must be a text"),
        (lambda net: add_lora(nn.Sequential(nn.Conv2d(1, 2, 3))), ValueError, "Linear layers are: none"),
        (lambda net: add_lora(nn.Sequential(nn.Conv2d(1, 2, 3)), layers=["0"]), TypeError, "'0' is a Conv2d.*Linear layers are: none"),
        (lambda net: add_lora(nn.Linear(3, 4), layers=["weight"]), ValueError, "no layer 'weight'; this network's Linear layers are: ''"),
    ],
)
def test_other_bad_arguments(net, call, error, message):
    with pytest.raises(error, match=message):
        call(net)
    assert not lora_layers(net)


def test_a_network_without_parameters_is_counted():
    assert str(count_parameters(nn.Sequential())) == "0 base + 0 LoRA = 0 parameters, 0 trainable"


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), True, "1", None])
def test_bad_alpha(net, alpha):
    with pytest.raises(ValueError, match="alpha"):
        add_lora(net, alpha=alpha)
    assert not lora_layers(net)


@pytest.mark.parametrize(
    "layers, error, word",
    [
        (["linear9"], ValueError, "linear9"),
        (["linear1", "relu"], TypeError, "ReLU"),
        ("linear1", TypeError, "layers is 'linear1'; it must be a list of names"),
        (b"linear1", TypeError, "layers is b'linear1'; it must be a list of names"),
        (5, TypeError, "layers is 5; it must be a list of names"),
        ([["linear1"]], TypeError, r"layers holds \['linear1'\], which is no name"),
        (["linear2", 1], TypeError, "layers holds 1, which is no name"),
        ([], ValueError, "No layer"),
        (["linear1", "linear1"], ValueError, "names a layer twice"),
    ],
)
def test_bad_layers(net, layers, error, word):
    with pytest.raises(error, match=word):
        add_lora(net, layers=layers)
    assert not lora_layers(net)


def test_adding_twice_is_refused(net):
    add_lora(net, layers=["linear2"])
    with pytest.raises(ValueError, match="already has an adapter named 'default'"):
        add_lora(net)
    assert list(lora_layers(net)) == ["linear2"]


def test_foreign_parametrizations_and_tied_weights_are_refused(net):
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="0.weight and 1.weight share one weight"):
        add_lora(tied)
    nn.utils.parametrizations.weight_norm(net.linear1)
    with pytest.raises(ValueError, match="_WeightNorm"):
        add_lora(net)
    assert not lora_layers(net)


def test_a_weight_shared_under_another_name_is_found(net):
    net.table = net.linear2.weight
    with pytest.raises(ValueError, match="table and linear2.weight share one weight"):
        add_lora(net)
    del net.table
    add_lora(net, name="nine")
    net.table = net.linear2.parametrizations.weight.original
    with pytest.raises(ValueError, match="share one weight"):
        add_lora(net, name="four")


def test_a_layer_that_is_used_twice_is_adapted_once_under_its_first_name():
    layer = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": layer, "b": layer})
    with pytest.raises(ValueError, match="'b' is another name of the layer 'a'; write 'a'"):
        add_lora(net, layers=["b"])
    assert list(lora_layers(add_lora(net))) == ["a"] and len(lora_layers(net)["a"]) == 1


@pytest.mark.parametrize(
    "call", [freeze_base, merge_lora, remove_lora, lambda net: set_lora_enabled(net, True), lambda net: lora_disabled(net).__enter__()]
)
def test_without_lora_the_error_says_what_to_do(net, call):
    with pytest.raises(ValueError, match="add_lora"):
        call(net)


def test_enabled_must_be_a_bool(net):
    with pytest.raises(TypeError, match="True or False"):
        set_lora_enabled(add_lora(net), "off")
