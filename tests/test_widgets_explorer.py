"""The explorer without a browser: controls in, results, text and pictures out."""

import copy

import numpy as np
import pytest
import torch
from test_widgets_panel import some  # noqa: F401  (fixture)
from traitlets import TraitError

import lora_helpers.experiments
from lora_helpers import LoRAExplorer, Setting, add_lora, evaluate, freeze_base, only_digit, train
from lora_helpers.widgets.explorer import PRESETS


@pytest.fixture(scope="module")
def made(some):  # noqa: F811
    from lora_helpers import pretrained_base

    return LoRAExplorer(pretrained_base(), some)


@pytest.fixture
def explorer(made):
    """The explorer at its start, drawn again; it remembers what earlier tests trained."""
    made.apply(Setting(seed=1))
    made._drawn.clear()
    made.apply(Setting(), enabled=True)
    return made


@pytest.fixture
def trainings(monkeypatch):
    """The settings that are trained."""
    seen, real = [], lora_helpers.experiments.train_adapters

    def counted(base, images, labels, settings, *args, **kwargs):
        seen.extend(settings)
        return real(base, images, labels, settings, *args, **kwargs)

    monkeypatch.setattr(lora_helpers.experiments, "train_adapters", counted)
    return seen


def test_slider_and_switch_act_on_a_real_network(base, some, explorer):  # noqa: F811
    state = torch.get_rng_state()
    explorer.sliders["rank"].set_state({"value": 4.0})  # the way a move in the browser takes
    net = freeze_base(add_lora(copy.deepcopy(base), rank=4, generator=torch.Generator().manual_seed(0)))
    train(net, only_digit(some.train, 9), max_batches=100, seed=0, progress=False)
    off, on = evaluate(base, some.test), evaluate(net, some.test)
    assert explorer.rank == explorer.fields["rank"].value == 4 and explorer.result.trained == 4 * 6_794
    assert (
        explorer.result.on.wrong_counts
        == on.wrong_counts
        != off.wrong_counts
        == explorer.result.off.wrong_counts
    )
    heights = [[bar.get_height() for bar in bars] for bars in explorer._picture._bars]
    assert heights == [off.wrong_counts, [min(count, explorer._picture._top) for count in on.wrong_counts]]
    explorer.fields["enabled"].set_state({"value": False})
    assert [bar.get_height() for bar in explorer._picture._bars[1]] == off.wrong_counts
    assert torch.equal(torch.get_rng_state(), state), "the global random stream is left alone"


def test_the_summary_speaks_of_the_network_as_it_is_switched(explorer):
    off, on = explorer.result.off, explorer.result.on
    old, new = off.wrong_counts[9], on.wrong_counts[9]
    others, now = sum(off.wrong_counts) - old, sum(on.wrong_counts) - new
    assert explorer.summary.startswith("LoRA on · rank 1 · α 1 · 100 batches of digit 9 · ")
    for part in (f"9 wrong {old} → {new} (−{old - new})", f"others wrong {others} → {now} (+{now - others})"):
        assert part in explorer.summary
    assert (
        f"accuracy {off.accuracy:.1%} → {on.accuracy:.1%} · 6,794 trained parameters (0.24% of the base)"
        in explorer.summary
    )
    explorer.enabled = False
    assert explorer.summary.startswith("LoRA off · rank 1 · α 1 · ")
    assert f"9 wrong {old} → {old} (±0) · others wrong {others} → {others} (±0)" in explorer.summary


def test_scrubbing_through_the_batches_and_the_switch_train_no_more(explorer, trainings):
    for batches, origin in ((50, "just tested"), (0, "just tested"), (100, "remembered"), (50, "remembered")):
        explorer.sliders["batches"].set_state({"index": explorer.sliders["batches"].options.index(batches)})
        assert explorer.result.setting.batches == explorer.fields["batches"].value == batches
        assert explorer.origin == origin
    explorer.enabled = False
    assert not trainings and explorer.summary.endswith("seed 0, remembered")
    explorer.batches = 0
    assert torch.equal(explorer.result.on.predictions, explorer.result.off.predictions)
    assert explorer.proofs["B = 0 changes nothing"] and set(explorer.result.norms.values()) == {0}


def test_the_strength_multiplies_the_update_and_trains_no_more(base, some, explorer, trainings):  # noqa: F811
    full = explorer.result
    explorer.sliders["strength"].set_state({"index": explorer.sliders["strength"].options.index(0.5)})
    half, net = explorer.result, copy.deepcopy(base)
    with torch.no_grad():
        for name, (A, B) in full.adapters.items():
            net.get_submodule(name).weight += 0.5 * full.scale * B @ A
    assert half.on.wrong_counts == evaluate(net, some.test).wrong_counts != full.on.wrong_counts
    assert half.norms == pytest.approx({name: norm / 2 for name, norm in full.norms.items()})
    assert " · α 1, strength 0.5 · " in explorer.summary and all(explorer.proofs.values())
    explorer.strength = 0.0
    assert torch.equal(explorer.result.on.predictions, explorer.result.off.predictions)
    explorer.strength = 1.0
    assert explorer.result.on.wrong_counts == full.on.wrong_counts and not trainings


