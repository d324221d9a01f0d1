"""The explorer's page as a learner meets it: a file in Chromium without network, by keyboard and finger."""

import re
from itertools import product

import pytest
import torch
from browser import browser  # noqa: F401  (fixture)
from playwright.sync_api import expect
from test_widgets_digit_pad import NINE, RING
from test_widgets_panel import some  # noqa: F401  (fixture)

from lora_helpers import FineTuner, LoRAExplorer, Setting, as_mnist, pretrained_base
from lora_helpers.data import MEAN, STD
from lora_helpers.experiments import RULES
from lora_helpers.widgets.explorer_picture import summarise
from lora_helpers.widgets.page import BATCHES, RANKS, STRENGTHS, save_page

FEW = (1, 4, 64), (0, 20, 100), (0.0, 0.5, 1.0)
START = "LoRA on · rank 1 · α 1 · 100 batches of digit 9 · "
FIGURES = """state => { const f = figures(state); return {
    summary: summarise(state, f), repaired: f.repaired, broken: f.broken,
    off: f.off.confusion, now: f.now.confusion, wrong: f.now.wrong} }"""
PROBABILITIES = """async ([state, images]) => {
    const adapter = await adapterOf(state), both = [[null, 0], [adapter, scaleOf(state)]];
    return images.map(image => both.map(own => forward(Float32Array.from(image), ...own))); }"""
# The least contrast between text and what lies behind it, where colours that let others through are mixed.
CONTRAST = """() => {
    const parse = text => [...text.match(/[0-9.]+/g).map(Number), 1].slice(0, 4);
    const mix = (over, under) => under.map((v, i) => over[3] * over[i] + (1 - over[3]) * v);
    const behind = e => !e ? [255, 255, 255, 1] :
        mix(parse(getComputedStyle(e).backgroundColor), behind(e.parentElement));
    const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const light = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]) + 0.05;
    const speaks = e => e.offsetWidth && (e.matches("[type=number]") ||
        [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()));
    return Math.min(...[...document.body.querySelectorAll("*")].filter(speaks).map(e => {
        const pair = [light(parse(getComputedStyle(e).color)), light(behind(e))];
        return Math.max(...pair) / Math.min(...pair); }));
}"""
# Controls without a name, or too small for a finger (24 pixels, WCAG 2.2, 2.5.8).
POOR = """() => [...document.querySelectorAll("button, input")].filter(e => {
    const box = (e.closest("label") ?? e).getBoundingClientRect();
    const name = e.ariaLabel || [...e.labels ?? []].map(l => l.textContent).join("") || e.textContent;
    return !name.trim() || box.width < 24 || box.height < 24; }).map(e => e.outerHTML)"""


@pytest.fixture(scope="module")
def tuner(some):  # noqa: F811
    return FineTuner(pretrained_base(), some)


@pytest.fixture(scope="module")
def file(tuner, tmp_path_factory):
    path, (ranks, batches, strengths) = tmp_path_factory.mktemp("page") / "explorer.html", FEW
    return save_page(
        path, tuner, Setting(), ranks=ranks, batches=batches, strengths=strengths, progress=False
    )


@pytest.fixture
def open_file(browser):  # noqa: F811
    """Opens a file as a double click does, the network cut; fails on errors and on anything fetched."""
    contexts, troubles = [], []

    def open_it(path, **look):
        contexts.append(browser.new_context(**look))
        contexts[-1].set_offline(True)
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text))
        page.on("request", lambda request: request.url == path.as_uri() or troubles.append(request.url))
        page.goto(path.as_uri())
        expect(page.locator("#page")).to_be_visible(timeout=30_000)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not troubles


@pytest.fixture
def page(open_file, file):
    return open_file(file, viewport={"width": 1280, "height": 720})


def states(ranks, batches, strengths, seed):
    for rank, rule, stop, strength, on in product(ranks, RULES, batches, strengths, (True, False)):
        yield Setting(rank=rank, rule=rule, batches=stop, strength=strength, seed=seed), on


def as_state(setting, on=True):
    names = ("rank", "rule", "batches", "strength")
    return {"on": on} | {name: getattr(setting, name) for name in names}


