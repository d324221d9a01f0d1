"""The widgets as a reader meets them: JupyterLab and Chromium, keyboard and mouse."""

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

SCREENSHOTS = os.environ.get("LORA_SCREENSHOTS")  # a folder
CELLS = (
    """from lora_helpers import DigitPad, LoRAExplorer, ParametrizationInspector, ScalingLab, load_mnist, pretrained_base, projector_mode
mnist = load_mnist("sample")
base = pretrained_base(mnist, progress=False)
explorer = LoRAExplorer(base, mnist)
explorer""",
    "DigitPad(explorer)",
    "ParametrizationInspector()",
    "ScalingLab(base, mnist)",
)
PRESETS = {  # a part of the name, and how the summary then begins
    "no scaling": "LoRA on · rank 16 · α 16 · 100 batches of digit 9 · ",
    "rehearse": "LoRA on · rank 1 · α 1 · 100 batches of digit 9 with 50% others · ",
    "paper default": "LoRA on · rank 1 · α 1 · 100 batches of digit 9 · ",
}
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false"},  # no question about news in the way
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells stay in the page, also when out of sight
}
# Resolves to the milliseconds from the next key or click to the next frame after the panel's picture has changed.
STOPWATCH = """panel => { window.moved = new Promise(done => {
    let start;
    for (const kind of ["keydown", "pointerdown"])
        addEventListener(kind, () => start ??= performance.now(), {once: true, capture: true});
    new MutationObserver((_, observer) => {
        observer.disconnect();
        requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
    }).observe(panel.querySelector("img").parentNode, {childList: true, subtree: true, attributes: true});
}) }"""

# Notes in every frame where the panel and its picture stand, and how large they are.
WATCH = """panel => { window.frames_seen = 0; window.places = new Set(); (function look() {
    const boxes = [panel.querySelector("img"), panel].map(element => element.getBoundingClientRect());
    window.places.add(boxes.map(box => [box.x, box.y, box.width, box.height].join(" ")).join(" "));
    window.frames_seen += 1;
    requestAnimationFrame(look);
})() }"""

# The least contrast between text and what lies behind it, of all elements below the panel that hold text of their own.
CONTRAST = """panel => {
    const light = color => color.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const parse = text => text.match(/[0-9.]+/g).map(Number);
    const behind = element => {
        const color = parse(getComputedStyle(element).backgroundColor);
        return color.length == 3 || color[3] > 0.5 || !element.parentElement ? color : behind(element.parentElement);
    };
    const speaking = [...panel.querySelectorAll("*")].filter(e => e.offsetWidth && (e.matches("input, select") ||
        [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())));
    return Math.min(...speaking.map(e => {
        const pair = [parse(getComputedStyle(e).color).slice(0, 3), behind(e).slice(0, 3)].map(light).sort((a, b) => b - a);
        return (pair[0] + 0.05) / (pair[1] + 0.05);
    }));
}"""


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """A folder with one notebook that makes the four panels."""
    folder = tmp_path_factory.mktemp("served")
    serve(folder / "panels.ipynb", CELLS)
    return folder


def without_outputs(notebook):
    """`notebook`, changed so that all that is seen of it is new."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def serve(path, sources):
    kernel = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources], metadata=kernel), path)


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
        path.write_text(json.dumps(settings))
    home = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    home |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces")}
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--IdentityProvider.token="]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", *options, f"--ServerApp.root_dir={notebooks}"],
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
def page(lab, browser):
    """The notebook of panels with all its cells run, and what the browser's console called errors."""
    page = run_all(lab, browser, "panels.ipynb", height=1000)
    page.locator(".lora-panel").nth(3).wait_for(timeout=180_000)
    yield page
    page.close()


def run_all(lab: str, browser: Browser, notebook: str, height: int) -> Page:
    """A page that shows `notebook` and has just begun to run all its cells."""
    page = open_notebook(lab, browser, notebook, height)
    page.get_by_text("Run", exact=True).first.click()
    page.locator("#jp-mainmenu-run").get_by_text("Run All Cells", exact=True).click()  # JupyterLab 4.3 says it elsewhere too
    return page


def open_notebook(lab: str, browser: Browser, notebook: str, height: int) -> Page:
    """A page that shows `notebook`, its kernel ready; `page.errors` is what it called errors."""
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


