"""Pictures. Each function returns a matplotlib `Figure` made without pyplot, so that nothing is drawn twice."""

import torch
from matplotlib.figure import Figure
from torch.utils.data import TensorDataset

from lora_helpers.data import as_tensors
from lora_helpers.training import Evaluation

# Okabe and Ito's palette, told apart by colour-blind readers; hatching says the same without colour.
BEFORE, AFTER = "#0072B2", "#E69F00"


def show_digits(dataset: TensorDataset, indices=None, titles=None) -> Figure:
    """A row of digits. `indices`: which images (default: the first of each label)."""
    images, labels = as_tensors(dataset)
    if indices is None:
        indices = [(labels == digit).nonzero()[0].item() for digit in labels.unique().tolist()]
    figure = Figure(figsize=(max(1.1 * len(indices), 2), 1.5), layout="constrained")
    for place, (axes, index) in enumerate(zip(figure.subplots(1, len(indices), squeeze=False)[0], indices)):
        axes.imshow(images[index].squeeze(), cmap="gray_r")
        axes.set_title(titles[place] if titles else str(labels[index].item()), fontsize=10)
        axes.axis("off")
    return figure


def plot_losses(losses: list[float], window: int = 50) -> Figure:
    """The loss of each batch (nats), and its running mean over `window` batches."""
    values = torch.tensor(losses)
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(values, color="0.75", linewidth=0.7, label="each batch")
    if len(values) > window:
        axes.plot(range(window - 1, len(values)), values.unfold(0, window, 1).mean(dim=1), color=BEFORE, label=f"mean of {window}")
    axes.set(xlabel="batch", ylabel="cross-entropy", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def plot_confusion(result: Evaluation) -> Figure:
    """What is mistaken for what: the right answers on the diagonal are left blank."""
    wrong = result.confusion.clone().fill_diagonal_(0)
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(wrong, cmap="Blues")
    for true, row in enumerate(wrong.tolist()):
        for answer, count in enumerate(row):
            if count:
                axes.text(answer, true, count, ha="center", va="center", color="white" if count > wrong.max() / 2 else "black", fontsize=8)
    axes.set(xlabel="the network's answer", ylabel="the digit", xticks=range(10), yticks=range(10), title="wrong answers")
    return figure


def plot_wrong_counts(before: Evaluation, after: Evaluation, labels=("LoRA off", "LoRA on")) -> Figure:
    """Wrong answers per digit, before beside after, the change written above."""
    figure = Figure(figsize=(7.5, 3), layout="constrained")
    axes = figure.subplots()
    top = max(before.wrong_counts + after.wrong_counts + [1])
    for shift, result, color, hatch, label in ((-0.2, before, BEFORE, "", labels[0]), (0.2, after, AFTER, "//", labels[1])):
        axes.bar([d + shift for d in range(10)], result.wrong_counts, 0.4, color=color, hatch=hatch, edgecolor="white", label=label)
    for digit, (old, new) in enumerate(zip(before.wrong_counts, after.wrong_counts)):
        axes.text(digit, max(old, new) + top * 0.02, f"{new - old:+d}", ha="center", fontsize=9)
    axes.set(xlabel="digit", ylabel="wrong answers", xticks=range(10), ylim=(0, top * 1.15))
    axes.legend(frameon=False)
    return figure
