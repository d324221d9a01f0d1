"""Training and testing. The notebooks show both loops in a cell of their own; these are the same, quicker."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import islice

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from lora_helpers.checks import LARGEST_SEED, check_network, check_positive, check_whole, no_autocast
from lora_helpers.data import as_tensors
from lora_helpers.fast import Fast, ImagesToTest, is_plain, is_trainable_plain


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Answers of a network on a dataset.

    Attributes:
        confusion: int64, 10×10; row = the true digit, column = the network's answer.
        predictions: int64, N; the answers, in the dataset's order.
    """

    confusion: torch.Tensor
    predictions: torch.Tensor

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.confusion.trace().item() / self.confusion.sum().item()

    @property
    def wrong_counts(self) -> list[int]:
        """For each digit 0 to 9, how many of its images were answered wrongly."""
        return (self.confusion.sum(dim=1) - self.confusion.diagonal()).tolist()

    @property
    def recall(self) -> torch.Tensor:
        """Of the images of each digit, the share that are called so: float32, 10."""
        return self.confusion.diagonal().float() / self.confusion.sum(dim=1).clamp(min=1)

    @property
    def precision(self) -> torch.Tensor:
        """Of the images that are called each digit, the share that are one: float32, 10."""
        return self.confusion.diagonal().float() / self.confusion.sum(dim=0).clamp(min=1)

    def __repr__(self) -> str:
        return f"Evaluation(accuracy={self.accuracy:.3f}, wrong_counts={self.wrong_counts})"