@pytest.fixture
def explorer(page):
    panel = page.locator(".lora-panel").first
    panel.evaluate("panel => panel.scrollIntoView({block: 'center'})")
    panel.get_by_role("button", name="paper default").click()
    expect(panel.locator("output")).to_have_text(re.compile("^LoRA o.* · rank 1 · α 1 · 100 batches of digit 9 · "), timeout=20_000)
    yield panel
    assert not page.errors


def other_panel(page: Page, number: int) -> Locator:
    panel = page.locator(".lora-panel").nth(number)
    panel.evaluate("panel => panel.scrollIntoView({block: 'center'})")
    return panel


@pytest.fixture
def pad(explorer, page):
    return other_panel(page, 1)


def shows(panel: Locator, start: str) -> None:
    """The summary begins with `start`, and the picture's text alternative says the same."""
    expect(panel.locator("output")).to_have_text(re.compile("^" + re.escape(start)), timeout=60_000)
    expect(panel.locator("img")).to_have_attribute("alt", panel.locator("output").inner_text())
    expect(panel.get_by_role("alert")).to_have_count(0)


def milliseconds(page: Page, panel: Locator, move) -> float:
    """From the key or click that `move` makes to the new picture on the screen."""
    panel.evaluate(STOPWATCH)
    move()
    return page.evaluate("() => window.moved")


def slider(panel: Locator, number: int) -> Locator:
    return panel.get_by_role("slider").nth(number)  # rank, α, batches, others


def test_the_slider_and_the_switch_act_on_a_real_network(explorer):
    slider(explorer, 0).press("ArrowRight")
    shows(explorer, "LoRA on · rank 2 · α 1 · 100 batches of digit 9 · ")
    on = explorer.locator("output").inner_text()
    explorer.get_by_label("LoRA on").click()
    shows(explorer, "LoRA off · rank 2 · α 1 · ")
    assert "(±0)" in explorer.locator("output").inner_text() and "(±0)" not in on
    explorer.get_by_label("LoRA on").press("Space")
    shows(explorer, "LoRA on · rank 2 · α 1 · ")
    expect(explorer.get_by_text("✓ LoRA off = base, to the bit")).to_be_visible()
    expect(explorer.get_by_text("✗")).to_have_count(0)


def test_every_control_by_keyboard(explorer):
    slider(explorer, 1).press("ArrowRight")
    shows(explorer, "LoRA on · rank 1 · α 2 · ")
    slider(explorer, 2).press("ArrowLeft")
    shows(explorer, "LoRA on · rank 1 · α 2 · 70 batches of digit 9 · ")
    slider(explorer, 3).press("ArrowRight")
    shows(explorer, "LoRA on · rank 1 · α 2 · 70 batches of digit 9 with 10% others · ")
    for label, text in (("rank r", "6"), ("α", "0.5"), ("seed", "3")):
        field = explorer.get_by_label(label, exact=True)
        field.fill(text)
        field.press("Enter")
    shows(explorer, "LoRA on · rank 6 · α 0.5 · 70 batches of digit 9 with 10% others · ")
    expect(explorer.locator("output")).to_have_text(re.compile("seed 3, "))
    for label, key in (("batches", "5"), ("others", "Home"), ("learn digit", "ArrowDown")):
        explorer.get_by_label(label).press(key)
    shows(explorer, "LoRA on · rank 6 · α 0.5 · 5 batches of digit 8 · ")
    for name, start in PRESETS.items():
        explorer.get_by_role("button", name=name).press("Enter")
        shows(explorer, start)
    assert explorer.get_by_label("rank r", exact=True).input_value() == "1"


