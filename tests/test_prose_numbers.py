"""No notebook says a number that it does not compute: each number in its prose stands in the code or
output of the same section.

A section begins at a heading of the first or second level; the summary at the end may quote them all.
Allowed besides: what
names a thing rather than measures it (see `ALLOWED`), and whole numbers up to `SMALL`, which in prose are
counts of things on
the page ("1", "2", "rank 1") or the digits themselves, unless they measure ("3 times", "5 %").
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
    r"[Aa] (?:few|dozen) (?:hundred|thousand)s?",  # no number
]
# Said in words, a number is one all the same.
SMALL_WORDS = "two three four five six seven eight nine ten eleven twelve".split()
WORDS = {word: value for value, word in enumerate(SMALL_WORDS, start=2)}
WORDS |= {"fifteen": 15, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50}
WORDS |= {"a hundred": 100, "hundred": 100, "a thousand": 1000, "thousand": 1000}
WORD = re.compile(rf"\b(?:{'|'.join(sorted(WORDS, key=len, reverse=True))})\b(?![-‑])", re.IGNORECASE)
# What a cell cannot compute, and why: settings that are a function's default, constants, figures that
# others published.
DEFINED = {
    "1_mlp": {0.001: "train's learning rate", 2.3: "ln 10"},
    "2_scaling_math": {20: "the steps of an exercise's check"},
    "4_digit_9": {64: "the end of a slider"},
    "6_scaling_laboratory": {10: "the factor that a paper claims"},
}
MEASURE = re.compile(r"\s*(?:times|-?fold|×(?!\s*\d)|%|percent)")
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


def numbers_in(text):
    """The numbers of a text, without thousands' commas: '1,000' and '1000.0' are one number."""
    return {float(found.rstrip(",").replace(",", "")) for found in NUMBER.findall(in_digits(text))}


def in_digits(text):
    return WORD.sub(lambda word: str(WORDS[word.group().lower()]), text)


def prose_numbers(text):
    for allowed in ALLOWED:
        text = re.sub(allowed, " ", text, flags=re.MULTILINE)
    text, found = in_digits(text), set()
    for match in NUMBER.finditer(text):
        (number,) = numbers_in(match.group())
        if number > SMALL or not number.is_integer() or MEASURE.match(text, match.end()):
            found.add(number)
    return found


def outputs_of(cell):
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        yield output.get("data", {}).get("text/plain", "")


def sections_of(notebook):
    sections = [[]]
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and re.match(r"##? ", cell.source):
            sections.append([])
        sections[-1].append(cell)
    return sections


def computed_in(cells):
    found = set()
    for cell in cells:
        if cell.cell_type == "code":
            found = found.union(numbers_in(cell.source), *map(numbers_in, outputs_of(cell)))
    return found


def unsupported(notebook):
    """Prose numbers that stand neither in a code cell of their section nor in its output, with the
    sentence that says them."""
    *sections, summary = sections_of(notebook)
    places = [(section, computed_in(section)) for section in sections] + [
        (summary, computed_in(notebook.cells))
    ]
    return [
        (number, cell.source[:80])
        for section, computed in places
        for cell in section
        if cell.cell_type == "markdown"
        for number in sorted(prose_numbers(cell.source) - computed)
    ]


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
        ("All 5 of them.", []),
        ("It is 5 times better, by 3 %.", [3, 5]),
        ("It is 8× as long, or five times, or 3-fold; for thirty of them, a hundred.", [3, 5, 8, 30, 100]),
        ("A shape of 4×6, two of them, and a few thousand more.", []),
        ("## Another section\n\nIt takes 42.", [42]),
    ],
)
def test_the_check_itself_finds_what_no_cell_computes(prose, missing):
    cell = nbformat.v4.new_code_cell(
        "print(6 * 7, 'of', 200)", outputs=[nbformat.v4.new_output("stream", text="42 of 200\n")]
    )
    summary = nbformat.v4.new_markdown_cell("## What was shown\n\nIt takes 42 of 200.")
    cells = [cell, nbformat.v4.new_markdown_cell(prose), summary]
    notebook = nbformat.v4.new_notebook(cells=cells)
    assert [number for number, _ in unsupported(notebook)] == missing
