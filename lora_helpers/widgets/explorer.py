"""The explorer: move rank, α and the rest, flip the switch, and see what a really trained adapter does."""

import html
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import ipywidgets as widgets
import traitlets

from lora_helpers.data import Mnist
from lora_helpers.experiments import STOPS, FineTuner, FineTuning, Setting
from lora_helpers.model import RichBoyNet
from lora_helpers.widgets.explorer_picture import ExplorerPicture, summarise
from lora_helpers.widgets.panel import Panel, row

SHARES = (0.0, 0.1, 0.2, 0.5, 0.8)
STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.2, 1.5)
# Name: what the present setting becomes, and what that means. `Setting(seed=now.seed)` resets all but the
# seed; `replace(now, …)` keeps the rest.
PRESETS = {
    "rank 1, α 1": (lambda now: Setting(seed=now.seed), "all controls as at the start, but for the seed"),
    "no scaling: α = r": (
        lambda now: replace(now, alpha=float(now.rank)),
        "α becomes the rank, so the scale α/r is 1 and BA is added as it is",
    ),
    "rehearse the other digits": (
        lambda now: Setting(share=0.5, seed=now.seed),
        "rank 1, α 1, but half of the training images show other digits",
    ),
}


class LoRAExplorer(Panel):
    """Trains, tests and shows a real adapter for each setting of its controls, on a private copy of `base`.

    Traits to read, set and observe: `rank` (1 to 64), `alpha` (1/16 to 64), `batches` (one of
    `experiments.STOPS`), `digit`, `share` (of other digits among the training images: one of
    `explorer.SHARES`), `seed`, `strength` (one of `explorer.STRENGTHS`; ΔW is used this many times), and
    `enabled`, the switch. `result` is the `FineTuning` shown, `origin` says where it comes from, `proofs`
    what was checked, `summary` is a line of text, `status` what went wrong.

    Raises:
        ValueError: `base` already has LoRA, or is too small for the rank. TraitError: a value out of range.
    """

    rank = traitlets.Int(1, min=1, max=64)
    alpha = traitlets.Float(1.0, min=1 / 16, max=64.0)
    batches = traitlets.Enum(STOPS, 100)
    digit = traitlets.Int(9, min=0, max=9)
    share = traitlets.Enum(SHARES, 0.0)
    seed = traitlets.Int(0, min=0, max=9999)
    strength = traitlets.Enum(STRENGTHS, 1.0)
    enabled = traitlets.Bool(True)
    result = traitlets.Instance(FineTuning, allow_none=True)
    origin = traitlets.Unicode()
    proofs = traitlets.Dict()
    settings = ("rank", "alpha", "batches", "digit", "share", "seed", "strength")  # of `Setting`
    moves = (*settings, "enabled")

    def __init__(self, base: RichBoyNet, mnist: Mnist, **settings):
        for name in settings:
            if name not in self.moves:
                raise TypeError(f"{name!r} is not a setting; allowed are {', '.join(self.moves)}.")
        self.tuner = FineTuner(base, mnist)
        self._picture = self._follower = None
        super().__init__(**settings)

    @property
    def setting(self) -> Setting:
        """What the controls stand at."""
        return Setting(**{name: getattr(self, name) for name in self.settings})

    def apply(self, setting: Setting, **more) -> None:
        """Moves all controls at once, with at most one training; `more` may hold `enabled`."""
        self.move({name: getattr(setting, name) for name in self.settings} | more)

    def attach(self, follower: Callable) -> None:
        """Calls `follower(change)` after every move, in place of one left by an earlier run of the cell."""
        if self._follower:
            self.unobserve(self._follower, ["result", "enabled"])
        self._follower = follower
        self.observe(follower, ["result", "enabled"])

    def save_page(self, path: str | os.PathLike) -> Path:
        """Saves the explorer as one HTML file, for a browser without Python or network; see `page.save_page`.

        α, digit, share and seed are as the controls stand; the page has sliders for the rest. It takes a
        minute or two, in which everything that the page shows is trained and tested.
        """
        from lora_helpers.widgets.page import save_page

        return save_page(path, self.tuner, self.setting)

    def arrange(self) -> list[widgets.Widget]:
        shares = [(f"{share:.0%}", share) for share in SHARES]
        self.presets = {}
        for name, (preset, tip) in PRESETS.items():
            self.presets[name] = widgets.Button(description=name, tooltip=tip, layout={"width": "auto"})
            self.presets[name].on_click(lambda _, to=preset: self.apply(to(self.setting), enabled=True))
        first = row(self.switch("off: the base, to the bit"), *self.presets.values())
        controls = [
            self.control("rank", "rank r", "rank r of every adapter: rows of A, columns of B", powers=(0, 6)),
            self.control("alpha", "α", "α: the update is scaled by α/r", powers=(-4, 6)),
            self.control("strength", "strength", "multiplies ΔW, without a new training", options=STRENGTHS),
            self.control("batches", "batches", "of 10 images: go back and forth in time", options=STOPS),
            self.control("share", "others", "how many images show other digits", options=shares),
            self.control("digit", "learn digit", "the digit to fine-tune on"),
            self.control("seed", "seed", "of A and of the order of the images: is it luck?"),
        ]
        self._proof_row = widgets.HTML()
        return [first, row(*controls), self._words, self._image, self._proof_row]

    def compute(self, *state):
        *values, enabled = state
        setting = Setting(**dict(zip(self.settings, values)))
        result, origin = self.tuner.run(setting, progress=self.show_training())
        proofs = self.tuner.proofs(setting)
        if self._picture is None:
            self._picture = ExplorerPicture(self.tuner.mnist.test, result.off)
        attributes = {"result": result, "origin": origin, "proofs": proofs}
        draw = partial(self._picture.update, result, enabled)
        return draw, summarise(result, enabled, origin), attributes

    @traitlets.observe("proofs")
    def _show_proofs(self, change) -> None:
        marks = [f"{'✓' if ok else '✗ FALSE:'} {html.escape(claim)}" for claim, ok in self.proofs.items()]
        style = "display: flex; flex-wrap: wrap; gap: 0 1.5em; list-style: none; margin: 0; padding: 0"
        items = "".join(f"<li>{mark}</li>" for mark in marks)
        self._proof_row.value = f'<ul aria-label="proofs, just recomputed" style="{style}">{items}</ul>'
