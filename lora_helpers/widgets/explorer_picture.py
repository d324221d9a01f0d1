"""The explorer's picture and its words: a pure function of a fine-tuning and the switch."""

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from torch.utils.data import TensorDataset

from lora_helpers.finetuning import FineTuning
from lora_helpers.plots import AFTER, BEFORE, ink
from lora_helpers.training import Evaluation
from lora_helpers.widgets.pictures import LivePicture, Words, signed

LAYER_STYLES = ((BEFORE, "o"), ("#D55E00", "s"), ("#009E73", "^"))  # Okabe and Ito's palette, and a shape each
STRIP = 12  # images repaired, and as many broken, that are shown
PALE = 0.35  # what LoRA would do if it were on
ORIGINS = {"just tested": "trained before, tested just now"}  # in words that explain themselves
REMEMBERED = 32  # drawings, of some 100 kB each
TICKS = MaxNLocator(nbins=6, steps=[1, 2, 5, 10])
ZERO = 1e-3  # where a logarithmic axis draws zero, and all that is smaller


def summarise(result: FineTuning, enabled: bool, origin: str = "") -> str:
    """One line of text that says what the picture shows; `origin` says how the result was come by."""
    s, now = result.settings, result.on if enabled else result.off
    lesson = f"{s.batches} batches of digit {s.digit}" + (f" with {s.share:.0%} others" if s.share else "")
    return " · ".join(
        [
            f"LoRA {'on' if enabled else 'off'}",
            f"rank {s.rank}",
            f"α {s.alpha:g}",
            lesson,
            f"{s.digit} wrong {_change(result.off.wrong_counts[s.digit], now.wrong_counts[s.digit])}",
            f"others wrong {_change(_others(result.off, s.digit), _others(now, s.digit))}",
            f"accuracy {result.off.accuracy:.1%} → {now.accuracy:.1%}",
            f"{result.trainable:,} trained parameters ({result.trainable / result.base_parameters:.2%} of the base)",
            f"seed {s.seed}" + (f", {ORIGINS.get(origin, origin)}" if origin else ""),
        ]
    )


