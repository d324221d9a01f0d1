"""The explorer: move rank, α and the rest, flip the switch, and see what a really trained adapter does."""

import html
import time
from collections.abc import Callable

import ipywidgets as widgets
import traitlets
from torch import nn

from lora_helpers.data import Mnist
from lora_helpers.finetuning import STOPS, FineTuner, FineTuning, Settings
from lora_helpers.model import RichBoyNet
from lora_helpers.widgets.common import FIELD, WRAP, Finite, Panel, paired, powers_of_two, stops, tie
from lora_helpers.widgets.explorer_picture import ExplorerPicture, summarise
from lora_helpers.widgets.main_thread import on_main_thread

SHARES = (0.0, 0.1, 0.2, 0.5, 0.8)
PRESETS = {
    "paper default": (Settings(), "rank 1, α 1: α is fixed once, then only the rank is changed"),
    "no scaling: α = r": (Settings(rank=16, alpha=16), "rank 16, α 16: the scale α/r is 1, so BA is added as it is"),
    "rehearse the other digits": (Settings(share=0.5), "rank 1, α 1, but half of the training images show other digits"),
}
PATIENCE = 0.8  # seconds of training before a progress bar appears: drawing it slows a training that is soon over


class LoRAExplorer(Panel):
    """Trains, tests and shows a real adapter for each setting of its controls, on a private copy of `base`.

    Traits to read, set and observe: `rank` (1 to 64), `alpha` (1/16 to 64), `batches` (one of `finetuning.STOPS`), `digit`,
    `share` (of other digits in the lesson: one of `explorer.SHARES`), `seed`, and `enabled`, the switch. `result` is the
    `FineTuning` shown, `origin` how it was come by, `proofs` what was checked, `summary` a line of text, `status` what went wrong.

    Raises:
        ValueError: `base` already has LoRA. TraitError: a value out of range.
    """

    rank = traitlets.Int(1, min=1, max=64)
    alpha = Finite(1.0, min=1 / 16, max=64.0)
    batches = traitlets.Enum(STOPS, 100)
    digit = traitlets.Int(9, min=0, max=9)
    share = traitlets.Enum(SHARES, 0.0)
    seed = traitlets.Int(0, min=0, max=9999)
    enabled = traitlets.Bool(True)
    result = traitlets.Instance(FineTuning, allow_none=True)
    origin = traitlets.Unicode()
    proofs = traitlets.Dict()

    def __init__(self, base: RichBoyNet, mnist: Mnist, **settings):
        self.tuner = FineTuner(base, mnist)
        self._ranks = {name: min(layer.weight.shape) for name, layer in base.named_modules() if isinstance(layer, nn.Linear)}
        self._picture = ExplorerPicture(mnist.test, self._ranks)
        self._follower = None
        self._tiles = widgets.HTML()
        self._progress = widgets.IntProgress(layout=widgets.Layout(width="190px", visibility="hidden"), description="training")
        super().__init__([], below=[self._tiles])
        for name, value in settings.items():
            if name not in self.trait_names():
                raise TypeError(f"{name!r} is no setting; allowed are rank, alpha, batches, digit, share, seed and enabled.")
            setattr(self, name, value)
        self.children = (*self._make_controls(), *self.children)
        self._follow(*Settings.__dataclass_fields__, "enabled")

    @property
    def settings(self) -> Settings:
        """The settings that the controls stand at."""
        return Settings(**{name: getattr(self, name) for name in Settings.__dataclass_fields__})

    @property
    def shown(self) -> tuple[Settings, bool]:
        """The settings and the switch as the picture shows them: while a training runs, the controls may be ahead of it."""
        *settings, enabled = self._shown.state
        return Settings(*settings), enabled

    def apply(self, settings: Settings) -> None:
        """Moves all controls at once, with at most one training."""
        self._together(vars(settings))

    def attach(self, follower: Callable[[], None]) -> None:
        """Calls `follower()` after every move, in place of the follower before it: a cell run twice leaves no old one."""
        self._follower = follower

    def _make_controls(self) -> list[widgets.Widget]:
        shares = [(f"{share:.0%}", share) for share in SHARES]
        rank_tip, alpha_tip = "rank r of every adapter: rows of A, columns of B", "α: the update is scaled by α/r"
        batches_tip = "batches of 10 images trained so far: go back and forth through the training (beyond 100: a longer one, once)"
        share_tip = "share of the training images that show other digits"
        self.rank_slider = powers_of_two(0, 6, self.rank, rank_tip)
        self.alpha_slider = powers_of_two(-4, 6, self.alpha, alpha_tip)
        self.batches_slider = stops(STOPS, self.batches, batches_tip)
        self.share_slider = stops(shares, self.share, share_tip)
        self.rank_field = widgets.BoundedIntText(self.rank, min=1, max=64, description="rank r", tooltip=rank_tip, **FIELD)
        self.alpha_field = widgets.BoundedFloatText(
            self.alpha, min=1 / 16, max=64, step=1 / 16, description="α", tooltip=alpha_tip, **FIELD
        )
        self.batches_field = widgets.Dropdown(
            options=STOPS, value=self.batches, description="batches", tooltip=batches_tip, **FIELD
        )
        self.share_field = widgets.Dropdown(options=shares, value=self.share, description="others", tooltip=share_tip, **FIELD)
        self.digit_field = widgets.BoundedIntText(
            self.digit, min=0, max=9, description="learn digit", tooltip="the digit to fine-tune on", **FIELD
        )
        self.seed_field = widgets.BoundedIntText(
            self.seed, min=0, max=9999, description="seed", tooltip="of A and of the order of the images: is it luck?", **FIELD
        )
        self.switch = widgets.Checkbox(
            self.enabled, description="LoRA on", indent=False, tooltip="off: the base, to the bit", layout=widgets.Layout(width="150px")
        )
        for trait, control in (("digit", self.digit_field), ("seed", self.seed_field), ("enabled", self.switch)):
            tie(self, trait, control)
        buttons = []
        for name, (settings, tip) in PRESETS.items():
            button = widgets.Button(description=name, tooltip=tip, layout=widgets.Layout(width="auto"))
            button.on_click(on_main_thread(lambda _, settings=settings: self._together({**vars(settings), "enabled": True})))
            buttons.append(button)
        self.preset_buttons = dict(zip(PRESETS, buttons))
        return [
            widgets.HBox([self.switch, *buttons, self._progress], layout=WRAP),
            widgets.HBox(
                [
                    paired(self, "rank", self.rank_field, self.rank_slider),
                    paired(self, "alpha", self.alpha_field, self.alpha_slider),
                    self.digit_field,
                    paired(self, "batches", self.batches_field, self.batches_slider),
                    paired(self, "share", self.share_field, self.share_slider),
                    self.seed_field,
                ],
                layout=WRAP,
            ),
        ]

    def _refresh(self, state):
        *settings, enabled = state
        settings = Settings(*settings)
        try:
            result, origin = self.tuner.run(settings, progress=self._training_progress())
        finally:
            self._progress.layout.visibility = "hidden"
        proofs = self.tuner.proofs(settings)
        summary = summarise(result, enabled, origin)
        return self._picture.update(result, enabled, summary), summary, {"origin": origin, "proofs": proofs, "result": result}

    def _show(self) -> None:
        self._tiles.value = _proof_row(self._shown.attributes["proofs"])
        super()._show()
        if self._follower:
            try:
                self._follower()
            except Exception as error:
                self._tell_follower_failed(error)

    def _training_progress(self):
        start = time.monotonic()

        def progress(done: int, total: int) -> None:
            if done % 10 == 0 and time.monotonic() - start > PATIENCE:
                self._progress.max, self._progress.value = total, done
                self._progress.layout.visibility = "visible"

        return progress

    def _draw(self) -> ExplorerPicture:
        picture = ExplorerPicture(self.tuner.mnist.test, self._ranks, caption=True)
        return picture.update(self.result, self.shown[1], self.summary)


def _proof_row(proofs: dict[str, bool]) -> str:
    marks = (f"<li>{'✓' if holds else '✗ FALSE:'} {html.escape(claim)}</li>" for claim, holds in proofs.items())
    style = "display: flex; flex-wrap: wrap; gap: 0 1.5em; list-style: none; margin: 0; padding: 0; line-height: 1.6"
    return f'<ul aria-label="proofs, just recomputed" style="{style}">{"".join(marks)}</ul>'
