"""Several adapters on one base, and adapters as files that PEFT reads and writes."""

import copy
import json
import os
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tracing import traced

from lora_helpers import (
    RichBoyNet,
    adapter_names,
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
from lora_helpers import adapters as adapter_files
from lora_helpers.adapters import CONFIG, TENSORS

IMAGES = torch.randn(5, 784, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return RichBoyNet(30, 40)


def stir(net, name="default"):
    """As if trained: B is not zero."""
    with torch.no_grad():
        for adapters in lora_layers(net).values():
            for adapter in adapters:
                if adapter.name == name:
                    adapter.lora_B.normal_(std=0.1)
    return net


def same_bits(net, state):
    return net.state_dict().keys() == state.keys() and all(torch.equal(t, state[k]) for k, t in net.state_dict().items())


# Several adapters


def test_named_adapters_are_switched_and_the_base_keeps_its_bits(base):
    state, before = copy.deepcopy(base.state_dict()), base(IMAGES)
    stir(add_lora(base, rank=2, name="nine"), "nine")
    nine = base(IMAGES)
    stir(add_lora(base, rank=3, alpha=6, name="four"), "four")
    four = base(IMAGES)
    assert adapter_names(base) == ["nine", "four"] and not torch.equal(nine, four)
    use_adapter(base, "nine")
    assert torch.equal(base(IMAGES), nine)
    with lora_disabled(base):
        assert torch.equal(base(IMAGES), before)
    assert torch.equal(base(IMAGES), nine)
    use_adapter(base, "four")
    assert torch.equal(base(IMAGES), four)
    remove_lora(base, "four")
    use_adapter(base, "nine")
    assert torch.equal(base(IMAGES), nine) and adapter_names(base) == ["nine"]
    remove_lora(base)
    assert same_bits(base, state) and type(base.linear1) is torch.nn.Linear


def test_the_switch_stays_while_adapters_change(base):
    before = base(IMAGES)
    stir(add_lora(base, name="nine"), "nine")
    stir(add_lora(base, name="four"), "four")
    set_lora_enabled(base, False)
    use_adapter(base, "nine")
    assert torch.equal(base(IMAGES), before)
    set_lora_enabled(base, True)
    use_adapter(base, "nine")
    assert not torch.equal(base(IMAGES), before)


def test_only_the_adapter_in_use_is_trained(base):
    add_lora(base, rank=2, name="nine")
    add_lora(base, rank=3, name="four")
    freeze_base(base)
    sides = 784 + 30 + 30 + 40 + 40 + 10
    count = count_parameters(base)
    assert (count.lora, count.trainable) == (5 * sides, 3 * sides)
    use_adapter(base, "nine")
    freeze_base(base)
    assert count_parameters(base).trainable == 2 * sides


def test_merging_never_discards_an_adapter_without_a_word(base):
    stir(add_lora(base, name="nine"), "nine")
    add_lora(base, name="four")
    state = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="'nine'"):
        merge_lora(base)
    assert same_bits(base, state)
    remove_lora(base, "four")
    use_adapter(base, "nine")
    expected, names = base(IMAGES), [name for name, _ in RichBoyNet(30, 40).named_parameters()]
    merge_lora(base)
    assert torch.equal(base(IMAGES), expected)
    assert [name for name, _ in base.named_parameters()] == names


@pytest.mark.parametrize("call", [lambda net: use_adapter(net, "five"), lambda net: remove_lora(net, "five"), lambda net: save_adapter(net, "x", "five")])
def test_an_unknown_adapter_is_named_with_those_there_are(base, call):
    add_lora(base, name="nine")
    with pytest.raises(ValueError, match="'five'.*'nine'"):
        call(base)


def test_a_name_is_given_once(base):
    add_lora(base, name="nine")
    state = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="already has an adapter named 'nine'"):
        add_lora(base, name="nine")
    with pytest.raises(ValueError, match="name is ''"):
        add_lora(base, name="")
    assert same_bits(base, state)


# Files