class ExplorerPicture(LivePicture):
    """Wrong answers per digit, what is mistaken for what, the singular values of ΔW, and images repaired and broken.

    Args:
        test: the test set whose images are shown.
        ranks: the highest rank that the ΔW of each layer can have.
        caption: leaves room for the summary, for places where no text stands beside the picture.
    """

    def __init__(self, test: TensorDataset, ranks: dict[str, int], caption: bool = False):
        super().__init__(11, 4.55, caption)
        self._images = test.tensors[0]
        self._ranks = ranks
        self._of, self._drawn = None, {}
        self._make_bars()
        self._base_map, self._now_map = self._make_map(4.95), self._make_map(7.2)
        self._base_map[0].set_ylabel("digit", fontsize=9, labelpad=1)
        self._base_map[0].set_title("mistakes, base", loc="center", fontsize=11)
        axes, image, numbers = self._now_map
        self._now_title = Words(axes, fontsize=11, inches=True)
        self._moving += [image, self._now_title, numbers]
        self._make_spectrum()
        self._strips = [self._make_strip(x) for x in (0.1, 5.6)]

    def _make_bars(self):
        axes = self._axes_bars = self._place(0.45, 1.55, 4.05, 2.7)
        digits = np.arange(10)
        self._bars = [
            axes.bar(digits + shift, np.ones(10), 0.4, color=color, hatch=hatch, edgecolor="white", linewidth=0.5)
            for shift, color, hatch in ((-0.2, BEFORE, ""), (0.2, AFTER, "///"))
        ]
        self._changes = Words(axes, fontsize=9.5, room=4)
        self._scale = Words(axes, fontsize=10, room=6, align="right")
        self._learned = Words(axes, fontsize=9, inches=True)
        self._bars_label = Words(axes, fontsize=10, align="left", inches=True)
        axes.set(xlim=(-0.6, 9.6), xticks=digits, yticks=[])
        axes.tick_params(labelsize=10, length=0)
        axes.set_title("wrong answers per digit", loc="left", fontsize=11)
        axes.legend(self._bars, ["base", " " * 14], loc="lower right", frameon=False, fontsize=10, ncols=2, borderpad=0,
                    bbox_to_anchor=(1, 1.02), handlelength=1.4, columnspacing=1)  # fmt: skip
        self._moving += [*self._bars[0], *self._bars[1], self._changes, self._scale, self._learned, self._bars_label]

    def _make_map(self, left):
        axes = self._place(left, 1.55, 2.05, 2.7)
        image = axes.imshow(np.zeros((10, 10)), cmap="Blues", aspect="auto", vmin=0, vmax=1)
        numbers = Words(axes, fontsize=8, room=3)
        axes.set(xticks=range(10), yticks=range(10))
        axes.tick_params(labelsize=9, length=0, pad=2)
        axes.set_xlabel("answer", fontsize=9, labelpad=1)
        return axes, image, numbers

    def _make_spectrum(self):
        axes = self._axes_spectrum = self._place(9.75, 2.4, 1.15, 1.85)
        axes.set(xscale="log", yscale="log", xlim=(0.8, 80), ylim=(ZERO / 2, 2000))
        axes.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
        axes.set_yticks([ZERO, 0.01, 0.1, 1, 10, 100, 1000], ["≤10⁻³", "0.01", "0.1", "1", "10", "100", "1000"])
        axes.minorticks_off()
        axes.tick_params(labelsize=9, length=2, pad=2)
        axes.set_xlabel("number", fontsize=9, labelpad=1)
        axes.set_title("singular values of ΔW", loc="right", fontsize=11)
        self._edge = axes.axvline(1, color="0.4", linewidth=1, linestyle="--")
        self._points = [axes.plot([], [], marker, color=color, markersize=4)[0] for color, marker in LAYER_STYLES]
        self._norms = Words(axes, fontsize=10, room=5, align="left", inches=True)
        for row, (name, (color, marker)) in enumerate(zip(self._ranks, LAYER_STYLES)):
            self._write(9.6, 1.83 - 0.2 * row, fontsize=10, va="center").set_text(f"{name} ‖ΔW‖")
            axes.plot([-0.2], [-0.31 - 0.108 * row], marker, color=color, markersize=6, transform=axes.transAxes, clip_on=False)
        self._moving += [self._edge, *self._points, self._norms]

    def _make_strip(self, left):
        axes = self._place(left, 0.3, 5.3, 5.3 / STRIP)
        image = axes.imshow(np.zeros((28, 28 * STRIP)), cmap="gray_r", vmin=0, vmax=1, aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        answers = Words(axes, fontsize=9.5, room=5)
        self._write(left + 5.3, 0.85, fontsize=9.5, ha="right", va="center", color="0.3").set_text(f"up to {STRIP} shown: base's answer → LoRA's")
        heading = Words(axes, fontsize=11, align="left", inches=True)
        self._moving += [image, heading, answers]
        return left, heading, image, answers

    def update(self, result: FineTuning, enabled: bool, summary: str) -> "ExplorerPicture":
        """Shows `result` with LoRA on or off; returns the picture itself."""
        now, label = (result.on, "LoRA on") if enabled else (result.off, "LoRA off")
        self._of = (result, enabled, self._caption.get_visible() and summary)
        self.describe(summary)
        self._update_bars(result, now, label)
        if self._background is None:  # the base stays the same, its shades too
            _fill_map(self._base_map, result.off)
        _fill_map(self._now_map, now)
        self._now_title.write([(8.225, 4.38, f"mistakes, {label}", "black")])
        self._update_spectrum(result, enabled)
        for strip, indices, (done, would) in zip(self._strips, (result.repaired, result.broken), (("repaired", "repair"), ("broken", "break"))):
            self._update_strip(strip, indices, f"{done} by LoRA:" if enabled else f"LoRA on would {would}:", result, enabled)
        return self

    def png(self) -> bytes:
        """The picture as PNG; what was drawn lately is not drawn again, so that the switch can go back and forth at once."""
        self.fit()
        key = (self._of, self.dpi)
        if key not in self._drawn:
            self._drawn[key] = super().png()
            if len(self._drawn) > REMEMBERED:
                del self._drawn[next(iter(self._drawn))]
        return self._drawn[key]

    def _update_bars(self, result, now, label):
        heights = result.off.wrong_counts, now.wrong_counts
        top = max(*result.off.wrong_counts, *result.on.wrong_counts, 10)  # whatever the switch: the base's bars keep their height
        self._axes_bars.set_ylim(0, top * 1.1)
        self._scale.write((-0.75, tick, f"{tick:.0f}", "black") for tick in TICKS.tick_values(0, top) if 0 <= tick <= top * 1.1)
        x = 0.45 + 4.05 * (result.settings.digit + 0.6) / 10.2
        self._learned.write([(x, 1.27, "▲", "black"), (x, 1.11, "learned", "black")])
        for bars, values in zip(self._bars, heights):
            for bar, value in zip(bars, values):
                bar.set_height(value)
        above = top * 0.035
        self._changes.write((digit, max(old, new) + above, signed(new - old), "black") for digit, (old, new) in enumerate(zip(*heights)))
        self._bars_label.write([(3.95, 4.45, label, "black")])

    def _update_spectrum(self, result, enabled):
        for points, (name, values) in zip(self._points, result.singular_values.items()):
            heights = np.full(min(64, self._ranks[name]), ZERO)
            heights[: len(values)] = values.clamp(min=ZERO)
            points.set_data(np.arange(1, len(heights) + 1), heights)
            points.set_alpha(1 if enabled else PALE)  # there, but not added to the weights
        self._norms.write((10.56, 1.83 - 0.2 * row, _three_digits(norm), "black") for row, norm in enumerate(result.norms.values()))
        self._edge.set_xdata([result.settings.rank * 1.1] * 2)

    def _update_strip(self, strip, indices, words, result, enabled):
        left, heading, image, answers = strip
        places = torch.linspace(0, len(indices) - 1, min(STRIP, len(indices)), device=indices.device).round().long()
        chosen = indices[places].tolist()
        mosaic = np.zeros((28, 28 * STRIP))
        for n, index in enumerate(chosen):
            pixels = self._images[index].reshape(28, 28).cpu().numpy()
            mosaic[:, 28 * n : 28 * n + 28] = (pixels - pixels.min()) / (np.ptp(pixels) or 1)  # an empty image has no ink
        changes = [f"{result.off.predictions[index]} → {result.on.predictions[index]}" for index in chosen]
        answers.write((28 * n + 13.5, 33, change, "black") for n, change in enumerate(changes))
        image.set_data(mosaic)
        image.set_alpha(1 if enabled else PALE)
        heading.write([(left, 0.85, words, "black"), (left + heading.width(words) + 0.08, 0.85, f"{len(indices):,}", "black")])


def _fill_map(part, shown: Evaluation) -> None:
    _, image, numbers = part
    mistakes = shown.confusion.clone().fill_diagonal_(0).numpy()
    most = shown.confusion.sum(dim=1).max().item()  # all images of a digit: in every map, one shade is one number
    shades = np.sqrt(mistakes / most)  # the root, so that rare mistakes are seen too
    image.set_data(shades)
    numbers.write(
        (x, y, str(count) if count else "", ink(ground))
        for (y, x), count, ground in zip(np.ndindex(mistakes.shape), mistakes.flat, image.to_rgba(shades).reshape(-1, 4))
    )


def _three_digits(norm: float) -> str:
    return f"{norm:.0f}" if norm >= 100 else f"{norm:.1f}" if norm >= 1 else f"{norm:.2g}"


def _others(shown: Evaluation, digit: int) -> int:
    return sum(shown.wrong_counts) - shown.wrong_counts[digit]


def _change(old: int, new: int) -> str:
    return f"{old} → {new} ({signed(new - old)})"
