"""What goes wrong elsewhere, tried here: global settings, pages without a kernel, consoles, encodings; and
the traps of torch.nn.utils.parametrize, each with what the package makes of it."""

import ast
import copy
import dataclasses
import io
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from nbconvert import PythonExporter
from stirred import stir
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import TensorDataset

from lora_helpers import (
    DigitPad,
    LoRAExplorer,
    LoRAParametrization,
    ParametrizationInspector,
    RichBoyNet,
    ScalingLab,
    Setting,
    add_lora,
    count_parameters,
    evaluate,
    fine_tune,
    freeze_base,
    load_adapter,
    lora_disabled,
    lora_layers,
    merge_lora,
    plots,
    pretrained_base,
    remove_lora,
    save_adapter,
    scaling,
    scaling_plots,
    set_lora_enabled,
    train,
    use_adapter,
)
from lora_helpers.data import Mnist
from lora_helpers.experiments import FineTuner, sweep

ROOT = Path(__file__).parents[1]
IMAGES = torch.randn(5, 784, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return RichBoyNet(30, 40)


@pytest.fixture
def net(base):
    return stir(add_lora(base, rank=2, alpha=3))


@pytest.fixture(scope="module")
def some(mnist):
    """A small part of MNIST, enough for everything to run."""
    parts = ((mnist.train, 3000), (mnist.test, 1000))
    return Mnist(*(TensorDataset(*(t[:n] for t in part.tensors)) for part, n in parts))


def same_bits(net, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


# PyTorch's and matplotlib's global settings


def trained(net, data, **options):
    """A float32 training of more than 256 batches: there a counter in bfloat16 stops."""
    losses = train(net, data, max_batches=260, seed=0, progress=False, **options)
    return losses, [parameter.tolist() for parameter in net.parameters()]


def small(*wrappers):
    net, generator = RichBoyNet(12, 16).float(), torch.Generator().manual_seed(0)  # follows the global dtype
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float32, generator=generator) / 10
    return nn.Sequential(net) if wrappers else net


def with_lora(net):
    return freeze_base(add_lora(net, rank=2, generator=torch.Generator().manual_seed(0)))


def figures_of(run):
    numbers = [run.norms, {name: v.tolist() for name, v in run.singular_values.items()}, run.called]
    return run.losses, run.on.predictions.tolist(), run.on.recall.tolist(), numbers


def moved(panel, **moves):
    """Summary, picture and stand-in of a panel after each move."""
    seen = [panel.summary, panel._png, panel._repr_mimebundle_()[0]["image/png"]]
    for name, value in moves.items():
        setattr(panel, name, value)
        seen += [panel.summary, panel._png, panel.status]
    return seen


def merged(some):
    return [p.tolist() for p in merge_lora(with_lora(small())).parameters()]


def analysed(some):
    """What the notebooks on scaling compute, but for times."""
    base, settings = small(), [Setting(rank=2, batches=9), Setting(rank=2, batches=9, rule="α/√r")]
    runs = sweep(base, some, settings, progress=False)
    gradient = scaling.weight_gradient(base, some.train)
    parts = scaling.best_low_rank(gradient, [2])[2], scaling.part_along(runs[0], "linear2", gradient)
    steps = [
        dataclasses.astuple(step) for step in scaling.first_steps(gradient, ranks=(1, 2), seeds=range(2))
    ]
    curves = scaling.learning_curves(base, some, settings, batches=9, progress=False)
    costs = [cost.trained for cost in scaling.costs(base, some.train, ranks=(1,), steps=1)]
    drawn = scaling.low_rank_gradient(30, 20).tolist()
    return [part.tolist() if torch.is_tensor(part) else part for part in parts], steps, curves, costs, drawn


def drawn(some):
    pad = DigitPad(LoRAExplorer(pretrained_base(), some, rank=2))
    seen = moved(pad, index=7) + [pad.base.tolist(), pad.adapted.tolist()]
    pad.draw([[(150, 50), (150, 200)]])
    return seen + [pad.image.tolist(), *moved(pad)]


def probed(some):
    tuner, setting = FineTuner(pretrained_base(), some), Setting(rank=4, batches=10)
    tuner.run(setting)
    return tuner.proofs(setting), [p.tolist() for p in tuner.probabilities(setting, some.test.tensors[0][:9])]


COMPUTED = {
    "train a network": lambda some: trained(small(), some.train),
    "train LoRA": lambda some: trained(with_lora(small()), some.train),
    "train by autograd": lambda some: trained(small(nn.Sequential), some.train),
    "train with SGD": lambda some: trained(small(), some.train, optimizer_class=torch.optim.SGD),
    "merge": merged,
    "the scaling notebooks": analysed,
    "evaluate": lambda some: evaluate(pretrained_base(), some.test).confusion.tolist(),
    "fine_tune": lambda some: figures_of(fine_tune(pretrained_base(), some, rank=2, batches=20, share=0.5)),
    "Kaiming's A": lambda some: FineTuner(small(), some).run(Setting(start="kaiming", batches=5))[0].losses,
    "proofs and probabilities": probed,
    "the explorer": lambda some: moved(LoRAExplorer(pretrained_base(), some), rank=4, enabled=False),
    "the lab": lambda some: moved(ScalingLab(pretrained_base(), some), layer="linear1"),
    "the inspector": lambda some: moved(ParametrizationInspector(), rank=2, steps=7),
    "the digit pad": drawn,
    "a random spectrum": lambda some: scaling.spectra(
        small(), {"linear2": torch.ones(16, 12, dtype=torch.float32)}
    )["linear2"]["random"].tolist(),
}


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def usual(some):
    """What comes out without any setting, by name."""
    return {name: compute(some) for name, compute in COMPUTED.items()}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", COMPUTED)
def test_a_global_dtype_or_autocast_changes_no_figure(some, usual, name, around):
    with AROUND[around]():
        assert COMPUTED[name](some) == usual[name]


@pytest.fixture(scope="module")
def pictures(some):
    """What draws each public picture, by the name of its function."""
    base, settings = pretrained_base(), scaling.ladder(ranks=(1, 4), seeds=(0, 1), batches=5)
    before, (one, *runs) = evaluate(base, some.test), sweep(base, some, settings, stops=(1,), progress=False)
    update = {"linear1": one.adapters["linear1"][1] @ one.adapters["linear1"][0]}
    spectra = scaling.spectra(base, {**update, "linear3": torch.ones(10, 2000)})
    steps = scaling.first_steps(torch.ones(8, 6), ranks=(1, 2), seeds=(0,))
    curves = scaling.learning_curves(base, some, settings[:2], batches=25, progress=False)
    costs = [scaling.Cost("full", None, 2, 16, 8, 1.5), scaling.Cost("written out", 1, 1, 8, 4, 0.5)]
    return {
        "show_digits": lambda: plots.show_digits(some.test, [0]),
        "plot_losses": lambda: plots.plot_losses([2.0, 1.0, 3.0]),
        "plot_confusion": lambda: plots.plot_confusion(before),
        "plot_wrong_counts": lambda: plots.plot_wrong_counts(before, one.on),
        "plot_luck": lambda: plots.plot_luck({"rank 1": [one, *runs]}),
        "plot_cures": lambda: plots.plot_cures(before, {"rank": [("1", one.on), ("4", runs[-1].on)]}),
        "plot_rows": lambda: plots.plot_rows(update),
        "plot_spectra": lambda: scaling_plots.plot_spectra(spectra),
        "plot_first_steps": lambda: scaling_plots.plot_first_steps(steps, "norm"),
        "plot_exponents": lambda: scaling_plots.plot_exponents({"Adam": [one, *runs]}),
        "plot_by_rank": lambda: scaling_plots.plot_by_rank([one, *runs]),
        "plot_terms": lambda: scaling_plots.plot_terms([1.0, 2.0, 3.0], [1.0, 1.5, 1.6]),
        "plot_grids": lambda: scaling_plots.plot_grids({"Adam": [one, *runs]}),
        "plot_curves": lambda: scaling_plots.plot_curves(curves),
        "plot_costs": lambda: scaling_plots.plot_costs(costs),
        "plot_rates": lambda: scaling_plots.plot_rates([one, *runs], {0.001: [0.9, 0.95]}),
        "plot_thin": lambda: scaling_plots.plot_thin(20, 10, (1, 4)),
    }


def test_a_style_of_the_session_changes_no_picture_and_no_panel(some, pictures, usual):
    public = {name for module in (plots, scaling_plots) for name in vars(module) if name.startswith("plot_")}
    assert pictures.keys() == public | {"show_digits"}, "every public picture takes part"
    plain = {name: draw().png() for name, draw in pictures.items()}
    hostile = {"text.usetex": True, "font.size": 30, "figure.dpi": 40, "image.cmap": "hot"}
    with plt.style.context("dark_background"), plt.rc_context(hostile):
        for name, draw in pictures.items():
            assert draw().png() == plain[name], name
        for name in ("the explorer", "the inspector"):
            assert COMPUTED[name](some) == usual[name], name


def test_a_style_changes_no_panel_that_grows_under_it():
    def grown():
        plots.set_type_scale(1.5)
        return moved(inspector, rank=2, steps=7)

    try:
        inspector = ParametrizationInspector()
        plain = grown()
        plots.set_type_scale(1.0)
        inspector = ParametrizationInspector()
        with plt.rc_context({"text.hinting": "none", "lines.linewidth": 9}):
            assert grown() == plain
    finally:
        plots.set_type_scale(1.0)


def test_plots_can_be_drawn_whatever_the_global_dtype(pictures):
    plain = {name: draw().alt for name, draw in pictures.items()}
    with default_dtype(torch.bfloat16):
        assert {name: draw().alt for name, draw in pictures.items()} == plain


# Consoles and files that are not UTF-8


def test_a_notebook_exported_as_a_script_runs_on_a_console_without_greek(tmp_path):
    script, resources = PythonExporter().from_filename(str(ROOT / "notebooks" / "3_parametrization.ipynb"))
    assert resources["output_extension"] == ".py"
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="cp1252", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(?/r)" in done.stdout and "nines wrong" in done.stdout  # α/r, as far as that console can say it


def test_every_text_file_is_read_and_written_with_its_encoding():
    files = [*ROOT.glob("lora_helpers/**/*.py"), *ROOT.glob("tests/*.py")]
    for file in files:
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call):
                name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                given = [word.arg for word in call.keywords]
                opens = name == "open" and getattr(getattr(call.func, "value", None), "id", "") != "Image"
                if name in ("read_text", "write_text") or opens or "text" in given and name == "run":
                    assert "encoding" in given, f"{file.name}:{call.lineno}"


