"""What the scale α/r does, measured: what notebook 2 computes. Each function returns a plain table."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean, stdev

import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lora_helpers.checks import no_autocast
from lora_helpers.data import Mnist, as_tensors, only_digit
from lora_helpers.experiments import (
    OPTIMIZERS,
    RULES,
    FineTuning,
    Setting,
    adapters_of,
    product_norm,
    set_adapters,
    train_adapters,
)
from lora_helpers.fast import Fast
from lora_helpers.lora import add_lora, count_parameters, freeze_base, frozen_twin
from lora_helpers.model import LAYERS, RichBoyNet
from lora_helpers.training import evaluate, progress_bar, train

# ---------------------------------------------------------------- ranks and exponents


def slope(ranks: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of the best fit values ≈ c · ranks^p: least squares on a log-log scale.

    Raises:
        ValueError: fewer than two different ranks, or something not positive.
    """
    positive = min(ranks) > 0 and all(0 < value < math.inf for value in values)
    if len(ranks) != len(values) or len(set(ranks)) < 2 or not positive:
        raise ValueError(
            "An exponent needs two or more ranks and as many positive values; "
            f"given {list(ranks)} and {list(values)}."
        )
    x, y = torch.tensor(ranks, dtype=torch.float64).log(), torch.tensor(values, dtype=torch.float64).log()
    x = x - x.mean()
    return (x @ y / (x @ x)).item()


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation, as text; "–" without any."""
    if not values:
        return "–"
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):+.{digits}f} ± {deviation:.{digits}f}"


# ---------------------------------------------------------------- before the first step


def start_lora(base: nn.Module, setting: Setting) -> nn.Module:
    """A network with LoRA as `setting` says, untrained. It shares the memory of `base`: do not merge it."""
    return setting.add_to(frozen_twin(base))


# ---------------------------------------------------------------- the first step


@dataclass(frozen=True)
class FirstStep:
    """ΔW after one step from B = 0: its norm, and its useful part ⟨−ΔW, G⟩, the fall of the loss."""

    optimizer: str
    rule: str
    rank: int
    seed: int
    norm: float
    useful: float


@no_autocast()
def low_rank_gradient(
    out_features: int = 2000, in_features: int = 1000, rank: int = 10, seed: int = 0
) -> torch.Tensor:
    """A random gradient, out_features × in_features, float32: a batch of 10 gives at most rank 10."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(out_features, rank, generator=generator, dtype=torch.float32)
    right = torch.randn(rank, in_features, generator=generator, dtype=torch.float32)
    return left @ right / rank**0.5


@no_autocast()
def weight_gradient(
    net: RichBoyNet, dataset: TensorDataset, layer: str = "linear2", batch_size: int = 10, seed: int = 0
) -> torch.Tensor:
    """G, the gradient of the loss with respect to the weight of `layer`, on one random batch of `dataset`."""
    images, labels = as_tensors(dataset)
    batch = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:batch_size]
    loss = F.cross_entropy(net(images[batch]), labels[batch])
    return torch.autograd.grad(loss, net.get_submodule(layer).weight)[0]


@no_autocast()
def first_steps(
    gradient: torch.Tensor,
    *,
    ranks: Iterable[int] = (1, 2, 4, 8, 16, 32, 64),
    seeds: Iterable[int] = range(10),
    lr: float = 1e-3,
    a_std: float = 1.0,
) -> list[FirstStep]:
    """One real step of SGD and of Adam from B = 0, A ~ N(0, a_std²), where ∂L/∂W is `gradient`.

    Nothing of the weight's size is made: the loss ⟨G, s·BA⟩ is ⟨s·B, G Aᵀ⟩.

    Source: algebra of Hu et al., arXiv 2106.09685, equation (3): the gradient in B is s · G Aᵀ.
    """
    table = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for rank in ranks:
            A = a_std * torch.randn(rank, gradient.shape[1], generator=generator, dtype=gradient.dtype)
            projected = gradient @ A.T  # out × r
            for rule in reversed(RULES):
                scale = Setting(rank=rank, rule=rule).scale
                for name, optimizer_class in OPTIMIZERS.items():
                    B = torch.zeros_like(projected, requires_grad=True)
                    optimizer = optimizer_class([B], lr=lr)
                    (scale * (B * projected).sum()).backward()
                    optimizer.step()
                    useful = -scale * (B.detach() * projected).sum().item()
                    table.append(
                        FirstStep(name, rule, rank, seed, product_norm(A, B.detach(), scale), useful)
                    )
    return table


