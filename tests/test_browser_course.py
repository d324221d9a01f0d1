"""The course as a learner meets it, in JupyterLab and Chromium, and what is left of it without a kernel."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from browser import (  # noqa: F401  (fixtures)
    browser,
    cell,
    lab,
    open_notebook,
    run,
    run_all,
    shows,
    slider,
    without_outputs,
    write_notebook,
)
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell
from playwright.sync_api import expect

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
ORDER = "the fours > the sevens > the zeros"
RANKING = """\
from lora_helpers import PredictRanking
ranking = PredictRanking("Who will lose most? And then?", ["the fours", "the sevens", "the zeros"])
ranking"""
REVEAL = 'ranking.reveal(["the sevens", "the fours", "the zeros"])'

# A notebook that is run, saved and read without a kernel, and the words of its pictures.
CELLS = (
    "import matplotlib.pyplot\n%matplotlib inline\n%config InlineBackend.figure_formats = ['svg']",
    "from lora_helpers import *\nmnist, base = load_mnist(), pretrained_base()\nshow_digits(mnist.test)",
    "for end in (1.5, 1.0):\n    display(plot_losses([2.0, end]))",
    "losses = train(RichBoyNet(20, 30), mnist.test, max_batches=100)",
    "from lora_helpers.experiments import sweep\nruns = sweep(base, mnist, [Setting(batches=60)])",
    "try:\n    train(RichBoyNet(20, 30), mnist.test, max_batches=90, after_batch=lambda k: 1 / (80 - k))\n"
    "except ZeroDivisionError:\n    pass",
    "explorer = LoRAExplorer(base, mnist)\nexplorer",
    "DigitPad(explorer)",
    "ParametrizationInspector()",
    "PredictNumber('How many nines?', 0, 9)",
    "from lora_helpers.course import ex1_mlp\nex1_mlp.quiz()",
)
WORDS = (
    *("Digits: 0, 1, 2", "Loss of 2 batches, from 2.00 to 1.50", "Loss of 2 batches, from 2.00 to 1.00"),
    *("LoRA on · rank 1 · α 1 · 100 batches", "LoRA on · rank 1 · α 1 · test image"),
    "LoRA on · rank 1 · α 1 · α/r 1",
)


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """Notebooks 1 (with a ranking) and 4, their outputs left out; and one run by README's command."""
    folder = tmp_path_factory.mktemp("served")
    notebook = nbformat.read(NOTEBOOKS / "1_mlp.ipynb", as_version=4)
    notebook.cells += [new_code_cell(RANKING), new_code_cell(REVEAL)]
    nbformat.write(without_outputs(notebook), folder / "1_mlp.ipynb")
    notebook = nbformat.read(NOTEBOOKS / "4_digit_9.ipynb", as_version=4)
    nbformat.write(without_outputs(notebook), folder / "4_digit_9.ipynb")
    write_notebook(folder / "page.ipynb", CELLS)
    option = "--ExecutePreprocessor.store_widget_state=False"
    assert option in (NOTEBOOKS.parent / "README.md").read_text(encoding="utf-8")
    command = [sys.executable, "-m", "nbconvert", "--execute", "--to", "notebook", "--inplace", option]
    subprocess.run([*command, str(folder / "page.ipynb")], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def notebook_1(lab, browser):  # noqa: F811
    """Notebook 1 with its imports run; each test runs the cells that it is about."""
    page = open_notebook(lab, browser, "1_mlp.ipynb", height=1400)
    expect(run(page, "import ex1_mlp as exercises")).to_contain_text("Mnist(", timeout=60_000)
    yield page
    page.close()
    assert not page.errors


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
    prediction = run(notebook_1, "ranking = PredictRanking(").locator(".lora-prediction")
    radios = prediction.get_by_role("radio")
    expect(radios).to_have_count(9)
    for place in range(3):  # the nth name in the nth column
        radios.nth(4 * place).focus()
        notebook_1.keyboard.press("Space")
        expect(radios.nth(4 * place)).to_be_checked()
    expect(prediction.locator("output")).to_contain_text(f"Your guess: {ORDER}")
    prediction.get_by_role("button", name="Keep this guess").press("Enter")
    expect(prediction.locator("output")).to_contain_text(f"Kept: {ORDER}")
    measured = f"your guess.*{ORDER}.*measured.*the sevens > the fours > the zeros"
    expect(run(notebook_1, REVEAL)).to_contain_text(re.compile(measured, re.S))


def test_an_exercise_answers_in_words(notebook_1):
    check = "exercises.layer_parameters.check("
    expect(run(notebook_1, check)).to_contain_text("Not attempted yet")
    for formula, words in (
        ("in_features * out_features", "bias forgotten"),
        ("count(in_features, out_features)", "calls itself without end"),
        ("in_features * out_features + out_features", "Right."),
    ):
        answer = f"def count(in_features, out_features): return {formula}\n{check}count)"
        output = run(notebook_1, check, answer)
        expect(output).to_contain_text(words, timeout=20_000)
        expect(output).not_to_contain_text("Traceback")


def test_the_quiz_answers_each_choice(notebook_1):
    quiz = run(notebook_1, "exercises.quiz()").locator(".lora-quiz")
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
    output.get_by_label("Tick this box").check(timeout=60_000)
    expect(output).to_contain_text("Yes, widgets run.")
    words, size = output.locator("output").first, "element => parseFloat(getComputedStyle(element).fontSize)"
    usual = words.evaluate(size)
    expect(run(notebook_1, "projector_mode()", "projector_mode()")).to_contain_text("Large type is on")
    assert cell(notebook_1, "preflight()").locator("output").first.evaluate(size) > 1.3 * usual


@pytest.mark.slow  # nbval runs its cells, and test_browser_widgets.py moves its explorer
def test_all_of_notebook_4_runs_and_its_explorer_moves(lab, browser):  # noqa: F811
    page = run_all(lab, browser, "4_digit_9.ipynb")
    expect(page.get_by_text("Right at the first try: 0 of 4.")).to_be_attached(
        timeout=300_000
    )  # the last cell
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=60_000)
    for kind in ("error", "stderr"):
        assert page.locator(f"[data-mime-type='application/vnd.jupyter.{kind}']").count() == 0
    explorer = page.locator(".lora-panel").first
    shows(explorer, "LoRA on · rank 1 · α 1 · 100 batches of digit 9 · ")
    slider(explorer, 0).press("ArrowRight")
    shows(explorer, "LoRA on · rank 2 · α 1 · 100 batches of digit 9 · ")
    explorer.get_by_label("LoRA on").press("Space")
    shows(explorer, "LoRA off · rank 2 · ")
    assert not page.errors
    page.close()


