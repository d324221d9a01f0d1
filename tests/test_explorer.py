"""The explorer without a browser: controls in, results and text out."""

import pytest
import torch

from lora_helpers import LoRAExplorer, evaluate, load_mnist, pretrained_base


@pytest.fixture(scope="module")
def mnist():
    return load_mnist("sample")


@pytest.fixture(scope="module")
def base(mnist):
    return pretrained_base(mnist, progress=False)


def test_slider_and_switch_act_on_a_real_network(base, mnist):
    before = evaluate(base, mnist.test)
    state = torch.get_rng_state()
    explorer = LoRAExplorer(base, mnist)
    assert explorer.summary.startswith("LoRA on · rank 1 · α 1 · ")
    assert explorer.result.trainable == 6_794
    assert torch.equal(explorer.result.off.confusion, before.confusion)
    explorer.rank_slider.set_state({"index": 2})  # the path a move in the browser takes
    assert explorer.summary.startswith("LoRA on · rank 4 · α 1 · ") and explorer.result.trainable == 4 * 6_794
    remembered = explorer.result
    explorer.switch.value = False
    assert explorer.summary.startswith("LoRA off · rank 4") and explorer.result is remembered
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(evaluate(base, mnist.test).confusion, before.confusion), "the given base is left alone"


def test_an_error_is_seen_and_the_widget_stays_usable(base, mnist, monkeypatch):
    explorer = LoRAExplorer(base, mnist)
    with monkeypatch.context() as patch:
        patch.setattr("lora_helpers.explorer.train", lambda *args, **kwargs: 1 / 0)
        explorer.rank_slider.value = 8
        assert "division by zero" in explorer._status.value
    explorer.rank_slider.value = 2
    assert explorer.result.rank == 2 and not explorer._status.value


def test_a_static_picture_and_its_text_stand_in(base, mnist):
    explorer = LoRAExplorer(base, mnist)
    data, metadata = explorer._repr_mimebundle_()
    assert data["image/png"] and "application/vnd.jupyter.widget-view+json" in data
    assert metadata["image/png"]["alt"] == explorer.summary
