"""The explorer without a browser: controls in, results, text and pictures out."""

import base64
import re
import threading
import time

import pytest
import torch
from matplotlib.figure import Figure
from traitlets import TraitError

import lora_helpers.finetuning
from lora_helpers import LoRAExplorer, add_lora, evaluate, load_mnist, pretrained_base
from lora_helpers.finetuning import Settings
from lora_helpers.widgets.explorer import PRESETS
from lora_helpers.widgets.pictures import Words


@pytest.fixture(scope="module")
def mnist():
    return load_mnist("sample")


@pytest.fixture(scope="module")
def base(mnist):
    return pretrained_base(mnist, progress=False)


@pytest.fixture
def explorer(base, mnist):
    return LoRAExplorer(base, mnist)


@pytest.fixture
def trainings(monkeypatch):
    """Counts the trainings."""
    calls, real = [], lora_helpers.finetuning.train

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(lora_helpers.finetuning, "train", counted)
    return calls


def pictured(explorer):
    """The picture that the browser is given."""
    return base64.b64decode(explorer._image.value.split("base64,")[1].split('"')[0])


def test_slider_and_switch_act_on_a_real_network(base, mnist):
    before = evaluate(base, mnist.test)
    state = torch.get_rng_state()
    explorer = LoRAExplorer(base, mnist)
    assert explorer.summary.startswith("LoRA on · rank 1 · α 1 · 100 batches of digit 9 · ")
    assert explorer.result.trainable == 6_794 and explorer.summary.endswith("seed 0, just trained")
    assert torch.equal(explorer.result.off.confusion, before.confusion)
    explorer.rank_slider.set_state({"value": 4.0})  # the path a move in the browser takes
    assert explorer.rank == explorer.rank_field.value == 4
    assert explorer.summary.startswith("LoRA on · rank 4 · α 1 · ") and explorer.result.trainable == 4 * 6_794
    remembered, on = explorer.result, pictured(explorer)
    explorer.switch.set_state({"value": False})
    assert explorer.summary.startswith("LoRA off · rank 4") and explorer.result is remembered
    assert explorer.summary.endswith("seed 0, remembered")
    assert pictured(explorer) != on
    explorer.enabled = True
    assert pictured(explorer) == on
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(evaluate(base, mnist.test).confusion, before.confusion), "the given base is left alone"


def test_the_summary_speaks_of_the_network_as_it_is_switched(explorer):
    off, on = explorer.result.off, explorer.result.on
    wrong, others = (sum(r.wrong_counts[:9]) for r in (off, on))
    assert f"9 wrong {off.wrong_counts[9]} → {on.wrong_counts[9]} (" in explorer.summary
    assert f"others wrong {wrong} → {others} (" in explorer.summary
    assert f"accuracy {off.accuracy:.1%} → {on.accuracy:.1%}" in explorer.summary
    assert "6,794 trained parameters (0.24% of the base)" in explorer.summary
    explorer.enabled = False
    assert f"others wrong {wrong} → {wrong} (±0)" in explorer.summary
    assert f"accuracy {off.accuracy:.1%} → {off.accuracy:.1%}" in explorer.summary


def test_twenty_moves_at_once_train_at_most_twice(explorer, monkeypatch):
    real, entered, go_on = lora_helpers.finetuning.train, threading.Event(), threading.Event()
    trained = []

    def slow(*args, **kwargs):
        trained.append(explorer.rank)
        entered.set()
        assert go_on.wait(60)
        return real(*args, **kwargs)

    monkeypatch.setattr(lora_helpers.finetuning, "train", slow)
    moves = [threading.Thread(target=setattr, args=(explorer.rank_slider, "value", float(2 + n))) for n in range(20)]
    moves[0].start()
    assert entered.wait(60)
    for move in moves[1:]:
        move.start()
    deadline = time.monotonic() + 60
    while explorer.rank != 21:
        assert time.monotonic() < deadline, "a move was lost while another was at work"
        time.sleep(0.01)
    go_on.set()
    for move in moves:
        move.join(60)
    assert len(trained) <= 2 and explorer.result.settings.rank == explorer.rank
    assert explorer.summary.startswith(f"LoRA on · rank {explorer.rank} ") and not explorer.status


def test_scrubbing_through_the_batches_trains_no_more(explorer, trainings):
    for batches in (50, 0, 100, 50):
        explorer.batches_slider.set_state({"index": lora_helpers.finetuning.STOPS.index(batches)})
        assert explorer.result.settings.batches == explorer.batches_field.value == batches
    assert not trainings and explorer.origin == "remembered"
    explorer.batches = 0
    assert torch.equal(explorer.result.on.predictions, explorer.result.off.predictions)
    assert set(explorer.result.norms.values()) == {0}
    explorer.batches = 200
    assert len(trainings) == 1 and explorer.origin == "just trained"
    for batches in (150, 300):
        explorer.batches = batches
        assert len(trainings) == 1 and explorer.origin == "just tested"