def differing(page, tuner, ranks, batches, strengths, seed=0):
    """The states in which a figure of the page is not that of the live engine; and how many were compared."""
    wrong, count = [], 0
    for setting, on in states(ranks, batches, strengths, seed):
        result, _ = tuner.run(setting)
        now = result.on if on else result.off
        rule = "" if setting.rule == "α/r" else f", scale {setting.rule}"
        alpha = "α 1" if setting.strength == 1 else f"α 1, strength {setting.strength:g}"
        expected = {
            "summary": summarise(result, on).replace(f"{alpha} ·", f"{alpha}{rule} ·"),
            "repaired": result.repaired.tolist(),
            "broken": result.broken.tolist(),
            "off": result.off.confusion.tolist(),
            "now": now.confusion.tolist(),
            "wrong": now.wrong_counts,
        }
        count += 1
        if page.evaluate(FIGURES, as_state(setting, on)) != expected:
            wrong.append((setting, on))
    return wrong, count


def test_every_figure_of_every_state_is_the_live_engines(page, some):  # noqa: F811
    wrong, count = differing(page, FineTuner(pretrained_base(), some), *FEW)
    assert not wrong and count == 3 * 3 * 3 * 3 * 2


@pytest.mark.slow
def test_every_figure_of_the_page_that_is_given_away_is_the_live_engines(open_file, mnist, tmp_path):
    """The page that the command makes."""
    page = open_file(
        save_page(tmp_path / "explorer.html", FineTuner(pretrained_base(), mnist), Setting(seed=2))
    )
    wrong, count = differing(page, FineTuner(pretrained_base(), mnist), RANKS, BATCHES, STRENGTHS, 2)
    assert not wrong and count == 7 * 3 * 4 * 5 * 2


def test_what_is_seen_is_what_the_explorer_shows(page, some):  # noqa: F811
    explorer = LoRAExplorer(pretrained_base(), some, rank=4, batches=20, strength=0.5)
    page.get_by_label("rank r").press("ArrowRight")
    page.get_by_label("batches").press("ArrowLeft")
    page.get_by_label("strength").press("ArrowLeft")
    summary = explorer.summary.removesuffix(f", {explorer.origin}")
    expect(page.locator("#summary")).to_have_text(summary)
    rows = page.locator("#wrong tr").all_inner_texts()
    off, on = explorer.result.off.wrong_counts, explorer.result.on.wrong_counts
    assert [row.split("\t")[1:] for row in rows[2:4]] == [[f"{n}" for n in counts] for counts in (off, on)]
    heights = page.locator("#wrong i").evaluate_all("bars => bars.map(bar => parseFloat(bar.style.height))")
    top = explorer._picture._top
    assert heights == pytest.approx(
        [100 * min(n, top) / top for pair in zip(off, on) for n in pair], abs=0.01
    )
    expect(page.locator("#repaired_title")).to_have_text(f"repaired by LoRA: {len(explorer.result.repaired)}")
    first = explorer.result.repaired[0].item()
    button = page.locator("#repaired button").first
    expect(button).to_have_attribute("aria-label", re.compile(f" → 9: test image {first}, a 9\\. "))


def test_by_keyboard(page):
    said = page.locator("#summary")
    expect(said).to_have_text(re.compile("^" + START))
    on = said.inner_text()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(said).to_have_text(re.compile("^LoRA off · .*(±0).*(±0)"))
    expect(page.locator("#answer")).to_have_text(re.compile("^LoRA off · test image "))
    page.keyboard.press("Space")
    expect(said).to_have_text(on)
    page.keyboard.press("Tab")
    page.keyboard.press("End")
    expect(said).to_have_text(re.compile("^LoRA on · rank 64 · α 1 · "))
    page.get_by_label("α/√r").press("ArrowRight")
    expect(said).to_have_text(re.compile("^LoRA on · rank 64 · α 1, scale α · "))
    page.get_by_role("spinbutton").fill("7")
    page.get_by_role("spinbutton").press("Enter")
    expect(page.locator("#answer")).to_have_text(re.compile("^LoRA on · test image 7, a 9 · the base says "))
    for kind in ("repaired", "broken"):
        page.get_by_role("button", name=f"next {kind}").press("Enter")
        expect(page.locator("#answer")).to_have_text(re.compile(r"test image (?!7,)\d+, a \d · "))
        answers = re.search(r"a (\d) · the base says (\d) .* now (\d) ", page.locator("#answer").inner_text())
        assert answers[1] == answers[3 if kind == "repaired" else 2] and answers[2] != answers[3]
    page.get_by_role("button", name="clear").press("Enter")
    expect(page.locator("#answer")).to_have_text(re.compile("nothing drawn yet"))


