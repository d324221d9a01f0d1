"""What must hold for any adapter on any small network, and what must be refused, tried with many inputs.

Hypothesis (hypothesis.works) draws them, always the same ones, and small, so that a failure can be read.
"""

import copy
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from stirred import stir
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import TensorDataset

from lora_helpers import (
    LoRAParametrization,
    RichBoyNet,
    add_lora,
    count_parameters,
    evaluate,
    fine_tune,
    freeze_base,
    load_adapter,
    lora_disabled,
    lora_layers,
    merge_lora,
    only_digit,
    plot_confusion,
    plot_losses,
    plot_wrong_counts,
    pretrained_base,
    remove_lora,
    save_adapter,
    set_lora_enabled,
    show_digits,
    train,
    use_adapter,
)

settings.register_profile("same everywhere", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile("same everywhere")

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@st.composite
def networks(draw):
    """Two or three linear layers of any small sizes, with or without biases, of any dtype."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=3, max_size=4))
    torch.manual_seed(draw(st.integers(0, 99)))
    layers = [nn.Linear(i, o, bias=draw(st.booleans())) for i, o in zip(sizes, sizes[1:])]
    return nn.Sequential(*layers).to(draw(DTYPES))


@st.composite
def adapted(draw):
    """A network with an adapter as if trained, the network without it, and what the adapter was made with."""
    base = draw(networks())
    names = [name for name, _ in base.named_children()]
    layers = draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    how = {
        "rank": draw(st.integers(1, max(min(base.get_submodule(name).weight.shape) for name in layers))),
        "alpha": draw(st.floats(1 / 64, 64)),
        "layers": layers,
        "rank_stabilised": draw(st.booleans()),
    }
    return stir(add_lora(copy.deepcopy(base), **how)), base, how


def inputs_for(net):
    weight = next(net.parameters())
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
    return x.to(weight.dtype)


def same_bits(one, other):
    one, other = one.state_dict(), other.state_dict()
    return list(one) == list(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# What must hold for any adapter


@given(adapted())
def test_with_b_at_zero_or_switched_off_the_network_is_the_base_to_the_bit(case):
    net, base, how = case
    x, untrained = inputs_for(base), add_lora(copy.deepcopy(base), **how)
    assert torch.equal(untrained(x), base(x))
    with lora_disabled(net):
        assert torch.equal(net(x), base(x))
    set_lora_enabled(net, False)
    assert torch.equal(net(x), base(x))


@given(adapted())
def test_each_weight_is_w_plus_scaled_ba_and_the_other_layers_are_left_alone(case):
    net, base, how = case
    scale = how["alpha"] / (math.sqrt(how["rank"]) if how["rank_stabilised"] else how["rank"])
    assert set(lora_layers(net)) == set(how["layers"])
    for name, layer in base.named_children():
        expected = layer.weight
        if name in how["layers"]:
            (adapter,), rows, columns = lora_layers(net)[name], *layer.weight.shape
            A, B = adapter.lora_A, adapter.lora_B
            assert (A.shape, B.shape) == ((how["rank"], columns), (rows, how["rank"]))
            assert A.dtype == B.dtype == layer.weight.dtype
            expected = expected + scale * (B @ A)
        torch.testing.assert_close(net.get_submodule(name).weight, expected)


@given(adapted())
def test_merging_keeps_the_outputs_and_removing_gives_the_base_back(case):
    net, base, _ = case
    x, outputs = inputs_for(base), net(inputs_for(base))
    merged, removed = merge_lora(copy.deepcopy(net)), remove_lora(copy.deepcopy(net))
    assert torch.equal(merged(x), outputs) and torch.equal(net(x), outputs)
    assert list(merged.state_dict()) == list(base.state_dict())
    assert not any(parametrize.is_parametrized(module) for module in merged.modules())
    assert same_bits(removed, base) and list(map(type, removed)) == list(map(type, base))


@given(adapted())
def test_state_copy_and_file_carry_the_adapter_to_the_bit(tmp_path_factory, case):
    net, base, how = case
    x, outputs = inputs_for(base), net(inputs_for(base))
    twin = add_lora(copy.deepcopy(base), **how)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x), outputs) and torch.equal(copy.deepcopy(net)(x), outputs)
    folder = save_adapter(net, tmp_path_factory.mktemp("adapter"))
    assert torch.equal(load_adapter(copy.deepcopy(base), folder)(x), outputs)


@given(adapted(), DTYPES)
def test_in_another_dtype_only_a_and_b_are_trained(case, dtype):
    net, base, how = case
    net = freeze_base(net.to(dtype))
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert list(trained) == [name for name, _ in net.named_parameters() if "lora_" in name]
    added = sum(how["rank"] * sum(base.get_submodule(name).weight.shape) for name in how["layers"])
    count = count_parameters(net)
    assert (count.lora, count.trainable) == (added, added) and count.base == count_parameters(base).base
    before = {name: p.detach().clone() for name, p in trained.items()}
    net(inputs_for(base).to(dtype)).float().square().sum().sqrt().backward()
    torch.optim.SGD(trained.values(), lr=0.1).step()
    assert any(not torch.equal(p, before[name]) for name, p in trained.items())
    assert same_bits(remove_lora(net), base.to(dtype))


@settings(max_examples=20)
@given(st.data())
def test_several_adapters_come_and_go_in_any_order(data):
    base, names, alone = data.draw(networks()), ["nine", "four", "two"], {}
    x, net = inputs_for(base), copy.deepcopy(base)
    for name in names:
        alone[name] = stir(add_lora(net, name=name))(x)
    for name in data.draw(st.permutations(names)):
        use_adapter(net, name)
        assert torch.equal(net(x), alone[name])
        with lora_disabled(net):
            assert torch.equal(net(x), base(x))
    gone, *rest = data.draw(st.permutations(names))
    remove_lora(net, gone)
    use_adapter(net, rest[0])
    assert torch.equal(net(x), alone[rest[0]])
    assert same_bits(remove_lora(net), base)


# What must hold for training, testing and pictures


def images(count, fill=0.0, dtype=torch.float32):
    return torch.full((count, 1, 28, 28), fill, dtype=dtype)


LABELS = st.lists(st.integers(0, 9), min_size=1, max_size=40)


class ReadsTheAnswer(nn.Module):
    """Answers the number that stands in the first pixel."""

    def forward(self, images):
        return torch.eye(10)[images.flatten(1)[:, 0].long()]


@given(LABELS, st.data())
def test_the_figures_of_a_test_are_those_of_counting_by_hand(labels, data):
    answers = data.draw(st.lists(st.integers(0, 9), min_size=len(labels), max_size=len(labels)))
    shown = images(len(labels)) + torch.tensor(answers)[:, None, None, None]
    result = evaluate(ReadsTheAnswer(), TensorDataset(shown, torch.tensor(labels)))
    pairs = list(zip(labels, answers))
    assert result.predictions.tolist() == answers
    assert result.accuracy == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    for digit in range(10):
        found = pairs.count((digit, digit))
        assert result.wrong_counts[digit] == labels.count(digit) - found
        assert result.recall[digit].item() == pytest.approx(found / max(1, labels.count(digit)))
        assert result.precision[digit].item() == pytest.approx(found / max(1, answers.count(digit)))


@given(LABELS, st.integers(0, 9))
def test_only_digit_keeps_all_images_of_that_digit_in_their_order(labels, digit):
    assume(digit in labels)
    numbered = images(len(labels)) + torch.arange(len(labels))[:, None, None, None]
    kept = only_digit(TensorDataset(numbered, torch.tensor(labels)), digit)
    assert kept.tensors[0][:, 0, 0, 0].tolist() == [i for i, label in enumerate(labels) if label == digit]
    assert set(kept.tensors[1].tolist()) == {digit}


@given(LABELS, st.integers(1, 50), st.integers(1, 20), st.booleans())
def test_training_takes_the_batches_asked_for_and_moves_only_what_is_trainable(labels, size, batches, lora):
    torch.manual_seed(0)
    net = RichBoyNet(7, 5)
    if lora:
        freeze_base(add_lora(net))
    before, data = copy.deepcopy(net), TensorDataset(torch.randn(len(labels), 784), torch.tensor(labels))
    losses = train(net, data, max_batches=batches, batch_size=size, progress=False)
    assert len(losses) == batches and all(map(math.isfinite, losses))
    moved = {n for (n, p), q in zip(net.named_parameters(), before.parameters()) if not torch.equal(p, q)}
    assert moved and moved <= {name for name, p in net.named_parameters() if p.requires_grad}


@settings(max_examples=3)
@given(LABELS, st.lists(st.floats(0, 100), min_size=1, max_size=80))
def test_any_digits_losses_and_results_can_be_drawn(labels, losses):
    data = TensorDataset(images(len(labels)), torch.tensor(labels))
    result = evaluate(RichBoyNet(3, 4), data)
    shown = ", ".join(map(str, sorted(set(labels))))
    assert show_digits(data).alt == f"Digits: {shown}"
    for picture in (plot_losses(losses, window=3), plot_confusion(result), plot_wrong_counts(result, result)):
        assert picture.png() and picture.alt


@settings(max_examples=5)
@given(st.integers(0, 99), st.floats(-100, 100, width=32))
def test_a_base_of_ones_own_comes_back_from_its_file_to_the_bit(tmp_path_factory, seed, bias):
    torch.manual_seed(seed)
    own, file = RichBoyNet(), tmp_path_factory.mktemp("base") / "own.safetensors"
    nn.init.constant_(own.linear3.bias, bias)
    save_file(own.state_dict(), file)
    assert same_bits(pretrained_base(file), own)


# What must be refused, with nothing changed


def is_ours(caught):
    """The package raised it and says so in words; Python or PyTorch did not stumble on it further down."""
    last = caught.traceback[-1]
    raised = str(last.statement).strip().startswith("raise ")
    return "lora_helpers" in last.path.parts and raised and len(str(caught.value)) > 25


def refused(call, net, *args, **options):
    """`call` raises in words of its own, and leaves every tensor, flag and name of `net` as it was."""
    before, flags = copy.deepcopy(net), [p.requires_grad for p in net.parameters()]
    with pytest.raises((ValueError, TypeError)) as caught:
        call(net, *args, **options)
    assert is_ours(caught)
    assert same_bits(net, before) and [p.requires_grad for p in net.parameters()] == flags
    return str(caught.value)


JUNK = st.one_of(st.booleans(), st.text(max_size=3), st.lists(st.none(), max_size=2), st.complex_numbers())
NO_COUNTS = st.one_of(JUNK, st.integers(max_value=0), st.floats())
NO_RANKS = st.one_of(NO_COUNTS, st.none(), st.integers(min_value=13))
NO_DIGITS = st.one_of(JUNK, st.integers(max_value=-1), st.integers(min_value=10), st.floats())
NO_RATES = st.one_of(
    JUNK, st.none(), st.floats(max_value=0), st.integers(max_value=0), st.sampled_from([math.nan, math.inf])
)


@given(networks(), NO_RANKS, NO_RATES)
def test_no_bad_rank_or_alpha_is_taken(net, rank, alpha):
    assert refused(add_lora, net, rank=rank).startswith(f"rank is {rank!r}; it must be")
    assert refused(add_lora, net, alpha=alpha).startswith(f"alpha is {alpha!r}; it must be")
    if not isinstance(rank, int) or rank < 1:
        with pytest.raises(ValueError, match="^in_features is "):
            LoRAParametrization(rank, 3)


@given(networks(), st.lists(st.one_of(st.text(), st.integers(), st.none(), st.lists(st.none())), max_size=3))
def test_no_unknown_layer_is_taken(net, layers):
    assume(not layers or any(layer not in list(dict(net.named_children())) for layer in layers))
    refused(add_lora, net, layers=layers)


TWELVE = TensorDataset(images(12), torch.arange(12) % 10)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return freeze_base(add_lora(RichBoyNet(12, 16)))


@given(NO_COUNTS, NO_RATES, NO_DIGITS)
def test_no_bad_number_is_trained_with(net, bad, rate, digit):
    cases = [("epochs", bad), ("max_batches", bad), ("batch_size", bad), ("lr", rate)]
    cases += [("seed", bad)] if bad != 0 else []
    for name, value in cases:
        message = refused(train, net, TWELVE, progress=False, **{name: value})
        assert message.startswith(f"{name} is {value!r}; it must be")
    for call in (lambda: only_digit(TWELVE, digit), lambda: fine_tune(RichBoyNet(3, 4), None, digit=digit)):
        with pytest.raises(ValueError, match="^digit is .*0 to 9"):
            call()


BAD_DATA = {
    "dataset is a list": ["digits"],
    "Labels run from 3 to 10": TensorDataset(images(2), torch.tensor([3, 10])),
    "images hold NaN": TensorDataset(images(2, math.nan), torch.tensor([3, 1])),
}


@pytest.mark.parametrize("message, data", BAD_DATA.items(), ids=BAD_DATA)
def test_no_unfit_dataset_is_taken(net, message, data):
    assert message in refused(train, net, data) and message in refused(evaluate, net, data)
    for call in (lambda: only_digit(data, 3), lambda: show_digits(data)):
        with pytest.raises((ValueError, TypeError), match=message):
            call()


@pytest.mark.parametrize("thing", ["net", None, 3, RichBoyNet])
def test_what_is_not_a_network_is_named(thing):
    calls = [add_lora, count_parameters, freeze_base, lora_layers, merge_lora, remove_lora]
    calls += [lambda net: evaluate(net, TWELVE), lambda net: train(net, TWELVE)]
    calls += [lambda net: load_adapter(net, "nowhere"), lambda net: save_adapter(net, "nowhere")]
    calls += [lambda net: use_adapter(net, "nine"), lambda net: set_lora_enabled(net, True)]
    for call in calls:
        with pytest.raises(TypeError, match="must be a network"):
            call(thing)
