"""A JupyterLab and a Chromium for the browser tests; each module gives `notebooks`, the folder to serve."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false"},  # no question about news in the way
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells stay in the page, also out of sight
}


def write_notebook(path, sources) -> None:
    kernel = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}
    cells = [new_code_cell(source) for source in sources]
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)


def without_outputs(notebook):
    """`notebook`, changed so that everything seen of it is new."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


@pytest.fixture(scope="module")
def lab(chromium, notebooks, tmp_path_factory):
    """The address of a JupyterLab that serves `notebooks`, with settings of its own."""
    folder = tmp_path_factory.mktemp("lab")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, settings in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
    home = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    home |= {f"JUPYTERLAB_{kind}_DIR": str(folder / kind.lower()) for kind in ("SETTINGS", "WORKSPACES")}
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token="]
    options += [f"--ServerApp.port={port}", f"--ServerApp.root_dir={notebooks}"]
    with (folder / "log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "jupyter", "lab", *options]
        server = subprocess.Popen(command, env=os.environ | home, stdout=log, stderr=log)
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/status", server, folder / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=20)


def _wait_for(address, server, log) -> None:
    for _ in range(300):
        assert server.poll() is None, log.read_text(encoding="utf-8")
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.2)
    pytest.fail(log.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def browser(chromium):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_notebook(lab: str, browser: Browser, notebook: str, height: int = 1000) -> Page:
    """A page that shows `notebook`, its kernel ready; `page.errors` is what the console called errors."""
    page = browser.new_page(viewport={"width": 1280, "height": height})
    page.set_default_timeout(60_000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.goto(f"{lab}/doc/tree/{notebook}?reset")
    # Before it has a kernel, a notebook that is told to run asks for one in a dialog.
    page.locator(".jp-NotebookPanel-toolbar [data-status=idle]").wait_for(state="attached")
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=60_000)
    return page


def run_all(lab: str, browser: Browser, notebook: str, height: int = 1000) -> Page:
    """A page that shows `notebook` and has just begun to run all its cells."""
    page = open_notebook(lab, browser, notebook, height)
    page.get_by_text("Run", exact=True).first.click()
    page.locator("#jp-mainmenu-run").get_by_text("Run All Cells", exact=True).click()
    return page


def cell(page: Page, source: str) -> Locator:
    """The code cell that holds `source`."""
    found = page.locator(".jp-CodeCell", has=page.locator(".cm-content", has_text=source)).first
    found.scroll_into_view_if_needed(timeout=20_000)
    return found


def run(page: Page, source: str, replacement: str | None = None) -> Locator:
    """Runs the cell that holds `source`, or `replacement` in its place; returns its output."""
    found = cell(page, source)
    found.locator(".cm-content").click()
    if replacement is not None:
        page.keyboard.press("ControlOrMeta+A")
        page.keyboard.insert_text(replacement)
    page.keyboard.press("ControlOrMeta+Enter")
    return found.locator(".jp-OutputArea").first


def shows(panel: Locator, start: str) -> None:
    """The summary begins with `start`, and the picture's text alternative says the same."""
    expect(panel.locator("output")).to_have_text(re.compile("^" + re.escape(start)), timeout=60_000)
    expect(panel.locator("img")).to_have_attribute("alt", panel.locator("output").inner_text())
    expect(panel.get_by_role("alert")).to_have_count(0)


def slider(panel: Locator, number: int) -> Locator:
    return panel.get_by_role("slider").nth(number)