def finds_everything(page):
    pictures = page.locator(".jp-OutputArea img")
    expect(pictures).to_have_count(len(WORDS))
    for number, words in enumerate(WORDS):
        expect(pictures.nth(number)).to_have_attribute("alt", re.compile("^" + re.escape(words)))
        pictures.nth(number).scroll_into_view_if_needed()
        assert pictures.nth(number).evaluate("image => image.naturalWidth") > 100
    outputs = page.locator(".jp-OutputArea")
    expect(outputs.filter(has_text="Predict: How many nines?")).to_be_visible()
    expect(outputs.locator("summary").first).to_have_text("Answer")
    for bar in ("100/100 [", "60/60 [", "80/90 ["):  # the bars of the trainings, as they ended
        expect(outputs.filter(has_text=bar)).to_be_visible()
    assert not re.search(r"\b0(batch|/\d+) \[", page.locator("body").inner_text())


def test_a_saved_notebook_shows_every_picture_with_its_words_in_jupyterlab(lab, browser):  # noqa: F811
    page = open_notebook(lab, browser, "page.ipynb", height=3000)
    finds_everything(page)
    page.close()


def test_an_exported_page_shows_every_picture_with_its_words_offline(browser, notebooks):  # noqa: F811
    exported, _ = HTMLExporter().from_filename(str(notebooks / "page.ipynb"))
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.set_content(exported, wait_until="domcontentloaded")
    finds_everything(page)
    context.close()
