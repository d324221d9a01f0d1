"""Before a lesson: is this machine ready? One call, a table, and advice."""

import html
import importlib.metadata
import sys
import time
from pathlib import Path
from typing import NamedTuple

import ipywidgets as widgets
from jupyter_core.paths import jupyter_path
from packaging.requirements import Requirement

from lora_helpers.data import load_mnist
from lora_helpers.experiments import fine_tune
from lora_helpers.model import pretrained_base

SLOW = 3.0  # seconds for one fine-tuning; a slider that takes longer is not pleasant to use
GOOD, SLUGGISH, BROKEN = "✔ good", "◐ slow, but works", "✘ look here"


class Check(NamedTuple):
    """One line of the preflight. `state` is one of the three above; `advice` says what to do."""

    what: str
    found: str
    state: str = GOOD
    advice: str = ""


class Preflight(widgets.VBox):
    """The checks, a verdict in words, and a box to tick. Only an answer to the tick shows that widgets run.

    Attributes:
        checks: a tuple of `Check`. ready: whether the notebooks run here, even if slowly. verdict: text.
    """

    def __init__(self, checks: tuple[Check, ...]):
        states = [check.state for check in checks]
        self.checks, self.ready = checks, BROKEN not in states
        opening = "Not ready." if not self.ready else "Ready, but slow." if SLUGGISH in states else "Ready."
        self.verdict = " ".join([opening, *(check.advice for check in checks if check.state != GOOD)])
        self.box = widgets.Checkbox(
            False,
            description="Tick this box: do widgets run here?",
            indent=False,
            layout=widgets.Layout(width="auto"),
        )
        self._answer = widgets.HTML()
        self.box.observe(self._ticked, names="value")
        self._ticked()
        super().__init__([widgets.HTML(self._table()), widgets.HBox([self.box, self._answer])])

    def _ticked(self, change=None) -> None:
        answer = "<b>Yes, widgets run.</b>" if self.box.value else "No answer yet."
        self._answer.value = f"<output>{answer}</output>"

    def _table(self) -> str:
        rows = "".join(
            f'<tr style="text-align: left"><th scope="row">{html.escape(check.what)}</th>'
            f"<td>{check.state}</td><td>{html.escape(check.found)}</td></tr>"
            for check in self.checks
        )
        return f"<table>{rows}</table><p><b>{html.escape(self.verdict)}</b></p>"

    def __repr__(self) -> str:
        return "\n".join([f"{c.state} · {c.what}: {c.found}" for c in self.checks] + [self.verdict])

    def _repr_mimebundle_(self, **kwargs):
        return super()._repr_mimebundle_(**kwargs) | {"text/html": self._table()}


def preflight() -> Preflight:
    """Checks the installed versions, the time of one fine-tuning and the widgets, and says what to do."""
    return Preflight((_versions(), _speed(), _widget_files()))


def _versions() -> Check:
    """Compares the installed versions with the bounds that this package declares."""
    found, wrong = [f"Python {sys.version.split()[0]}"], []
    for need in map(Requirement, importlib.metadata.requires("lora-helpers") or []):
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        found.append(f"{need.name} {version}")
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name} is {version}, but must be {need.specifier}")
    if wrong:
        advice = "Install again with the first command of the README, and start JupyterLab from there."
        return Check("versions", "; ".join(wrong), BROKEN, advice)
    return Check("versions", ", ".join(found))


def _speed() -> Check:
    base, mnist = pretrained_base(), load_mnist()
    seconds = []
    for seed in range(2):  # the first one is slower
        start = time.perf_counter()
        fine_tune(base, mnist, seed=seed)
        seconds.append(time.perf_counter() - start)
    what, found = "one fine-tuning, 100 batches and a test", f"{min(seconds):.1f} s"
    if min(seconds) <= SLOW:
        return Check(what, found)
    advice = "Close other programs. If it stays slow, run the notebooks before the lesson (TEACHING.md)."
    return Check(what, found, SLUGGISH, advice)


def _widget_files() -> Check:
    folders = [Path(folder) / "labextensions" / "@jupyter-widgets" for folder in jupyter_path()]
    if any((folder / "jupyterlab-manager").is_dir() for folder in folders):
        return Check("widgets", "installed; the box below shows whether they run")
    advice = "Install ipywidgets where JupyterLab runs, then reload the page."
    return Check("widgets", "their part of JupyterLab is missing", BROKEN, advice)
