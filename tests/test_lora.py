"""LoRA: counts, names, shapes, every equality that must hold to the bit, and several adapters on one base."""

import copy

import numpy as np
import pytest
import torch
from stirred import stir
from torch import nn
from torch.nn.utils import parametrizations

from lora_helpers import (
    LoRAParametrization,
    RichBoyNet,
    adapter_names,
    add_lora,
    count_parameters,
    freeze_base,
    lora_disabled,
    lora_layers,
    merge_lora,
    remove_lora,
    save_adapter,
    set_lora_enabled,
    use_adapter,
)

IMAGES = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(5))
SIDES = 784 + 30 + 30 + 40 + 40 + 10  # of the three weights of `net`: rank 1 costs as many numbers


@pytest.fixture
def net():
    torch.manual_seed(0)
    return RichBoyNet(30, 40)


def same_bits(net, state):
    now = net.state_dict()
    return now.keys() == state.keys() and all(torch.equal(tensor, state[key]) for key, tensor in now.items())


# One adapter


def test_the_counts_of_the_lesson():
    net = RichBoyNet()
    count = count_parameters(add_lora(net))
    assert (count.base, count.lora, count.total) == (2_807_010, 6_794, 2_813_804)
    assert count_parameters(freeze_base(net)).trainable == 6_794
    assert "0.242%" in str(count)
    assert str(count_parameters(nn.Sequential())) == "0 base + 0 LoRA = 0 parameters, 0 trainable"


def test_the_shapes_and_names_of_the_lesson():
    net = add_lora(RichBoyNet())
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    for layer, rows, columns in (("linear1", 1000, 784), ("linear2", 2000, 1000), ("linear3", 10, 2000)):
        prefix = f"{layer}.parametrizations.weight"
        assert shapes[f"{prefix}.original"] == (rows, columns)
        assert shapes[f"{prefix}.0.lora_A"] == (1, columns)
        assert shapes[f"{prefix}.0.lora_B"] == (rows, 1)
        assert shapes[f"{layer}.bias"] == (rows,)
    assert set(shapes) == set(net.state_dict()) and len(shapes) == 12


def test_a_is_standard_normal_and_b_is_zero():
    adapter = LoRAParametrization(2000, 3, rank=50, generator=torch.Generator().manual_seed(0))
    assert abs(adapter.lora_A.mean()) < 0.02 and abs(adapter.lora_A.std() - 1) < 0.02
    assert torch.equal(adapter.lora_B, torch.zeros(3, 50))


@pytest.mark.parametrize("rank, alpha, scale", [(1, 1, 1), (4, 16, 4), (8, 0.5, 0.0625)])
def test_forward_is_w_plus_alpha_over_r_times_ba(rank, alpha, scale):
    adapter = LoRAParametrization(6, 9, rank=rank, alpha=alpha)
    nn.init.normal_(adapter.lora_B)
    weight = torch.randn(9, 6)
    assert torch.equal(adapter(weight), weight + scale * (adapter.lora_B @ adapter.lora_A))
    adapter.enabled = False
    assert adapter(weight) is weight
    assert LoRAParametrization(6, 9, rank=4, alpha=16, rank_stabilised=True).scale == 8  # 16 / √4


def test_with_b_at_zero_or_switched_off_the_outputs_are_the_bases_to_the_bit(net):
    before = net(IMAGES)
    assert torch.equal(add_lora(net, rank=2)(IMAGES), before), "B = 0"
    adapted = stir(net)(IMAGES)
    assert not torch.equal(adapted, before)
    with lora_disabled(net):
        assert torch.equal(net(IMAGES), before)
    assert torch.equal(net(IMAGES), adapted)
    set_lora_enabled(net, False)
    with pytest.raises(RuntimeError), lora_disabled(net):
        raise RuntimeError
    assert torch.equal(net(IMAGES), before), "off before the block, off after it"
    set_lora_enabled(net, True)
    assert torch.equal(net(IMAGES), adapted)


def test_freezing_leaves_a_and_b_alone_trainable_and_finds_them_by_class(net):
    net.lora_like_name = nn.Parameter(torch.zeros(3))
    freeze_base(add_lora(net, rank=2))
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == {f"linear{i}.parametrizations.weight.0.lora_{m}" for i in (1, 2, 3) for m in "AB"}


