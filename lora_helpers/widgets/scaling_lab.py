"""The scaling lab: what rank, α and the rule of scaling do to ‖BA‖, to the scale, and to their product."""

import ipywidgets as widgets
import numpy as np
import traitlets

from lora_helpers.data import Mnist
from lora_helpers.finetuning import FineTuner, FineTuning, Settings
from lora_helpers.model import RichBoyNet
from lora_helpers.scaling import alpha_for, slope
from lora_helpers.widgets.common import FIELD, WRAP, Finite, Panel, paired, powers_of_two, tie
from lora_helpers.widgets.pictures import LivePicture

RANKS = (1, 2, 4, 8, 16, 32, 64)
RULES = {"none": "α", "α/r": "α/r", "α/√r": "α/√r"}  # as learners say it, and as lora_helpers.scaling does
CURVES = (("‖BA‖", "#0072B2", "o", "--", "●"), ("scale", "#D55E00", "s", ":", "■"), ("product, ‖ΔW‖", "#009E73", "^", "-", "▲"))
LOW, HIGH = 5e-4, 1e6  # from α/r at its least; above the highest curve there is room for words


class ScalingPicture(LivePicture):
    """Left: ‖BA‖, scale and product over the rank, both axes logarithmic. Right: what the network then does."""

    def __init__(self, caption: bool = False):
        super().__init__(11, 3.6, caption)
        axes = self._axes = self._place(0.75, 0.5, 4.6, 2.75)
        axes.set(xscale="log", yscale="log", xlim=(0.85, 75), ylim=(LOW, HIGH))
        self._lines = [axes.plot([], [], line, marker=marker, color=color, markersize=6)[0] for _, color, marker, line, _ in CURVES]
        self._words = []
        for row, (_, color, _, _, sign) in enumerate(CURVES):  # words are black, to be read; the sign has the curve's colour
            axes.text(0.03, 0.95 - 0.08 * row, sign, color=color, fontsize=11, va="top", transform=axes.transAxes)
            self._words.append(axes.text(0.07, 0.95 - 0.08 * row, "", fontsize=11, va="top", transform=axes.transAxes))
        self._title = axes.text(0, 1.04, "", fontsize=11, transform=axes.transAxes)
        right = self._place(6.3, 0.5, 4.5, 2.75)
        right.set(xscale="log", xlim=(0.85, 75), ylim=(-3, 122), yticks=range(0, 101, 20))
        right.set_title("what the network does: wrong answers, %", loc="left", fontsize=11)
        self._nines = right.plot([], [], "-D", color="#CC79A7", markersize=6)[0]
        self._others = right.plot([], [], "--v", color="#000000", markersize=6)[0]
        for x, sign, color in ((1, "◆", "#CC79A7"), (4, "▼", "black")):
            right.text(x, 111, sign, fontsize=11, va="center", color=color)
        self._right_words = [right.text(x * 1.22, 111, "", fontsize=11, va="center") for x in (1, 4)]
        self._marks = []
        for part, top in ((axes, 0.73), (right, 0.83)):  # the mark leaves the words alone
            part.set_xticks(RANKS, [str(rank) for rank in RANKS])
            part.minorticks_off()
            part.set_xlabel("rank r", fontsize=10)
            part.tick_params(labelsize=9)
            part.grid(color="0.9")
            self._marks.append(part.axvline(1, ymax=top, color="0.4", linewidth=1, linestyle="-."))
        self._moving += [*self._marks, *self._lines, *self._words, self._title, self._nines, self._others, *self._right_words]

    def update(self, results: list[FineTuning], scales: list[float], layer: str, rank: int, summary: str) -> "ScalingPicture":
        """Shows one result for each of `RANKS`, trained at `scales`; returns the picture itself."""
        self.describe(summary)
        norms = np.array([result.norms[layer] for result in results])
        values = norms / scales, np.array(scales), norms
        for line, word, heights, (name, *_) in zip(self._lines, self._words, values, CURVES):
            line.set_data(RANKS, heights)
            word.set_text(f"{name} ∝ r^{slope(RANKS, heights.tolist()):.2f}".replace("-", "−").replace("−0.00", "0.00"))
        self._title.set_text(f"{layer}: ‖BA‖ × scale = ‖ΔW‖")
        digit = results[0].settings.digit
        nines, others = zip(*(_wrong_shares(result) for result in results))
        self._nines.set_data(RANKS, nines)
        self._others.set_data(RANKS, others)
        for word, text in zip(self._right_words, (f"{digit}s", "other digits")):
            word.set_text(text)
        for mark in self._marks:
            mark.set_xdata([rank, rank])
        return self