@pytest.mark.parametrize("rank, alpha, layers, rank_stabilised", [(1, 1, None, False), (4, 16, ["linear2"], False), (8, 2.5, ["linear3", "linear1"], True)])
def test_an_adapter_comes_back_from_its_folder(base, tmp_path, rank, alpha, layers, rank_stabilised):
    fresh = copy.deepcopy(base)
    stir(add_lora(base, rank=rank, alpha=alpha, layers=layers, rank_stabilised=rank_stabilised))
    folder = save_adapter(base, tmp_path / "new" / "folder")
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, TENSORS]
    stream = torch.get_rng_state()
    load_adapter(fresh, folder, name="nine")
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(fresh(IMAGES), base(IMAGES)) and adapter_names(fresh) == ["nine"]


@pytest.mark.parametrize("rank, alpha, layers, rank_stabilised", [(1, 1, None, False), (4, 16, ["linear2"], False), (8, 3, ["linear1", "linear3"], True)])
def test_peft_opens_ours_and_we_open_pefts(base, tmp_path, rank, alpha, layers, rank_stabilised):
    ours = stir(add_lora(copy.deepcopy(base), rank=rank, alpha=alpha, layers=layers, rank_stabilised=rank_stabilised))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), save_adapter(ours, tmp_path / "ours"))
    assert torch.allclose(theirs(IMAGES), ours(IMAGES), rtol=1e-4, atol=1e-5)

    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers or ["linear1", "linear2", "linear3"], use_rslora=rank_stabilised)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        theirs(IMAGES).square().mean().backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path / "theirs")
    assert not torch.allclose(theirs(IMAGES), base(IMAGES), rtol=1e-4, atol=1e-5)
    assert torch.allclose(load_adapter(copy.deepcopy(base), tmp_path / "theirs")(IMAGES), theirs(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("excluded", [["linear2"], r".*2"])
def test_layers_that_peft_left_out_are_left_out(base, tmp_path, excluded):
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["linear1", "linear2", "linear3"], exclude_modules=excluded))
    theirs.save_pretrained(tmp_path)
    assert "linear2" in json.loads((tmp_path / CONFIG).read_text())["target_modules"], "so PEFT writes it"
    assert list(lora_layers(load_adapter(base, tmp_path))) == ["linear1", "linear3"]


