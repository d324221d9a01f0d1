"""Notebook 4 itself, as a reader runs it: all cells in JupyterLab and Chromium, then the explorer by keyboard."""

import re

import nbformat
import pytest
from playwright.sync_api import expect
from test_browser_widgets import browser, lab, run_all, shows, slider, without_outputs  # noqa: F401  (fixtures)
from test_rerun import NOTEBOOKS


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """Notebook 4 without its stored outputs, so that all that is seen was made in the test."""
    folder = tmp_path_factory.mktemp("served")
    (path,) = (path for path in NOTEBOOKS if path.stem == "4_digit_9")
    nbformat.write(without_outputs(nbformat.read(path, as_version=4)), folder / path.name)
    return folder


def test_all_cells_run_and_the_slider_and_the_switch_change_the_summary(lab, browser):  # noqa: F811
    page = run_all(lab, browser, "4_digit_9.ipynb", height=1000)
    expect(page.get_by_text("Right at the first try: 0 of 4.")).to_be_attached(timeout=240_000)  # the last cell
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=60_000)
    for kind in ("error", "stderr"):
        assert page.locator(f"[data-mime-type='application/vnd.jupyter.{kind}']").count() == 0
    explorer = page.locator(".lora-panel").first
    shows(explorer, "LoRA on · rank 1 · α 1 · 100 batches of digit 9 · ")
    slider(explorer, 0).press("ArrowRight")
    shows(explorer, "LoRA on · rank 2 · α 1 · 100 batches of digit 9 · ")
    explorer.get_by_label("LoRA on").press("Space")
    expect(explorer.locator("output")).to_have_text(re.compile("^LoRA off · rank 2 · "), timeout=60_000)
    assert not page.errors
    page.close()