def test_off_hides_nothing_and_moves_no_axis(explorer):
    picture, result = explorer._picture, explorer.result
    top, base = picture._axes_bars.get_ylim(), [bar.get_height() for bar in picture._bars[0]]

    def headings():
        return [" ".join(word for _, _, word, _ in heading.words) for _, heading, _, _ in picture._strips]

    assert headings() == [f"repaired by LoRA: {len(result.repaired):,}", f"broken by LoRA: {len(result.broken):,}"]
    mosaics = [image.get_array().copy() for _, _, image, _ in picture._strips]
    explorer.enabled = False
    assert picture._axes_bars.get_ylim() == top and [bar.get_height() for bar in picture._bars[0]] == base
    assert headings() == [f"LoRA on would repair: {len(result.repaired):,}", f"LoRA on would break: {len(result.broken):,}"]
    for (_, _, image, _), mosaic in zip(picture._strips, mosaics):
        assert (image.get_array() == mosaic).all() and mosaic.any() and image.get_alpha() < 0.5


def test_one_shade_is_one_number_of_mistakes(explorer):
    explorer.rank = 4
    shades = {}
    for evaluation, (_, image, _) in zip((explorer.result.off, explorer.result.on), (explorer._picture._base_map, explorer._picture._now_map)):
        for count, shade in zip(evaluation.confusion.flatten().tolist(), image.get_array().flat):
            shades.setdefault(count, set()).add(float(shade))
    common = [count for count in shades if 0 < count < 20]
    assert len(common) > 5 and all(len(shades[count]) == 1 for count in common)


def test_small_norms_and_as_many_singular_values_as_there_are(explorer):
    explorer.apply(Settings(rank=4, alpha=1 / 16, batches=1))
    picture, norms = explorer._picture, explorer.result.norms
    for (_, _, word, _), norm in zip(picture._norms.words, norms.values()):
        assert float(word) == pytest.approx(norm, rel=0.05) and 0 < norm < 0.1
    assert len(picture._norms.words) == 3
    assert [len(points.get_xdata()) for points in picture._points] == [64, 64, 10]


def test_large_values_stay_in_the_picture(explorer):
    explorer.apply(Settings(rank=1, alpha=64, batches=300))
    picture, (low, high) = explorer._picture, explorer._picture._axes_spectrum.get_ylim()
    assert max(explorer.result.norms.values()) > 100
    assert all(low < value < high for points in picture._points for value in points.get_ydata())
    assert len(picture._norms.words) == 3 and all(re.fullmatch(r"\d{2,3}(\.\d)?", word) for _, _, word, _ in picture._norms.words)


def test_long_words_are_written_smaller():
    words = Words(Figure().subplots(), fontsize=8, room=3)
    words.write([(0, 0, "12", "black"), (1, 0, "123", "black"), (2, 0, "1234", "white"), (3, 0, "", "black")])
    two, three, four = (path.get_extents().width for path in words.get_paths())
    assert two < four < 1.1 * three and len(words.get_offsets()) == 3
    words.write([])
    assert len(words.get_offsets()) == 0


def test_a_stop_that_is_only_tested_now_says_so(explorer):
    explorer.batches = 20
    assert explorer.origin == "just tested" and explorer.summary.endswith("seed 0, trained before, tested just now")


@pytest.mark.parametrize("fails", [False, True])
def test_a_preset_moves_all_controls_before_it_trains_and_all_go_back(explorer, monkeypatch, fails):
    seen, real = [], lora_helpers.finetuning.train

    def watched(*args, **kwargs):
        seen.append((explorer.settings, explorer.rank_field.value, explorer.rank_slider.value, explorer.alpha_field.value))
        return 1 / 0 if fails else real(*args, **kwargs)

    monkeypatch.setattr("lora_helpers.finetuning.train", watched)
    explorer.preset_buttons["no scaling: α = r"].click()
    assert seen == [(Settings(rank=16, alpha=16), 16, 16, 16)], "one training, of the whole preset"
    assert explorer.settings == explorer.result.settings == (Settings() if fails else Settings(rank=16, alpha=16))
    assert explorer.rank_field.value == explorer.rank and explorer.alpha_slider.value == explorer.alpha
    assert ("division by zero" in explorer.status) == fails


def test_a_preset_out_of_range_moves_nothing(explorer):
    with pytest.raises(TraitError):
        explorer.apply(Settings(alpha=2, rank=100))
    assert explorer.settings == explorer.result.settings == Settings() and explorer.alpha_field.value == 1
    explorer.rank = 2
    assert explorer.result.settings == Settings(rank=2)


