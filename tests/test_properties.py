"""What must hold for any adapter on any small network, and what must be refused, tried with many inputs.

Hypothesis (hypothesis.works) draws them, always the same ones; its cases are small, so that a failure can be read.
"""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, parametrizations, prune
from torch.utils.data import TensorDataset

from lora_helpers import (
    DigitPad,
    ParametrizationInspector,
    PredictChoice,
    PredictRanking,
    Question,
    Quiz,
    LoRAParametrization,
    RichBoyNet,
    add_lora,
    as_mnist,
    count_parameters,
    evaluate,
    factorised,
    fine_tune,
    freeze_base,
    load_adapter,
    load_mnist,
    lora_disabled,
    lora_layers,
    merge_lora,
    only_digit,
    plot_losses,
    pretrained_base,
    projector_mode,
    remove_lora,
    save_adapter,
    set_lora_enabled,
    show_digits,
    train,
    train_side_by_side,
    use_adapter,
)

settings.register_profile("same everywhere", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("same everywhere")

SIZES = st.integers(1, 12)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@st.composite
def networks(draw):
    """Two or three linear layers of any small sizes, with or without biases, of any dtype."""
    sizes = draw(st.lists(SIZES, min_size=3, max_size=4))
    torch.manual_seed(draw(st.integers(0, 99)))
    layers = [nn.Linear(i, o, bias=draw(st.booleans())) for i, o in zip(sizes, sizes[1:])]
    return nn.Sequential(*layers).to(draw(st.sampled_from(list(TOLERANCES))))


@st.composite
def adapted(draw):
    """A network, its copy without LoRA, and what the adapter was made with."""
    net = draw(networks())
    names = draw(st.lists(st.sampled_from([name for name, _ in net.named_children()]), unique=True, min_size=1))
    largest = max(min(net.get_submodule(name).weight.shape) for name in names)
    how = {"rank": draw(st.integers(1, largest)), "alpha": draw(st.floats(1 / 64, 64)), "layers": names, "rank_stabilised": draw(st.booleans())}
    return add_lora(copy.deepcopy(net), **how), net, how


def stir(net):
    """As if trained: B is not zero."""
    with torch.no_grad():
        for (adapter,) in lora_layers(net).values():
            adapter.lora_B.normal_(std=0.1)


def inputs_for(net, rows=3):
    layer = next(m for m in net.modules() if isinstance(m, nn.Linear))
    return torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(1)).to(layer.weight.dtype)