def test_merging_keeps_the_outputs_and_gives_back_an_ordinary_network(net):
    plain = RichBoyNet(30, 40)
    adapted = stir(add_lora(net, rank=3, alpha=2))(IMAGES)
    merge_lora(net)
    assert torch.equal(net(IMAGES), adapted) and type(net.linear1) is nn.Linear
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    plain.load_state_dict(net.state_dict())


def test_removing_gives_the_bits_of_the_base_back(net):
    state = copy.deepcopy(net.state_dict())
    assert same_bits(remove_lora(stir(add_lora(net, rank=3))), state)


def test_merging_what_diverged_is_refused(net):
    add_lora(net).linear2.parametrizations.weight[0].lora_B.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="weight of linear2 would hold values that are not finite"):
        merge_lora(net)
    assert len(lora_layers(net)) == 3


def test_layers_can_be_chosen(net):
    add_lora(net, rank=2, layers=["linear2"])
    assert list(lora_layers(net)) == ["linear2"]
    assert count_parameters(net).lora == 2 * (30 + 40)


def test_an_adapter_is_where_the_weight_is_and_moves_with_it(net):
    """PyTorch's device without memory stands for a GPU: what stays behind cannot be computed with there."""
    assert all(p.dtype == torch.float64 for p in add_lora(net.to(torch.float64)).parameters())
    for other in (net.to("meta"), add_lora(RichBoyNet(3, 4).to("meta"))):
        assert {tensor.device.type for tensor in other.state_dict().values()} == {"meta"}
        assert count_parameters(freeze_base(other)).trainable == count_parameters(other).lora > 0
        assert other(torch.zeros(3, 784, device="meta", dtype=other.linear1.bias.dtype)).shape == (3, 10)


def test_a_generator_draws_a_and_leaves_the_global_stream_alone(net):
    state = torch.get_rng_state()
    add_lora(net, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    first = torch.randn(1, 784, generator=torch.Generator().manual_seed(1))
    assert torch.equal(net.linear1.parametrizations.weight[0].lora_A, first)


# Several adapters


def test_each_named_adapter_answers_as_if_alone_and_the_base_keeps_its_bits(net):
    state, before = copy.deepcopy(net.state_dict()), net(IMAGES)
    nine = stir(add_lora(net, rank=2, name="nine"), "nine")(IMAGES)
    four = stir(add_lora(net, rank=3, alpha=6, name="four"), "four")(IMAGES)
    assert adapter_names(net) == ["nine", "four"] and not torch.equal(nine, four)
    use_adapter(net, "nine")
    assert torch.equal(net(IMAGES), nine)
    with lora_disabled(net):
        assert torch.equal(net(IMAGES), before)
    assert torch.equal(net(IMAGES), nine)
    use_adapter(net, "four")
    assert torch.equal(net(IMAGES), four)
    remove_lora(net, "four")
    assert torch.equal(net(IMAGES), nine) and adapter_names(net) == ["nine"]
    assert same_bits(remove_lora(net), state)


def test_only_the_adapter_in_use_is_trained(net):
    add_lora(net, rank=2, name="nine")
    add_lora(net, rank=3, name="four")
    count = count_parameters(freeze_base(net))
    assert (count.lora, count.trainable) == (5 * SIDES, 3 * SIDES)
    use_adapter(net, "nine")
    assert count_parameters(freeze_base(net)).trainable == 2 * SIDES


def test_off_stays_off_when_another_adapter_is_used_or_one_is_removed(net):
    before = net(IMAGES)
    stir(add_lora(net, name="nine"), "nine")
    stir(add_lora(net, name="four"), "four")
    set_lora_enabled(net, False)
    use_adapter(net, "nine")
    assert torch.equal(net(IMAGES), before)
    remove_lora(net, "nine")
    assert torch.equal(net(IMAGES), before)
    set_lora_enabled(net, True)
    assert not torch.equal(net(IMAGES), before)


def test_after_a_block_with_lora_off_the_adapters_from_before_it_are_as_they_were(net):
    nine = stir(add_lora(net, name="nine"), "nine")(IMAGES)
    with lora_disabled(net):
        add_lora(net, name="four")
    assert [adapter.enabled for adapter in lora_layers(net)["linear1"]] == [True, False]
    use_adapter(net, "nine")
    set_lora_enabled(net, True)
    assert torch.equal(net(IMAGES), nine)


def test_when_the_adapter_in_use_goes_the_last_that_remains_is_in_use(net):
    for name in ("nine", "four", "two"):
        stir(add_lora(net, name=name), name)
    two = net(IMAGES)
    use_adapter(net, "four")
    four = net(IMAGES)
    remove_lora(net, "nine")
    assert torch.equal(net(IMAGES), four), "another one went"
    remove_lora(net, "four")
    assert torch.equal(net(IMAGES), two)
    assert torch.equal(merge_lora(net)(IMAGES), two)


def test_merging_never_discards_another_adapter_without_a_word(net):
    stir(add_lora(net, name="nine"), "nine")
    add_lora(net, name="four")
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="not in use: 'nine'.*save_adapter"):
        merge_lora(net)
    assert same_bits(net, state)