@pytest.mark.parametrize("name, becomes", [
    ("rank 1, α 1", Setting(seed=2)),
    ("no scaling: α = r", Setting(rank=4, alpha=4, seed=2)),
    ("rehearse the other digits", Setting(share=0.5, seed=2)),
])  # fmt: skip
def test_a_preset_is_one_click_and_at_most_one_training(explorer, trainings, name, becomes):
    explorer.move({"rank": 4, "seed": 2, "batches": 100, "enabled": False})
    trainings.clear()
    explorer.presets[name].click()
    assert explorer.result.setting == explorer.setting == becomes and explorer.enabled and len(trainings) <= 1
    assert explorer.sliders["alpha"].value == explorer.fields["alpha"].value == becomes.alpha
    assert set(PRESETS) == set(explorer.presets) and all(explorer.proofs.values())


@pytest.mark.parametrize("seed, fault", [(0, ZeroDivisionError), (1, KeyboardInterrupt)])
def test_a_preset_that_fails_puts_all_controls_back(explorer, monkeypatch, seed, fault):
    wanted = Setting(rank=7, alpha=7, share=0.2, seed=seed)

    def fail(*args, **kwargs):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(lora_helpers.experiments, "train_adapters", fail)
        try:
            explorer.apply(wanted)
        except KeyboardInterrupt:
            assert explorer.status == "Interrupted. Set the value again."
        assert explorer.status
    assert explorer.setting == explorer.result.setting == Setting()
    assert explorer.fields["rank"].value == explorer.sliders["alpha"].value == 1
    explorer.apply(wanted)
    assert explorer.result.setting == wanted and explorer.fields["share"].value == 0.2 and not explorer.status


def test_a_setting_out_of_range_moves_nothing(explorer):
    with pytest.raises(TraitError):
        explorer.apply(Setting(alpha=2, rank=100))
    for trait, value in (
        ("rank", 65),
        ("alpha", 0.01),
        ("batches", 37),
        ("digit", 10),
        ("share", 0.3),
        ("strength", 0.4),
    ):
        with pytest.raises(TraitError):
            setattr(explorer, trait, value)
    assert explorer.setting == explorer.result.setting == Setting() and explorer.fields["alpha"].value == 1


def test_the_bars_keep_one_axis_and_off_hides_nothing(explorer):
    picture, result = explorer._picture, explorer.result
    axis = picture._bar_axes.get_ylim()

    def strips():
        return [strip.get_array().copy() for strip in picture._strips]

    def said():
        return " ".join(word for _, _, word, *_ in picture._words)

    on = strips()
    assert (
        f"repaired by LoRA: {len(result.repaired)} " in said()
        and f"broken by LoRA: {len(result.broken)} " in said()
    )
    explorer.enabled = False
    assert f"broken if LoRA were on: {len(result.broken)} " in said()
    assert all((old == new).all() and new.any() for old, new in zip(on, strips()))
    explorer.apply(Setting(rank=64, alpha=64), enabled=True)
    most = max(explorer.result.on.wrong_counts)
    assert picture._bar_axes.get_ylim() == axis and most > axis[1] and f" {most} " in said(), (
        "the number says it"
    )


def test_one_shade_is_one_number_of_mistakes(explorer):
    explorer.rank = 4
    shades = {}
    maps = (
        (explorer.result.off, explorer._picture._base_map),
        (explorer.result.on, explorer._picture._now_map),
    )
    for evaluation, image in maps:
        for count, shade in zip(
            evaluation.confusion.clone().fill_diagonal_(0).flatten().tolist(), np.ravel(image.get_array())
        ):
            shades.setdefault(count, set()).add(float(shade))
    assert len(shades) > 5 and all(len(found) == 1 for found in shades.values())


@pytest.mark.parametrize(
    "setting", [Setting(rank=4, alpha=1 / 16, batches=1), Setting(alpha=64, batches=300), Setting(rank=16)]
)
def test_as_many_singular_values_as_the_rank_all_in_the_picture(explorer, setting):
    explorer.apply(setting)
    for points, name in zip(explorer._picture._points, explorer.result.norms):
        low, high = points.axes.get_ylim()
        assert len(points.get_ydata()) <= min(setting.rank, 10 if name == "linear3" else 64)
        assert all(low <= value < high for value in points.get_ydata())


@pytest.mark.parametrize("patience, shown", [(-1, ["visible", "hidden"]), (1e9, [])])
def test_a_long_training_shows_how_far_it_is(explorer, monkeypatch, patience, shown):
    monkeypatch.setattr("lora_helpers.widgets.panel.PATIENCE", patience)
    steps, moves = [], []
    explorer._progress.layout.observe(lambda change: moves.append(change.new), "visibility")
    explorer._progress.observe(lambda change: steps.append(change.new), "value")
    explorer.seed = 100 + bool(shown)
    assert moves == shown and steps[-10:] == (list(range(10, 101, 10)) if shown else [])


def test_settings_given_at_the_start(base, some):  # noqa: F811
    explorer = LoRAExplorer(base, some, rank=3, digit=4, enabled=False)
    assert explorer.result.setting == Setting(rank=3, digit=4)
    assert explorer.summary.startswith("LoRA off · rank 3 · α 1 · 100 batches of digit 4")
    with pytest.raises(TypeError, match="'ranks' is not a setting"):
        LoRAExplorer(base, some, ranks=3)
    with pytest.raises(ValueError, match="already has LoRA"):
        LoRAExplorer(add_lora(base), some)