def test_every_control_by_mouse(explorer):
    for name, start in PRESETS.items():
        explorer.get_by_role("button", name=name).click()
        shows(explorer, start)
    for number, start in enumerate((
        "LoRA on · rank 64 · α 1 · ",
        "LoRA on · rank 64 · α 64 · 100 batches of digit 9 · ",
        "LoRA on · rank 64 · α 64 · 300 batches of digit 9 · ",
        "LoRA on · rank 64 · α 64 · 300 batches of digit 9 with 80% others · ",
    )):  # fmt: skip
        drag_to_the_end(explorer, number)
        shows(explorer, start)
    press_arrow(explorer.get_by_label("learn digit"), up=False)
    shows(explorer, "LoRA on · rank 64 · α 64 · 300 batches of digit 8 with 80% others · ")
    press_arrow(explorer.get_by_label("rank r"), up=False)
    press_arrow(explorer.get_by_label("α", exact=True), up=False)
    shows(explorer, "LoRA on · rank 63 · α 63.9375 · 300 batches of digit 8 with 80% others · ")
    explorer.get_by_label("batches").select_option("5")
    explorer.get_by_label("others").select_option("0%")
    shows(explorer, "LoRA on · rank 63 · α 63.9375 · 5 batches of digit 8 · ")
    press_arrow(explorer.get_by_label("seed"), up=True)
    expect(explorer.locator("output")).to_have_text(re.compile(r"seed \d+, just trained"), timeout=60_000)
    explorer.get_by_label("LoRA on").click()
    shows(explorer, "LoRA off · rank 63 · ")
    explorer.get_by_role("button", name="paper default").click()
    shows(explorer, "LoRA on · rank 1 · ")  # what a preset shows is seen, whatever the switch


def press_arrow(field: Locator, up: bool) -> None:
    """Clicks on one of the two arrows in a field for numbers."""
    box = field.bounding_box()
    field.page.mouse.click(box["x"] + box["width"] - 9, box["y"] + box["height"] * (1 / 4 if up else 3 / 4))


def drag_to_the_end(panel: Locator, number: int) -> None:
    handle, track = slider(panel, number).bounding_box(), panel.locator(".noUi-base").nth(number).bounding_box()
    mouse = panel.page.mouse
    mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    mouse.down()
    mouse.move(track["x"] + track["width"], handle["y"], steps=5)
    mouse.up()


def test_the_inspector_by_keyboard_and_mouse(page):
    inspector = other_panel(page, 2)
    for number, start in enumerate(("LoRA on · rank 2 · α 1 · ", "LoRA on · rank 2 · α 2 · ")):
        slider(inspector, number).press("ArrowRight")
        shows(inspector, start)
    inspector.get_by_label("steps").fill("80")
    inspector.get_by_label("steps").press("Enter")
    expect(inspector.locator("output")).to_have_text(re.compile("after 80 steps · "))
    slider(inspector, 2).press("ArrowRight")
    expect(inspector.locator("output")).to_have_text(re.compile("after 90 steps · "))
    for label, text in (("rank r", "3"), ("α", "0.5")):
        inspector.get_by_label(label, exact=True).fill(text)
        inspector.get_by_label(label, exact=True).press("Enter")
    shows(inspector, "LoRA on · rank 3 · α 0.5 · ")
    for label in ("rank r", "α", "steps"):
        press_arrow(inspector.get_by_label(label, exact=True), up=False)
    expect(inspector.locator("output")).to_have_text(re.compile("after 89 steps · "))  # the last of the three moves
    shows(inspector, "LoRA on · rank 2 · α 0.25 · ")
    for number, start in enumerate(("LoRA on · rank 4 · α 0.25 · ", "LoRA on · rank 4 · α 16 · ")):
        drag_to_the_end(inspector, number)
        shows(inspector, start)
    drag_to_the_end(inspector, 2)
    expect(inspector.locator("output")).to_have_text(re.compile("after 200 steps · "))
    inspector.get_by_label("LoRA on").press("Space")
    shows(inspector, "LoRA off · rank 4 · α 16 · α/r 4 · the weight is W, to the bit · ")
    inspector.get_by_label("LoRA on").click()
    shows(inspector, "LoRA on · rank 4 · α 16 · ")
    assert not page.errors


