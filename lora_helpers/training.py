"""Training, testing, and the pre-trained base that every notebook starts from."""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import islice

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.adam import adam
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from lora_helpers import __version__
from lora_helpers.backpropagation import Backpropagation, check_copies, transposed_weight
from lora_helpers.cache import is_saved, load_tensors, save_tensors
from lora_helpers.checks import LARGEST_SEED, all_finite, check_network, check_positive, check_whole
from lora_helpers.data import Mnist, as_tensors, check_mnist
from lora_helpers.factorisation import factorised, with_first_products
from lora_helpers.model import RichBoyNet


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Answers of a network on a dataset.

    Attributes:
        confusion: int64, 10×10; row = the true digit, column = the network's answer.
        predictions: int64, N; the answers, in the dataset's order and on its device.
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
        """Of the images of each digit, the share called so: float32, 10."""
        return self.confusion.diagonal() / self.confusion.sum(dim=1).clamp(min=1)

    @property
    def precision(self) -> torch.Tensor:
        """Of the images called each digit, the share that are: float32, 10."""
        return self.confusion.diagonal() / self.confusion.sum(dim=0).clamp(min=1)

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

    LoRA is computed in its factorised form (see `factorised`), and on a frozen `RichBoyNet` its gradients are written out (see
    `Backpropagation`), which is faster and changes only rounding. Images are moved to the network's device and dtype. `net` is in
    training mode meanwhile. An interrupt leaves it usable, trained as far as it came. Where the loss ends as NaN or infinite, a
    warning says so. A network that starts and is trained as `pretrained_base` does it, on the CPU, is kept in the cache for it.

    Args:
        dataset: floating-point images, N×1×28×28 or N×784, and int64 labels, N.
        epochs: passes over `dataset`, each in a new order.
        max_batches: if given, exactly so many batches, whatever `epochs` says; a smaller
            dataset is gone round again.
        seed: of the order of the images; None draws one from PyTorch's global random stream.
        progress: shows a tqdm bar with the running mean loss.
        after_batch: called after each batch with the number of batches done, from 1; it may look at the network, not change it.
        optimizer_class: such as `torch.optim.SGD`, used with PyTorch's defaults but for `lr`.

    Returns:
        The loss of each batch.

    Raises:
        ValueError: a number out of range, an empty dataset, nothing to train (also: LoRA is off, or gradients are), or a
            network that does not answer with 10 logits an image.
        TypeError: `net` is no network, `dataset` no `TensorDataset` of images and labels, or `optimizer_class` no class.

    Source: Adam, https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html
    """
    check_network(net)
    if max_batches is not None:
        check_whole("max_batches", max_batches)
    images, labels = _checked(dataset, lr, seed, epochs=epochs, batch_size=batch_size)
    trainable = _trainable(net)
    if not torch.is_grad_enabled():
        raise ValueError("Gradients are off, so nothing can be trained; train outside torch.no_grad() and torch.inference_mode().")
    device = trainable[0].device
    images, labels = images.to(trainable[0]), labels.to(device)
    by_recipe = (max_batches, batch_size, lr, optimizer_class) == (None, 10, 1e-3, torch.optim.Adam) and seed is not None
    is_base = by_recipe and _starts_as_base(net, images, seed)
    steps = max_batches or epochs * -(-len(labels) // batch_size)
    optimizer, backpropagate = make_optimizer(optimizer_class, trainable, lr), _written_out(net) or partial(_by_autograd, net)
    losses = torch.zeros(steps, device=device)
    with _mode(net, training=True), factorised(net), tqdm(total=steps, disable=not progress, unit="batch") as bar:
        for step, (x, digits) in enumerate(_drawn(net, images, labels, batch_size, seed, steps)):
            optimizer.zero_grad()
            losses[step] = backpropagate(x, digits)
            optimizer.step()
            if progress and (step + 1) % 50 == 0:  # reading a loss makes the device wait
                bar.set_postfix(loss=f"{losses[: step + 1].mean().item():.3f}", refresh=False)
            bar.update()
            if after_batch:
                after_batch(step + 1)
    if not math.isfinite(losses[-1]):
        warnings.warn(f"The training diverged: the last loss is {losses[-1]}. Start from a fresh network, with a smaller lr or alpha.", stacklevel=2)
    if is_base and all_finite(net.parameters()):
        save_tensors(_base_name(images.detach(), labels, epochs, seed), net.state_dict())
    return losses.tolist()


def train_side_by_side(
    nets: Sequence[nn.Module],
    dataset: TensorDataset,
    *,
    max_batches: int,
    batch_size: int = 10,
    lr: float = 1e-3,
    seed: int | None = None,
    after_batch: Callable[[int], None] | None = None,
) -> None:
    """Trains the adapters of several copies of one base on the same batches, in one pass.

    Each ends as `train(net, dataset, max_batches=…, seed=seed)` leaves it, but for rounding; in less time than one
    after the other, since the frozen weights are multiplied once for all (see `Backpropagation`).

    Raises:
        ValueError: as of `train`; there is no network, or one twice; they are not `RichBoyNet`s that are copies of one frozen base, each
            with one adapter in use on each of the same layers.
        TypeError: `nets` is no list of networks, or `dataset` no `TensorDataset` of images and labels.
    """
    images, labels = _checked(dataset, lr, seed, batch_size=batch_size, max_batches=max_batches)
    check_copies(nets)
    trainable = _trainable(*nets)
    optimizer, backpropagate = _Adam(trainable, lr), Backpropagation(nets)
    images, labels = images.to(trainable[0]), labels.to(trainable[0].device)
    for batch, (x, digits) in enumerate(_drawn(nets[0], images, labels, batch_size, seed, max_batches)):
        optimizer.zero_grad()
        backpropagate(torch.cat([x] * len(nets)), digits.repeat(len(nets)))
        optimizer.step()
        if after_batch:
            after_batch(batch + 1)


def evaluate(net: nn.Module, dataset: TensorDataset) -> Evaluation:
    """Tests `net` on `dataset`: no gradients, no shuffling, evaluation mode; afterwards each module is in its own mode.

    Images are moved to the network's device and dtype. A network whose training diverged (its logits are NaN) answers 0.

    Raises:
        ValueError: the dataset is empty, an image is not 28×28 finite values, a label is not 0 to 9, or the network does
            not answer with 10 logits an image.
        TypeError: `net` is no network, or `dataset` no `TensorDataset` of images and labels.
    """
    check_network(net)
    images, labels = as_tensors(dataset)
    weight = next(net.parameters(), images)  # a network without parameters takes the images as they are
    with _mode(net, training=False), torch.no_grad():
        return _compared(torch.cat([_logits(net, part.to(weight)).argmax(dim=1) for part in images.split(500)]), labels)


class SharedTest:
    """`evaluate`, without its checks, for one adapter after another on one frozen base: what stays the same is computed once.

    LoRA is computed thinly (see `factorised`). Images of one digit are tested together, since they leave the same hidden units
    silent (see `Backpropagation`).

    Args:
        net: the base with any adapter; its frozen weights must stay as they are.
        dataset: as of `evaluate`.
    """

    def __init__(self, net: nn.Module, dataset: TensorDataset):
        images, self._labels = as_tensors(dataset)
        self._transposed = transposed_weight(net)
        self._order, counts = self._labels.argsort(stable=True), self._labels.bincount().tolist()
        images = images.to(next(net.parameters()))
        images = with_first_products(net, images[self._order.to(images.device)])
        self._parts = [part for of_one_digit in images.split(counts) if len(of_one_digit) for part in of_one_digit.split(500)]

    @torch.no_grad()
    def __call__(self, net: nn.Module) -> Evaluation:
        written_out = _written_out(net, self._transposed)
        with _mode(net, training=False), factorised(net):
            logits = written_out.logits if written_out else partial(_logits, net)
            answers = torch.cat([logits(part).argmax(dim=1) for part in self._parts]).to(self._labels.device)
        return _compared(torch.empty_like(answers).index_copy_(0, self._order, answers), self._labels)


def _compared(predictions: torch.Tensor, labels: torch.Tensor) -> Evaluation:
    predictions = predictions.to(labels.device)
    return Evaluation(torch.bincount(labels * 10 + predictions, minlength=100).reshape(10, 10).cpu(), predictions)


def pretrained_base(mnist: Mnist, *, seed: int = 0, progress: bool = True) -> RichBoyNet:
    """A `RichBoyNet` trained on `mnist`, from the cache; trained and cached where it is missing.

    The recipe: Adam, learning rate 0.001, batches of 10, `mnist.pretraining_epochs` passes.
    The cache is keyed by recipe, data, seed, number of threads, and the versions of PyTorch and of this package.
    It is trained on the CPU and comes on PyTorch's default device, float32, whatever PyTorch's default dtype or that of the images.
    PyTorch's global random stream is left as it was.

    Raises:
        TypeError: `mnist` is no `Mnist`, or its training part no `TensorDataset` of images and labels.
        ValueError: `seed` is no whole number of at least 0, or the training part is empty or holds what is no digit.
    """
    check_mnist(mnist)
    check_whole("seed", seed, 0, LARGEST_SEED)
    images, labels = _lesson(mnist)
    net, epochs, device = untrained_base(seed), mnist.pretraining_epochs, torch.get_default_device()
    state = load_tensors(_base_name(images, labels, epochs, seed), like=net.state_dict())
    if state is not None:
        net.load_state_dict(state)
        return net.to(device)
    with _float32_by_default(), torch.device("cpu"):  # so that a seed gives one base on every device
        train(net, TensorDataset(images, labels), epochs=epochs, seed=seed, progress=progress)  # which keeps it
    return net.to(device)


def base_is_cached(mnist: Mnist) -> bool:
    """Whether `pretrained_base(mnist)` has only to be read."""
    return is_saved(_base_name(*_lesson(mnist), mnist.pretraining_epochs, seed=0))


def untrained_base(seed: int = 0) -> RichBoyNet:
    """What `pretrained_base` begins with, on the CPU. PyTorch's global random stream is left as it was."""
    with _float32_by_default(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RichBoyNet()


def _lesson(mnist: Mnist) -> tuple[torch.Tensor, torch.Tensor]:
    # The key is made from what is trained on: images of another dtype, or with gradients, have no bytes that could be read.
    images, labels = as_tensors(mnist.train)
    return images.detach().to("cpu", torch.float32), labels.cpu()


def _base_name(images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int) -> str:
    return f"base-{len(labels)}-{_fingerprint(TensorDataset(images, labels), epochs, seed)}"


def _starts_as_base(net: nn.Module, images: torch.Tensor, seed: int) -> bool:
    """Whether all of `net` is trained, and it is, as to parameters and answers, the network that `pretrained_base` begins with."""
    base, state = untrained_base(seed), net.state_dict()
    start = base.state_dict()
    if state.keys() != start.keys() or not all(p.requires_grad for p in net.parameters()):
        return False
    if not all(t.device.type == "cpu" and t.dtype == torch.float32 and torch.equal(t, start[name]) for name, t in state.items()):
        return False
    with torch.no_grad(), _mode(net, training=True):  # what stands between the layers has no parameters
        return torch.equal(_logits(net, images[:10]), base(images[:10]))


@contextmanager
def _float32_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _checked(dataset: TensorDataset, lr: float, seed: int | None, **counts: int) -> tuple[torch.Tensor, torch.Tensor]:
    for name, value in counts.items():
        check_whole(name, value)
    if seed is not None:
        check_whole("seed", seed, 0, LARGEST_SEED)
    check_positive("lr", lr)
    return as_tensors(dataset)


def _trainable(*nets: nn.Module) -> list[nn.Parameter]:
    trainable = [p for net in nets for p in net.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("Nothing to train: every parameter is frozen. Add LoRA, or set requires_grad.")
    return trainable


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
            f"it must be {len(images)} × 10, a logit for each digit of each image, as of RichBoyNet()."
        )
    return logits


def _written_out(net: nn.Module, transposed: torch.Tensor | None = None) -> Backpropagation | None:
    """How the gradients of `net` are found without autograd, where that can be done."""
    try:
        check_copies([net])
    except ValueError:
        return None
    return Backpropagation([net], transposed)


def _by_autograd(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(_logits(net, images), labels)
    if not loss.requires_grad:
        raise ValueError(
            "Nothing that is trainable takes part in the network's answers. If LoRA is off, call set_lora_enabled(net, True); "
            "if another adapter is in use, call freeze_base(net), which makes that one trainable."
        )
    loss.backward()
    return loss.detach()


def make_optimizer(wanted: Callable, trainable: list[nn.Parameter], lr: float) -> "torch.optim.Optimizer | _Adam":
    """An optimizer of the class `wanted`, as fast as there is one of its kind."""
    if not callable(wanted):
        raise TypeError(f"optimizer_class is {wanted!r}; it must be a class of torch.optim, such as torch.optim.SGD, without quotation marks.")
    if wanted is torch.optim.Adam:
        return _Adam(trainable, lr)
    fused = {"fused": True} if "fused" in signature(wanted).parameters else {}  # quicker, but not every optimiser has it
    return wanted(trainable, lr=lr, **fused)


class _Adam:
    """The step of `torch.optim.Adam` without its class, whose first use imports PyTorch's compiler: 3 s and 150 MB."""

    def __init__(self, parameters: list[nn.Parameter], lr: float):
        self.lr = lr
        self.state = [(p, torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=p.device)) for p in parameters]

    def zero_grad(self) -> None:
        for parameter, *_ in self.state:
            parameter.grad = None

    def step(self) -> None:
        moved = [entry for entry in self.state if entry[0].grad is not None]  # an adapter that is switched off has none
        parameters, means, squares, steps = (list(column) for column in zip(*moved))
        adam(
            parameters, [p.grad for p in parameters], means, squares, [], steps,
            amsgrad=False, beta1=0.9, beta2=0.999, lr=self.lr, weight_decay=0.0, eps=1e-8, maximize=False, fused=True,
        )  # fmt: skip


def _drawn(
    net: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int, seed: int | None, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What `net` is given for each of `steps` batches, and the labels; fetched for twenty batches at once, which costs less."""
    at_once = len(images) <= 1000  # of more images, many may never be drawn
    if at_once:
        images = with_first_products(net, images)
    batches = islice(shuffled_batches(len(labels), batch_size, seed), steps)
    while ahead := list(islice(batches, 20)):
        chosen, sizes = torch.cat(ahead).to(images.device), [len(batch) for batch in ahead]
        drawn = images[chosen] if at_once else with_first_products(net, images[chosen])
        yield from zip(drawn.split(sizes), labels[chosen].split(sizes))


def shuffled_batches(size: int, batch_size: int, seed: int | None) -> Iterator[torch.Tensor]:
    """Indices of shuffled batches, pass after pass without end; a pass may end in a smaller batch."""
    generator = torch.Generator()
    generator.manual_seed(torch.randint(2**31, (), device="cpu").item() if seed is None else seed)
    while True:
        yield from torch.randperm(size, generator=generator, device="cpu").split(batch_size)


def _fingerprint(dataset: TensorDataset, epochs: int, seed: int) -> str:
    # The number of threads decides in which order sums are made, and so how they are rounded.
    machine = f"torch {torch.__version__} threads {torch.get_num_threads()} lora_helpers {__version__}"
    recipe = f"RichBoyNet Adam 0.001 10 {epochs} {seed} {machine}"
    digest = hashlib.blake2b(recipe.encode(), digest_size=8)
    for tensor in as_tensors(dataset):
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
