"""The digit pad, the inspector and the scaling lab without a browser."""

import base64
import io
import math

import pytest
import torch
from PIL import Image
from torch import nn
from traitlets import TraitError

from lora_helpers import (
    DigitPad, LoRAExplorer, ParametrizationInspector, RichBoyNet, ScalingLab, as_mnist, load_mnist, pretrained_base, projector_mode,
)  # fmt: skip
from lora_helpers.data import MEAN, STD
from lora_helpers.widgets import inspector
from lora_helpers.widgets.inspector import inspect
from lora_helpers.widgets.scaling_lab import RANKS

RING = [(140 + 50 * math.cos(n / 10), 90 + 50 * math.sin(n / 10)) for n in range(64)]
NINE = [RING, [(190, 90), (185, 150), (170, 250)]]


@pytest.fixture(scope="module")
def mnist():
    return load_mnist("sample")


@pytest.fixture(scope="module")
def base(mnist):
    return pretrained_base(mnist, progress=False)


@pytest.fixture(scope="module")
def explorer(base, mnist):
    return LoRAExplorer(base, mnist)


def ink(image):
    return (image * STD + MEAN)[0]


# ---------------------------------------------------------------- drawings


@pytest.mark.parametrize("strokes", [NINE, [RING], [[(10, 10), (10, 200)]], [[(0, 0), (260, 20)]]])
def test_a_drawing_is_scaled_and_centred_as_mnist_does(strokes):
    pixels = ink(as_mnist(strokes))
    assert pixels.shape == (28, 28) and 0 <= pixels.min() + 1e-6 and pixels.max() <= 1 + 1e-6
    positions = torch.arange(28.0)
    assert (pixels.sum(dim=0) @ positions / pixels.sum()).item() == pytest.approx(13.5, abs=0.1)
    assert (pixels.sum(dim=1) @ positions / pixels.sum()).item() == pytest.approx(13.5, abs=0.1)
    extent = max((pixels > 0.5).any(dim=0).sum().item(), (pixels > 0.5).any(dim=1).sum().item())
    assert 19 <= extent <= 21


def test_place_and_size_on_the_canvas_do_not_matter():
    moved = [[(3 * x + 500, 3 * y - 70) for x, y in stroke] for stroke in NINE]
    assert torch.allclose(as_mnist(NINE), as_mnist(moved), atol=1e-3)


def test_ink_and_range_are_those_of_mnist(mnist):
    genuine = (mnist.test.tensors[0] * STD + MEAN).sum(dim=(1, 2, 3))
    low, high = genuine.quantile(0.02), genuine.quantile(0.98)
    assert low < ink(as_mnist(NINE)).sum() < high


def test_a_dot_is_a_dot_and_nothing_is_refused():
    assert 1 < ink(as_mnist([[(5, 5)]])).sum() < 20
    for nothing in ([], [[]]):
        with pytest.raises(ValueError, match="nothing drawn"):
            as_mnist(nothing)


def test_genuine_digits_traced_by_their_pixels_are_read(base, mnist):
    """Each bright pixel drawn as a dot, on another scale: the preparation must bring the digit back."""
    images, labels = (t[::40] for t in mnist.test.tensors)
    redrawn = torch.stack([as_mnist([[(7.0 * x, 7.0 * y)] for y, x in (ink(image) > 0.6).nonzero().tolist()]) for image in images])
    with torch.no_grad():
        right = (base(redrawn).argmax(dim=1) == labels).float().mean()
    assert right > 0.7


def test_the_pad_follows_drawing_switch_and_rank(explorer):
    pad = DigitPad(explorer)
    assert pad.index in explorer.result.repaired and "a 9" in pad.summary and pad.summary.startswith(f"LoRA on · rank {explorer.rank} · α ")
    pad.draw(NINE)
    assert pad.index_field.description == "your drawing", "not: test image −1"
    assert pad.index == -1 and torch.equal(pad.image, as_mnist(NINE)) and "your drawing" in pad.summary and not pad.status
    assert pad.base.sum().item() == pytest.approx(1, abs=1e-5) and not torch.equal(pad.base, pad.adapted)
    before = pad.adapted
    explorer.rank = 8
    assert not torch.equal(pad.adapted, before) and " · rank 8 · " in pad.summary
    explorer.enabled = False
    assert torch.equal(pad.base, pad.adapted) and pad.summary.startswith("LoRA off")
    explorer.enabled, explorer.rank = True, 1
    assert torch.equal(pad.adapted, before)