def same_bits(one, other):
    one, other = (net.state_dict() for net in (one, other))
    return list(one) == list(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# What must hold for any adapter


@given(adapted())
def test_nothing_changes_until_b_moves_and_off_is_the_base_to_the_bit(case):
    net, base, how = case
    x = inputs_for(base)
    assert torch.equal(net(x), base(x))
    assert list(lora_layers(net)) == [name for name, _ in base.named_children() if name in how["layers"]]
    stir(net)
    with lora_disabled(net):
        assert torch.equal(net(x), base(x))
    set_lora_enabled(net, False)
    assert torch.equal(net(x), base(x))


@given(adapted())
def test_the_weight_is_w_plus_scaled_ba_of_rank_r_at_most(case):
    net, base, how = case
    stir(net)
    r = how["rank"]
    scale = how["alpha"] / (math.sqrt(r) if how["rank_stabilised"] else r)
    for name, (adapter,) in lora_layers(net).items():
        w, a, b = base.get_submodule(name).weight, adapter.lora_A, adapter.lora_B
        assert (tuple(a.shape), tuple(b.shape)) == ((r, w.shape[1]), (w.shape[0], r))
        assert a.dtype == b.dtype == w.dtype
        torch.testing.assert_close(net.get_submodule(name).weight, w + scale * (b @ a))
        assert torch.linalg.matrix_rank((b.double() @ a.double()).detach()) <= r


@given(adapted())
def test_both_ways_to_compute_agree(case):
    net, base, _ = case
    stir(net)
    x = inputs_for(base)
    slow = net(x)
    with factorised(net):
        fast = net(x)
    tolerance = TOLERANCES[x.dtype]
    assert (slow - fast).norm() <= tolerance * max(1, slow.norm().item(), sum(a.delta.norm().item() for (a,) in lora_layers(net).values()) ** 2)
    assert torch.equal(net(x), slow)


@given(adapted())
def test_merging_gives_an_ordinary_network_and_removing_the_base(case):
    net, base, _ = case
    stir(net)
    x = inputs_for(base)
    outputs = net(x)
    merged, removed = merge_lora(copy.deepcopy(net)), remove_lora(copy.deepcopy(net))
    assert torch.equal(merged(x), outputs) and torch.equal(net(x), outputs)
    assert list(merged.state_dict()) == list(base.state_dict())
    assert not any(parametrize.is_parametrized(module) for module in merged.modules())
    assert same_bits(removed, base) and [type(m) for m in removed.modules()] == [type(m) for m in base.modules()]


@given(adapted())
def test_state_copy_and_file_carry_the_adapter_to_the_bit(tmp_path_factory, case):
    net, base, how = case
    stir(net)
    x = inputs_for(base)
    outputs = net(x)
    twin = add_lora(copy.deepcopy(base), **how)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x), outputs)
    assert torch.equal(copy.deepcopy(net)(x), outputs)
    folder = save_adapter(net, tmp_path_factory.mktemp("adapter"))
    assert torch.equal(load_adapter(copy.deepcopy(base), folder)(x), outputs)