def first_step_slopes(table: Sequence[FirstStep], quantity: str) -> dict[tuple[str, str], list[float]]:
    """For each (optimizer, rule) the fitted exponent of r of each seed; `quantity` is "norm" or "useful"."""
    slopes = {}
    for key in dict.fromkeys((step.optimizer, step.rule) for step in table):
        by_seed: dict[int, list[FirstStep]] = {}
        for step in table:
            if (step.optimizer, step.rule) == key:
                by_seed.setdefault(step.seed, []).append(step)
        slopes[key] = [
            slope([s.rank for s in some], [getattr(s, quantity) for s in some]) for some in by_seed.values()
        ]
    return slopes


# ---------------------------------------------------------------- whole trainings


def ladder(
    ranks: Iterable[int] = (1, 4, 16, 64),
    rules: Iterable[str] = RULES,
    seeds: Iterable[int] = range(3),
    **common,
) -> list[Setting]:
    """Settings for all ranks, rules and seeds; `common` as in `Setting`."""
    return [
        Setting(rank=rank, rule=rule, seed=seed, **common)
        for rule in rules
        for rank in ranks
        for seed in seeds
    ]


def grid(alphas: Iterable[float], lrs: Iterable[float], **common) -> list[Setting]:
    """Settings for each α (outer) and learning rate (inner), scale α/r; `common` as in `Setting`."""
    return [Setting(alpha=alpha, lr=lr, **common) for alpha in alphas for lr in lrs]


def norm_after(run: FineTuning, layer: str, batches: int | None = None) -> float:
    """‖ΔW‖ of one layer at the end, or after so many batches, which must be a stop of the training."""
    A, B = (run.adapters if batches in (None, run.setting.batches) else run.earlier[batches])[layer]
    return product_norm(A, B, run.scale)


@no_autocast()
def part_along(run: FineTuning, layer: str, direction: torch.Tensor) -> float:
    """The part of ΔW of one layer along a direction D of the weight's shape: ⟨ΔW, D⟩ / ‖D‖."""
    A, B = run.adapters[layer]
    return run.scale * (B * (direction @ A.T)).sum().item() / direction.norm().item()


def slopes_by_rule(
    runs: Sequence[FineTuning], value: Callable[[FineTuning], float]
) -> dict[str, list[float]]:
    """For each rule the exponents of r in `value(run)`: one a seed, if it is positive at every rank."""
    slopes: dict[str, list[float]] = {}
    for rule, seed in dict.fromkeys((run.setting.rule, run.setting.seed) for run in runs):
        some = [run for run in runs if (run.setting.rule, run.setting.seed) == (rule, seed)]
        values = [value(run) for run in some]
        slopes.setdefault(rule, [])
        if min(values) > 0:
            slopes[rule].append(slope([run.setting.rank for run in some], values))
    return slopes


def norm_slopes(
    runs: Sequence[FineTuning], layer: str = "linear2", batches: int | None = None
) -> dict[str, list[float]]:
    """For each rule the exponents of r in ‖ΔW‖ of one layer, one for each seed; see `norm_after`."""
    return slopes_by_rule(runs, lambda run: norm_after(run, layer, batches))


# ---------------------------------------------------------------- full fine-tuning and its low-rank part


def full_fine_tuning(
    base: nn.Module, mnist: Mnist, *, lr: float = 1e-3, batches: int = 100, digit: int = 9, seed: int = 0
) -> dict[str, torch.Tensor]:
    """ΔW of each layer when weights (not biases, which LoRA leaves alone too) are all trained with Adam."""
    net = copy.deepcopy(base)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.endswith("weight"))
    train(net, only_digit(mnist.train, digit), max_batches=batches, lr=lr, seed=seed, progress=False)
    return {
        name: (net.get_submodule(name).weight - base.get_submodule(name).weight).detach() for name in LAYERS
    }


