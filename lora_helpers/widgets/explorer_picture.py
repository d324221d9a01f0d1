"""The explorer's picture and its words: a pure function of a fine-tuning and the switch."""

import numpy as np
import torch
from torch.utils.data import TensorDataset
from torchvision.utils import make_grid

from lora_helpers.experiments import FineTuning, Setting
from lora_helpers.training import Evaluation
from lora_helpers.widgets.pictures import COLORS, LivePicture, signed

STRIP = 12  # images repaired, and as many broken, that are shown
PALE = 0.35  # what LoRA would do if it were on
ORIGINS = {"just tested": "trained before, tested just now"}  # in words that explain themselves
SIGNS = (("●", "o"), ("■", "s"), ("▲", "^"))  # of the three layers, in words and in matplotlib
LEAST = 1e-3  # the singular values' axis begins here


def summarise(result: FineTuning, enabled: bool, origin: str = "") -> str:
    """One line of text that says what the picture shows; `origin` says where the result comes from."""
    s, now = result.setting, result.on if enabled else result.off
    wrong = result.off.wrong_counts[s.digit], now.wrong_counts[s.digit]
    others = sum(result.off.wrong_counts) - wrong[0], sum(now.wrong_counts) - wrong[1]
    parts = [
        f"LoRA {'on' if enabled else 'off'}",
        f"rank {s.rank}",
        alpha_of(s),
        f"{s.batches} batches of digit {s.digit}" + (f" with {s.share:.0%} others" if s.share else ""),
        f"{s.digit} wrong {_change(*wrong)}",
        f"others wrong {_change(*others)}",
        f"accuracy {result.off.accuracy:.1%} → {now.accuracy:.1%}",
        f"{result.trained:,} trained parameters ({result.trained / result.base_parameters:.2%} of the base)",
        f"seed {s.seed}" + (f", {ORIGINS.get(origin, origin)}" if origin else ""),
    ]
    return " · ".join(parts)


def alpha_of(setting: Setting) -> str:
    """α, and the strength where it is not 1, in words."""
    return f"α {setting.alpha:g}" + (f", strength {setting.strength:g}" if setting.strength != 1 else "")