@given(adapted(), st.sampled_from(list(TOLERANCES)), st.booleans())
def test_moved_to_another_dtype_it_is_still_one_network_and_trains(case, dtype, on):
    net, base, how = case
    stir(net)
    net = freeze_base(net.to(dtype))
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert [name for name, p in net.named_parameters() if p.requires_grad] == [name for name, _ in net.named_parameters() if "lora_" in name]
    set_lora_enabled(net, on)
    before = [p.detach().clone() for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    if on:
        net(inputs_for(base).to(dtype)).float().square().sum().sqrt().backward()
        optimizer.step()
    else:
        assert not net(inputs_for(base).to(dtype)).requires_grad
    moved = [not torch.equal(p, q) for p, q in zip(before, (p for p in net.parameters() if p.requires_grad))]
    assert any(moved) is on
    assert same_bits(remove_lora(net), base.to(dtype))


def test_moved_to_another_device_all_of_it_moves():
    """PyTorch's device without memory stands for a GPU: what stayed behind would not go together with the rest there."""
    net = freeze_base(add_lora(RichBoyNet(8, 9), rank=2))
    names, trainable = list(net.state_dict()), [p.requires_grad for p in net.parameters()]
    net.to("meta")
    assert {t.device.type for t in (*net.parameters(), *net.buffers())} == {"meta"}
    assert list(net.state_dict()) == names and [p.requires_grad for p in net.parameters()] == trainable
    x = torch.zeros(3, 784, device="meta")
    for computing in (nullcontext(net), factorised(net), lora_disabled(net)):
        with computing:
            assert net(x).device.type == "meta" and net(x).shape == (3, 10)
    added = add_lora(RichBoyNet(8, 9).to("meta"), rank=2)
    assert {p.device.type for p in added.parameters()} == {"meta"}, "made where the weight is"
    assert {p.device.type for p in merge_lora_of_zeros(net).parameters()} == {"cpu"}


def merge_lora_of_zeros(net):
    """`net`, back from the device without memory, where it lost its values."""
    net = net.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    return merge_lora(net)


@given(adapted())
def test_what_is_counted_is_what_is_there(case):
    net, base, how = case
    counts = count_parameters(freeze_base(net))
    added = sum(how["rank"] * sum(base.get_submodule(name).weight.shape) for name in how["layers"])
    assert (counts.base, counts.lora, counts.trainable) == (sum(p.numel() for p in base.parameters()), added, added)
    assert counts.total == sum(p.numel() for p in net.parameters())


@settings(max_examples=25)
@given(st.data())
def test_several_adapters_come_and_go_in_any_order(data):
    base = data.draw(networks())
    x, net = inputs_for(base), copy.deepcopy(base)
    names, alone = ["nine", "four", "two"], {}
    for name in names:
        add_lora(net, rank=1, name=name)
        with torch.no_grad():
            for adapters in lora_layers(net).values():
                adapters[-1].lora_B.normal_(std=0.1)
        alone[name] = net(x)
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


# What must be refused, with nothing changed


def is_ours(caught):
    """The error was raised by a line of the package that says so, not stumbled on by Python or PyTorch below it."""
    last = caught.traceback[-1]
    return "lora_helpers" in last.path.parts and str(last.statement).strip().startswith("raise ") and len(str(caught.value)) > 25


def refused(net, call, error=(ValueError, TypeError)):
    """`call(net)` raises, with a word on what was wrong, and leaves every tensor, flag and name as it was."""
    before, flags = copy.deepcopy(net), [p.requires_grad for p in net.parameters()]
    with pytest.raises(error) as caught:
        call(net)
    assert is_ours(caught)
    assert same_bits(net, before) and [p.requires_grad for p in net.parameters()] == flags
    assert not any(parametrize.is_parametrized(m) for m in net.modules()) or lora_layers(net).keys() == lora_layers(before).keys()
    return str(caught.value)


NO_NUMBERS = st.one_of(st.none(), st.booleans(), st.text(max_size=3), st.lists(st.integers(), max_size=2), st.complex_numbers(), st.binary(max_size=2))
BAD_RANKS = st.one_of(NO_NUMBERS, st.integers(max_value=0), st.integers(min_value=13), st.floats(), st.fractions())
BAD_ALPHAS = st.one_of(NO_NUMBERS, st.floats(max_value=0), st.just(math.nan), st.just(math.inf), st.integers(max_value=0), st.integers(min_value=10**309))
BAD_DIGITS = st.one_of(NO_NUMBERS, st.integers(max_value=-1), st.integers(min_value=10), st.floats())
BAD_COUNTS = st.one_of(NO_NUMBERS.filter(lambda value: value is not None), st.integers(max_value=0), st.floats())
BAD_RATES = st.one_of(NO_NUMBERS, st.floats(max_value=0), st.just(math.nan), st.just(math.inf), st.integers(max_value=0))


@given(networks(), BAD_RANKS)
def test_no_bad_rank_is_taken(net, rank):
    assert refused(net, lambda net: add_lora(net, rank=rank)).startswith(f"rank is {rank!r}")


@given(networks(), BAD_ALPHAS)
def test_no_bad_alpha_is_taken(net, alpha):
    assert refused(net, lambda net: add_lora(net, alpha=alpha)).startswith(f"alpha is {alpha!r}")


@given(networks(), st.lists(st.one_of(st.text(), st.integers(), st.none(), st.just("")), max_size=3))
def test_no_unknown_layer_is_taken(net, layers):
    assume(not layers or any(layer not in dict(net.named_children()) for layer in layers))
    refused(net, lambda net: add_lora(net, layers=layers))


@given(BAD_RANKS.filter(lambda value: not isinstance(value, int) or value < 1), BAD_ALPHAS)
def test_no_bad_parametrization_is_made(size, alpha):
    for bad in ({"in_features": size}, {"out_features": size}, {"rank": size}, {"alpha": alpha}):
        with pytest.raises(ValueError, match=f"^{next(iter(bad))} is "):
            LoRAParametrization(**{"in_features": 3, "out_features": 4} | bad)


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    return net


def tied_elsewhere():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net.table = net[1].weight
    return net


def plain_tensor():
    layer = nn.Linear(4, 3)
    del layer.weight
    layer.weight = torch.zeros(3, 4)
    return layer


def after_a_good_one(make):
    return lambda: nn.Sequential(nn.Linear(4, 4), make())


# What makes the network, and what add_lora says of it, by default and when the misfit is named.
UNFIT = {
    "a convolution": (after_a_good_one(lambda: nn.Conv2d(1, 2, 3)), None, "'1' is a Conv2d; .*Linear layers are: '0'"),
    "an embedding": (after_a_good_one(lambda: nn.Embedding(5, 3)), None, "'1' is a Embedding; .*Linear layers are: '0'"),
    "a convolution alone": (lambda: nn.Sequential(nn.Identity(), nn.Conv2d(1, 2, 3)), "Linear layers are: none", "'1' is a Conv2d; .*are: none"),
    "nothing in it": (nn.Sequential, "Linear layers are: none", "no layer '1'; .*are: none"),
    "tied weights": (tied, "0.weight and 1.weight share one weight", "0.weight and 1.weight share one weight"),
    "tied to another name": (tied_elsewhere, "table and 1.weight share one weight", "table and 1.weight share one weight"),
    "another parametrization": (after_a_good_one(lambda: parametrizations.weight_norm(nn.Linear(4, 3))), *2 * ["'1' already carries _WeightNorm"]),
    "an orthogonal weight": (after_a_good_one(lambda: parametrizations.orthogonal(nn.Linear(4, 3))), *2 * ["'1' already carries _Orthogonal"]),
    "LoRA already": (lambda: add_lora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), layers=["1"]), *2 * ["already has an adapter named 'default'"]),
    "no shape yet": (after_a_good_one(lambda: nn.LazyLinear(3)), *2 * ["'1' has no shape yet; run the network once"]),
    "complex weights": (after_a_good_one(lambda: nn.Linear(4, 3, dtype=torch.complex64)), *2 * ["dtype is torch.complex64; it must be float16"]),
    "weight_norm of old": (after_a_good_one(lambda: nn.utils.weight_norm(nn.Linear(4, 3))), *2 * ["'1' is no parameter, .*remove_weight_norm"]),
    "spectral_norm of old": (after_a_good_one(lambda: nn.utils.spectral_norm(nn.Linear(4, 3))), *2 * ["'1' is no parameter, .*remove_spectral_norm"]),
    "pruned": (after_a_good_one(lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 2)), *2 * ["'1' is no parameter, .*prune.remove"]),
    "a plain tensor": (after_a_good_one(plain_tensor), *2 * ["'1' is no parameter, but computed from others or set by hand"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("make, by_default, named", UNFIT.values(), ids=UNFIT)
def test_no_unfit_network_is_taken(make, by_default, named):
    net = make()
    before, kinds = {name: id(p) for name, p in net.named_parameters()}, [type(module) for module in net.modules()]
    for layers, message in ((None, by_default), (["1"], named), (["0", "1"], None)):
        if layers is None and message is None:
            continue  # then the misfit is left out, and the good layer adapted
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            add_lora(net, layers=layers)
        assert is_ours(caught)
    assert {name: id(p) for name, p in net.named_parameters()} == before and [type(module) for module in net.modules()] == kinds


def test_a_misfit_that_is_not_named_does_not_matter():
    net = after_a_good_one(lambda: nn.LazyLinear(3))()
    assert list(lora_layers(add_lora(net, layers=["0"]))) == ["0"]
    with pytest.raises(ValueError, match="no shape yet"):
        add_lora(net, name="more")
    remove_lora(net)


def images(count, fill=None, dtype=torch.float32):
    return torch.zeros(count, 1, 28, 28, dtype=dtype) if fill is None else torch.full((count, 1, 28, 28), fill, dtype=dtype)


DATASETS = {
    "no dataset": ["digits"],
    "images without labels": TensorDataset(images(3)),
    "empty": TensorDataset(images(0), torch.zeros(0, dtype=torch.int64)),
    "a label of 10": TensorDataset(images(2), torch.tensor([3, 10])),
    "a label of −1": TensorDataset(images(2), torch.tensor([3, -1])),
    "float labels": TensorDataset(images(2), torch.tensor([3.0, 1.0])),
    "one-hot labels": TensorDataset(images(2), torch.eye(10, dtype=torch.int64)[:2]),
    "raw bytes": TensorDataset(images(2, dtype=torch.uint8), torch.tensor([3, 1])),
    "27 rows": TensorDataset(torch.zeros(2, 1, 27, 28), torch.tensor([3, 1])),
    "one image alone": TensorDataset(torch.zeros(784), torch.zeros(784, dtype=torch.int64)),
    "NaN": TensorDataset(images(2, math.nan), torch.tensor([3, 1])),
    "infinite": TensorDataset(images(2, -math.inf), torch.tensor([3, 1])),
}  # fmt: skip
TAKES_DATA = {
    "train": lambda net, data: train(net, data, progress=False),
    "train_side_by_side": lambda net, data: train_side_by_side([net], data, max_batches=2),
    "evaluate": evaluate,
    "only_digit": lambda _, data: only_digit(data, 3),
    "show_digits": lambda _, data: show_digits(data),
}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return freeze_base(add_lora(RichBoyNet(12, 16)))


@pytest.mark.parametrize("data", DATASETS.values(), ids=DATASETS)
@pytest.mark.parametrize("call", TAKES_DATA.values(), ids=TAKES_DATA)
def test_no_unfit_dataset_is_taken(net, call, data):
    message = refused(net, lambda net: call(net, data))
    assert "ataset" in message or "abel" in message or "image" in message


@pytest.fixture(scope="module")
def two():
    return TensorDataset(images(12), torch.arange(12) % 10)


@given(bad=BAD_COUNTS, rate=BAD_RATES)
def test_no_bad_number_is_trained_with(net, two, bad, rate):
    for name in ("epochs", "max_batches", "batch_size"):
        assert f"{name} is {bad!r}" in refused(net, lambda net: train(net, two, progress=False, **{name: bad}))
    assert f"lr is {rate!r}" in refused(net, lambda net: train(net, two, progress=False, lr=rate))
    if bad != 0:  # a seed may be 0
        assert f"seed is {bad!r}" in refused(net, lambda net: train(net, two, progress=False, seed=bad))


@given(digit=BAD_DIGITS)
def test_no_bad_digit_is_taken(two, digit):
    with pytest.raises(ValueError, match="^digit is .*0 to 9"):
        only_digit(two, digit)


@pytest.fixture(scope="module")
def mnist():
    return load_mnist("sample")


SETTINGS = {"rank": BAD_RANKS.filter(lambda rank: rank != 13 and not (isinstance(rank, int) and 13 < rank <= 64)), "alpha": BAD_ALPHAS, "digit": BAD_DIGITS}


@settings(max_examples=30)
@given(data=st.data())
def test_no_bad_setting_is_fine_tuned(net, mnist, data):
    name = data.draw(st.sampled_from(list(SETTINGS)))
    base = RichBoyNet(12, 16)
    bad = data.draw(SETTINGS[name])
    assert f"{name} is {bad!r}" in refused(base, lambda base: fine_tune(base, mnist, batches=1, **{name: bad}))
    for name in ("batches", "seed"):
        bad = data.draw(BAD_COUNTS.filter(lambda value: value != 0))
        assert f"{name} is {bad!r}" in refused(base, lambda base: fine_tune(base, mnist, **{name: bad}))
    bad = data.draw(st.one_of(NO_NUMBERS, st.floats(max_value=-0.01), st.floats(min_value=0.81), st.just(math.nan)))
    assert f"share is {bad!r}" in refused(base, lambda base: fine_tune(base, mnist, share=bad))


NO_NETWORK = ["net", None, 3, RichBoyNet]
TAKES_NETWORK = {
    "add_lora": add_lora,
    "count_parameters": count_parameters,
    "evaluate": lambda net: evaluate(net, load_mnist("sample").test),
    "factorised": lambda net: factorised(net).__enter__(),
    "fine_tune": lambda net: fine_tune(net, load_mnist("sample")),
    "freeze_base": freeze_base,
    "load_adapter": lambda net: load_adapter(net, "nowhere"),
    "lora_disabled": lambda net: lora_disabled(net).__enter__(),
    "lora_layers": lora_layers,
    "merge_lora": merge_lora,
    "remove_lora": remove_lora,
    "save_adapter": lambda net: save_adapter(net, "nowhere"),
    "set_lora_enabled": lambda net: set_lora_enabled(net, True),
    "train_side_by_side": lambda net: train_side_by_side([net], load_mnist("sample").test, max_batches=1),
    "train": lambda net: train(net, load_mnist("sample").test),
    "use_adapter": lambda net: use_adapter(net, "nine"),
}


@pytest.mark.parametrize("thing", NO_NETWORK, ids=map(repr, NO_NETWORK))
@pytest.mark.parametrize("call", TAKES_NETWORK.values(), ids=TAKES_NETWORK)
def test_what_is_no_network_is_named(call, thing):
    with pytest.raises(TypeError, match="must be a network"):
        call(thing)


OTHERS = {
    "no networks to train": (lambda: train_side_by_side([], TensorDataset(images(2), torch.tensor([1, 2])), max_batches=2), "network"),
    "another source": (lambda: load_mnist("fashion"), "allowed are"),
    "no mnist": (lambda: pretrained_base("sample"), "load_mnist"),
    "no mnist to fine-tune on": (lambda: fine_tune(RichBoyNet(8, 9), "sample"), "load_mnist"),
    "a negative seed": (lambda: pretrained_base(load_mnist("sample"), seed=-1), "seed is -1"),
    "no losses": (lambda: plot_losses([]), "losses"),
    "a window of 0": (lambda: plot_losses([1.0, 2.0], window=0), "window is 0"),
    "an image that is not there": (lambda: show_digits(load_mnist("sample").test, [2000]), "2000"),
    "no image": (lambda: show_digits(load_mnist("sample").test, []), "image"),
    "fewer titles than images": (lambda: show_digits(load_mnist("sample").test, [0, 1], ["one"]), "titles"),
    "nothing drawn": (lambda: as_mnist([]), "nothing drawn"),
    "an empty stroke": (lambda: as_mnist([[]]), "nothing drawn"),
    "a point that is nowhere": (lambda: as_mnist([[(1, math.nan)]]), "finite"),
    "a point of three numbers": (lambda: as_mnist([[(1, 2, 3)]]), "(x, y)"),
    "an optimizer by name": (lambda: train(RichBoyNet(8, 9), load_mnist().test, progress=False, optimizer_class="sgd"), "torch.optim.SGD"),
    "a quiz of nothing": (lambda: Quiz([]), "at least one Question"),
    "a quiz of numbers": (lambda: Quiz(3), "it must be a list"),
    "an inspector of a number": (lambda: ParametrizationInspector(3), "it must be an nn.Linear"),
    "an inspector of float64": (lambda: ParametrizationInspector(torch.nn.Linear(8, 6).double()), "call layer.float()"),
    "a pad without an explorer": (lambda: DigitPad(5), "must be a LoRAExplorer"),
    "a choice of nothing": (lambda: PredictChoice("?", []), "at least one choice"),
    "a choice of a number": (lambda: PredictChoice("?", 5), "must be a list"),
    "seven places": (lambda: PredictRanking("?", list("abcdefg")), "at most"),
    "a question without replies": (lambda: Question("?", "a", None), "must be a dict"),
    "an inspector of an adapted layer": (lambda: ParametrizationInspector(add_lora(torch.nn.Linear(8, 6))), "as it was made"),
    "a look that is no bool": (lambda: projector_mode("large"), "True or False"),
}


@pytest.mark.parametrize("call, word", OTHERS.values(), ids=OTHERS)
def test_anything_else_that_is_bad_is_named(call, word):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert word in str(caught.value) and is_ours(caught)
