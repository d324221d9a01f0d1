"""Before a lesson: is this machine ready? One call, a table, and a plain verdict with what to do."""

import html
import importlib.metadata
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
import torch
from jupyter_core.paths import jupyter_path

from lora_helpers.cache import cache_folder
from lora_helpers.data import Mnist, load_mnist
from lora_helpers.finetuning import fine_tune
from lora_helpers.training import base_is_cached, pretrained_base, untrained_base

PACKAGES = ("torch", "torchvision", "jupyterlab", "ipywidgets", "matplotlib", "numpy", "safetensors")
SLOW = 3.0  # seconds for one fine-tuning, beyond which a slider is no longer pleasant to use live
GOOD, SLUGGISH, BROKEN = "good", "slow, but works", "look here"
_MARKS = {GOOD: "✔", SLUGGISH: "◐", BROKEN: "✘"}


@dataclass(frozen=True)
class Check:
    """One line of the preflight: what was looked at, what was found, its state, and what to do if that is not good.

    Attributes:
        state: "good", "slow, but works" or "look here".
    """

    what: str
    found: str
    state: str = GOOD
    advice: str = ""


class Preflight(widgets.VBox):
    """The checks, a verdict in words, and a box to tick: only a tick that is answered shows that widgets run.

    Attributes:
        checks: a tuple of `Check`. ready: whether the notebooks run here, be it slowly. verdict: a sentence or two.
    """

    def __init__(self, checks: tuple[Check, ...]):
        states = {check.state for check in checks}
        self.checks, self.ready = checks, BROKEN not in states
        opening = "Not ready." if not self.ready else "Ready, but slow here." if SLUGGISH in states else "Ready."
        self.verdict = " ".join([opening, *(check.advice for check in checks if check.state != GOOD)])
        self.box = widgets.Checkbox(False, description="Tick this box: do widgets run here?", indent=False, layout=widgets.Layout(width="auto"))
        self._answer = widgets.HTML("<output>No answer yet.</output>")
        self.box.observe(self._ticked, names="value")
        super().__init__([widgets.HTML(self._table()), widgets.HBox([self.box, self._answer])])

    def _ticked(self, change) -> None:
        self._answer.value = "<output><b>Yes, widgets run.</b></output>" if change["new"] else "<output>No answer yet.</output>"

    def _table(self) -> str:
        rows = "".join(
            f'<tr><th scope="row" style="text-align: left">{html.escape(check.what)}</th>'
            f'<td style="text-align: left; white-space: nowrap">{_MARKS[check.state]} {check.state}</td>'
            f'<td style="text-align: left">{html.escape(check.found)}</td></tr>'
            for check in self.checks
        )
        return f"<table>{rows}</table><p><b>{html.escape(self.verdict)}</b></p>"

    def __repr__(self) -> str:
        lines = [f"{check.state:15} · {check.what}: {check.found}" for check in self.checks]
        return "\n".join([*lines, self.verdict])

    def _repr_mimebundle_(self, **kwargs):
        data = super()._repr_mimebundle_(**kwargs)
        data["text/html"] = self._table()
        return data


def preflight() -> Preflight:
    """Looks at versions, data, cache, cores, device, the time of one fine-tuning and the widgets, and says what to do.

    Nothing is trained for it but two adapters; the base network is only looked for.
    """
    checks = [_versions(), _cores(), Check("device", _device())]
    try:
        mnist = load_mnist()
        cached = base_is_cached(mnist)
        checks += [Check("digits", str(mnist)), _cache(), _base(cached), _speed(mnist, cached)]
    except RuntimeError as error:
        advice = "Unset LORA_MNIST to go on with the bundled sample, or set LORA_MNIST_ROOT to the folder that holds MNIST/raw."
        checks.append(Check("digits", str(error).splitlines()[0], BROKEN, advice))
    return Preflight((*checks, _widget_files()))


def _versions() -> Check:
    """Compares what is installed with the bounds that this package declares."""
    from packaging.requirements import Requirement  # comes with jupyterlab

    found, wrong = [f"Python {sys.version.split()[0]}"], []
    for line in importlib.metadata.requires("lora-helpers") or []:
        need = Requirement(line)
        if need.marker and not need.marker.evaluate():
            continue
        try:
            have = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if need.name in PACKAGES:
            found.append(f"{need.name} {have}")
        if not need.specifier.contains(have, prereleases=True):
            wrong.append(f"{need.name} is {have}, needed is {need.specifier}")
    if wrong:
        return Check("versions", "; ".join(wrong), BROKEN, "Install again with the README's first command, and start JupyterLab with it.")
    return Check("versions", ", ".join(found))


def _cores() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("processor cores", f"{usable} usable, {torch.get_num_threads()} used by PyTorch")


def _device() -> str:
    device = torch.get_default_device()
    if device.type == "cuda":
        return f"GPU ({torch.cuda.get_device_name(device)})"
    if torch.cuda.is_available():
        return f"CPU; there is a GPU too ({torch.cuda.get_device_name()}), and LORA_DEVICE=cuda uses it, but so small a network gains little"
    return "CPU, which is all that the notebooks need"


def _cache() -> Check:
    folder = cache_folder()
    if _writable(folder):
        return Check("cache folder", _short(folder))
    return Check("cache folder", f"{_short(folder)}, read-only: what it holds is used, nothing is added")


def _base(cached: bool) -> Check:
    if cached:
        return Check("base network", "in the cache")
    if _writable(cache_folder()):
        return Check("base network", "to be trained, in seconds: notebook 1 shows how and keeps it; another notebook does it if it comes first")
    advice = "Set LORA_CACHE to a folder that you may write to; until then each notebook trains its base anew."
    return Check("base network", "not cached, and cannot be", SLUGGISH, advice)


def _speed(mnist: Mnist, cached: bool) -> Check:
    base = pretrained_base(mnist, progress=False) if cached else untrained_base().to(torch.get_default_device())
    times = []
    for seed in range(2):  # the first one warms up
        start = time.perf_counter()
        fine_tune(base, mnist, seed=seed)
        times.append(time.perf_counter() - start)
    advice = (
        "Close what else runs on this machine. If that does not help, run the notebooks before the lesson and move a slider one step "
        "at a time (TEACHING.md, “A slow machine”)."
    )
    return Check("one fine-tuning, 100 batches and a test", f"{min(times):.1f} s", GOOD if min(times) <= SLOW else SLUGGISH, advice)


def _widget_files() -> Check:
    places = [Path(folder) / "labextensions" / "@jupyter-widgets" / "jupyterlab-manager" for folder in jupyter_path()]
    if any(place.is_dir() for place in places):
        return Check("widgets", "their part of JupyterLab is installed; the box below shows whether they run")
    return Check(
        "widgets", "their part of JupyterLab is missing", BROKEN,
        "Install ipywidgets where JupyterLab runs, reload the page, and run this cell again.",
    )  # fmt: skip


def _writable(folder: Path) -> bool:
    return os.access(next(parent for parent in (folder, *folder.parents) if parent.exists()), os.W_OK)


def _short(folder: Path) -> str:
    return re.sub(f"^{re.escape(str(Path.home()))}(?=/|\\\\|$)", "~", str(folder))
