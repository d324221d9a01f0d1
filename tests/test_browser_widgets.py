"""The widgets as a reader meets them: JupyterLab and Chromium, keyboard and mouse."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    """The address of a JupyterLab that serves a copy of the notebooks, with settings of its own."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(NOTEBOOKS, folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    home |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces")}
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--IdentityProvider.token="]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", *options, f"--ServerApp.root_dir={folder / 'notebooks'}"],
            env=os.environ | home, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/status", server, folder / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=20)


def _wait_for(address, server, log):
    for _ in range(300):
        assert server.poll() is None, log.read_text()
        try:
            return urllib.request.urlopen(address, timeout=5)
        except OSError:
            time.sleep(0.2)
    pytest.fail(log.read_text())


@pytest.fixture(scope="module")
def browser(chromium):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def notebook_4(lab, browser):
    """Notebook 4 with all its cells run, and what the browser's console called errors."""
    page = browser.new_page(viewport={"width": 1280, "height": 1600})
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    run_all(page, lab, "4_digit_9.ipynb")
    yield page
    page.close()


def run_all(page: Page, lab: str, name: str) -> None:
    page.goto(f"{lab}/doc/tree/{name}?reset")
    page.locator("[data-status=idle]").first.wait_for(timeout=60_000, state="attached")
    page.get_by_text("Run", exact=True).first.click()
    page.get_by_text("Run All Cells", exact=True).click()
    panel = page.locator(".lora-panel").first
    panel.scroll_into_view_if_needed(timeout=60_000)
    panel.wait_for(timeout=60_000)


def summary_of(panel):
    return panel.locator("output")


def settled(panel, start: str, move) -> float:
    """Seconds from `move` until the summary begins with `start` and the picture says the same."""
    begin = time.monotonic()
    move()
    expect(summary_of(panel)).to_have_text(re.compile("^" + re.escape(start)), timeout=20_000)
    expect(panel.locator("img")).to_have_attribute("alt", re.compile("^" + re.escape(start)))
    return time.monotonic() - begin


def test_the_slider_and_the_switch_act_on_a_real_network(notebook_4):
    panel = notebook_4.locator(".lora-panel").first
    expect(summary_of(panel)).to_have_text(re.compile("^LoRA on · rank 1 · α 1 · "), timeout=60_000)
    handle = panel.get_by_role("slider").first
    settled(panel, "LoRA on · rank 2 · α 1 · ", lambda: (handle.focus(), handle.press("ArrowRight")))
    settled(panel, "LoRA off · rank 2 · α 1 · ", panel.get_by_label("LoRA on").click)
    settled(panel, "LoRA on · rank 2 · α 1 · ", panel.get_by_label("LoRA on").click)
    assert not notebook_4.errors
