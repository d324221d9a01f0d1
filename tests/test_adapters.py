"""Several adapters on one base, and adapters as files that PEFT reads and writes."""

import copy
import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

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
    "another rank": (lambda f: edit_config(f, r=3), r"linear1: the file has A \(2, 784\)"),
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
    "whole numbers": (lambda f: edit_tensors(f, **{LINEAR1_A: torch.zeros(2, 784, dtype=torch.int64)}), "int64"),
    "a tensor of something else": (lambda f: edit_tensors(f, base_model__model__linear1__bias=torch.zeros(30)), "no lora_A or lora_B"),
    "a layer that is not there": (
        lambda f: edit_tensors(f, **{k.replace("linear1", "linear9"): torch.zeros(2, 2) for k in (LINEAR1_A, LINEAR1_B)}),
        "no layer 'linear9'",
    ),
    "a layer that is no Linear": (
        lambda f: edit_tensors(f, **{k.replace("linear1", "relu"): torch.zeros(2, 2) for k in (LINEAR1_A, LINEAR1_B)}),
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

    monkeypatch.setattr("lora_helpers.adapters.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_adapter(add_lora(base, rank=3), saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
