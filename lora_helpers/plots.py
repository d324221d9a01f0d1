"""Pictures. Each function returns a `Picture`: a figure made without pyplot, so nothing is drawn twice."""

import base64
import html
import io
import operator
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image  # comes with matplotlib
from torch.utils.data import TensorDataset

from lora_helpers.checks import check_whole
from lora_helpers.data import as_tensors
from lora_helpers.experiments import FineTuning
from lora_helpers.training import Evaluation

# Okabe and Ito's palette, told apart by colour-blind readers; hatching says the same without colour.
BEFORE, AFTER = "#0072B2", "#E69F00"
LOOKS = ((BEFORE, "o"), (AFTER, "^"), ("#009E73", "s"), ("#CC79A7", "X"))  # of groups of points

# Pictures look the same whatever style the session has set. The backend is the session's own business.
PLAIN = {
    key: value
    for key, value in matplotlib.rcParamsDefault.items()
    if not key.startswith(("backend", "webagg"))
}
in_plain_style = matplotlib.rc_context(PLAIN)  # a decorator, for whatever makes or draws a picture

_type_scale = 1.0


def set_type_scale(scale: float) -> None:
    """How large the type of all pictures drawn from now on is, 1 being usual. `projector_mode` calls it."""
    global _type_scale
    _type_scale = scale


def ink(ground: tuple[float, ...]) -> str:
    """Black or white, whichever can be read better on `ground`, given as red, green and blue from 0 to 1.

    Source: relative luminance and contrast of WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio;
    0.179 is where both are alike.
    """
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in ground[:3])
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179 else "black"


