"""Pictures. Each function returns a `Picture`, a matplotlib figure made without pyplot, so that nothing is drawn twice."""

import base64
import io
import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image  # comes with matplotlib
from torch.utils.data import TensorDataset

from lora_helpers.checks import check_whole
from lora_helpers.data import as_tensors
from lora_helpers.training import Evaluation

# Okabe and Ito's palette, told apart by colour-blind readers; hatching says the same without colour.
BEFORE, AFTER = "#0072B2", "#E69F00"


_type_scale = 1.0


def set_type_scale(scale: float) -> None:
    """How large the type of all pictures drawn from now on is, 1 being usual. `projector_mode` calls it."""
    global _type_scale
    _type_scale = scale


def ink(ground: tuple[float, ...]) -> str:
    """Black or white, whichever can be read better on `ground`, given as red, green and blue from 0 to 1.

    Source: relative luminance and contrast of WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio; 0.179 is where both are alike.
    """
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in ground[:3])
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179 else "black"


class Picture(Figure):
    """A matplotlib figure that a notebook shows by itself, with a text alternative for those who cannot see it."""

    def __init__(self, alt: str, dpi: float = 100, **kwargs):
        super().__init__(layout="constrained", dpi=dpi, **kwargs)
        self.alt = alt

    def png(self) -> bytes:
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
        data = {"image/png": base64.b64encode(self.png()).decode(), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt}}


def pixels(canvas: FigureCanvasAgg) -> Image.Image:
    """What is drawn on `canvas`, in red, green and blue."""
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")


def show_digits(dataset: TensorDataset, indices=None, titles=None) -> Picture:
    """A row of digits. `indices`: which images (default: the first of each label). `titles`: one for each (default: its label).

    Raises:
        ValueError: there is no such image, none is asked for, or there are more or fewer titles than images.
        TypeError: `dataset` is no `TensorDataset` of images and labels, or `indices` no list of whole numbers.
    """
    images, labels = as_tensors(dataset)
    if indices is None:
        indices = [(labels == digit).nonzero()[0].item() for digit in labels.unique().tolist()]
    try:
        indices = [operator.index(index) for index in indices]
    except TypeError:
        raise TypeError(f"indices is {indices!r}; it must be a list of whole numbers, such as [0, 1, 2].") from None
    if not indices or not all(-len(labels) <= index < len(labels) for index in indices):
        raise ValueError(f"indices is {indices}; it must name at least one image, from 0 to {len(labels) - 1}.")
    if titles and len(titles) != len(indices):
        raise ValueError(f"There are {len(titles)} titles for {len(indices)} images; give as many.")
    names = titles or [str(labels[index].item()) for index in indices]
    figure = Picture(f"Digits: {', '.join(names)}", figsize=(max(1.1 * len(indices), 2), 1.5))
    for place, (axes, index) in enumerate(zip(figure.subplots(1, len(indices), squeeze=False)[0], indices)):
        axes.imshow(images[index].reshape(28, 28).cpu().numpy(), cmap="gray_r")
        axes.set_title(names[place], fontsize=10)
        axes.axis("off")
    return figure


def plot_losses(losses: list[float], window: int = 50) -> Picture:
    """The loss of each batch (nats), and its running mean over `window` batches.

    Raises:
        ValueError: there are no losses, or `window` is no whole number of at least 1.
        TypeError: `losses` is no list of numbers.
    """
    try:
        values = torch.tensor([float(loss) for loss in losses], device="cpu")
    except (TypeError, ValueError):
        raise TypeError(f"losses is {losses!r}; it must be the list that train returns: losses = train(net, mnist.train).") from None
    if not len(values):
        raise ValueError("There are no losses to draw; train first: losses = train(net, mnist.train).")
    check_whole("window", window)
    figure = Picture(f"Loss of {len(values)} batches, from {values[0]:.2f} to {values[-1]:.2f}", figsize=(7, 2.6))
    axes = figure.subplots()
    axes.plot(values, color="0.75", linewidth=0.7, label="each batch")
    if len(values) > window:
        axes.plot(range(window - 1, len(values)), values.unfold(0, window, 1).mean(dim=1), color=BEFORE, label=f"mean of {window}")
    axes.set(xlabel="batch", ylabel="cross-entropy", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def plot_confusion(result: Evaluation) -> Picture:
    """What is mistaken for what: the right answers on the diagonal are left blank.

    Raises:
        TypeError: `result` is not what `evaluate` returns.
    """
    _check_evaluation("result", result)
    wrong = result.confusion.clone().fill_diagonal_(0)
    figure = Picture(f"Confusion matrix; wrong answers of digits 0 to 9: {result.wrong_counts}", figsize=(4.8, 4.4))
    axes = figure.subplots()
    image = axes.imshow(wrong.numpy(), cmap="Blues")
    for true, row in enumerate(wrong.tolist()):
        for answer, count in enumerate(row):
            if count:
                axes.text(answer, true, count, ha="center", va="center", color=ink(image.to_rgba(count)), fontsize=8)
    axes.set(xlabel="the network's answer", ylabel="the digit", xticks=range(10), yticks=range(10), title="wrong answers")
    return figure


def plot_wrong_counts(before: Evaluation, after: Evaluation, labels=("LoRA off", "LoRA on")) -> Picture:
    """Wrong answers per digit, before beside after, the change written above.

    Raises:
        TypeError: `before` or `after` is not what `evaluate` returns.
    """
    _check_evaluation("before", before)
    _check_evaluation("after", after)
    alt = f"Wrong answers of digits 0 to 9: {labels[0]} {before.wrong_counts}, {labels[1]} {after.wrong_counts}"
    figure = Picture(alt, figsize=(7.5, 3))
    axes = figure.subplots()
    top = max(before.wrong_counts + after.wrong_counts + [1])
    for shift, result, color, hatch, label in ((-0.2, before, BEFORE, "", labels[0]), (0.2, after, AFTER, "//", labels[1])):
        axes.bar([d + shift for d in range(10)], result.wrong_counts, 0.4, color=color, hatch=hatch, edgecolor="white", label=label)
    for digit, (old, new) in enumerate(zip(before.wrong_counts, after.wrong_counts)):
        axes.text(digit, max(old, new) + top * 0.02, f"{new - old:+d}", ha="center", fontsize=9)
    axes.set(xlabel="digit", ylabel="wrong answers", xticks=range(10), ylim=(0, top * 1.15))
    axes.legend(frameon=False)
    return figure


def _check_evaluation(name: str, value: Evaluation) -> None:
    if not isinstance(value, Evaluation):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be what evaluate(net, dataset) returns.")