def test_the_pad_computes_what_pytorch_computes(page, tuner):
    images = tuner.mnist.test.tensors[0][::50]
    inks = [*(images * STD + MEAN).flatten(1).tolist(), page.evaluate("s => [...asMnist(s)]", NINE)]
    normal = (torch.tensor(inks).view(-1, 1, 28, 28) - MEAN) / STD
    for rank, rule, strength in ((1, "α/r", 1), (4, "α/√r", 0.5), (64, "α", 1), (64, "α/r", 1)):
        setting = Setting(rank=rank, rule=rule, strength=strength)
        found = torch.tensor(page.evaluate(PROBABILITIES, [as_state(setting), inks]))
        for own, true in zip(found.unbind(1), tuner.probabilities(setting, normal)):
            assert torch.allclose(own, true, atol=0.005), setting


@pytest.mark.parametrize(
    "strokes", [NINE, [RING], [[(10, 10), (10, 200)]], [[(0, 0), (260, 20)]], [[(5, 5)]]]
)
def test_a_drawing_becomes_the_same_image_as_in_the_digit_pad(page, strokes):
    ink = torch.tensor(page.evaluate("strokes => [...asMnist(strokes)]", strokes))
    difference = (ink - (as_mnist(strokes) * STD + MEAN).flatten()).abs()
    assert difference.max() < 0.15 and difference.mean() < 0.01


def test_a_finger_draws_a_nine_on_a_phone_and_both_networks_answer(open_file, file):
    page = open_file(file, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    pad = page.locator("#pad")
    pad.scroll_into_view_if_needed()
    box, touch = pad.bounding_box(), page.context.new_cdp_session(page)
    scrolled = page.evaluate("scrollY")
    for stroke in NINE:
        for n, (x, y) in enumerate(stroke):
            point = {"x": box["x"] + x * box["width"] / 280, "y": box["y"] + y * box["height"] / 280}
            kind = "touchMove" if n else "touchStart"
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    said = page.locator("#answer")
    expect(said).to_have_text(re.compile(r"^LoRA on · your drawing · the base says \d .* now 9 "))
    assert page.evaluate("scrollY") == scrolled, "drawing does not scroll the page"
    shown = page.locator("#seen").evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, 28, 28).data].filter((_, i) => i % 4 == 0)"
    )
    ink = 1 - torch.tensor(shown) / 255
    assert (ink - (as_mnist(NINE) * STD + MEAN).flatten()).abs().mean() < 0.02
    page.get_by_role("switch").tap()
    expect(said).to_have_text(re.compile(r"^LoRA off · your drawing · the base says (\d \(\d+%\)) · now \1$"))
    page.get_by_role("button", name="clear").tap()
    expect(said).to_have_text(re.compile("nothing drawn yet"))


@pytest.mark.parametrize("height", [553, 640, 740])  # of small phones, their browser's bars left out
def test_switch_pad_and_answer_are_on_one_screen_of_a_phone(open_file, file, height):
    page = open_file(file, viewport={"width": 360, "height": height}, has_touch=True, is_mobile=True)
    page.locator("#answer").evaluate("answer => answer.scrollIntoView({block: 'end'})")
    controls, pad, answer = (page.locator(id).bounding_box() for id in ("#controls", "#pad", "#answer"))
    assert 0 <= controls["y"] and controls["y"] + controls["height"] <= pad["y"]
    assert answer["y"] + answer["height"] <= height + 1


@pytest.mark.parametrize("width, height", [(360, 740), (1280, 720), (1920, 1080)])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_is_readable_and_in_reach(open_file, file, width, height, theme):
    page = open_file(file, viewport={"width": width, "height": height}, color_scheme=theme)
    assert page.evaluate(CONTRAST) >= 4.5 and page.evaluate(POOR) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out sideways"
    if width > 1000:
        for part in ("#summary", "#wrong", "#pad", "#probabilities"):
            box = page.locator(part).bounding_box()
            assert box["y"] + box["height"] <= height, f"{part} is on the first screen"


def test_an_old_browser_says_that_it_is_too_old(browser, file):  # noqa: F811
    page = browser.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(file.as_uri())
    expect(page.locator("#page")).to_be_hidden()
    expect(page.locator("#summary")).to_have_text(re.compile("^This page cannot be shown .* newer browser"))
    page.close()


def test_a_second_finger_the_other_button_and_the_edge_do_no_harm(page):
    page.get_by_role("button", name="clear").click()
    box = page.locator("#pad").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 20, box["y"] + 600)  # past the edge
    page.evaluate("() => pad.dispatchEvent(new PointerEvent('pointerup', {isPrimary: false}))")
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.up()
    page.mouse.down(button="right")
    page.mouse.up(button="right")
    strokes = page.evaluate("strokes")
    assert len(strokes) == 1 and len(strokes[0]) == 3 and strokes[0][1][1] == 280