def test_the_pen(explorer):
    pad = DigitPad(explorer)
    pad._pen_move(3, 3)
    assert pad.index >= 0, "moving without pressing draws nothing"
    pad._pen_down(100, 50)
    pad._pen_move(100, 200)
    pad._pen_up(100, 200)
    assert pad.index == -1 and pad._strokes == [[(100, 50), (100, 200)]] and "your drawing" in pad.summary
    pad.buttons["clear"].click()
    assert "nothing drawn yet" in pad.summary and not pad.base.any() and not pad.status


def test_a_test_image_that_is_not_there_is_named(explorer):
    pad = DigitPad(explorer, index=3)
    for index in (-2, 2000):
        with pytest.raises(TraitError, match="0 to 1999"):
            pad.index = index
        with pytest.raises(TraitError, match="0 to 1999"):
            DigitPad(explorer, index=index)
    assert pad.index == 3 and "test image 3" in pad.summary


def test_a_broken_pen_is_seen(explorer, monkeypatch):
    pad = DigitPad(explorer)
    with monkeypatch.context() as patch:
        patch.setattr(pad.canvas, "stroke_line", lambda *points: 1 / 0)
        pad._pen_down(100, 50)
        assert "division by zero" in pad.status and pad.status in pad._trouble.value
    pad.draw(NINE)
    assert "your drawing" in pad.summary and not pad.status


def test_test_images_are_picked_by_keyboard_and_by_button(explorer, mnist):
    pad = DigitPad(explorer)
    pad.index_field.value = 5
    assert torch.equal(pad.image, mnist.test.tensors[0][5]) and "test image 5, a 0" in pad.summary
    for name in ("repaired", "broken"):
        pad.buttons[f"next {name}"].click()
        assert pad.index in getattr(explorer.result, name)
    explorer.batches = 0
    pad.buttons["next broken"].click()
    assert pad.status == "With these settings no test image is broken." and pad.status in pad._trouble.value
    explorer.batches = 100
    assert not pad.status


def test_a_pad_made_anew_replaces_the_old_one(explorer):
    old, new = DigitPad(explorer), DigitPad(explorer)
    explorer.enabled = False
    assert new.summary.startswith("LoRA off") and old.summary.startswith("LoRA on")
    explorer.enabled = True


# ---------------------------------------------------------------- inspector