class Nested(nn.Module):
    """Names that end alike: `a`, `x.a`, `y.x.a`; and a `y.a` that is no linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(3, 3)
        self.x = nn.ModuleDict({"a": nn.Linear(3, 3)})
        self.y = nn.ModuleDict({"a": nn.ReLU(), "x": nn.ModuleDict({"a": nn.Linear(3, 3)})})

    def forward(self, x):
        return self.y.x.a(self.x.a(self.y.a(self.a(x))))


@pytest.mark.parametrize("layers", [["a"], ["x.a"], ["a", "y.x.a"], ["a", "x.a", "y.x.a"], ["y.x.a"]])
@pytest.mark.filterwarnings("error")
def test_names_that_end_alike_are_told_apart_here_and_by_peft(tmp_path, layers):
    net = stir(add_lora(Nested(), layers=layers))
    folder, x = save_adapter(net, tmp_path), torch.ones(2, 3)
    loaded = load_adapter(Nested(), folder)
    assert list(lora_layers(loaded)) == layers and torch.equal(loaded(x), net(x))
    assert torch.allclose(peft.PeftModel.from_pretrained(Nested(), folder)(x), net(x), rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_its_bits(base, tmp_path):
    base = base.to(torch.bfloat16)
    fresh = copy.deepcopy(base)
    stir(add_lora(base, rank=2))
    load_adapter(fresh, save_adapter(base, tmp_path))
    assert torch.equal(fresh.linear1.weight, base.linear1.weight)


@pytest.fixture
def saved(base, tmp_path):
    return save_adapter(stir(add_lora(copy.deepcopy(base), rank=2)), tmp_path / "adapter")


def edit_config(folder, **options):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **options}))


def edit_tensors(folder, **changes):
    tensors = load_file(folder / TENSORS)
    for key, tensor in changes.items():
        key = key.replace("__", ".")
        tensors.pop(key) if tensor is None else tensors.update({key: tensor})
    save_file(tensors, folder / TENSORS)


LINEAR1_A, LINEAR1_B = "base_model__model__linear1__lora_A__weight", "base_model__model__linear1__lora_B__weight"
MISFITS = {
    "no adapter but another method": (lambda f: edit_config(f, peft_type="LOHA"), "peft_type is 'LOHA'"),
    "dora": (lambda f: edit_config(f, use_dora=True), "use_dora = True"),
    "trained biases": (lambda f: edit_config(f, bias="all"), "bias = 'all'"),
    "transposed weights": (lambda f: edit_config(f, fan_in_fan_out=True), "fan_in_fan_out"),
    "ranks by layer": (lambda f: edit_config(f, rank_pattern={"linear1": 3}), "rank_pattern"),
    "alphas by layer": (lambda f: edit_config(f, alpha_pattern={"linear1": 3}), "alpha_pattern"),
    "other modules saved": (lambda f: edit_config(f, modules_to_save=["linear3"]), "modules_to_save"),
    "an option of the future": (lambda f: edit_config(f, use_quantum=True), "use_quantum = True"),
    "a changed base": (lambda f: edit_config(f, init_lora_weights="pissa"), "pissa"),
    "rank 0": (lambda f: edit_config(f, r=0), "r is 0"),
    "rank true": (lambda f: edit_config(f, r=True), "r is True"),
    "a pattern that is none": (lambda f: edit_config(f, target_modules="("), r"pattern '\(' cannot be read"),
    "no layers named": (lambda f: edit_config(f, target_modules=None), "file also has: 'linear1', 'linear2', 'linear3'"),
    "layers that are numbers": (lambda f: edit_config(f, target_modules=[1, 2]), r"target_modules .* is \[1, 2\]"),
    "a layer fewer than named": (lambda f: edit_tensors(f, **{LINEAR1_A: None, LINEAR1_B: None}), "nothing for: 'linear1'"),
    "a layer fewer than the pattern": (
        lambda f: (edit_config(f, target_modules=r"linear\d"), edit_tensors(f, **{LINEAR1_A: None, LINEAR1_B: None})),
        "nothing for: 'linear1'",
    ),
    "a layer fewer than all": (
        lambda f: (edit_config(f, target_modules="all-linear"), edit_tensors(f, **{LINEAR1_A: None, LINEAR1_B: None})),
        "nothing for: 'linear1'",
    ),
    "a layer more than named": (lambda f: edit_config(f, target_modules=["linear1", "linear3"]), "file also has: 'linear2'"),
    "a layer more than the pattern": (lambda f: edit_config(f, target_modules="linear[12]"), "file also has: 'linear3'"),
    "a name without a layer": (lambda f: edit_config(f, target_modules=["linear1", "linear2", "linear3", "linear9"]), "nothing for: 'linear9'"),
    "a start of another kind": (lambda f: edit_config(f, init_lora_weights=["x"]), r"init_lora_weights is \['x'\]; supported are"),
    "a layer more than may be": (lambda f: edit_config(f, exclude_modules=["linear2"]), r"exclude_modules is \['linear2'\], but the file has: 'linear2'"),
    "a layer more than may be, by pattern": (lambda f: edit_config(f, exclude_modules="linear[3-9]"), "but the file has: 'linear3'"),
    "another rank": (lambda f: (edit_config(f, r=3), edit_tensors(f)), r"linear1: the file has A \(2, 784\)"),
    "the alpha of another": (lambda f: edit_config(f, lora_alpha=16), "not of one adapter.*Save the adapter again"),
    "rsLoRA in one file": (lambda f: edit_config(f, use_rslora=True), "not of one adapter.*Save the adapter again"),
    "no alpha": (lambda f: edit_config(f, lora_alpha=None), "lora_alpha is None"),
    "alpha infinite": (lambda f: edit_config(f, lora_alpha=float("inf")), "lora_alpha is inf"),
    "rsLoRA maybe": (lambda f: edit_config(f, use_rslora="maybe"), "use_rslora is 'maybe'"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), "cannot be read"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "holds a list"),
    "nested without end": (lambda f: (f / CONFIG).write_text("[" * 100_000), "cannot be read"),
    "no text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "no safetensors": (lambda f: (f / TENSORS).write_bytes(b"PK\x03\x04 a pickle"), "cannot be read"),
    "cut short": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-100]), "cannot be read"),
    "empty": (lambda f: (f / TENSORS).write_bytes(b""), "cannot be read"),
    "no tensors": (lambda f: save_file({}, f / TENSORS), "no tensor in it"),
    "A alone": (lambda f: edit_tensors(f, **{LINEAR1_B: None}), "linear1 has only lora_A"),
    "another shape": (lambda f: edit_tensors(f, **{LINEAR1_B: torch.zeros(31, 2)}), r"linear1: the file has A \(2, 784\) and B \(31, 2\)"),
    "not a number": (lambda f: edit_tensors(f, **{LINEAR1_A: torch.full((2, 784), float("nan"))}), "not all finite"),
    "too large for the weights": (
        lambda f: edit_tensors(f, **{LINEAR1_A: torch.full((2, 784), 1e300, dtype=torch.float64)}),
        "lora_A has values that are not all finite numbers in torch.float32",
    ),
    "whole numbers": (lambda f: edit_tensors(f, **{LINEAR1_A: torch.zeros(2, 784, dtype=torch.int64)}), "int64; it must be floating-point"),
    "a tensor of something else": (lambda f: edit_tensors(f, base_model__model__linear1__bias=torch.zeros(30)), "no lora_A or lora_B"),
    "a layer that is not there": (
        lambda f: (
            edit_config(f, target_modules=["linear1", "linear2", "linear3", "linear9"]),
            edit_tensors(f, **{k.replace("linear1", "linear9"): torch.zeros(2, 2) for k in (LINEAR1_A, LINEAR1_B)}),
        ),
        "no layer 'linear9'",
    ),
    "a layer that is no Linear": (
        lambda f: (
            edit_config(f, target_modules=["linear1", "linear2", "linear3", "relu"]),
            edit_tensors(f, **{k.replace("linear1", "relu"): torch.zeros(2, 2) for k in (LINEAR1_A, LINEAR1_B)}),
        ),
        "'relu' is a ReLU",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_refused_before_anything_is_touched(base, saved, damage, message):
    damage(saved)
    state = copy.deepcopy(base.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        load_adapter(base, saved)
    assert same_bits(base, state) and adapter_names(base) == []


def test_a_missing_file_is_named_and_a_pickle_is_never_opened(base, saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_adapter(base, tmp_path / "nowhere")
    shutil.move(saved / TENSORS, saved / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing.*adapter_model.bin"):
        load_adapter(base, saved)


def test_layers_of_different_ranks_are_not_saved_as_one(base, tmp_path):
    add_lora(base, rank=2, layers=["linear1"], name="a")
    add_lora(base, rank=3, layers=["linear2"], name="b")
    for adapters in lora_layers(base).values():
        adapters[0].active = True
    with pytest.raises(ValueError, match="differ in"):
        save_adapter(base, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_files(base, saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match=f"^The adapter cannot be saved in {saved}: No space left on device. Make room there, or give a folder"):
        save_adapter(add_lora(base, rank=3), saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


@pytest.mark.parametrize("foreign", [CONFIG, TENSORS])
def test_a_save_that_may_not_replace_one_of_the_files_leaves_both(base, saved, monkeypatch, foreign):
    before, real = {p.name: p.read_bytes() for p in saved.iterdir()}, Path.replace

    def sticky(self, target):  # a folder in which each may move only files of their own
        if saved / foreign in (self, target):
            raise PermissionError(1, "Operation not permitted", str(self), None, str(target))
        real(self, target)

    monkeypatch.setattr(Path, "replace", sticky)
    with pytest.raises(PermissionError, match=f"^The adapter cannot be saved in {saved}: Operation not permitted. .*replace files.$"):
        save_adapter(add_lora(base, rank=3, alpha=9), saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_two_kernels_that_save_at_once_never_leave_parts_of_two_adapters_without_a_word(base, saved, monkeypatch):
    one, other = (stir(add_lora(copy.deepcopy(base), rank=2, alpha=alpha)) for alpha in (1, 16))
    real = Path.replace

    def interleaved(self, target):
        real(self, target)
        if target == saved / TENSORS:  # between the two moves of one, the whole other
            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", real)
                save_adapter(other, saved)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interleaved)
        save_adapter(one, saved)
    with pytest.raises(ValueError, match="'lora_alpha': 1, .*saved with .*'lora_alpha': 16.*Save the adapter again"):
        load_adapter(copy.deepcopy(base), saved)
    save_adapter(one, saved)
    assert torch.equal(load_adapter(copy.deepcopy(base), saved)(IMAGES), one(IMAGES))


UNREADABLE = [
    (FileNotFoundError(2, "No such file"), "a moment ago.*try again"),
    (PermissionError(13, "Permission denied"), "cannot be read: Permission denied. Save"),
]


@pytest.mark.parametrize("error, message", UNREADABLE)
def test_a_config_that_vanishes_or_may_not_be_read_is_named(base, saved, monkeypatch, error, message):
    def refused(path):
        raise error

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(type(error), match=f"{CONFIG}.*{message}"):
        load_adapter(base, saved)


def test_a_file_that_is_shortened_while_it_is_read_kills_no_kernel(base, saved, monkeypatch):
    pair_up = adapter_files._pair_up

    def shorten(tensors):
        os.truncate(saved / TENSORS, 0)  # were the file mapped into memory, the next look at a tensor would be a SIGBUS
        return pair_up(tensors)

    monkeypatch.setattr(adapter_files, "_pair_up", shorten)
    assert adapter_names(load_adapter(base, saved)) == ["default"]


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("moved", [True, False])
def test_an_interrupted_save_never_leaves_parts_of_two_adapters(base, saved, monkeypatch, number, moved):
    old, new = (stir(add_lora(copy.deepcopy(base), rank=2, alpha=alpha)) for alpha in (1, 16))
    save_adapter(old, saved)
    outputs = new(IMAGES)
    calls, real = 0, Path.replace

    def stopped(self, target):
        nonlocal calls
        calls += 1
        if calls == number and not moved:
            raise KeyboardInterrupt
        real(self, target)
        if calls == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(new, saved)
    if moved and number == 3:  # it was done by then
        assert torch.equal(load_adapter(copy.deepcopy(base), saved)(IMAGES), outputs)
    elif number == 1 or (number, moved) == (2, False):  # no new file was there yet
        assert torch.equal(load_adapter(copy.deepcopy(base), saved)(IMAGES), old(IMAGES))
        assert sorted(p.name for p in saved.iterdir()) == [CONFIG, TENSORS]
    else:
        with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
            load_adapter(copy.deepcopy(base), saved)
    save_adapter(new, saved)  # the same cell once more
    assert torch.equal(load_adapter(copy.deepcopy(base), saved)(IMAGES), outputs)
    assert sorted(p.name for p in saved.iterdir()) == [CONFIG, TENSORS]


@pytest.mark.parametrize("file, other", [(CONFIG, TENSORS), (TENSORS, CONFIG)])
def test_a_folder_in_the_place_of_a_file_leaves_the_other_as_it_was(base, saved, file, other):
    (saved / file).unlink()
    (saved / file).mkdir()
    before = (saved / other).read_bytes()
    with pytest.raises(IsADirectoryError, match=f"{file} is a folder; .*move it away"):
        save_adapter(add_lora(base, rank=3), saved)
    assert (saved / other).read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="no umask")
def test_others_may_read_the_files_as_the_umask_says(base, tmp_path):
    old = os.umask(0o027)
    try:
        folder = save_adapter(add_lora(base), tmp_path)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_an_adapter_that_is_not_finite_is_neither_saved_nor_merged(base, saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    add_lora(base)
    with torch.no_grad():
        base.linear2.parametrizations.weight[0].lora_B[3] = float("nan")
    state = list(base.state_dict())
    with pytest.raises(ValueError, match="linear2: lora_B holds values that are not finite"):
        save_adapter(base, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    with pytest.raises(ValueError, match="the weight of linear2 would hold values that are not finite"):
        merge_lora(base)
    assert list(base.state_dict()) == state and adapter_names(base) == ["default"]
    remove_lora(base)


def test_values_too_large_for_half_precision_are_refused(base, saved):
    edit_tensors(saved, **{LINEAR1_B: torch.full((30, 2), 1e5)})
    half = copy.deepcopy(base).half()
    with pytest.raises(ValueError, match="linear1: lora_B has values that are not all finite numbers in torch.float16"):
        load_adapter(half, saved)
    assert adapter_names(half) == [] and adapter_names(load_adapter(base, saved)) == ["default"]


@pytest.mark.parametrize("targets", ["all-linear", r"linear\d", r".*1|.*2|linear3", ["linear3", "linear1", "linear2"]])
def test_the_layers_may_be_named_in_each_of_pefts_ways(base, saved, targets):
    edit_config(saved, target_modules=targets)
    assert list(lora_layers(load_adapter(base, saved))) == ["linear1", "linear2", "linear3"]


def test_layers_are_named_by_suffix_and_left_out_by_name(tmp_path):
    def blocks():
        torch.manual_seed(0)
        return nn.ModuleDict({str(i): nn.ModuleDict({"up": nn.Linear(3, 4), "down": nn.Linear(4, 3)}) for i in range(3)})

    folder = save_adapter(add_lora(blocks(), layers=["0.up", "2.up"]), tmp_path)
    edit_config(folder, target_modules=["up"])
    with pytest.raises(ValueError, match="nothing for: '1.up'"):
        load_adapter(blocks(), folder)
    edit_config(folder, exclude_modules=["1.up"])
    assert list(lora_layers(load_adapter(blocks(), folder))) == ["0.up", "2.up"]


@pytest.mark.parametrize("folder", [None, 3, b"here", ["here"]])
def test_what_is_no_path_is_named(base, folder):
    for call in (lambda: save_adapter(add_lora(copy.deepcopy(base)), folder), lambda: load_adapter(base, folder)):
        with pytest.raises(TypeError, match=f"folder is {re.escape(repr(folder))}; it must be a path"):
            call()


def test_a_file_is_no_folder(base, tmp_path):
    (tmp_path / "mine").write_text("my notes")
    with pytest.raises(NotADirectoryError, match="mine is a file"):
        save_adapter(add_lora(copy.deepcopy(base)), tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_adapter(base, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "my notes"


def test_a_layer_without_a_name_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match=r"nn.Sequential\(layer\)"):
        save_adapter(add_lora(nn.Linear(3, 4)), tmp_path)
    assert not list(tmp_path.iterdir())


# The switch, and which adapter is in use


def test_the_switch_stays_off_when_the_adapter_in_use_is_removed(base):
    before = base(IMAGES)
    stir(add_lora(base, name="nine"), "nine")
    stir(add_lora(base, name="four"), "four")
    set_lora_enabled(base, False)
    remove_lora(base, "four")
    use_adapter(base, "nine")
    assert torch.equal(base(IMAGES), before)


def test_an_adapter_added_while_off_for_a_moment_is_on_afterwards(base):
    add_lora(base, name="nine")
    with lora_disabled(base):
        before = base(IMAGES)
        stir(add_lora(base, name="four"), "four")
        assert torch.equal(base(IMAGES), before)
    assert not torch.equal(base(IMAGES), before)
    set_lora_enabled(base, False)
    with lora_disabled(base):
        remove_lora(base, "four")
        stir(add_lora(base, name="two"), "two")
    assert torch.equal(base(IMAGES), before)


def test_when_the_adapter_in_use_goes_the_last_that_remains_is_in_use(base):
    for name in ("nine", "four", "two"):
        stir(add_lora(base, name=name), name)
    use_adapter(base, "four")
    four = base(IMAGES)
    remove_lora(base, "nine")
    assert torch.equal(base(IMAGES), four), "another one went"
    use_adapter(base, "two")
    two = base(IMAGES)
    use_adapter(base, "four")
    remove_lora(base, "four")
    assert torch.equal(base(IMAGES), two)
    assert count_parameters(freeze_base(base)).trainable > 0
    merge_lora(base)
    assert torch.equal(base(IMAGES), two)


def test_freezing_with_no_adapter_in_use_is_refused(base):
    add_lora(base, name="nine")
    for (adapter,) in lora_layers(base).values():
        adapter.active = False
    with pytest.raises(ValueError, match=r"No adapter is in use; call use_adapter\(net, name\).*'nine'"):
        freeze_base(base)
    assert all(p.requires_grad for p in base.parameters())


# Interrupts: at every seventh line that the package and PyTorch's parametrizations run

LINES = range(1, 10_000, 7)


def small():
    torch.manual_seed(0)
    return add_lora(add_lora(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), name="nine"), name="four")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    return save_adapter(small(), tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def calls(small_file):
    return {
        "add": lambda net: add_lora(net, name="two", generator=torch.Generator().manual_seed(1)),
        "load": lambda net: load_adapter(net, small_file, "two"),
        "remove the one in use": lambda net: remove_lora(net, "four"),
        "remove another": lambda net: remove_lora(net, "nine"),
        "remove all": remove_lora,
    }


def look(net):
    """All that may change: layer by layer its class, its tensors, and its adapters with their flags."""
    flags = {name: [(a.name, a.enabled, a.active) for a in adapters] for name, adapters in lora_layers(net).items()}
    return [type(m).__name__ for m in net.modules()], {k: t.clone() for k, t in net.state_dict().items()}, flags


def alike(one, two):
    return one[0] == two[0] and one[2] == two[2] and list(one[1]) == list(two[1]) and all(torch.equal(t, two[1][k]) for k, t in one[1].items())


def interrupted_at(line, call):
    """Whether `call` was interrupted when it came to its `line`-th line."""
    try:
        traced(call, "lora_helpers/lora.py", "lora_helpers/adapters.py", "utils/parametrize.py", stop=line - 1)
    except KeyboardInterrupt:
        return True
    return False


@pytest.mark.parametrize("name", ["add", "load", "remove the one in use", "remove another", "remove all"])
def test_interrupted_anywhere_a_network_is_as_before_or_done(calls, name):
    call, before, done = calls[name], look(small()), look(calls[name](small()))
    again = 0
    for line in LINES:
        net = small()
        if not interrupted_at(line, lambda: call(net)):
            break
        assert torch.is_grad_enabled(), f"line {line}"
        if alike(look(net), before):
            again += 1
            call(net)  # the same cell once more
        assert alike(look(net), done), f"line {line}"
        assert net(torch.ones(2, 3)).shape == (2, 3)
    assert again > 30


def test_an_interrupted_merge_adds_nothing_twice(calls):
    start = remove_lora(stir(small(), "four"), "nine")
    outputs = start(torch.ones(2, 3))
    for line in LINES:
        net = copy.deepcopy(start)
        if not interrupted_at(line, lambda: merge_lora(net)):
            break
        assert torch.is_grad_enabled(), f"line {line}"
        assert torch.equal(net(torch.ones(2, 3)), outputs)
        if adapter_names(net):
            merge_lora(net)
        assert torch.equal(net(torch.ones(2, 3)), outputs) and not adapter_names(net)
    assert line > 100