class Picture(Figure):
    """A matplotlib figure that a notebook shows by itself, with words for those who cannot see it.

    It is shown where it is the value of a cell's last line; elsewhere, as in a loop, call `display(picture)`.
    """

    def __init__(self, alt: str, dpi: float = 100, **kwargs):
        super().__init__(layout="constrained", dpi=dpi, **kwargs)
        self.alt = alt

    @in_plain_style
    def png(self) -> bytes:
        """The picture as PNG, with the type size that `projector_mode` asks for."""
        with self._type_scaled():
            canvas = FigureCanvasAgg(self)
            canvas.draw()  # once: `savefig` draws twice where the layout is constrained
        # 128 colours look the same at a third of the size: what a notebook stores is fetched by every reader.
        buffer = io.BytesIO()
        pixels(canvas).quantize(128, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
        return buffer.getvalue()

    @contextmanager
    def _type_scaled(self) -> Iterator[None]:
        # When drawn, not when made: so one call also reaches the pictures of widgets that exist already.
        if _type_scale == 1:
            yield
            return
        self.draw_without_rendering()  # makes the labels of the ticks
        sizes = {text: text.get_fontsize() for text in self.findobj(Text)}
        for text, size in sizes.items():
            text.set_fontsize(size * _type_scale)
        try:
            yield
        finally:
            for text, size in sizes.items():
                text.set_fontsize(size)

    def _repr_mimebundle_(self, **kwargs):
        # JupyterLab and exported pages show the HTML, for an image/png loses its alt there. The PNG is for
        # places without HTML: a PDF made by LaTeX, and some sites that host code.
        png = self.png()
        encoded = base64.b64encode(png).decode()
        data = {"text/html": as_html(png, self.alt), "image/png": encoded, "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt}}


def pixels(canvas: FigureCanvasAgg) -> Image.Image:
    """What is drawn on `canvas`, in red, green and blue."""
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")


def as_html(png: bytes, alt: str) -> str:
    """An `<img>` that holds `png`. Its size is given and decoding waits, so that nothing jumps."""
    width, height = Image.open(io.BytesIO(png)).size
    style = "max-width: 100%; height: auto; border-radius: 4px; display: block"
    return (
        f'<img alt="{html.escape(alt)}" width="{width}" height="{height}" decoding="sync" style="{style}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    )


@in_plain_style
def show_digits(dataset: TensorDataset, indices=None, titles=None) -> Picture:
    """A row of digits. `indices`: which images (default: the first of each label). `titles`: one for each
    (default: its label).

    Raises:
        ValueError: there is no such image, none is asked for, or there are more or fewer titles than images.
        TypeError: `dataset` is no `TensorDataset` of images and labels, or `indices` no whole numbers.
    """
    images, labels = as_tensors(dataset)
    if indices is None:
        indices = [(labels == digit).nonzero()[0].item() for digit in labels.unique().tolist()]
    try:
        indices = [operator.index(index) for index in indices]
    except TypeError:
        raise TypeError(
            f"indices is {indices!r}; it must be a list of whole numbers, such as [0, 1, 2]."
        ) from None
    if not indices or not all(-len(labels) <= index < len(labels) for index in indices):
        raise ValueError(
            f"indices is {indices}; it must name at least one image, from 0 to {len(labels) - 1}."
        )
    if titles and len(titles) != len(indices):
        raise ValueError(f"There are {len(titles)} titles for {len(indices)} images; give as many.")
    names = titles or [str(labels[index].item()) for index in indices]
    figure = Picture(f"Digits: {', '.join(names)}", figsize=(max(1.1 * len(indices), 2), 1.5))
    for place, (axes, index) in enumerate(zip(figure.subplots(1, len(indices), squeeze=False)[0], indices)):
        axes.imshow(images[index].reshape(28, 28).cpu().numpy(), cmap="gray_r")
        axes.set_title(names[place], fontsize=10)
        axes.axis("off")
    return figure


@in_plain_style
def plot_losses(losses: list[float], window: int = 50) -> Picture:
    """The loss of each batch (nats), and its running mean over `window` batches.

    Raises:
        ValueError: there are no losses, or `window` is no whole number of at least 1.
        TypeError: `losses` is no list of numbers.
    """
    try:
        values = torch.tensor([float(loss) for loss in losses], dtype=torch.float32)
    except (TypeError, ValueError):
        raise TypeError(
            f"losses is {losses!r}; it must be the list that train returns: losses = train(net, mnist.train)."
        ) from None
    if not len(values):
        raise ValueError("There are no losses to draw; train first: losses = train(net, mnist.train).")
    check_whole("window", window)
    figure = Picture(
        f"Loss of {len(values)} batches, from {values[0]:.2f} to {values[-1]:.2f}", figsize=(7, 2.6)
    )
    axes = figure.subplots()
    axes.plot(values, color="0.75", linewidth=0.7, label="each batch")
    if len(values) > window:
        axes.plot(
            range(window - 1, len(values)),
            values.unfold(0, window, 1).mean(dim=1),
            color=BEFORE,
            label=f"mean of {window}",
        )
    axes.set(xlabel="batch", ylabel="cross-entropy", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


@in_plain_style
def plot_confusion(result: Evaluation) -> Picture:
    """What is mistaken for what: the right answers on the diagonal are left blank.

    Raises:
        TypeError: `result` is not what `evaluate` returns.
    """
    _check_evaluation("result", result)
    wrong = result.confusion.clone().fill_diagonal_(0)
    figure = Picture(
        f"Confusion matrix; wrong answers of digits 0 to 9: {result.wrong_counts}", figsize=(4.8, 4.4)
    )
    axes = figure.subplots()
    image = axes.imshow(wrong.numpy(), cmap="Blues")
    for true, row in enumerate(wrong.tolist()):
        for answer, count in enumerate(row):
            if count:
                axes.text(
                    answer, true, count, ha="center", va="center", color=ink(image.to_rgba(count)), fontsize=8
                )
    axes.set(
        xlabel="the network's answer",
        ylabel="the digit",
        xticks=range(10),
        yticks=range(10),
        title="wrong answers",
    )
    return figure


@in_plain_style
def plot_wrong_counts(before: Evaluation, after: Evaluation, labels=("LoRA off", "LoRA on")) -> Picture:
    """Wrong answers per digit, before beside after, the change written above.

    Raises:
        TypeError: `before` or `after` is not what `evaluate` returns.
    """
    _check_evaluation("before", before)
    _check_evaluation("after", after)
    alt = (
        f"Wrong answers of digits 0 to 9: {labels[0]} {before.wrong_counts}, {labels[1]} {after.wrong_counts}"
    )
    figure = Picture(alt, figsize=(7.5, 3))
    axes = figure.subplots()
    top = max(before.wrong_counts + after.wrong_counts + [1])
    for shift, result, color, hatch, label in (
        (-0.2, before, BEFORE, "", labels[0]),
        (0.2, after, AFTER, "//", labels[1]),
    ):
        axes.bar(
            [d + shift for d in range(10)],
            result.wrong_counts,
            0.4,
            color=color,
            hatch=hatch,
            edgecolor="white",
            label=label,
        )
    for digit, (old, new) in enumerate(zip(before.wrong_counts, after.wrong_counts)):
        axes.text(digit, max(old, new) + top * 0.02, f"{new - old:+d}", ha="center", fontsize=9)
    axes.set(xlabel="digit", ylabel="wrong answers", xticks=range(10), ylim=(0, top * 1.15))
    axes.legend(frameon=False)
    return figure


@in_plain_style
def plot_luck(groups: dict[str, list[FineTuning]]) -> Picture:
    """Fine-tunings that differ in their seed only: wrong answers on the learned digit, by those on others.

    Args:
        groups: by name, the fine-tunings of one base; at most four.
    """
    figure = Picture("", figsize=(7, 3.6))
    axes = figure.subplots()
    said = []
    for (name, runs), (color, marker) in zip(groups.items(), LOOKS):
        others, wrong = [run.others_wrong for run in runs], [run.wrong for run in runs]
        axes.scatter(
            others, wrong, color=color, marker=marker, edgecolor="black", linewidth=0.5, alpha=0.8, label=name
        )
        said.append(f"{name}: {min(wrong)} to {max(wrong)} wrong, others {min(others)} to {max(others)}")
    digit = runs[0].setting.digit
    _draw_base(axes, runs[0].off, digit)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False)
    figure.alt = f"Wrong answers on digit {digit} and on the others, one point a seed. " + "; ".join(said)
    return figure


@in_plain_style
def plot_cures(base: Evaluation, cures: dict[str, list[tuple[str, Evaluation]]], digit: int = 9) -> Picture:
    """Networks on one map: wrong answers on the learned digit, by those on all others.

    Args:
        base: the network before fine-tuning. Below the dashed line a network is more accurate than it.
        cures: by name, at most four; for each its networks, tested, with a label (several may share one).
    """
    figure, said = Picture("", figsize=(8, 4.4)), []
    axes = figure.subplots()
    # Where a label stands beside its point. Points of two cures may coincide, so each cure has its own side.
    sides = ((0, -12, "center"), (6, 4, "left"), (-7, -4, "right"), (0, 8, "center"))
    for (name, tested), (color, marker), (right, up, side) in zip(cures.items(), LOOKS, sides):
        points = [(sum(t.wrong_counts) - t.wrong_counts[digit], t.wrong_counts[digit]) for _, t in tested]
        axes.scatter(*zip(*points), color=color, marker=marker, edgecolor="black", linewidth=0.5, label=name)
        labels = [label for label, _ in tested]
        said += [f"{name} {label}: {y} wrong, others {x}" for label, (x, y) in zip(labels, points)]
        for label in dict.fromkeys(labels):  # once, at the leftmost of its points
            point = min(point for own, point in zip(labels, points) if own == label)
            axes.annotate(label, point, (right, up), textcoords="offset points", ha=side, fontsize=8)
    others, wrong = _draw_base(axes, base, digit)
    axes.axline(
        (others, wrong), slope=-1, color="0.4", linestyle="--", linewidth=1, label="as accurate as the base"
    )
    axes.set_ylim(0, 1.1 * wrong)
    axes.legend(frameon=False)
    said = [f"base: {wrong} wrong, others {others}", *said]
    figure.alt = f"Wrong answers on digit {digit} and on the others. " + "; ".join(said)
    return figure


@in_plain_style
def plot_rows(updates: dict[str, torch.Tensor], count: int = 8) -> Picture:
    """The strongest rows of the first layer's ΔW as 28×28 pictures, one line for each update.

    Blue: a bright pixel raises the hidden unit; red: it lowers the unit. Each line has one scale of colours.

    Args:
        updates: by name, ΔW of linear1, float32, hidden × 784.
    """
    figure, said = Picture("", figsize=(8, 1.25 * len(updates))), []
    for strip, (name, delta) in zip(figure.subfigures(len(updates), 1, squeeze=False)[:, 0], updates.items()):
        norms = delta.norm(dim=1)
        strongest = norms.argsort(descending=True)[:count].tolist()
        top = delta[strongest[0]].abs().quantile(0.98).item()
        for axes, row in zip(strip.subplots(1, count), strongest):
            axes.imshow(delta[row].reshape(28, 28).cpu(), cmap="RdBu", vmin=-top, vmax=top)
            axes.axis("off")
        strip.suptitle(name, fontsize=10)
        said.append(f"{name}, norms from {norms[strongest[0]]:.2g} to {norms[strongest[-1]]:.2g}")
    figure.alt = f"The {count} strongest rows of ΔW₁, as pictures of 28 × 28 pixels: " + "; ".join(said)
    return figure


def _draw_base(axes, base: Evaluation, digit: int) -> tuple[int, int]:
    """A star for the base, and the names of the axes; returns where the star stands."""
    wrong = base.wrong_counts[digit]
    others = sum(base.wrong_counts) - wrong
    axes.scatter(others, wrong, color="black", marker="*", s=120, label="base")
    axes.set(xlabel="wrong answers, other digits", ylabel=f"wrong answers, digit {digit}")
    return others, wrong


def _check_evaluation(name: str, value: Evaluation) -> None:
    if not isinstance(value, Evaluation):
        raise TypeError(
            f"{name} is a {type(value).__name__}; it must be what evaluate(net, dataset) returns."
        )