def test_the_scaling_lab_by_keyboard_and_mouse(page):
    lab = other_panel(page, 3)
    slider(lab, 0).press("ArrowRight")
    shows(lab, "LoRA on · rank 8 · α 1 · scale α/r = 0.125 · linear2: ")
    lab.get_by_role("button", name="α/√r").press("Enter")
    shows(lab, "LoRA on · rank 8 · α 1 · scale α/√r = 0.354 · linear2: ")
    slider(lab, 1).press("ArrowRight")
    shows(lab, "LoRA on · rank 8 · α 2 · scale α/√r = 0.707 · linear2: ")
    lab.get_by_role("button", name="linear3").click()
    shows(lab, "LoRA on · rank 8 · α 2 · scale α/√r = 0.707 · linear3: ")
    lab.get_by_role("button", name="linear1").press("Enter")
    shows(lab, "LoRA on · rank 8 · α 2 · scale α/√r = 0.707 · linear1: ")
    drag_to_the_end(lab, 0)
    shows(lab, "LoRA on · rank 64 · α 2 · scale α/√r = 0.25 · linear1: ")
    lab.get_by_label("rank r").press("Home")
    shows(lab, "LoRA on · rank 1 · α 2 · ")
    lab.get_by_label("rank r").select_option("16")
    lab.get_by_role("button", name="none").click()
    shows(lab, "LoRA on · rank 16 · α 2 · scale α at every rank = 2 · ")
    track = lab.locator(".noUi-base").nth(1).bounding_box()
    page.mouse.click(track["x"] + track["width"] * 0.4, track["y"] + track["height"] / 2)  # α from 2⁻⁴ to 2⁶: 1 in between
    shows(lab, "LoRA on · rank 16 · α 1 · ")
    field = lab.get_by_label("α", exact=True)
    press_arrow(field, up=True)
    shows(lab, "LoRA on · rank 16 · α 1.0625 · ")
    field.fill("0.5")
    field.press("Enter")
    shows(lab, "LoRA on · rank 16 · α 0.5 · ")
    assert not page.errors


@pytest.mark.parametrize("control, key", [("rank", "ArrowRight"), ("seed", "ArrowUp")])
def test_a_key_held_down_queues_no_work(explorer, control, key):
    """At most the training under way at key-up is finished, and one more for where the key was let go."""
    seed = explorer.get_by_label("seed")
    seed.fill({"rank": "1100", "seed": "1200"}[control])  # every setting from here on must be trained
    seed.press("Enter")
    expect(explorer.locator("output")).to_have_text(re.compile("seed 1.00, just trained"), timeout=60_000)
    explorer.evaluate("""panel => { window.later = null; addEventListener("keyup", () => window.later = [], {once: true, capture: true});
        new MutationObserver(() => window.later?.push(panel.querySelector("output").textContent))
            .observe(panel.querySelector("output").parentNode, {childList: true, subtree: true, characterData: true}) }""")
    held = slider(explorer, 0) if control == "rank" else seed
    held.focus()
    for _ in range(20):
        explorer.page.keyboard.down(key)  # again and again without letting go, as a keyboard repeats
        time.sleep(0.03)
    explorer.page.keyboard.up(key)
    value = seed.input_value()
    settled = "^LoRA on · rank 64 .* seed 1100, " if control == "rank" else f" seed {value}, "
    assert control == "rank" or int(value) >= 1210, "the key did repeat"
    expect(explorer.locator("output")).to_have_text(re.compile(settled), timeout=60_000)
    time.sleep(2)
    expect(explorer.locator("output")).to_have_text(re.compile(settled))
    trained = {text for text in explorer.page.evaluate("() => window.later") if text.endswith("just trained")}
    print(f"\n{control}: {len(trained)} trainings done after key-up")
    assert len(trained) <= 2


def test_nothing_jumps(explorer, page):
    explorer.evaluate(WATCH)
    rank, switch = slider(explorer, 0), explorer.get_by_label("LoRA on")
    moves = [(rank, "ArrowRight", "on · rank 2"), (rank, "ArrowRight", "on · rank 4"), (switch, "Space", "off · rank 4"),
             (switch, "Space", "on · rank 4"), (rank, "ArrowLeft", "on · rank 2")]  # fmt: skip
    for control, key, text in moves:
        control.press(key)
        shows(explorer, f"LoRA {text} · ")
        time.sleep(0.2)
    frames, places = page.evaluate("() => [window.frames_seen, [...window.places]]")
    assert frames > 20 and len(places) == 1, places
    assert float(places[0].split()[2]) >= 1000