@pytest.mark.parametrize(
    "call", [use_adapter, remove_lora, lambda net, name: save_adapter(net, "nowhere", name)]
)
def test_an_unknown_adapter_is_named_with_those_there_are(net, call):
    add_lora(net, name="nine")
    with pytest.raises(ValueError, match="'five'.*'nine'"):
        call(net, "five")


def test_a_name_is_given_once(net):
    add_lora(net, layers=["linear2"])
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="already has an adapter named 'default'.*remove_lora"):
        add_lora(net)
    assert same_bits(net, state)


# What is refused, with nothing changed; test_properties.py tries many more


@pytest.mark.parametrize("rank", [0, -1, 1.5, 2.0, True, "4", None, 41])
def test_a_rank_is_a_whole_number_that_a_layer_can_have(net, rank):
    with pytest.raises(ValueError, match=f"rank is {rank!r}; it must be"):
        add_lora(net, rank=rank)
    assert not lora_layers(net)


@pytest.mark.parametrize("number", [np.int64(2), np.float32(0.5), torch.tensor(2)])
def test_a_number_of_another_library_is_told_from_pythons_own(net, number):
    with pytest.raises(ValueError, match=rf"alpha is .*type {type(number).__name__}: write float\(…\)"):
        add_lora(net, alpha=number)
    add_lora(net, alpha=float(number))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"alpha": 0}, ValueError, "alpha is 0; it must be a positive, finite number"),
        ({"generator": 5}, TypeError, "generator is 5; it must be a torch.Generator"),
        ({"name": ""}, ValueError, "name is ''; it must be a text"),
        ({"name": 5}, ValueError, "name is 5; it must be a text"),
        ({"rank_stabilised": 1}, TypeError, "rank_stabilised is 1; it must be True or False"),
        ({"layers": ["linear9"]}, ValueError, "no layer 'linear9'; .* are: 'linear1', 'linear2', 'linear3'"),
        ({"layers": [["linear1"]]}, ValueError, "no layer \\['linear1'\\]"),
        ({"layers": ["linear1", "relu"]}, TypeError, "'relu' is a ReLU"),
        ({"layers": "linear1"}, TypeError, "layers is 'linear1'; it must be a list of names"),
        ({"layers": 5}, TypeError, "layers is 5; it must be a list of names"),
        ({"layers": []}, ValueError, "no layer to adapt"),
        ({"layers": ["linear1", "linear1"]}, ValueError, "names a layer twice"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(net, options, error, message):
    with pytest.raises(error, match=message):
        add_lora(net, **options)
    assert not lora_layers(net)


def test_a_weight_that_something_else_uses_or_computes_is_refused(net):
    def refused(message):
        before = type(net.linear1), [name for name, _ in net.named_parameters()]
        with pytest.raises(ValueError, match=message):
            add_lora(net)
        assert (type(net.linear1), [name for name, _ in net.named_parameters()]) == before

    net.table = net.linear2.weight
    refused("table and linear2.weight share one weight")
    net.table = None
    parametrizations.weight_norm(net.linear3)
    refused("'linear3' already has _WeightNorm")
    del net.linear2.weight
    net.linear2.weight = torch.zeros(40, 30)
    refused("'linear2' is computed from other tensors")


def test_a_network_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="no layer to adapt; this network's Linear layers are: none"):
        add_lora(nn.Sequential(nn.Conv2d(1, 2, 3)))


def test_without_lora_the_error_says_what_to_do(net):
    calls = [freeze_base, merge_lora, remove_lora, lambda net: use_adapter(net, "nine")]
    calls += [lambda net: set_lora_enabled(net, True), lambda net: lora_disabled(net).__enter__()]
    for call in calls:
        with pytest.raises(ValueError, match="has no LoRA; call add_lora"):
            call(net)


def test_the_switch_is_true_or_false(net):
    with pytest.raises(TypeError, match="enabled is 'off'; it must be True or False"):
        set_lora_enabled(add_lora(net), "off")