@pytest.mark.parametrize("patience, seen", [(0, ["visible", "hidden"]), (1e9, [])])
def test_a_longer_training_shows_how_far_it_is(explorer, monkeypatch, patience, seen):
    monkeypatch.setattr("lora_helpers.widgets.explorer.PATIENCE", patience)
    bar, steps = explorer._progress, []
    moves = []
    bar.layout.observe(lambda change: moves.append(change.new), "visibility")
    bar.observe(lambda change: steps.append(change.new), "value")
    explorer.rank = 2
    assert moves == seen and steps == sorted(steps) and (len(steps) > 5) == bool(seen)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_one_click_and_one_training(explorer, trainings, name):
    explorer.rank, explorer.enabled = 2, False
    trainings.clear()
    explorer.preset_buttons[name].click()
    assert explorer.result.settings == explorer.settings == PRESETS[name][0] and explorer.enabled
    assert explorer.rank_slider.value == explorer.rank and explorer.share_slider.value == explorer.share
    assert len(trainings) <= 1 and explorer.proofs and all(explorer.proofs.values())


def test_what_the_presets_are_to_show(explorer):
    shown = {}
    for name, (settings, _) in PRESETS.items():
        explorer.apply(settings)
        shown[name] = explorer.result
    default, unscaled, rehearsed = shown.values()
    assert unscaled.on.wrong_counts[9] <= 2 and unscaled.on.accuracy < 0.5, "everything is called a 9"
    assert default.on.wrong_counts[9] < default.off.wrong_counts[9]
    assert len(rehearsed.broken) < len(default.broken) / 2 and rehearsed.on.accuracy > default.on.accuracy


def test_an_error_is_seen_and_the_widget_stays_usable(explorer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("lora_helpers.finetuning.train", lambda *args, **kwargs: 1 / 0)
        explorer.rank_field.value = 8
        assert "division by zero" in explorer.status and explorer.status in explorer._trouble.value
        assert explorer.summary.startswith("LoRA on · rank 1 "), "the picture and its text stay together"
    explorer.rank = 2
    assert explorer.result.settings.rank == 2 and not explorer.status and not explorer._trouble.value
    explorer.rank = 8
    assert explorer.result.settings.rank == 8, "what failed once is tried again"


@pytest.mark.parametrize("listen", [lambda e, f: e.observe(f, "result"), lambda e, f: e.attach(lambda: f(None))])
def test_an_error_in_what_follows_takes_no_move_back(explorer, listen):
    listen(explorer, lambda change: 1 / 0)
    explorer.rank = 3
    assert explorer.rank == explorer.rank_field.value == explorer.result.settings.rank == 3 and " · rank 3 · " in explorer.summary
    assert explorer.status == "Updated, but what follows failed: division by zero (ZeroDivisionError)."
    explorer.apply(Settings())
    assert explorer.settings == explorer.result.settings == Settings() and " · rank 1 · " in explorer.summary


def test_a_follower_may_move_the_explorer(explorer):
    def only_small(change):
        if change.new.settings.rank > 2:
            explorer.rank = 2

    explorer.observe(only_small, "result")
    explorer.rank = 4
    assert explorer.rank == explorer.rank_field.value == explorer.result.settings.rank == 2
    assert " · rank 2 · " in explorer.summary and explorer.summary in explorer._image.value and not explorer.status
    assert "rank of ΔW at most 2" in explorer.proofs and "at most 2<" in explorer._tiles.value


@pytest.mark.parametrize("trait, value", [("rank", 65), ("rank", 0), ("alpha", 0.01), ("alpha", float("nan")), ("alpha", float("inf")), ("batches", 37), ("digit", 10), ("share", 0.3)])
def test_values_out_of_range_are_refused_and_change_nothing(explorer, trait, value):
    before = explorer.settings
    with pytest.raises(TraitError):
        setattr(explorer, trait, value)
    assert explorer.settings == before and explorer.result.settings == before
    explorer.alpha = 2.0
    assert explorer.result.settings.alpha == 2 and not explorer.status


def test_bad_arguments(base, mnist):
    with pytest.raises(TypeError, match="'ranks' is no setting"):
        LoRAExplorer(base, mnist, ranks=3)
    with pytest.raises(ValueError, match="already has LoRA"):
        LoRAExplorer(add_lora(pretrained_base(mnist, progress=False)), mnist)


def test_settings_given_at_the_start(base, mnist):
    explorer = LoRAExplorer(base, mnist, rank=3, digit=4, enabled=False)
    assert explorer.result.settings == Settings(rank=3, digit=4)
    assert explorer.summary.startswith("LoRA off · rank 3 · α 1 · 100 batches of digit 4")


def test_a_static_picture_and_its_text_stand_in(explorer):
    data, metadata = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG") and "application/vnd.jupyter.widget-view+json" in data
    assert metadata["image/png"]["alt"] == explorer.summary
    assert data["text/plain"] == "LoRAExplorer: run this notebook to use its controls"


def test_every_control_has_a_label_and_a_description(explorer):
    fields = [explorer.rank_field, explorer.alpha_field, explorer.batches_field, explorer.share_field, explorer.digit_field,
              explorer.seed_field, explorer.switch, *explorer.preset_buttons.values()]  # fmt: skip
    assert all(field.description and field.tooltip for field in fields)
    assert f'alt="{explorer.summary}"' in explorer._image.value and explorer.summary in explorer._text.value
