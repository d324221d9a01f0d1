"""Adapters as files: PEFT opens what we save, we open what PEFT saves, and anything else is refused."""

import copy
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from stirred import stir
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lora_helpers import RichBoyNet, adapter_names, add_lora, freeze_base, lora_layers, use_adapter
from lora_helpers.adapter_files import CONFIG, TENSORS, load_adapter, save_adapter

IMAGES = torch.randn(5, 784, generator=torch.Generator().manual_seed(0))
ALL = ["linear1", "linear2", "linear3"]
SETTINGS = [(1, 1, ALL, False), (4, 16, ["linear2"], False), (8, 2.5, ["linear1", "linear3"], True)]


@pytest.fixture(scope="module")
def peft():
    import peft  # here, for it takes seconds, and every worker reads every file

    return peft


@pytest.fixture
def base():
    torch.manual_seed(0)
    return RichBoyNet(30, 40)


@pytest.fixture
def saved(base, tmp_path):
    return save_adapter(stir(add_lora(copy.deepcopy(base), rank=2)), tmp_path / "adapter")


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def content(file, data):
    return lambda folder: (folder / file).write_bytes(data)


def config(by_peft=False, **options):
    """Edits the config; `by_peft` drops our second copy of the scaling, which PEFT does not write."""

    def damage(folder):
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(json.dumps({**found, **options}), encoding="utf-8")
        if by_peft:
            save_file(load_file(folder / TENSORS), folder / TENSORS)

    return damage


def tensors(old="", new="", **changes):
    """Renames tensors, and replaces A or B of linear1 (None takes it out)."""

    def damage(folder):
        found = {key.replace(old, new): tensor for key, tensor in load_file(folder / TENSORS).items()}
        found |= {f"base_model.model.linear1.lora_{matrix}.weight": new for matrix, new in changes.items()}
        save_file({key: tensor for key, tensor in found.items() if tensor is not None}, folder / TENSORS)

    return damage


def saved_by(peft, base, folder, **options):
    """A PEFT adapter, saved in `folder`, as if trained: B is not zero."""
    net = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    net.save_pretrained(folder)
    return net


# Exchange


@pytest.mark.parametrize("rank, alpha, layers, rank_stabilised", SETTINGS)
def test_an_adapter_comes_back_to_the_bit(base, tmp_path, rank, alpha, layers, rank_stabilised):
    net = stir(add_lora(copy.deepcopy(base), rank, alpha, layers, rank_stabilised=rank_stabilised))
    folder = save_adapter(net, tmp_path / "new" / "folder")
    assert sorted(contents(folder)) == [CONFIG, TENSORS]
    stream = torch.get_rng_state()
    assert load_adapter(base, folder, name="nine") is base
    assert torch.equal(torch.get_rng_state(), stream), "loading draws from PyTorch's global stream"
    assert torch.equal(base(IMAGES), net(IMAGES)) and adapter_names(base) == ["nine"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rank, alpha, layers, rank_stabilised", SETTINGS)
def test_peft_opens_what_we_save(peft, base, tmp_path, rank, alpha, layers, rank_stabilised):
    ours = stir(add_lora(copy.deepcopy(base), rank, alpha, layers, rank_stabilised=rank_stabilised))
    theirs = peft.PeftModel.from_pretrained(base, save_adapter(ours, tmp_path))
    assert close(theirs(IMAGES), ours(IMAGES))


@pytest.mark.parametrize("rank, alpha, layers, rank_stabilised", SETTINGS)
def test_we_open_what_peft_saves(peft, base, tmp_path, rank, alpha, layers, rank_stabilised):
    options = {"r": rank, "lora_alpha": alpha, "target_modules": layers, "use_rslora": rank_stabilised}
    theirs = saved_by(peft, base, tmp_path, **options)
    assert not close(theirs(IMAGES), base(IMAGES))
    load_adapter(base, tmp_path)
    assert list(lora_layers(base)) == layers and close(base(IMAGES), theirs(IMAGES))


PEFT_OPTIONS = {
    "all layers": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r"linear[13]"},
    "layers left out": {"target_modules": ALL, "exclude_modules": ["linear2"]},
    "layers left out by a pattern": {"target_modules": ALL, "exclude_modules": r".*2"},
    "a Gaussian start": {"target_modules": ALL, "init_lora_weights": "gaussian"},
    "a random start": {"target_modules": ALL, "init_lora_weights": False},
    "an orthogonal start": {"target_modules": ALL, "init_lora_weights": "orthogonal"},
    "dropout in training": {"target_modules": ALL, "lora_dropout": 0.1},
}


