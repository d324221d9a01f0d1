"""What a fresh machine relies on: the set-up files agree, and the stored notebooks are whole."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

import lora_helpers

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_conda_and_pip_install_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    pip = next(entry["pip"] for entry in environment if isinstance(entry, dict))
    assert sorted(pip) == sorted([*project["dependencies"], "-e ."])
    assert f"python{project['requires-python']}" in environment


def test_the_readme_has_the_commands_that_ci_runs():
    readme, ci = (
        (ROOT / "README.md").read_text(encoding="utf-8"),
        (ROOT / ".ci" / "run").read_text(encoding="utf-8"),
    )
    command = ci.strip().splitlines()[-1]
    assert command.endswith("pytest") and f"`{command}`" in readme
    assert f"`{command.replace('pytest', 'jupyter lab notebooks')}`" in readme


def test_every_public_name_is_there_and_documented():
    for name in lora_helpers.__all__:
        assert getattr(lora_helpers, name).__doc__, name


def test_nothing_else_is_at_the_top():
    allowed = {
        "notebooks",
        "lora_helpers",
        "tests",
        "environment.yml",
        "README.md",
        "pyproject.toml",
        "LICENSE",
    }
    hidden_or_made = {"uv.lock", "dist", "build"}
    assert {p.name for p in ROOT.iterdir() if not p.name.startswith(".")} - hidden_or_made == allowed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebook_was_run_in_order_and_carries_nothing_of_one_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 1_000_000
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        # With these, `jupyter nbconvert --to script` writes a .py file.
        "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
    }
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags", "slideshow", "reason"}, cell.id
        for output in cell.get("outputs", []):
            assert output.output_type != "error" and output.get("name") != "stderr", cell.id
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), cell.id
    assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text(encoding="utf-8"))


def printed(name):
    """All that the stored notebook printed."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def test_pages_quote_the_figures_that_the_notebooks_show():
    story = printed("4_digit_9.ipynb")
    nines, others, accuracy = (
        re.search(rf"^{what} (\S+) → (\S+)$", story, re.M).groups()
        for what in ("nines wrong", "all others wrong", "accuracy")
    )
    readme, teaching = (
        (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "notebooks/TEACHING.md")
    )
    row = "| notebook 4, seed 2 | {} → {} | {} → {} | {} → {} |"
    assert row.format(*accuracy, *nines, *others) in readme
    assert (
        f"{nines[0]} wrong nines became {nines[1]}" in teaching
        and f"{others[0]} became {others[1]}" in teaching
    )


def test_the_readme_gives_the_times_that_the_notebooks_give():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        opening = nbformat.read(path, as_version=4).cells[0].source
        times = re.search(r"\*\*Time:\*\* (\d+) minutes to run and read(?:, (\d+) with)?", opening)
        row = next(line for line in readme.splitlines() if f"(notebooks/{path.name})" in line)
        doing = f"{times[2]} min" if times[2] else "–"
        assert f"| {times[1]} min | {doing} |" in row


def test_no_figure_is_still_to_come():
    for page in (ROOT / "README.md", ROOT / "notebooks" / "TEACHING.md"):
        assert not re.search(r"\b(SPEED|MEMORY|T\d s|TODO|XXX)\b", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_the_code_is_formatted_and_lint_finds_nothing(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_package_sets_one_thread():
    count = "print(torch.get_num_threads()); "
    command = [sys.executable, "-c", f"import torch; {count}import lora_helpers; {count}"]
    two = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=two, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.split() == ["2", "1"]


@pytest.mark.parametrize("page", ["README.md", "notebooks/1_mlp.ipynb", "notebooks/4_digit_9.ipynb"])
def test_readers_in_notebook_7_hear_what_works_in_place_of_arrow_keys(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.search(r"In Jupyter Notebook 7[^.]*\b(the arrow keys leave|in place of arrow keys)", text)