def test_the_inspected_tensors_are_those_of_a_trained_layer():
    torch.manual_seed(1)
    layer = nn.Linear(8, 6)
    kept, state = layer.weight.detach().clone(), torch.get_rng_state()
    shown = inspect(layer, rank=2, alpha=6, steps=40)
    assert torch.equal(shown.weight, kept) and torch.equal(layer.weight, kept) and torch.equal(shown.effective_off, kept)
    assert torch.allclose(shown.update, 3 * shown.lora_B @ shown.lora_A)
    assert torch.equal(shown.effective, shown.weight + shown.update)
    assert torch.linalg.matrix_rank(shown.update) == 2 and shown.loss < shown.loss_before
    start = inspect(layer, rank=2, alpha=6, steps=0)
    assert not start.lora_B.any() and start.lora_A.any() and torch.equal(start.effective, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_higher_rank_comes_nearer_to_the_task():
    layer = ParametrizationInspector()._layer
    losses = [inspect(layer, rank=rank, steps=200).loss for rank in (1, 2, 4)]
    assert losses[0] > losses[1] > losses[2]


def test_the_inspector_trains_each_setting_once(monkeypatch):
    trained = []
    monkeypatch.setattr(inspector, "inspect", lambda layer, **settings: trained.append(settings) or inspect(layer, **settings))
    panel = ParametrizationInspector()
    for rank, enabled in ((1, False), (1, True), (2, True), (1, True)):
        panel.rank, panel.enabled = rank, enabled
    assert [settings["rank"] for settings in trained] == [1, 2] and panel.summary.endswith("seed 0, remembered")
    panel.steps = 60
    assert len(trained) == 3 and panel.summary.endswith("seed 0, just trained")


def test_the_inspector_moves_and_refuses():
    panel = ParametrizationInspector()
    assert panel.summary.startswith("LoRA on · rank 1 · α 1 · ") and "14 trained in A and B" in panel.summary
    panel.rank_slider.set_state({"value": 3})
    assert panel.result.rank == panel.rank_field.value == 3 and "of rank 3" in panel.summary and "42 trained" in panel.summary
    panel.switch.set_state({"value": False})
    assert panel.summary.startswith("LoRA off · rank 3") and "the weight is W, to the bit" in panel.summary
    data, metadata = panel._repr_mimebundle_()
    assert data["image/png"] and metadata["image/png"]["alt"] == panel.summary and not panel.status
    with pytest.raises(TraitError):
        panel.rank = 5
    for alpha in (math.nan, math.inf):
        with pytest.raises(TraitError):
            panel.alpha = alpha
    assert panel.result.alpha == panel.alpha == 1
    with pytest.raises(ValueError, match="must be 4 to 8"):
        ParametrizationInspector(nn.Linear(784, 1000))


# ---------------------------------------------------------------- scaling lab


@pytest.fixture(scope="module")
def lab(base, mnist):
    return ScalingLab(base, mnist)


def test_the_lab_measures_trained_adapters(lab):
    assert lab.summary.startswith("LoRA on · rank 4 · α 1 · scale α/r = 0.25 · ") and lab.summary.endswith("just trained")
    norms = {rule: None for rule in ("none", "α/r", "α/√r")}
    for rule in norms:
        lab.rule_field.value = rule
        norms[rule] = [lab.results[rank].norms["linear2"] for rank in RANKS]
        scales = [lab.results[rank].settings.alpha / rank for rank in RANKS]
        assert scales == pytest.approx([{"none": 1, "α/r": 1 / r, "α/√r": r**-0.5}[rule] for r in RANKS])
        assert not lab.status
    assert len({values[0] for values in norms.values()}) == 1, "at rank 1 all rules are one"
    assert norms["α/r"][-1] < norms["α/r"][0] / 3 and norms["none"][-1] > norms["none"][0]


def test_the_lab_remembers_and_its_rank_only_points(lab):
    lab.rule = "α/r"
    before = lab.results
    lab.rank_slider.set_state({"index": RANKS.index(64)})
    assert lab.results == before and " · rank 64 · " in lab.summary and lab.summary.endswith("remembered")
    data, metadata = lab._repr_mimebundle_()
    assert data["image/png"] and metadata["image/png"]["alt"] == lab.summary
    with pytest.raises(TraitError):
        lab.rule = "α·r"
    for alpha in (math.nan, math.inf):
        with pytest.raises(TraitError):
            lab.alpha = alpha


def test_the_axes_of_the_lab_hold_every_curve_and_words_stand_clear(lab):
    for alpha, rule in ((1 / 16, "α/r"), (64.0, "none")):
        lab._together({"alpha": alpha, "rule": rule})
        lab._draw().png()
        picture = lab._picture
        low, high = picture._axes.get_ylim()
        words = min(word.get_window_extent(picture._canvas.get_renderer()).y0 for word in picture._words)
        for line in picture._lines:
            assert low < min(line.get_ydata()) and max(line.get_ydata()) < high
            assert picture._axes.transData.transform(line.get_xydata())[:, 1].max() < words
    lab._together({"alpha": 1.0, "rule": "α/r"})


def test_the_lab_shows_how_far_it_is(lab):
    moves, bar = [], lab._progress
    bar.layout.observe(lambda change: moves.append((change.new, bar.value)), "visibility")
    lab.alpha = 0.5
    assert moves == [("visible", 10), ("hidden", 100)]


def test_a_base_too_small_for_the_ranks_is_refused_by_both(mnist):
    small = RichBoyNet(30, 40)
    with pytest.raises(ValueError, match="rank"):
        ScalingLab(small, mnist)
    with pytest.raises(ValueError, match="rank"):
        LoRAExplorer(small, mnist, rank=64)


# ---------------------------------------------------------------- all four


def test_the_projector_look_reaches_every_live_picture(explorer, lab):
    pad, inspector = DigitPad(explorer), ParametrizationInspector()
    moves = (explorer, "enabled", (False, True)), (pad, "index", (3, 4)), (inspector, "enabled", (False, True)), (lab, "rank", (8, 4))

    def sizes():
        found = []
        for panel, trait, values in moves:
            for value in values:
                setattr(panel, trait, value)
            image = Image.open(io.BytesIO(base64.b64decode(panel._image.value.split("base64,")[1].split('"')[0])))
            assert f'width="{image.width}" height="{image.height}"' in panel._image.value
            found.append((*image.size, image.tobytes()))
        return found

    usual = sizes()
    try:
        projector_mode()
        large = sizes()
    finally:
        projector_mode(False)
    for (width, height, _), (wide, high, _) in zip(usual, large):
        assert wide == pytest.approx(1.35 * width, abs=1) and high == pytest.approx(1.35 * height, abs=1)
    assert sizes() == usual