class ExplorerPicture(LivePicture):
    """Wrong answers per digit, what is taken for what, images repaired and broken, and singular values of ΔW.

    Args:
        test: the test set whose images are shown.
        off: the base's test. It sets the axis of the bars, for all settings.
    """

    def __init__(self, test: TensorDataset, off: Evaluation):
        self._images, self._off = test.tensors[0], off
        self._top = max(20, 50 * round(max(off.wrong_counts) / 20))  # 2.5 times the base's highest bar
        super().__init__(11, 4.7)

    def build(self) -> None:
        axes = self._bar_axes = self.place(0.5, 2.2, 4.6, 2.2, "wrong answers per digit")
        self._bars = self.bars(axes)
        axes.set_ylim(0, 1.1 * self._top)
        self._base_map, self._now_map = self._map(5.6, "mistakes, base"), self._map(8.45)
        self._fill_map(self._base_map, self._off)  # the base stays the same
        self.moving.append(self._now_map)
        self._strips = [self._strip(1.15), self._strip(0.23)]
        self._make_spectrum()

    def _map(self, left: float, title: str = ""):
        axes = self.place(left, 2.2, 2.4, 2.2, title)
        axes.set(xticks=range(10), yticks=range(10))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("answer", fontsize=9, labelpad=1)
        axes.set_ylabel("digit", fontsize=9, labelpad=2)
        return axes.imshow(np.zeros((10, 10)), cmap="Blues", aspect="auto", vmin=0, vmax=1)

    def _strip(self, bottom: float):
        axes = self.place(0.1, bottom, 5.4, 5.4 / STRIP)
        axes.axis("off")
        image = axes.imshow(np.zeros((28, 28 * STRIP)), cmap="gray_r", vmin=0, vmax=1, aspect="auto")
        self.moving.append(image)
        return image

    def _make_spectrum(self) -> None:
        axes = self.place(6.3, 0.4, 2.5, 1.15, "singular values of ΔW")
        axes.set(xscale="log", yscale="log", xlim=(0.8, 80), ylim=(LEAST, 1e3))
        axes.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
        axes.set_yticks([1e-3, 0.1, 10, 1000], ["0.001", "0.1", "10", "1000"])
        axes.minorticks_off()
        axes.grid(color="0.9")
        axes.set_xlabel("number", fontsize=9, labelpad=1)
        self._points = [
            axes.plot([], [], marker, color=color, markersize=5, clip_on=False)[0]
            for color, (_, marker) in zip(COLORS, SIGNS)
        ]
        self.moving += self._points

    def update(self, result: FineTuning, enabled: bool) -> "ExplorerPicture":
        """Shows `result` with LoRA on or off; returns the picture itself."""
        now, label = (result.on, "LoRA on") if enabled else (result.off, "LoRA off")
        self.erase()
        self._update_bars(result, now, label)
        self._fill_map(self._now_map, now)
        self.write(8.45, 4.54, f"mistakes, {label}", size=11, anchor="lm")
        kinds = ("repaired", result.repaired), ("broken", result.broken)
        for strip, (kind, indices) in zip(self._strips, kinds):
            heading = f"{kind} by LoRA" if enabled else f"{kind} if LoRA were on"
            self._update_strip(strip, indices, f"{heading}: {len(indices):,}", result, enabled)
        self._update_spectrum(result, enabled)
        return self

    def _update_bars(self, result, now, label):
        axes = self._bar_axes
        for bars, shift, counts in zip(self._bars, (-0.2, 0.2), (result.off.wrong_counts, now.wrong_counts)):
            for digit, (bar, count) in enumerate(zip(bars, counts)):
                bar.set_height(min(count, self._top))
                if count > self._top:  # the axis stays, so the number says how far the bar would go
                    self.write(digit + shift, 0.95 * self._top, f"{count}", axes=axes, size=8, halo=2)
        for digit, (old, new) in enumerate(zip(result.off.wrong_counts, now.wrong_counts)):
            height = min(max(old, new), self._top) + 0.04 * self._top
            self.write(digit, height, signed(new - old), axes=axes)
        self.write(4.42, 4.56, label, size=10, anchor="lm")
        self.write(result.setting.digit, -0.14 * self._top, "▲ learned", axes=axes)

    def _fill_map(self, image, shown: Evaluation):
        mistakes = shown.confusion.clone().fill_diagonal_(0).numpy()
        most = (
            shown.confusion.sum(dim=1).max().item()
        )  # images of a digit: one shade is one number in every map
        shades = np.sqrt(mistakes / most)  # the root, so that rare mistakes are seen too
        self.fill(image, shades, [f"{count}" if count else "" for count in mistakes.flat])

    def _update_strip(self, image, indices, heading, result, enabled):
        count = min(STRIP, len(indices))
        places = torch.linspace(0, len(indices) - 1, count, dtype=torch.float32).round().long()
        chosen = indices[places].tolist()
        mosaic = torch.zeros(28, 28 * STRIP, dtype=torch.float32)
        if chosen:
            grid = make_grid(self._images[chosen], nrow=STRIP, padding=0, normalize=True, scale_each=True)
            mosaic[:, : 28 * len(chosen)] = grid[0]
        image.set_data(mosaic.numpy())
        image.set_alpha(1 if enabled else PALE)
        for n, index in enumerate(chosen):
            change = f"{result.off.predictions[index]} → {result.on.predictions[index]}"
            self.write(28 * n + 13.5, 33.5, change, axes=image.axes)
        self.write(-0.5, -6, f"{heading} (base's answer → LoRA's)", axes=image.axes, size=10, anchor="lm")

    def _update_spectrum(self, result, enabled):
        lines = zip(self._points, COLORS, SIGNS, result.singular_values.values(), result.norms.items())
        for n, (points, color, (sign, _), values, (name, norm)) in enumerate(lines):
            values = values[values >= LEAST]
            points.set_data(np.arange(1, len(values) + 1), values)
            points.set_alpha(1 if enabled else PALE)  # there, but not added to the weights
            self.write_key(9.15, 1.45 - 0.22 * n, sign, color, f"{name}  ‖ΔW‖ {norm:.3g}")


def _change(old: int, new: int) -> str:
    return f"{old} → {new} ({signed(new - old)})"
