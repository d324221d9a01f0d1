"""The course as a learner meets it: a guess, an exercise and the quiz in JupyterLab and Chromium, by keyboard."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell
from playwright.sync_api import Page, expect
from test_browser_widgets import browser, lab, open_notebook, without_outputs  # noqa: F401  (fixtures)

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SCREENSHOT = os.environ.get("LORA_SCREENSHOT")
ORDER = "the fours > the sevens > the zeros"
REVEAL = 'pays_guess.reveal(["the sevens", "the fours", "the zeros"])'


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """A folder with notebook 1, its outputs left out so that all that is seen is new, and a ranking from notebook 4."""
    folder, read = tmp_path_factory.mktemp("served"), lambda name: nbformat.read(NOTEBOOKS / name, as_version=4)
    notebook = read("1_mlp.ipynb")
    rankings = [cell.source for cell in read("4_digit_9.ipynb").cells if "= PredictRanking(" in cell.source]
    notebook.cells += [new_code_cell("from lora_helpers import PredictRanking\n" + rankings[0]), new_code_cell(REVEAL)]
    nbformat.write(without_outputs(notebook), folder / "1_mlp.ipynb")
    return folder


@pytest.fixture(scope="module")
def notebook_1(lab, browser):  # noqa: F811
    """Notebook 1 with its imports run; each test runs the cells that it is about."""
    page = open_notebook(lab, browser, "1_mlp.ipynb", height=1400)
    expect(run(page, "from lora_helpers.course import mlp")).to_contain_text("Mnist(", timeout=60_000)
    yield page
    page.close()
    assert not page.errors


def cell(page: Page, source: str):
    found = page.locator(".jp-CodeCell", has=page.locator(".cm-content", has_text=source)).first
    found.scroll_into_view_if_needed(timeout=20_000)
    return found


def run(page: Page, source: str, replacement: str | None = None):
    found = cell(page, source)
    found.locator(".cm-content").click()
    if replacement is not None:
        page.keyboard.press("ControlOrMeta+A")
        page.keyboard.insert_text(replacement)
    page.keyboard.press("ControlOrMeta+Enter")
    return found.locator(".jp-OutputArea").first


def test_a_choice_is_guessed_by_keyboard_and_revealed(notebook_1):
    prediction = run(notebook_1, "largest = PredictChoice").locator(".lora-prediction")
    skipped = run(notebook_1, "largest.reveal(")
    expect(skipped).to_contain_text("measured")
    expect(skipped).not_to_contain_text("your guess")
    radios = prediction.get_by_role("radio")
    radios.first.focus()
    radios.first.press("Space")
    radios.first.press("Tab")
    notebook_1.keyboard.press("Space")
    expect(radios.nth(1)).to_be_checked()
    expect(prediction.locator("output")).to_contain_text("Your guess: linear2")
    prediction.get_by_role("button", name="Keep this guess").press("Enter")
    expect(prediction.locator("output")).to_contain_text("Kept: linear2")
    expect(radios.first).to_be_disabled()
    revealed = run(notebook_1, "largest.reveal(")
    expect(revealed).to_contain_text("your guess")
    expect(revealed).to_contain_text("You had it.")


def test_a_number_is_guessed_by_slider_and_by_typing(notebook_1):
    prediction = run(notebook_1, "accuracy_guess = PredictNumber").locator(".lora-prediction")
    field = prediction.get_by_label("my guess")
    prediction.get_by_role("slider").press("ArrowRight")
    expect(field).to_have_value("11")
    field.fill("88")
    field.press("Enter")
    expect(prediction.locator("output")).to_contain_text("Your guess: 88")
    revealed = run(notebook_1, "accuracy_guess.reveal(", "accuracy_guess.reveal(92.5)")
    expect(revealed).to_contain_text(re.compile("your guess.*88.*measured.*92.5.*Close", re.S))


def test_a_ranking_is_guessed(notebook_1):
    prediction = run(notebook_1, "= PredictRanking(").locator(".lora-prediction")
    radios = prediction.get_by_role("radio")
    expect(radios).to_have_count(9)
    for place in range(3):  # the nth name in the nth column
        radios.nth(4 * place).focus()
        notebook_1.keyboard.press("Space")
        expect(radios.nth(4 * place)).to_be_checked()
    expect(prediction.locator("output")).to_contain_text(f"Your guess: {ORDER}")
    prediction.get_by_role("button", name="Keep this guess").press("Enter")
    expect(prediction.locator("output")).to_contain_text(f"Kept: {ORDER}")
    revealed = run(notebook_1, REVEAL)
    expect(revealed).to_contain_text(re.compile(f"your guess.*{ORDER}.*measured.*the sevens > the fours > the zeros", re.S))


def test_an_exercise_answers_in_words(notebook_1):
    expect(run(notebook_1, "mlp.layer_parameters.check(")).to_contain_text("Not attempted yet")
    answer = "def count(in_features, out_features): return {}\nmlp.layer_parameters.check(count)"
    for formula, words in (
        ("in_features * out_features", "bias forgotten"),
        ("count(in_features, out_features)", "calls itself without end"),
        ("in_features * out_features + out_features", "Right."),
    ):
        output = run(notebook_1, "mlp.layer_parameters.check(", answer.format(formula))
        expect(output).to_contain_text(words, timeout=20_000)
        expect(output).not_to_contain_text("Traceback")


def test_the_quiz_answers_each_choice(notebook_1):
    quiz = run(notebook_1, "mlp.quiz()").locator(".lora-quiz")
    radios = quiz.get_by_role("radio")
    radios.nth(1).focus()
    radios.nth(1).press("Space")
    expect(quiz.locator("output").first).to_contain_text("✘ Not so.")
    radios.nth(1).press("Shift+Tab")
    notebook_1.keyboard.press("Space")
    expect(quiz.locator("output").first).to_contain_text("✔ Right.")
    radios.nth(4).click()
    expect(quiz.locator("output").last).to_contain_text("Right at the first try: 1 of 4.")


def test_preflight_and_the_projector_look(notebook_1):
    output = run(notebook_1, "preflight()", "preflight()")
    output.get_by_label("Tick this box").check(timeout=150_000)  # it trains the base first, where none is cached
    expect(output).to_contain_text("Yes, widgets run.")
    words, size = output.locator("output").first, "element => parseFloat(getComputedStyle(element).fontSize)"
    usual = words.evaluate(size)
    expect(run(notebook_1, "projector_mode()", "projector_mode()")).to_contain_text("Large type is on")
    assert cell(notebook_1, "preflight()").locator("output").first.evaluate(size) > 1.3 * usual
    notebook_1.screenshot(path=SCREENSHOT) if SCREENSHOT else None
