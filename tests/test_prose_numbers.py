"""No notebook says a number that it does not compute: each number in its prose stands in its code or in its output.

Allowed besides: what names a thing rather than measures it (see `ALLOWED`), and numbers up to `SMALL`, which in prose
are counts of things on the page ("1", "2", "rank 1") or the digits themselves.
"""

import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALL = 10
ALLOWED = [
    r"\[[^\]]*\]\([^)]*\)",  # links: titles of notebooks, arXiv numbers, addresses
    r"arXiv \d{4}\.\d{5}",
    r"^# \d+ ·",  # the notebook's own number
    r"\*\*Time:\*\*.*?\*\*Needs:",  # an estimate of reading time
    r"^\*\*Sources:\*\*.*",  # volumes, pages, years
    r"Exercises? \d\.\d(?: (?:and|to) \d\.\d)?",
    r"\b[67]0,000 images|\b10,000 test images",  # the size of MNIST
    r"[Ss]ections? \d\.\d(?: (?:and|to) \d\.\d)?",  # of a paper
    r", (?:19|20)\d\d\b",  # the year of a publication
    r"float(?:16|32|64)|int64",
    r"`[^`\n]*`",  # code and names
]
# What a cell cannot compute, and why: settings that are a function's default, constants, figures that others published.
DEFINED = {
    "1_mlp": {0.001: "train's learning rate", 2.3: "ln 10"},
    "4_digit_9": {128: "the published run", 14: "the published run", 64: "the end of a slider"},
}
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


def numbers_in(text):
    """The numbers of a text, without thousands' commas: '1,000' and '1000.0' are one number."""
    return {float(found.rstrip(",").replace(",", "")) for found in NUMBER.findall(text)}


def prose_numbers(text):
    for allowed in ALLOWED:
        text = re.sub(allowed, " ", text, flags=re.MULTILINE)
    return {n for n in numbers_in(text) if not (n <= SMALL and n.is_integer())}


def outputs_of(cell):
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        yield output.get("data", {}).get("text/plain", "")


def unsupported(notebook):
    """Prose numbers that stand neither in a code cell nor in an output, with the sentence that says them."""
    computed = set()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            computed |= numbers_in(cell.source)
            for text in outputs_of(cell):
                computed |= numbers_in(text)
    wrong = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            wrong += [(n, cell.source[:80]) for n in sorted(prose_numbers(cell.source) - computed)]
    return wrong


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_number_in_the_prose_is_computed_in_the_notebook(path):
    wrong = unsupported(nbformat.read(path, as_version=4))
    assert [(number, text) for number, text in wrong if number not in DEFINED.get(path.stem, {})] == []


@pytest.mark.parametrize(
    "prose, missing",
    [
        ("Accuracy rises to 0.97.", [0.97]),
        ("It holds 2,807,010 parameters.", [2807010]),
        ("It has 12,345 of them, 50 % more.", [50, 12345]),
        ("It takes 42 of 200.", []),  # both in the cell below
        ("In section 4.1 of [arXiv 2106.09685](https://arxiv.org/abs/2106.09685), the digit 9.", []),
        ("**Time:** 40 minutes. **Needs:** nothing. Use `lr=0.5`.", []),
        ("About 0.5 of it.", [0.5]),
    ],
)
def test_the_check_itself_finds_what_no_cell_computes(prose, missing):
    cell = nbformat.v4.new_code_cell("print(6 * 7, 'of', 200)", outputs=[nbformat.v4.new_output("stream", text="42 of 200\n")])
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(prose), cell])
    assert [number for number, _ in unsupported(notebook)] == missing
