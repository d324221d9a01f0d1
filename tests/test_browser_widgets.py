"""The widgets as a reader meets them: JupyterLab and Chromium, keyboard and mouse."""

import os
import re
import statistics
import time

import pytest
from browser import browser, lab, run, run_all, shows, slider, write_notebook  # noqa: F401  (fixtures)
from playwright.sync_api import Locator, Page, expect

SCREENSHOTS = os.environ.get("LORA_SCREENSHOTS")  # a folder
CELLS = (
    """from ipykernel.comm.comm import BaseComm
# ipykernel 7.4 keeps a move until the cell is done; 7.0 to 7.3 hear it at once, on another thread. As those:
BaseComm._reply_subshell_for = lambda comm, data, default: default
from lora_helpers import *
mnist, base = load_mnist(), pretrained_base()
explorer = LoRAExplorer(base, mnist)
explorer""",
    "DigitPad(explorer)",
    "ParametrizationInspector()",
    "ScalingLab(base, mnist)",
    "pass  # beside the moves",
)
BUSY = """\
# beside the moves
import threading, time
net, nines, heard = freeze_base(add_lora(pretrained_base(), rank=4)), only_digit(mnist.train, 9), []
explorer.observe(lambda change: heard.append(threading.current_thread() is threading.main_thread()), "result")
start = time.monotonic()
while len(heard) < 6 and time.monotonic() - start < 120:
    train(net, nines, max_batches=5, progress=False)
    time.sleep(0.01)
print("heard beside the cell:", len(heard), "on the main thread:", sum(heard))"""
AGAIN = """\
# beside the moves
print("as before:", explorer.result.off.wrong_counts == evaluate(base, mnist.test).wrong_counts)"""
START = "LoRA on · rank 1 · α 1 · 100 batches of digit 9 · "
# Resolves to the milliseconds from the next key to the next frame after the panel's picture has changed.
STOPWATCH = """panel => { window.moved = new Promise(done => {
    let start;
    addEventListener("keydown", () => start ??= performance.now(), {once: true, capture: true});
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
# Notes the summaries that come after the next key is let go.
LATER = """panel => { window.later = null;
    addEventListener("keyup", () => window.later = [], {once: true, capture: true});
    new MutationObserver(() => window.later?.push(panel.querySelector("output").textContent)).observe(
        panel.querySelector("output").parentNode, {childList: true, subtree: true, characterData: true}) }"""
# The least contrast between text and what lies behind it, of all elements of the panel that hold text.
CONTRAST = """panel => {
    const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const share = [0.2126, 0.7152, 0.0722];
    const light = color => color.reduce((sum, c, i) => sum + linear(c / 255) * share[i], 0);
    const parse = text => text.match(/[0-9.]+/g).map(Number);
    const behind = element => {
        const color = parse(getComputedStyle(element).backgroundColor);
        const opaque = color.length == 3 || color[3] > 0.5 || !element.parentElement;
        return opaque ? color : behind(element.parentElement);
    };
    const speaks = e => e.offsetWidth && (e.matches("input, select") ||
        [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()));
    return Math.min(...[...panel.querySelectorAll("*")].filter(speaks).map(e => {
        const pair = [parse(getComputedStyle(e).color), behind(e)].map(color => light(color.slice(0, 3)));
        return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    }));
}"""
SCROLLBARS = """panel => [...panel.querySelectorAll("*")].filter(e =>
    /auto|scroll/.test(getComputedStyle(e).overflow) && e.clientWidth &&
    (e.scrollWidth > e.clientWidth || e.scrollHeight > e.clientHeight)).map(e => e.className)"""
DARK = """canvas => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
    .filter((value, i) => i % 4 == 0 && value < 128).length"""


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """A folder with one notebook that makes the four panels."""
    folder = tmp_path_factory.mktemp("served")
    write_notebook(folder / "panels.ipynb", CELLS)
    return folder


@pytest.fixture(scope="module")
def page(lab, browser):  # noqa: F811
    """The notebook of panels with all its cells run."""
    page = run_all(lab, browser, "panels.ipynb", height=1000)
    page.locator(".lora-panel").nth(3).wait_for(timeout=180_000)
    yield page
    page.close()


def panel_of(page: Page, number: int) -> Locator:
    panel = page.locator(".lora-panel").nth(number)
    panel.evaluate("panel => panel.scrollIntoView({block: 'center'})")
    return panel


@pytest.fixture
def explorer(page):
    panel = panel_of(page, 0)
    panel.get_by_role("button", name="rank 1, α 1").click()
    shows(panel, START)
    yield panel
    assert not page.errors


def press_arrow(field: Locator, up: bool) -> None:
    """Clicks on one of the two arrows in a field for numbers."""
    box = field.bounding_box()
    field.page.mouse.click(box["x"] + box["width"] - 9, box["y"] + box["height"] * (1 / 4 if up else 3 / 4))


def drag_to_the_end(panel: Locator, number: int) -> None:
    handle, track = (
        slider(panel, number).bounding_box(),
        panel.locator(".noUi-base").nth(number).bounding_box(),
    )
    mouse = panel.page.mouse
    mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    mouse.down()
    mouse.move(track["x"] + track["width"], handle["y"], steps=5)
    mouse.up()


def type_into(panel: Locator, label: str, text: str) -> None:
    panel.get_by_label(label, exact=True).fill(text)
    panel.get_by_label(label, exact=True).press("Enter")


def milliseconds(panel: Locator, control: Locator, key: str) -> float:
    """From the key to the new picture on the screen."""
    panel.evaluate(STOPWATCH)
    control.press(key)
    taken = panel.page.evaluate("() => window.moved")
    time.sleep(0.3)
    return taken


def test_the_explorer_by_keyboard(explorer):
    for number, key, start in (
        (0, "ArrowRight", "LoRA on · rank 2 · α 1 · 100 batches of digit 9 · "),
        (1, "ArrowRight", "LoRA on · rank 2 · α 2 · 100 batches of digit 9 · "),
        (2, "ArrowLeft", "LoRA on · rank 2 · α 2, strength 0.7 · 100 batches of digit 9 · "),
        (2, "ArrowRight", "LoRA on · rank 2 · α 2 · 100 batches of digit 9 · "),
        (3, "ArrowLeft", "LoRA on · rank 2 · α 2 · 70 batches of digit 9 · "),
        (4, "ArrowRight", "LoRA on · rank 2 · α 2 · 70 batches of digit 9 with 10% others · "),
    ):
        slider(explorer, number).press(key)
        shows(explorer, start)
    on = explorer.locator("output").inner_text()
    explorer.get_by_label("LoRA on").press("Space")
    shows(explorer, "LoRA off · rank 2 · α 2 · ")
    assert "(±0)" in explorer.locator("output").inner_text() and "(±0)" not in on
    explorer.get_by_label("LoRA on").press("Space")
    for label, text in (("rank r", "6"), ("α", "0.5"), ("seed", "3")):
        type_into(explorer, label, text)
    for label, key in (("batches", "5"), ("others", "Home"), ("learn digit", "ArrowDown")):
        explorer.get_by_label(label).press(key)
    shows(explorer, "LoRA on · rank 6 · α 0.5 · 5 batches of digit 8 · ")
    expect(explorer.locator("output")).to_have_text(re.compile("seed 3, "), timeout=60_000)
    expect(explorer.get_by_text("✓ LoRA off = base, to the bit")).to_be_visible()
    expect(explorer.get_by_text("✗")).to_have_count(0)
    explorer.get_by_role("button", name="no scaling").press("Enter")
    shows(explorer, "LoRA on · rank 6 · α 6 · 5 batches of digit 8 · ")
    explorer.get_by_role("button", name="rehearse").press("Enter")
    shows(explorer, "LoRA on · rank 1 · α 1 · 100 batches of digit 9 with 50% others · ")


def test_the_explorer_by_mouse(explorer):
    for number, start in enumerate((
        "LoRA on · rank 64 · α 1 · ",
        "LoRA on · rank 64 · α 64 · 100 batches of digit 9 · ",
        "LoRA on · rank 64 · α 64, strength 1.5 · 100 batches of digit 9 · ",
        "LoRA on · rank 64 · α 64, strength 1.5 · 300 batches of digit 9 · ",
        "LoRA on · rank 64 · α 64, strength 1.5 · 300 batches of digit 9 with 80% others · ",
    )):  # fmt: skip
        drag_to_the_end(explorer, number)
        shows(explorer, start)
    assert explorer.evaluate(SCROLLBARS) == []
    for label in ("learn digit", "rank r", "α"):
        press_arrow(explorer.get_by_label(label, exact=True), up=False)
    explorer.get_by_label("batches").select_option("5")
    explorer.get_by_label("others").select_option("0%")
    explorer.get_by_label("strength").select_option("1.0")
    seed = int(explorer.get_by_label("seed").input_value())
    press_arrow(explorer.get_by_label("seed"), up=True)
    shows(explorer, "LoRA on · rank 63 · α 63.9375 · 5 batches of digit 8 · ")
    expect(explorer.locator("output")).to_have_text(re.compile(f"seed {seed + 1}, "), timeout=60_000)
    explorer.get_by_label("LoRA on").click()
    shows(explorer, "LoRA off · rank 63 · ")
    for name, start in (
        ("rank 1, α 1", START),
        ("no scaling", START),
        ("rehearse", "LoRA on · rank 1 · α 1 · 100 batches of digit 9 with 50% others · "),
    ):
        explorer.get_by_role("button", name=name).click()
        shows(explorer, start)


def test_the_inspector_by_keyboard_and_mouse(page):
    inspector = panel_of(page, 2)
    for number, start in enumerate(("LoRA on · rank 2 · α 1 · ", "LoRA on · rank 2 · α 2 · ")):
        slider(inspector, number).press("ArrowRight")
        shows(inspector, start)
    type_into(inspector, "steps", "80")
    expect(inspector.locator("output")).to_have_text(re.compile("after 80 steps$"))
    slider(inspector, 2).press("ArrowRight")
    expect(inspector.locator("output")).to_have_text(re.compile("after 90 steps$"))
    type_into(inspector, "rank r", "9")
    expect(inspector.get_by_role("alert")).to_have_text("rank r must be from 1 to 4, so 9 was not taken.")
    expect(inspector.get_by_label("rank r")).to_have_value("2")
    for label, text in (("rank r", "3"), ("α", "0.5")):
        type_into(inspector, label, text)
    shows(inspector, "LoRA on · rank 3 · α 0.5 · ")
    for label in ("rank r", "α", "steps"):
        press_arrow(inspector.get_by_label(label, exact=True), up=False)
    expect(inspector.locator("output")).to_have_text(
        re.compile("after 89 steps$")
    )  # the last of the three moves
    shows(inspector, "LoRA on · rank 2 · α 0.4375 · ")
    for number in range(3):
        drag_to_the_end(inspector, number)
    expect(inspector.locator("output")).to_have_text(re.compile("after 200 steps$"))
    assert inspector.evaluate(SCROLLBARS) == []
    inspector.get_by_label("LoRA on").press("Space")
    shows(inspector, "LoRA off · rank 4 · α 16 · α/r 4 · the weight is W, to the bit · ")
    inspector.get_by_label("LoRA on").click()
    shows(inspector, "LoRA on · rank 4 · α 16 · ")
    assert not page.errors


def test_the_scaling_lab_by_keyboard_and_mouse(page):
    lab = panel_of(page, 3)  # noqa: F811
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
    lab.get_by_role("button", name="α", exact=True).click()
    shows(lab, "LoRA on · rank 16 · α 2 · scale α = 2 · ")
    type_into(lab, "α", "0.5")
    shows(lab, "LoRA on · rank 16 · α 0.5 · ")
    assert lab.evaluate(SCROLLBARS) == [] and not page.errors


def test_a_digit_is_drawn_by_mouse_and_images_are_picked(explorer, page):
    pad = panel_of(page, 1)

    def stroke(*points):
        canvas = pad.locator("canvas").first.bounding_box()
        page.mouse.move(canvas["x"] + points[0][0], canvas["y"] + points[0][1])
        page.mouse.down()
        for x, y in points[1:]:
            page.mouse.move(canvas["x"] + x, canvas["y"] + y, steps=8)
        page.mouse.up()

    stroke(
        (190, 70), (150, 50), (110, 80), (110, 120), (150, 140), (185, 110), (190, 70), (185, 160), (170, 240)
    )
    shows(pad, "LoRA on · rank 1 · α 1 · your drawing · the base says ")
    dark = pad.locator("canvas").first.evaluate(DARK)
    assert 2_000 < dark < 30_000, "the stroke is seen on the canvas"
    explorer.get_by_label("LoRA on").press("Space")
    shows(pad, "LoRA off · rank 1 · α 1 · your drawing · ")
    explorer.get_by_label("LoRA on").press("Space")
    slider(explorer, 0).press("ArrowRight")
    shows(pad, "LoRA on · rank 2 · α 1 · your drawing · ")
    type_into(pad, "test image", "7")
    shows(pad, "LoRA on · rank 2 · α 1 · test image 7, a 9 · ")
    press_arrow(pad.get_by_role("spinbutton"), up=True)
    shows(pad, "LoRA on · rank 2 · α 1 · test image 8, a 5 · ")
    panel_of(page, 1)
    stroke((150, 50), (150, 200))
    shows(pad, "LoRA on · rank 2 · α 1 · your drawing · ")
    pad.get_by_role("button", name="clear").press("Enter")
    shows(pad, "LoRA on · rank 2 · α 1 · nothing drawn yet")
    pad.get_by_role("button", name="show").click()
    shows(pad, "LoRA on · rank 2 · α 1 · test image 8, a 5 · ")
    answers = re.compile(r"test image \d+, a (\d) · the base says (\d) .* now (\d) ")
    for name, right in (("next repaired", 3), ("next broken", 2)):
        before = pad.locator("output").inner_text()
        pad.get_by_role("button", name=name).press("Enter")
        expect(pad.locator("output")).not_to_have_text(before)
        found = answers.search(pad.locator("output").inner_text())
        assert found[1] == found[right] and found[2] != found[3]
    box, answer = pad.locator("canvas").first.bounding_box(), pad.locator("img").bounding_box()
    assert answer["x"] > box["x"] + box["width"] and pad.bounding_box()["height"] < 600, (
        "on one screen, side by side"
    )


@pytest.mark.parametrize("control, key", [("rank", "ArrowRight"), ("seed", "ArrowUp")])
def test_a_key_held_down_queues_no_work(explorer, control, key):
    """At most the training under way at key-up is finished, and one more for where the key was let go."""
    seed = {"rank": "1100", "seed": "1200"}[control]  # every setting from here on must be trained
    type_into(explorer, "seed", seed)
    expect(explorer.locator("output")).to_have_text(re.compile(f"seed {seed}, just trained"), timeout=60_000)
    explorer.evaluate(LATER)
    held = slider(explorer, 0) if control == "rank" else explorer.get_by_label("seed")
    held.focus()
    for _ in range(20):
        explorer.page.keyboard.down(key)  # again and again without letting go, as a keyboard repeats
        time.sleep(0.03)
    explorer.page.keyboard.up(key)
    value = explorer.get_by_label("seed").input_value()
    settled = re.compile("^LoRA on · rank 64 .* seed 1100, " if control == "rank" else f" seed {value}, ")
    assert control == "rank" or int(value) >= 1210, "the key did repeat"
    expect(explorer.locator("output")).to_have_text(settled, timeout=60_000)
    time.sleep(2)
    expect(explorer.locator("output")).to_have_text(settled, timeout=60_000)
    trained = {text for text in explorer.page.evaluate("() => window.later") if text.endswith("just trained")}
    assert len(trained) <= 2


def test_nothing_jumps(explorer, page):
    explorer.evaluate(WATCH)
    rank, switch = slider(explorer, 0), explorer.get_by_label("LoRA on")
    moves = ((rank, "ArrowRight", "on · rank 2"), (switch, "Space", "off · rank 2"))
    back = ((switch, "Space", "on · rank 2"), (rank, "ArrowLeft", "on · rank 1"))
    for control, key, text in moves + back:
        control.press(key)
        shows(explorer, f"LoRA {text} · ")
        time.sleep(0.2)
    frames, places = page.evaluate("() => [window.frames_seen, [...window.places]]")
    assert frames > 20 and len(places) == 1, places
    assert float(places[0].split()[2]) >= 1000


@pytest.mark.slow
def test_moves_are_as_quick_beside_a_running_cell_and_after_it(explorer, page):
    """The times are printed. The bound is loose, because a test shares its machine with others."""
    rank, switch = slider(explorer, 0), explorer.get_by_label("LoRA on")
    type_into(explorer, "seed", "21")
    expect(explorer.locator("output")).to_have_text(re.compile("seed 21, "), timeout=60_000)
    times = {"trained": [milliseconds(explorer, rank, "ArrowRight") for _ in range(6)]}  # as far as rank 64
    times["remembered"] = [milliseconds(explorer, rank, key) for key in 3 * ["ArrowLeft", "ArrowRight"]]
    times["switched"] = [milliseconds(explorer, switch, "Space") for _ in range(6)]
    said = run(page, "# beside the moves", BUSY)
    time.sleep(2)
    times["switched beside a cell"] = [milliseconds(explorer, switch, "Space") for _ in range(6)]
    expect(said).to_contain_text("heard beside the cell: 6 on the main thread: 0", timeout=130_000)
    times["switched after it"] = [milliseconds(explorer, switch, "Space") for _ in range(6)]
    type_into(explorer, "seed", "22")
    expect(explorer.locator("output")).to_have_text(re.compile("seed 22, "), timeout=60_000)
    times["trained after it"] = [milliseconds(explorer, rank, "ArrowLeft") for _ in range(6)]
    for kind, values in times.items():
        print(f"\n{kind}: {[round(value) for value in values]} ms from key to picture", end="")
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    assert medians["switched after it"] < 5 * medians["switched"] + 500
    assert medians["trained after it"] < 5 * medians["trained"] + 500
    expect(run(page, "# beside the moves", AGAIN)).to_contain_text("as before: True", timeout=60_000)


def test_all_is_readable_in_the_dark(explorer, page):
    for theme, light in (("JupyterLab Dark", "false"), ("JupyterLab Light", "true")):
        page.get_by_text("Settings", exact=True).first.click()
        page.get_by_text("Theme", exact=True).click()
        page.get_by_text(theme, exact=True).click()
        page.locator(f"body[data-jp-theme-light={light}]").wait_for(state="attached")
        page.locator("#jupyterlab-splash").wait_for(state="detached")
        for number in range(4):
            assert panel_of(page, number).evaluate(CONTRAST) >= 4.5, (theme, number)
            if SCREENSHOTS:
                page.screenshot(path=f"{SCREENSHOTS}/{theme.split()[-1]}_{number}.png")