class ScalingLab(Panel):
    """Trains an adapter of each of seven ranks, α and rule as chosen, and draws ‖BA‖, the scale and their product.

    Traits to read, set and observe: `rank` (one of `RANKS`), `alpha` (1/16 to 64), `rule` ("none", "α/r" or "α/√r")
    and `layer`. `results` holds the seven `FineTuning`s shown, by rank. All are remembered.
    """

    rank = traitlets.Enum(RANKS, 4)
    alpha = Finite(1.0, min=1 / 16, max=64.0)
    rule = traitlets.Enum(tuple(RULES), "α/r")
    layer = traitlets.Enum(("linear1", "linear2", "linear3"), "linear2")
    results = traitlets.Dict()

    def __init__(self, base: RichBoyNet, mnist: Mnist):
        self.tuner = FineTuner(base, mnist)
        self._picture = ScalingPicture()
        rank_tip, alpha_tip = "the rank whose numbers stand in the summary", "α: the strength of the update"
        self.rank_slider = widgets.SelectionSlider(options=RANKS, value=self.rank, readout=False, continuous_update=False,
                                                   tooltip=rank_tip, layout=widgets.Layout(width="190px"))  # fmt: skip
        self.rank_field = widgets.Dropdown(options=RANKS, value=self.rank, description="rank r", tooltip=rank_tip, **FIELD)
        self.alpha_slider = powers_of_two(-4, 6, self.alpha, alpha_tip)
        self.alpha_field = widgets.BoundedFloatText(self.alpha, min=1 / 16, max=64, step=1 / 16, description="α", tooltip=alpha_tip, **FIELD)
        # Buttons, for JupyterLab keeps arrow keys in a menu to itself: they go to the next cell.
        self.rule_field = _choice("scale", list(RULES), self.rule, ["α at every rank", "as in LoRA", "as in rsLoRA"])
        self.layer_field = _choice("layer", ["linear1", "linear2", "linear3"], self.layer, 3 * ["whose ΔW is measured"])
        self._progress = widgets.IntProgress(description="training", layout=widgets.Layout(width="190px", visibility="hidden"))
        row = [
            paired(self, "rank", self.rank_field, self.rank_slider),
            paired(self, "alpha", self.alpha_field, self.alpha_slider),
            tie(self, "rule", self.rule_field),
            tie(self, "layer", self.layer_field),
            self._progress,
        ]
        super().__init__([widgets.HBox(row, layout=WRAP)])
        self._follow("rank", "alpha", "rule", "layer")

    def _refresh(self, state):
        rank, alpha, rule, layer = state
        wanted = [Settings(rank=r, alpha=alpha_for(RULES[rule], r, alpha)) for r in RANKS]
        try:
            self.tuner.train_ahead(wanted, self._show_training)
            results, origins = zip(*(self.tuner.run(settings, stops=()) for settings in wanted))
        finally:
            self._progress.layout.visibility = "hidden"
        scales = [result.settings.alpha / result.settings.rank for result in results]
        place = RANKS.index(rank)
        shown, norm = results[place], results[place].norms[layer]
        nines, others = _wrong_shares(shown)
        summary = (
            f"LoRA on · rank {rank} · α {alpha:g} · scale {'α at every rank' if rule == 'none' else rule} = {scales[place]:.3g} · {layer}: ‖BA‖ {norm / scales[place]:.1f} × "
            f"{scales[place]:.3g} = ‖ΔW‖ {norm:.2f} · over the ranks ‖ΔW‖ ∝ r^{slope(RANKS, [r.norms[layer] for r in results]):.2f} · "
            f"{shown.settings.digit}s wrong {nines:.0f}% · others wrong {others:.0f}% · seed 0, "
            f"{'remembered' if set(origins) == {'remembered'} else 'just trained'}"
        ).replace("^-", "^−")
        arguments = results, scales, layer, rank, summary
        return self._picture.update(*arguments), summary, {"_arguments": arguments, "results": dict(zip(RANKS, results))}

    def _show_training(self, done: int, total: int) -> None:
        if done % 10 == 0:
            self._progress.max, self._progress.value, self._progress.layout.visibility = total, done, "visible"

    def _draw(self) -> ScalingPicture:
        return ScalingPicture(caption=True).update(*self._arguments)


def _choice(name: str, options: list[str], value: str, tooltips: list[str]) -> widgets.ToggleButtons:
    return widgets.ToggleButtons(
        options=options, value=value, description=name, tooltips=tooltips, style={"button_width": "auto", "description_width": "auto"}
    )


def _wrong_shares(result: FineTuning) -> tuple[float, float]:
    """Wrong answers in per cent, of the learned digit and of the others."""
    digit, confusion = result.settings.digit, result.on.confusion
    wrong, images = result.on.wrong_counts, confusion.sum(dim=1).tolist()
    others = sum(images) - images[digit]
    return 100 * wrong[digit] / max(images[digit], 1), 100 * (sum(wrong) - wrong[digit]) / max(others, 1)  # there may be none