def train(
    net: nn.Module,
    dataset: TensorDataset,
    *,
    epochs: int = 1,
    max_batches: int | None = None,
    batch_size: int = 10,
    lr: float = 1e-3,
    seed: int | None = None,
    progress: bool = True,
    after_batch: Callable[[int], None] | None = None,
    optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
) -> list[float]:
    """Trains the trainable parameters of `net` on cross-entropy, in shuffled batches.

    A `RichBoyNet`, with LoRA or without, is trained by `fast.Fast`, any other network by autograd; only
    rounding differs. Images are moved to the network's device and dtype. The stop button ends the training
    early, and one line says how far it came. A warning says if the loss ends as NaN or infinite.

    Args:
        dataset: floating-point images, N×1×28×28 or N×784, and int64 labels, N.
        epochs: passes over `dataset`, each in a new order.
        max_batches: if given, train on exactly this many batches, whatever `epochs` says; a dataset that is
            too small is used again, in a new order.
        seed: of the order of the images; None draws one from PyTorch's global random stream.
        progress: shows a tqdm bar with the running mean loss.
        after_batch: called after each batch with the number of batches done, from 1. It may look, not change.
        optimizer_class: such as `torch.optim.SGD`, used with PyTorch's defaults but for `lr`.

    Returns:
        The loss of each batch that was trained on.

    Raises:
        ValueError: a number out of range, an empty dataset, nothing to train (also: LoRA is off, or
            gradients are), or a network that does not answer with 10 logits an image.
        TypeError: `net` is not a network, `dataset` not a `TensorDataset`, or `optimizer_class` not a class.

    Source: Adam, https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html
    """
    check_network(net)
    _check_recipe(epochs, max_batches, batch_size, lr, seed)
    images, labels = as_tensors(dataset)
    trainable = [p for p in net.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("Nothing to train: every parameter is frozen. Add LoRA, or set requires_grad.")
    images, labels = images.to(trainable[0]), labels.to(trainable[0].device)
    steps = max_batches or epochs * math.ceil(len(labels) / batch_size)
    optimizer = make_optimizer(optimizer_class, trainable, lr)
    order = islice(shuffled_batches(len(labels), batch_size, seed), steps)
    losses, total = [], torch.zeros((), dtype=torch.float32, device=images.device)
    with _mode(net, training=True), no_autocast(), progress_bar(steps, progress) as bar:
        try:
            for done, loss in enumerate(_losses(net, images, labels, order, optimizer), start=1):
                losses.append(loss)
                total += loss
                if done % 50 == 0 or done == steps:  # not at every batch: to read a loss, a GPU must wait
                    bar.set_postfix(loss=f"{total.item() / done:.3f}", refresh=False)
                bar.update()
                if after_batch:
                    after_batch(done)
        except KeyboardInterrupt:  # the losses so far are worth a look
            print(
                f"Stopped after {len(losses):,} of {steps:,} batches; the network keeps what it has learned."
            )
            print("To go on, call train with it again. To start afresh, make a new network first.")
    losses = [loss.item() for loss in losses]
    if losses and not math.isfinite(losses[-1]):
        advice = "Start from a fresh network, with a smaller lr or alpha."
        warnings.warn(f"The training diverged: the last loss is {losses[-1]}. {advice}", stacklevel=2)
    return losses


def _check_recipe(epochs, max_batches, batch_size, lr, seed) -> None:
    check_whole("epochs", epochs)
    check_whole("batch_size", batch_size)
    if max_batches is not None:
        check_whole("max_batches", max_batches)
    if seed is not None:
        check_whole("seed", seed, 0, LARGEST_SEED)
    check_positive("lr", lr)


def evaluate(net: nn.Module, dataset: TensorDataset) -> Evaluation:
    """Tests `net` on `dataset`: no gradients, no shuffling, evaluation mode. Nothing of `net` is changed.

    Images are moved to the network's device and dtype. A network whose training diverged (its logits are
    NaN) answers 0.

    Raises:
        ValueError: the dataset is empty, an image is not 28×28 finite values, a label is not 0 to 9, or the
            network does not answer with 10 logits an image.
        TypeError: `net` is not a network, or `dataset` is not a `TensorDataset` of images and labels.
    """
    check_network(net)
    images, labels = as_tensors(dataset)
    weight = next(net.parameters(), images)  # a network without parameters takes the images as they are
    with _mode(net, training=False), torch.no_grad(), no_autocast():
        if is_plain(net):
            answers = ImagesToTest(net, images.flatten(1).to(weight)).answers(net)
        else:
            answers = torch.cat([_logits(net, part.to(weight)).argmax(dim=1) for part in images.split(500)])
    return compare(answers, labels)


def compare(answers: torch.Tensor, labels: torch.Tensor) -> Evaluation:
    """Counts answers by true digit; both int64, N."""
    answers = answers.to(labels.device)
    counts = torch.bincount(labels * 10 + answers, minlength=100)
    return Evaluation(counts.reshape(10, 10).cpu(), answers)


def make_optimizer(wanted: Callable, trainable: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """An optimiser of the class `wanted`, fused where PyTorch has that: one pass over memory for each step.

    Raises:
        TypeError: `wanted` is not a class.
    """
    if not callable(wanted):
        raise TypeError(
            f"optimizer_class is {wanted!r}; it must be a class of torch.optim, such as torch.optim.SGD, "
            "without quotes."
        )
    fused = {"fused": True} if "fused" in signature(wanted).parameters else {}
    return wanted(trainable, lr=lr, **fused)


@contextmanager
def progress_bar(total: int | None, shown: bool, unit: str = "batch", desc: str = "") -> Iterator[tqdm]:
    """A bar of tqdm. A saved notebook keeps the text of a widget, so the text is brought up to date."""
    handle = None
    try:
        # The delay keeps tqdm from displaying the widget itself. Ten updates a second, tqdm's usual, fill the
        # queue of a program that reads a cell's messages only at its end, as nbval does.
        look = {"unit": unit, "desc": desc, "delay": 1e-6, "mininterval": 0.5}
        with tqdm(total=total, disable=not shown, **look) as bar:
            widget = getattr(bar, "container", None)
            if widget is not None:
                from IPython.display import display

                handle, bar.displayed = display(widget, display_id=True), True
            yield bar
    finally:
        if handle:
            handle.update(widget)


def shuffled_batches(size: int, batch_size: int, seed: int | None) -> Iterator[torch.Tensor]:
    """Indices of shuffled batches, pass after pass without end; a pass may end in a smaller batch."""
    generator = torch.Generator()
    generator.manual_seed(torch.randint(2**31, (), device="cpu").item() if seed is None else seed)
    while True:
        yield from torch.randperm(size, generator=generator, device="cpu").split(batch_size)


def _losses(net, images, labels, order, optimizer) -> Iterator[torch.Tensor]:
    """Makes one step for each batch of `order`, and gives its loss."""
    if is_trainable_plain(net):
        fast = Fast([net])
        for x, y, products in fast.batches(images.flatten(1), labels, (batch[None] for batch in order)):
            loss = fast.backpropagate(x, y, products)[0]
            optimizer.step()
            yield loss
        return
    for batch in order:
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(net, images[batch]), labels[batch])
        if not loss.requires_grad:
            raise ValueError(
                "Nothing that is trainable takes part in the network's answers. If LoRA is off, call "
                "set_lora_enabled(net, True). If another adapter is in use, call freeze_base(net). "
                "If gradients are off, leave the torch.no_grad() block."
            )
        loss.backward()
        optimizer.step()
        yield loss.detach()


@contextmanager
def _mode(net: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in net.modules()]
    try:
        net.train(training)
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def _logits(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    logits = net(images)
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (len(images), 10):
        raise ValueError(
            f"For {len(images)} images the network answers with a {type(logits).__name__} of shape {shape}; "
            f"it must be {len(images)} × 10, a logit for each digit of each image, as RichBoyNet() answers."
        )
    return logits
