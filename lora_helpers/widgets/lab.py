"""The scaling lab: what rank, α and the rule of scaling do to ‖BA‖, to the scale, and to their product."""

from functools import partial

import ipywidgets as widgets
import numpy as np
import traitlets

from lora_helpers.data import Mnist
from lora_helpers.experiments import FineTuner, FineTuning, Setting
from lora_helpers.model import RichBoyNet
from lora_helpers.widgets.panel import Panel, row, tie
from lora_helpers.widgets.pictures import COLORS, LivePicture

RANKS = (1, 2, 4, 8, 16, 32, 64)
RULES = {"α/r": "as in LoRA", "α/√r": "as in rsLoRA", "α": "no scaling with the rank"}
LAYERS = ("linear1", "linear2", "linear3")
# Curves: name, sign, matplotlib's style, colour.
CURVES = tuple(zip(("‖BA‖", "scale", "‖ΔW‖"), "●■▲", ("o--", "s:", "^-"), COLORS))
WRONG = ("9s", "◆", "D-", "#CC79A7"), ("other digits", "▼", "v--", "black")
KEYS = (0.82, 2.2, 3.7, 6.37, 7.2)  # where the names of the curves stand, in inches


class ScalingPicture(LivePicture):
    """Left: ‖BA‖, scale and product over the rank, on logarithmic axes. Right: what the network then does."""

    def __init__(self):
        super().__init__(11, 3.6)

    def build(self) -> None:
        self._left, right = self.place(0.75, 0.5, 4.6, 2.55), self.place(6.3, 0.5, 4.5, 2.55)
        for axes in (self._left, right):
            axes.set(xscale="log", xlim=(0.85, 75), xlabel="rank r")
            axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
            axes.grid(color="0.9")
        self._left.set(yscale="log", yticks=[])  # its axis follows the curves, and `_fit` writes its numbers
        right.set(ylim=(-3, 103), yticks=range(0, 101, 20))
        for axes in (self._left, right):
            axes.minorticks_off()
        self._levels = self._left.hlines([], *self._left.get_xlim(), color="0.9", linewidth=0.8)
        self._marks = [axes.axvline(1, color="0.4", linewidth=1) for axes in (self._left, right)]
        self._lines = [self._left.plot([], [], style, color=color)[0] for *_, style, color in CURVES]
        self._lines += [right.plot([], [], style, color=color)[0] for *_, style, color in WRONG]
        self.moving += [self._levels, *self._marks, *self._lines]

    def update(self, results: list[FineTuning], layer: str, rank: int) -> "ScalingPicture":
        """Shows one result for each of `RANKS`; returns the picture itself."""
        self.erase()
        scales = np.array([result.scale for result in results])
        norms = np.array([result.norms[layer] for result in results])
        curves = [norms / scales, scales, norms, *zip(*(wrong_shares(result) for result in results))]
        self._fit(np.concatenate(curves[:3]))
        self.write(0.75, 3.43, f"{layer}: ‖BA‖ × scale = ‖ΔW‖", size=11, anchor="lm")
        self.write(6.3, 3.43, "what the network does: wrong answers, %", size=11, anchor="lm")
        for x, (name, sign, _, color), line, heights in zip(KEYS, CURVES + WRONG, self._lines, curves):
            line.set_data(RANKS, heights)
            word = f"{name} ∝ {power(heights)}" if line.axes is self._left else name
            self.write_key(x, 3.2, sign, color, word)
        for mark in self._marks:
            mark.set_xdata([rank, rank])
        return self

    def _fit(self, heights: np.ndarray) -> None:
        low, high = heights.min() / 1.3, heights.max() * 1.3
        self._left.set_ylim(low, high)
        exponents = range(int(np.log10(low)) - 2, int(np.log10(high)) + 2)
        levels = [level for e in exponents for level in (10.0**e, 3 * 10.0**e) if low <= level <= high]
        self._levels.set_segments([[(0.85, level), (75, level)] for level in levels])
        for level in levels:
            self.write(0.82, level, f"{level:.3g}", axes=self._left, anchor="rm")


class ScalingLab(Panel):
    """Trains an adapter of each of seven ranks, and draws ‖BA‖, the scale and their product.

    Traits to read, set and observe: `rank` (one of `RANKS`), `alpha` (1/16 to 64), `rule` ("α/r", "α/√r", or
    "α" for no scaling) and `layer`. `results` holds the seven `FineTuning`s shown, by rank.

    Raises:
        ValueError: `base` already has LoRA, or is too small for rank 64. TraitError: a value not allowed.
    """

    rank = traitlets.Enum(RANKS, 4)
    alpha = traitlets.Float(1.0, min=1 / 16, max=64.0)
    rule = traitlets.Enum(tuple(RULES), "α/r")
    layer = traitlets.Enum(LAYERS, "linear2")
    results = traitlets.Dict()
    moves = ("rank", "alpha", "rule", "layer")

    def __init__(self, base: RichBoyNet, mnist: Mnist):
        self.tuner = FineTuner(base, mnist)
        self._picture = ScalingPicture()
        super().__init__()

    def arrange(self):
        controls = [
            self.control("rank", "rank r", "the rank whose numbers stand in the summary", options=RANKS),
            self.control("alpha", "α", "α: the strength of the update", powers=(-4, 6)),
            self._buttons("rule", "scale", list(RULES), list(RULES.values())),
            self._buttons("layer", "layer", LAYERS, 3 * ["whose ΔW is measured"]),
        ]
        return [row(*controls), self._words, self._image]

    def _buttons(self, trait, label, options, tips) -> widgets.HBox:
        # Not a menu: JupyterLab keeps arrow keys in a menu to itself, and goes to the next cell.
        buttons = widgets.ToggleButtons(options=options, tooltips=tips, style={"button_width": "auto"})
        self.fields[trait] = tie(self, trait, buttons)
        return row(widgets.Label(label), buttons)

    def compute(self, rank, alpha, rule, layer):
        wanted = [Setting(rank=r, alpha=alpha, rule=rule) for r in RANKS]
        results, origins = zip(*self.tuner.run_all(wanted, progress=self.show_training()))
        shown, norms = results[RANKS.index(rank)], [result.norms[layer] for result in results]
        norm, scale = shown.norms[layer], shown.scale
        nines, others = wrong_shares(shown)
        origin = "remembered" if set(origins) == {"remembered"} else "just trained"
        parts = [
            "LoRA on",
            f"rank {rank}",
            f"α {alpha:g}",
            f"scale {rule} = {scale:.3g}",
            f"{layer}: ‖BA‖ {norm / scale:.1f} × {scale:.3g} = ‖ΔW‖ {norm:.2f}",
            f"over the ranks ‖ΔW‖ ∝ {power(norms)}",
            f"9s wrong {nines:.1f}%",
            f"others wrong {others:.1f}%",
            f"seed 0, {origin}",
        ]
        draw = partial(self._picture.update, results, layer, rank)
        return draw, " · ".join(parts), {"results": dict(zip(RANKS, results))}


def power(heights) -> str:
    """The power of the rank that `heights` follow: the slope of the line through their logarithms."""
    exponent = np.polyfit(np.log(RANKS), np.log(heights), 1)[0]
    return f"r^{exponent:.2f}".replace("-", "−").replace("−0.00", "0.00")


def wrong_shares(result: FineTuning) -> tuple[float, float]:
    """Wrong answers in per cent, of the learned digit and of the others."""
    images = result.on.confusion.sum(dim=1)
    own = images[result.setting.digit].item()
    return 100 * result.wrong / max(own, 1), 100 * result.others_wrong / max(images.sum().item() - own, 1)