def test_a_digit_is_drawn_by_mouse(pad, explorer):
    def stroke(*points):
        pad.locator("canvas").first.scroll_into_view_if_needed()
        canvas = pad.locator("canvas").first.bounding_box()
        places = [(canvas["x"] + x, canvas["y"] + y) for x, y in points]
        pad.page.mouse.move(*places[0])
        pad.page.mouse.down()
        for place in places[1:]:
            pad.page.mouse.move(*place, steps=8)
        pad.page.mouse.up()

    stroke((190, 70), (150, 50), (110, 80), (110, 120), (150, 140), (185, 110), (190, 70), (185, 160), (170, 240))
    shows(pad, "LoRA on · rank 1 · α 1 · your drawing · ")
    assert re.search(r"the base says \d \(\d+%\) · now \d \(\d+%\)$", pad.locator("output").inner_text())
    dark = pad.locator("canvas").first.evaluate(
        "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 == 0 && v < 128).length"
    )
    assert 2_000 < dark < 30_000, "the stroke is seen on the canvas"
    explorer.get_by_label("LoRA on").press("Space")
    shows(pad, "LoRA off · rank 1 · α 1 · your drawing · ")
    explorer.get_by_label("LoRA on").press("Space")
    slider(explorer, 0).press("ArrowRight")
    shows(pad, "LoRA on · rank 2 · α 1 · your drawing · ")
    pad.get_by_label("your drawing").fill("7")
    pad.get_by_label("your drawing").press("Enter")
    shows(pad, "LoRA on · rank 2 · α 1 · test image 7, a ")
    press_arrow(pad.get_by_role("spinbutton"), up=True)
    shows(pad, "LoRA on · rank 2 · α 1 · test image 8, a ")
    for act in (lambda button: button.press("Enter"), lambda button: button.click()):
        stroke((150, 50), (150, 200))
        shows(pad, "LoRA on · rank 2 · α 1 · your drawing · ")
        act(pad.get_by_role("button", name="clear"))
        shows(pad, "LoRA on · rank 2 · α 1 · nothing drawn yet")


def test_repaired_and_broken_images_one_after_the_other(pad):
    answers = re.compile(r"test image (\d+), a (\d) · the base says (\d) .* now (\d) ")
    seen = set()
    for name, act in 2 * [("next repaired", lambda b: b.press("Enter")), ("next broken", lambda b: b.click())]:
        before = pad.locator("output").inner_text()
        act(pad.get_by_role("button", name=name))
        expect(pad.locator("output")).not_to_have_text(before)
        expect(pad.locator("output")).to_have_text(answers)
        image, digit, base, now = answers.search(pad.locator("output").inner_text()).groups()
        assert (now if name == "next repaired" else base) == digit and base != now
        seen.add(image)
    assert len(seen) == 4


def test_latency_is_measured_and_printed(explorer, page):
    """No bound: machines differ. On two cores the sample is to answer in 0.5 s when it trains, 0.15 s when it remembers."""
    rank, switch = slider(explorer, 0), explorer.get_by_label("LoRA on")
    field = explorer.get_by_label("seed")
    field.fill("21")
    field.press("Enter")
    expect(explorer.locator("output")).to_have_text(re.compile("seed 21, just trained"), timeout=20_000)
    times = {"trained": [], "remembered": [], "switched": []}
    for _ in range(6):  # as far as rank 64
        times["trained"].append(milliseconds(page, explorer, lambda: rank.press("ArrowRight")))
        time.sleep(0.3)
    for key in 3 * ["ArrowLeft", "ArrowRight"]:
        times["remembered"].append(milliseconds(page, explorer, lambda: rank.press(key)))
        time.sleep(0.3)
        times["switched"].append(milliseconds(page, explorer, lambda: switch.press("Space")))
        time.sleep(0.3)
    for kind, values in times.items():
        print(f"\n{kind}: {[round(value) for value in values]} ms from key to picture", end="")
    assert all(values and min(values) > 0 for values in times.values())


def test_all_is_readable_in_the_dark(explorer, page):
    for theme, light in (("JupyterLab Dark", "false"), ("JupyterLab Light", "true")):
        page.get_by_text("Settings", exact=True).first.click()
        page.get_by_text("Theme", exact=True).click()
        page.get_by_text(theme, exact=True).click()
        page.locator(f"body[data-jp-theme-light={light}]").wait_for(state="attached")
        page.locator("#jupyterlab-splash").wait_for(state="detached")
        for number in range(4):
            contrast = other_panel(page, number).evaluate(CONTRAST)
            print(f"\n{theme}, panel {number}: contrast at least {contrast:.1f}", end="")
            assert contrast >= 4.5
        explorer.get_by_label("LoRA on").press("Space")
        shows(explorer, "LoRA off" if light == "false" else "LoRA on")
        if SCREENSHOTS:
            explorer.evaluate("panel => panel.scrollIntoView({block: 'center'})")
            page.screenshot(path=f"{SCREENSHOTS}/{theme.split()[-1]}.png")