@no_autocast()
def parts_along(
    updates: dict[str, torch.Tensor], directions: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Of each ΔW its part along the direction D of that layer: ⟨ΔW, D⟩ / ‖D‖² · D."""
    lengths = {name: (updates[name] * D).sum() / D.square().sum() for name, D in directions.items()}
    return {name: lengths[name] * D for name, D in directions.items()}


@torch.no_grad()
@no_autocast()
def with_updates(base: nn.Module, updates: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of `base` with ΔW added to the weight of each layer named."""
    net = copy.deepcopy(base)
    for name, delta in updates.items():
        net.get_submodule(name).weight += delta
    return net


@no_autocast()
def best_low_rank(matrix: torch.Tensor, ranks: Iterable[int]) -> dict[int, torch.Tensor]:
    """The nearest matrix of each rank, in the Frobenius norm: the singular value decomposition, cut off.

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1
    (1936).
    """
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    return {rank: (u[:, :rank] * values[:rank]) @ v[:rank] for rank in ranks}


@no_autocast()
def spectra(base: nn.Module, updates: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """By layer, the singular values, largest first, of "ΔW", "W" and a "random" matrix of that shape."""
    generator = torch.Generator().manual_seed(0)
    table = {}
    for name, delta in updates.items():
        random = torch.randn(delta.shape, generator=generator, dtype=torch.float32)
        matrices = {"ΔW": delta, "W": base.get_submodule(name).weight.detach(), "random": random}
        table[name] = {kind: torch.linalg.svdvals(matrix) for kind, matrix in matrices.items()}
    return table


# ---------------------------------------------------------------- α against the learning rate


@no_autocast()
def twins_apart(
    base: nn.Module,
    mnist: Mnist,
    *,
    c: float = 3.0,
    rescale_A: bool = True,
    optimizer: str = "Adam",
    steps: int = 20,
    rank: int = 4,
    eps: float = 1e-30,
) -> float:
    """Trains two adapters that ought to agree, in float64; how far apart their ΔW are, relative to the first.

    The twin has α and the learning rate exchanged. With `rescale_A`, exactly: scale c²·s, initial A divided
    by c, rate η/c under Adam or η/c² under SGD. Without, roughly: scale c·s and rate η/c (Adam) or η/c²
    (SGD), A as it was. Only Adam's epsilon breaks the symmetry, so `eps` makes it tiny; PyTorch's default
    is 1e-8.
    """
    exponent, usual = {"Adam": (1, 1e-3), "SGD": (2, 1e-2)}[optimizer]
    kind = torch.optim.SGD if optimizer == "SGD" else partial(torch.optim.Adam, eps=eps)
    images, labels = only_digit(mnist.train, 9).tensors
    twin = (c * c, 1 / c) if rescale_A else (c, 1.0)
    updates = []
    for (alpha, a_factor), lr in (((1.0, 1.0), usual), (twin, usual / c**exponent)):
        net = start_lora(base, Setting(rank=rank, alpha=alpha * rank)).double()
        adapters = adapters_of(net).values()
        for adapter in adapters:
            adapter.lora_A.data.mul_(a_factor)
        lesson = TensorDataset(images.double(), labels)
        train(net, lesson, max_batches=steps, lr=lr, seed=0, progress=False, optimizer_class=kind)
        updates.append([adapter.delta.detach() for adapter in adapters])
    return _norm_of([x - y for x, y in zip(*updates)]) / _norm_of(updates[0])


# ---------------------------------------------------------------- long training


@dataclass(frozen=True)
class Curve:
    """A long training: at each batch the loss, and the norm of the gradient in A and B together.

    At the end, on the test images: the accuracy, and the two signals through the adapter of `linear2`, as
    root mean squares. `forwards` is what it adds to the layer's output, ΔWx; `backwards` is what it adds to
    the gradient of an image's loss in the layer's input, ΔWᵀ∂L/∂(Wx).
    """

    setting: Setting
    losses: list[float] = field(repr=False)
    gradients: list[float] = field(repr=False)
    forwards: float
    backwards: float
    accuracy: float


def shuffled_pixels(mnist: Mnist, seed: int = 0, test_images: int = 10_000) -> Mnist:
    """The same digits with their pixels in another order, the same for all: everything must be learned
    again. It keeps the first `test_images` of the test images: few units are silent, so a test is slow."""
    order = torch.randperm(28 * 28, generator=torch.Generator().manual_seed(seed))
    parts = [
        TensorDataset(x.flatten(1)[:, order].view_as(x), y)
        for x, y in (mnist.train.tensors, mnist.test[:test_images])
    ]
    return Mnist(*parts)


@no_autocast()
def learning_curves(
    base: nn.Module, mnist: Mnist, settings: Sequence[Setting], *, batches: int = 300, progress: bool = True
) -> list[Curve]:
    """Trains on all digits of `mnist`, all settings side by side; one curve for each, with a progress bar.

    Source: the two signals are those of Kalajdzievski, arXiv 2312.03732, definition 3.1.
    """
    gradients: list[list[float]] = []

    def look(nets: Sequence[nn.Module]) -> None:
        found = [[p.grad for a in adapters_of(net).values() for p in a.parameters()] for net in nets]
        gradients.append([nn.utils.get_total_norm(own).item() for own in found])
        bar.update()

    everything = [replace(setting, digit=None) for setting in settings]
    with progress_bar(batches, progress) as bar:
        trainings = train_adapters(
            base, *as_tensors(mnist.train), everything, batches, {batches}, after_batch=look
        )
    curves = []
    for setting, training, own in zip(everything, trainings, zip(*gradients)):
        net = start_lora(base, setting)
        set_adapters(net, training.stops[batches])
        accuracy = evaluate(net, mnist.test).accuracy
        curves.append(Curve(setting, training.losses, list(own), *_signals(net, mnist), accuracy))
    return curves


@torch.no_grad()
def _signals(net: RichBoyNet, mnist: Mnist) -> tuple[float, float]:
    """What the adapter of linear2 adds, forwards and backwards, on the test images."""
    images, labels = as_tensors(mnist.test)
    fast, adapter = Fast([net]), adapters_of(net)["linear2"]
    D = fast.logits(images.flatten(1)[None]).softmax(dim=-1)[0] - F.one_hot(
        labels, 10
    )  # ∂L/∂z₃ of each image, N × 10
    D = fast.layers[2].backward(D[None])[0] * (fast.hidden_2[0] > 0)  # ∂L/∂(W₂x), N × 2000
    forwards = fast.hidden_1[0] @ adapter.lora_A.T @ adapter.lora_B.T
    backwards = D @ adapter.lora_B @ adapter.lora_A
    return tuple(adapter.scale * signal.square().mean().sqrt().item() for signal in (forwards, backwards))


def end(values: Sequence[float], window: int = 20) -> float:
    """The mean of the last `window` values."""
    return mean(values[-window:])


# ---------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class Cost:
    """Of one way to fine-tune: numbers trained, bytes of Adam and of a checkpoint, milliseconds a step."""

    method: str
    rank: int | None
    trained: int
    optimizer_bytes: int
    checkpoint_bytes: int
    milliseconds: float


@no_autocast()
def costs(
    base: nn.Module, dataset: TensorDataset, *, ranks: Iterable[int] = (1, 8, 64), steps: int = 10
) -> list[Cost]:
    """Measures full fine-tuning, LoRA as a parametrization, and LoRA written out (`fast.Fast`), by rank.

    The time is the best of `steps` training steps of 10 images (the least disturbed by other work); the
    checkpoint is what safetensors writes of the trained tensors.
    """
    images, labels = (tensor[:10] for tensor in as_tensors(dataset))
    ways = [("full", None)] + [(way, rank) for way in ("parametrization", "written out") for rank in ranks]
    table = []
    for method, rank in ways:
        net = copy.deepcopy(base).train()
        if rank:
            freeze_base(add_lora(net, rank=rank, generator=torch.Generator().manual_seed(0)))
        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        optimizer = torch.optim.Adam(trained.values(), lr=1e-5, fused=True)
        fast = Fast([net]) if method == "written out" else None
        best = min(_step_time(net, images, labels, optimizer, fast) for _ in range(steps))
        state = sum(t.nbytes for slots in optimizer.state.values() for t in slots.values() if t.ndim)
        written = len(save({name: p.detach().contiguous() for name, p in trained.items()}))
        table.append(Cost(method, rank, count_parameters(net).trainable, state, written, 1000 * best))
    return table


def _step_time(net, images, labels, optimizer, fast: Fast | None) -> float:
    begin = time.perf_counter()
    optimizer.zero_grad()
    if fast:
        fast.backpropagate(images.flatten(1)[None], labels[None])
    else:
        F.cross_entropy(net(images), labels).backward()
    optimizer.step()
    return time.perf_counter() - begin


def _norm_of(tensors: Iterable[torch.Tensor]) -> float:
    """The norm of all numbers of several tensors together."""
    return math.sqrt(sum(tensor.square().sum().item() for tensor in tensors))