UNDER_ANOTHER_LOCALE = (  # these look for an arrow, which is not the same in CP1252
    "tests/test_setup.py::test_pages_quote_the_figures_that_the_notebooks_show",
    "tests/test_model.py::test_the_base_keeps_the_rule_by_which_it_was_chosen",
)


@pytest.mark.slow
def test_what_reads_text_works_under_a_locale_that_is_not_utf_8(tmp_path):
    if not shutil.which("localedef"):
        pytest.skip("localedef, which makes such a locale, is not on this machine")
    made = ["localedef", "-i", "en_US", "-f", "CP1252", str(tmp_path / "en_US.CP1252")]
    if subprocess.run(made, capture_output=True).returncode > 1:  # 1: it warns
        pytest.skip("localedef has no CP1252 or no en_US here")
    locale = {"LOCPATH": str(tmp_path), "LC_ALL": "en_US.CP1252", "PYTHONUTF8": "0"}
    where = {"cwd": ROOT, "env": os.environ | locale, "capture_output": True, "encoding": "utf-8"}
    options = ["-q", "-n", "0", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *UNDER_ANOTHER_LOCALE]
    done = subprocess.run(command, **where, errors="replace")
    assert done.returncode == 0, done.stdout
    code = "import locale; print(locale.getencoding())"
    said = subprocess.run([sys.executable, "-c", code], **where)
    assert said.stdout == "CP1252\n", "Python did read in that encoding"


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