@pytest.mark.parametrize("options", PEFT_OPTIONS.values(), ids=PEFT_OPTIONS)
def test_we_open_plain_lora_with_pefts_usual_options(peft, base, tmp_path, options):
    theirs = saved_by(peft, base, tmp_path, r=2, **options)
    assert close(load_adapter(base, tmp_path)(IMAGES), theirs(IMAGES))


class Nested(nn.Module):
    """Names that end alike: `a`, `x.a`, `y.x.a`; and a `y.a` that is not a Linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(3, 3)
        self.x = nn.ModuleDict({"a": nn.Linear(3, 3)})
        self.y = nn.ModuleDict({"a": nn.ReLU(), "x": nn.ModuleDict({"a": nn.Linear(3, 3)})})

    def forward(self, x):
        return self.y.x.a(self.x.a(self.y.a(self.a(x))))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layers", [["a"], ["x.a"], ["a", "y.x.a"], ["a", "x.a", "y.x.a"]])
def test_names_that_end_alike_are_told_apart_here_and_by_peft(peft, tmp_path, layers):
    net, x = stir(add_lora(Nested(), layers=layers)), torch.ones(2, 3)
    loaded = load_adapter(Nested(), save_adapter(net, tmp_path))
    assert list(lora_layers(loaded)) == layers and torch.equal(loaded(x), net(x))
    assert close(peft.PeftModel.from_pretrained(Nested(), tmp_path)(x), net(x))


def test_bfloat16_keeps_its_bits(base, tmp_path):
    net = stir(add_lora(copy.deepcopy(base).to(torch.bfloat16), rank=2))
    loaded = load_adapter(base.to(torch.bfloat16), save_adapter(net, tmp_path))
    assert torch.equal(loaded.linear1.weight, net.linear1.weight)


def test_of_several_adapters_the_named_one_is_saved_or_else_the_one_in_use(base, tmp_path):
    net = stir(add_lora(add_lora(copy.deepcopy(base), name="nine"), name="four"))
    four = net(IMAGES)
    assert torch.equal(load_adapter(copy.deepcopy(base), save_adapter(net, tmp_path / "4"))(IMAGES), four)
    load_adapter(base, save_adapter(net, tmp_path / "9", "nine"), "nine")
    load_adapter(base, tmp_path / "4", "four")
    assert torch.equal(base(IMAGES), four), "the loaded adapter is in use"
    use_adapter(base, "nine")
    use_adapter(net, "nine")
    assert torch.equal(base(IMAGES), net(IMAGES))


WRAPPERS = {
    "compile": lambda net: torch.compile(net, backend="eager"),
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "DataParallel of compile": lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
    "AveragedModel of DataParallel": lambda net: AveragedModel(nn.DataParallel(net)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_network_is_saved_and_loaded_under_its_layers_own_names(peft, base, tmp_path, wrap):
    net = stir(add_lora(copy.deepcopy(base), rank=2))
    save_adapter(wrap(net), tmp_path)
    assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path)(IMAGES), net(IMAGES))
    assert close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(IMAGES), net(IMAGES))
    assert close(load_adapter(wrap(base), tmp_path)(IMAGES), net(IMAGES))


def test_a_layer_that_is_compiled_alone_is_named(base, tmp_path):
    add_lora(base).linear2 = torch.compile(base.linear2, backend="eager")
    with pytest.raises(ValueError, match="linear2.* is compiled; save the network as it was before"):
        save_adapter(base, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_made_within_inference_mode_can_be_trained(base, tmp_path):
    other = copy.deepcopy(base)
    with torch.inference_mode():
        added = freeze_base(add_lora(other))
        loaded = load_adapter(base, save_adapter(added, tmp_path))
    for net in (added, loaded):
        net(IMAGES).sum().backward()
        assert all(p.grad is not None for (a,) in lora_layers(net).values() for p in a.parameters())


def test_a_tilde_is_the_home_folder(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    net = stir(add_lora(copy.deepcopy(base)))
    assert save_adapter(net, "~/adapters/nine") == tmp_path / "adapters" / "nine"
    assert torch.equal(load_adapter(base, "~/adapters/nine")(IMAGES), net(IMAGES))


# What is refused


BAD_OPTIONS = {
    "peft_type": "LOHA",
    "use_dora": True,
    "bias": "all",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "rank_pattern": {"linear1": 3},
    "alpha_pattern": {"linear1": 3},
    "modules_to_save": ["linear3"],
    "layers_to_transform": 0,
    "layers_pattern": "blocks",
    "trainable_token_indices": [0],
    "init_lora_weights": "pissa",
    "qalora_group_size": 8,
    "an_option_of_the_future": 1,
}


@pytest.mark.parametrize("option, value", BAD_OPTIONS.items())
def test_an_option_that_is_not_plain_lora_is_refused_by_name(base, saved, option, value):
    config(**{option: value})(saved)
    with pytest.raises(ValueError, match=re.escape(f"{option} = {value!r}: not plain LoRA. Load it")):
        load_adapter(base, saved)
    assert adapter_names(base) == []


LAYER = "'base_model.model.{}.lora_A.weight'; the Linear layers here are: linear1, linear2, linear3."
NAN, LARGE = torch.full((2, 784), float("nan")), torch.full((30, 2), 1e300, dtype=torch.float64)
DAMAGE = {
    "rank 0": (config(by_peft=True, r=0), r"linear1: A is of shape \(2, 784\); at rank 0"),
    "no alpha": (config(by_peft=True, lora_alpha=None), "alpha is None"),
    "rsLoRA maybe": (config(by_peft=True, use_rslora="maybe"), "rank_stabilised is 'maybe'"),
    "another method": (config(peft_type="LOHA", alpha=8), "peft_type = 'LOHA'"),
    "an edited alpha": (config(lora_alpha=16), "'lora_alpha': 16.*'lora_alpha': 1,"),
    "an edited rsLoRA": (config(use_rslora=True), "'use_rslora': True.*'use_rslora': False"),
    "a layer fewer than listed": (tensors(A=None, B=None), "target_modules is .*has .'linear2', 'linear3'."),
    "a layer more than listed": (config(target_modules=ALL[:2]), "target_modules is .'linear1', 'linear2'.,"),
    "numbers for layers": (config(target_modules=[1, 2]), r"target_modules is \[1, 2\]"),
    "no JSON": (content(CONFIG, b"{"), "cannot be read"),
    "a list": (content(CONFIG, b"[]"), "does not hold a JSON object"),
    "nested without end": (content(CONFIG, b"[" * 100_000), "cannot be read"),
    "not UTF-8": (content(CONFIG, b"\xff\xfe\x00"), "cannot be read"),
    "a pickle": (lambda folder: torch.save({}, folder / TENSORS), "cannot be read"),
    "cut short": (lambda folder: os.truncate(folder / TENSORS, 9_000), "cannot be read"),
    "no tensors": (lambda folder: save_file({}, folder / TENSORS), r"adapter_model.safetensors has \[\]"),
    "A alone": (tensors(B=None), "linear1: B is missing"),
    "a wrong shape": (tensors(B=torch.zeros(31, 2)), r"linear1: B is of shape \(31, 2\); .* needs \(30, 2\)"),
    "NaN": (tensors(A=NAN), "linear1: A has values that are not finite"),
    "too large": (tensors(B=LARGE), "linear1: B has values that are not finite in torch.float32"),
    "a wrong layer": (tensors("linear2", "linear9"), LAYER.format("linear9")),
    "not a Linear layer": (tensors("linear2", "relu"), LAYER.format("relu")),
    "a wrong matrix": (tensors("linear2.lora_A", "linear2.lora_a"), "linear2.lora_a.weight'"),
    "compiled": (
        tensors(".linear", "._orig_mod.linear"),
        "added '_orig_mod.': save the network inside it again",
    ),
    "compiled outside": (tensors("base_model", "_orig_mod.base_model"), "added '_orig_mod.'"),
    "DataParallel": (
        tensors(".linear", ".module.linear"),
        "added 'module.': save the network inside it again",
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_adapter_is_refused_and_nothing_is_changed(base, saved, damage, message):
    state = copy.deepcopy(base.state_dict())
    damage(saved)
    with pytest.raises((ValueError, TypeError), match=message):
        load_adapter(base, saved)
    assert list(base.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in base.state_dict().items())


def test_a_name_that_is_taken_changes_nothing(base, saved):
    before = load_adapter(base, saved)(IMAGES)
    with pytest.raises(ValueError, match="already has an adapter named 'default'"):
        load_adapter(base, saved)
    assert torch.equal(base(IMAGES), before) and adapter_names(base) == ["default"]


def test_no_regular_expression_of_a_stranger_is_run(base, saved):
    config(target_modules="(", exclude_modules="(")(saved)  # running it would raise an error
    assert list(lora_layers(load_adapter(base, saved))) == ALL


def test_a_missing_file_is_named_and_a_pickle_beside_it_is_never_opened(base, saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{CONFIG} is missing"):
        load_adapter(base, tmp_path / "nowhere")
    shutil.move(saved / TENSORS, saved / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=f"{TENSORS} is missing"):
        load_adapter(base, saved)


def test_what_is_not_a_network_or_a_path_is_named(base, tmp_path):
    for call in (save_adapter, load_adapter):
        with pytest.raises(TypeError, match="net is a str"):
            call("net", tmp_path)
        with pytest.raises(TypeError, match="NoneType"):
            call(base, None)


def test_what_cannot_be_saved_is_named_and_the_old_files_stay(base, saved):
    before = contents(saved)
    with pytest.raises(ValueError, match=r"RichBoyNet has no LoRA; call add_lora\(net\)"):
        save_adapter(base, saved)
    with pytest.raises(ValueError, match=r"nn.Sequential\(layer\)"):
        save_adapter(add_lora(nn.Linear(3, 4)), saved)
    add_lora(base, rank=2, layers=["linear1"], name="nine")
    add_lora(base, rank=3, layers=["linear2"], name="four")
    with pytest.raises(ValueError, match="no adapter 'five'.*'nine', 'four'"):
        save_adapter(base, saved, "five")
    base.linear1.parametrizations.weight[0].active = True
    with pytest.raises(ValueError, match="The layers differ in"):
        save_adapter(base, saved)
    base.linear1.parametrizations.weight[0].lora_B.data[3] = float("nan")
    with pytest.raises(ValueError, match="linear1: A or B is not finite"):
        save_adapter(base, saved, "nine")
    assert contents(saved) == before


@pytest.mark.parametrize("method", ["write_text", "write_bytes"])
def test_a_failed_save_leaves_the_old_files(base, saved, monkeypatch, method):
    before = contents(saved)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"pathlib.Path.{method}", full_disk)
    with pytest.raises(OSError, match=f"cannot be saved in {saved}: No space left on device. Make room"):
        save_adapter(add_lora(base, rank=3), saved)
    assert contents(saved) == before


def test_a_new_adapter_replaces_the_old_one(base, saved):
    net = stir(add_lora(copy.deepcopy(base), rank=3, alpha=9, layers=["linear2"]))
    save_adapter(net, saved)
    assert sorted(contents(saved)) == [CONFIG, TENSORS]
    assert torch.equal(load_adapter(base, saved)(IMAGES), net(IMAGES))
