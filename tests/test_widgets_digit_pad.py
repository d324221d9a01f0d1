"""The digit pad: drawings become images like MNIST's, and two real networks answer."""

import math

import pytest
import torch
from test_widgets_panel import some  # noqa: F401  (fixture)

from lora_helpers import DigitPad, LoRAExplorer, as_mnist
from lora_helpers.data import MEAN, STD

RING = [(140 + 50 * math.cos(n / 10), 90 + 50 * math.sin(n / 10)) for n in range(64)]
NINE = [RING, [(190, 90), (185, 150), (170, 250)]]


@pytest.fixture(scope="module")
def explorer(some):  # noqa: F811
    from lora_helpers import pretrained_base

    return LoRAExplorer(pretrained_base(), some)


@pytest.fixture
def pad(explorer):
    explorer.move({"rank": 1, "batches": 100, "enabled": True})
    return DigitPad(explorer)


def ink(image):
    return (image * STD + MEAN)[0]


@pytest.mark.parametrize("strokes", [NINE, [RING], [[(10, 10), (10, 200)]], [[(0, 0), (260, 20)]]])
def test_a_drawing_is_scaled_and_centred_as_mnist_does(strokes):
    pixels = ink(as_mnist(strokes))
    assert pixels.shape == (28, 28) and pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6
    positions = torch.arange(28.0)
    for side in (0, 1):
        assert (pixels.sum(dim=side) @ positions / pixels.sum()).item() == pytest.approx(13.5, abs=0.1)
    assert 19 <= max((pixels > 0.5).any(dim=side).sum().item() for side in (0, 1)) <= 21


def test_place_and_size_on_the_canvas_do_not_matter():
    moved = [[(3 * x + 500, 3 * y - 70) for x, y in stroke] for stroke in NINE]
    assert torch.allclose(as_mnist(NINE), as_mnist(moved), atol=0.05)


def test_real_digits_drawn_again_are_read(base, mnist):
    """Each bright pixel drawn as a dot, on another scale: the preparation must bring the digit back."""
    images, labels = (t[::100] for t in mnist.test.tensors)
    dots = [[[(7.0 * x, 7.0 * y)] for y, x in (ink(image) > 0.6).nonzero().tolist()] for image in images]
    drawn = torch.stack([as_mnist(strokes) for strokes in dots])
    with torch.no_grad():
        assert (base(drawn).argmax(dim=1) == labels).float().mean() > 0.7
    low, high = ink(images.transpose(0, 1)).sum(dim=(1, 2)).aminmax()
    assert low < ink(as_mnist(NINE)).sum() < high


def test_a_dot_is_a_dot_and_nothing_is_refused():
    assert 1 < ink(as_mnist([[(5, 5)]])).sum() < 20
    for strokes, words in (([], "nothing drawn"), ([[]], "nothing drawn"), ([[(1, math.nan)]], "finite")):
        with pytest.raises(ValueError, match=words):
            as_mnist(strokes)


def test_the_pad_follows_drawing_switch_and_rank(explorer, pad):
    assert pad.index in explorer.result.repaired and "a 9" in pad.summary
    pad.draw(NINE)
    assert pad.index is None and torch.equal(pad.image, as_mnist(NINE)) and not pad.status
    assert pad.summary.startswith("LoRA on · rank 1 · α 1 · your drawing · the base says ")
    with torch.no_grad():
        assert torch.allclose(pad.base, explorer.tuner._net(pad.image[None]).softmax(dim=1)[0], atol=1e-5)
    before = pad.adapted
    assert not torch.equal(pad.base, before)
    explorer.rank = 8
    assert not torch.equal(pad.adapted, before) and " · rank 8 · " in pad.summary
    explorer.enabled = False
    assert torch.equal(pad.base, pad.adapted) and pad.summary.startswith("LoRA off")
    explorer.move({"enabled": True, "rank": 1})
    assert torch.equal(pad.adapted, before)


def test_the_pen_and_the_way_back_to_the_test_image(pad):
    index = pad.index
    pad._pen_move(3, 3)
    assert pad.index == index, "moving without pressing draws nothing"
    pad._pen_down(100, 50)
    pad._pen_move(100, 200)
    pad._pen_up(100, 200)
    assert pad._strokes == [[(100, 50), (100, 200)]] and "your drawing" in pad.summary
    pad.buttons["clear"].click()
    assert "nothing drawn yet" in pad.summary and not pad.base.any() and not pad.status
    pad.buttons["show"].click()
    assert f"test image {index}, " in pad.summary


def test_test_images_are_picked_by_number_and_by_button(explorer, pad, some):  # noqa: F811
    pad.fields["index"].value = 5
    assert torch.equal(pad.image, some.test.tensors[0][5]) and "test image 5, a 1" in pad.summary
    for name in ("repaired", "broken"):
        pad.buttons[f"next {name}"].click()
        assert pad.index in getattr(explorer.result, name)
    explorer.batches = 0
    pad.buttons["next broken"].click()
    assert pad.status == "With these settings no test image is broken."
    pad.fields["index"].value = 1000
    assert "it must be from 0 to 999" in pad.status and pad.index == pad.fields["index"].value != 1000
    with pytest.raises(ValueError, match="0 to 999"):
        DigitPad(explorer, index=1000)


def test_a_pad_made_again_replaces_the_old_one(explorer):
    old, new = DigitPad(explorer), DigitPad(explorer)
    explorer.enabled = not explorer.enabled
    assert new.summary.startswith("LoRA on") == explorer.enabled != old.summary.startswith("LoRA on")
