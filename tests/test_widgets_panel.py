"""What all panels promise: errors are seen, controls and picture agree, a picture reaches every reader."""

import base64
import io
import math
import threading
import time

import pytest
from PIL import Image
from torch.utils.data import TensorDataset
from traitlets import TraitError

from lora_helpers import DigitPad, LoRAExplorer, ParametrizationInspector, ScalingLab, projector_mode
from lora_helpers.data import Mnist
from lora_helpers.widgets.pictures import with_caption


@pytest.fixture(scope="module")
def some(mnist):
    """A small part of MNIST, enough for everything to run."""
    parts = ((mnist.train, 3000), (mnist.test, 1000))
    return Mnist(*(TensorDataset(*(t[:n] for t in part.tensors)) for part, n in parts))


@pytest.fixture
def panel():
    return ParametrizationInspector()  # computes in milliseconds


@pytest.fixture(scope="module")
def panels(some):
    from lora_helpers import pretrained_base

    explorer = LoRAExplorer(pretrained_base(), some)
    lab = ScalingLab(pretrained_base(), some)
    return explorer, DigitPad(explorer), ParametrizationInspector(), lab


def seen(panel):
    """The picture in the page."""
    data = panel._image.value.split("base64,")[1].split('"')[0]
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def test_a_move_of_a_control_moves_trait_summary_and_picture(panel):
    before = seen(panel).tobytes()
    panel.sliders["rank"].set_state({"value": 3})  # the way a move in the browser takes
    assert panel.rank == panel.fields["rank"].value == panel.result.rank == 3
    assert " · rank 3 · " in panel.summary and panel.summary in panel._text.value
    assert f'alt="{panel.summary}"' in panel._image.value and seen(panel).tobytes() != before
    panel.rank = 1
    assert panel.sliders["rank"].value == 1 and seen(panel).tobytes() == before


def test_an_error_is_seen_the_controls_go_back_and_the_next_move_starts_clean(panel, monkeypatch):
    before = panel.summary
    with monkeypatch.context() as patch:
        patch.setattr(panel, "_inspect", lambda **setting: 1 / 0)
        panel.fields["rank"].value = 3
    assert panel.status == "division by zero (ZeroDivisionError). Set another value, or run the cell again."
    assert 'role="alert"' in panel._alert.value and panel.status in panel._alert.value
    assert panel.rank == panel.fields["rank"].value == 1 and panel.summary == before in panel._image.value
    panel.fields["rank"].value = 3
    assert panel.result.rank == 3 and panel.status == panel._alert.value == ""


def test_a_listener_that_fails_is_seen_and_the_move_stands(panel):
    panel.observe(lambda change: 1 / 0, "result")
    panel.rank = 2
    assert "division by zero" in panel.status and panel.rank == panel.result.rank == 2
    assert " · rank 2 · " in panel.summary and panel.summary in panel._image.value


def test_a_listener_finds_all_figures_of_one_move(panel):
    found = []
    panel.observe(lambda change: found.append((panel.result.rank, panel.summary)), ["result", "summary"])
    panel.rank = 4
    assert found and all(rank == 4 and " · rank 4 · " in summary for rank, summary in found)


def test_a_value_out_of_range_is_refused_in_words(panel):
    panel.fields["rank"].set_state({"value": 9})
    assert panel.rank == panel.fields["rank"].value == 1
    assert panel.status == "rank r must be from 1 to 4, so 9 was not taken."
    for trait, value in (("rank", 0), ("alpha", 17.0), ("alpha", math.nan), ("alpha", math.inf)):
        with pytest.raises(TraitError):
            setattr(panel, trait, value)
    assert (panel.rank, panel.alpha) == (1, 1)


def test_of_moves_on_many_threads_the_last_is_shown_and_few_are_computed(panel, monkeypatch):
    real, entered, go_on, computed = panel._inspect, threading.Event(), threading.Event(), []

    def slow(**setting):
        computed.append(setting)
        entered.set()
        assert go_on.wait(60)
        return real(**setting)

    monkeypatch.setattr(panel, "_inspect", slow)
    moves = [
        threading.Thread(target=setattr, args=(panel.sliders["steps"], "value", 60 + n)) for n in range(20)
    ]
    moves[0].start()
    assert entered.wait(60)
    for move in moves[1:]:
        move.start()
    deadline = time.monotonic() + 60
    while panel.steps == 60:
        assert time.monotonic() < deadline, "a move was lost while another was at work"
        time.sleep(0.01)
    time.sleep(0.2)
    go_on.set()
    for move in moves:
        move.join(60)
    assert len(computed) <= 3 and computed[-1]["steps"] == panel.steps == panel.fields["steps"].value
    assert f"after {panel.steps} steps" in panel.summary and not panel.status


def test_a_picture_with_its_words_stands_in_where_no_kernel_runs(panels):
    for panel in panels:
        data, metadata = panel._repr_mimebundle_()
        assert metadata["image/png"]["alt"] == panel.summary
        assert data["text/plain"] == f"{type(panel).__name__}: run this notebook to use its controls"
        assert "application/vnd.jupyter.widget-view+json" in data
        assert f'alt="{panel.summary}"' in data["text/html"] and data["image/png"] in data["text/html"]
        picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
        assert picture.size == with_caption(seen(panel), panel.summary).size > seen(panel).size


def test_every_control_has_a_name_and_a_hint(panels):
    for panel in panels:
        assert panel.fields
        for field in panel.fields.values():
            assert getattr(field, "tooltips", None) or field.description and field.tooltip
        assert all(slider.tooltip for slider in panel.sliders.values())


def test_the_projector_look_reaches_every_picture(panels):
    moves = (panels[0], "enabled", (False, True)), (panels[1], "index", (3, 4)), (panels[2], "rank", (2, 1))
    moves += ((panels[3], "rank", (8, 4)),)

    def sizes():
        for panel, trait, values in moves:
            for value in values:
                setattr(panel, trait, value)
            yield seen(panel).size

    usual = list(sizes())
    try:
        projector_mode()
        large = list(sizes())
    finally:
        projector_mode(False)
    for (width, height), (wide, high) in zip(usual, large):
        assert wide == pytest.approx(1.35 * width, abs=1) and high == pytest.approx(1.35 * height, abs=1)
    assert list(sizes()) == usual
