"""What the scale α/r does, measured: small experiments, each a function that returns a plain table.

`uv run python -m lora_helpers.scaling` prints the tables of notebook 2; add `--full` for the full MNIST (`--root FOLDER`
where its files are at hand) and `--seeds N`. The result of `--full` is stored in scaling_full_mnist.txt.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from lora_helpers.backpropagation import Backpropagation
from lora_helpers.data import Mnist, as_tensors, load_mnist, only_digit
from lora_helpers.factorisation import factorised, with_first_products
from lora_helpers.lora import LoRAParametrization, add_lora, count_parameters, freeze_base, frozen_twin, lora_layers
from lora_helpers.model import LAYERS as WEIGHTS, RichBoyNet
from lora_helpers.training import Evaluation, SharedTest, evaluate, make_optimizer, pretrained_base, shuffled_batches, train

# The factor on B A as the rank grows: none, that of rsLoRA, that of LoRA. All agree at rank 1.
RULES = {"α": lambda rank: 1.0, "α/√r": lambda rank: rank**-0.5, "α/r": lambda rank: 1 / rank}
OPTIMIZERS = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
STARTS = {"normal": "A ~ N(0, 1)", "kaiming": "A ~ Kaiming-uniform"}
ALPHAS, FACTORS = (0.25, 1, 4, 16), (1 / 16, 1 / 4, 1, 4)  # of the grid; the factors are on the usual learning rates
TOGETHER = 32  # adapters trained side by side, at most


def alpha_for(rule: str, rank: int, strength: float = 1.0) -> float:
    """The α for which α/r is `strength` times the rule's scale: how each rule is given to a LoRA that divides by r."""
    return strength * _choice("rule", rule, RULES)(rank) * rank


def slope(ranks: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of the best fit values ≈ c · ranks^p: least squares on a log-log scale.

    Raises:
        ValueError: fewer than two different ranks, or something not positive.
    """
    if len(ranks) != len(values) or len(set(ranks)) < 2 or min(ranks) <= 0 or not all(0 < v < math.inf for v in values):
        raise ValueError(f"An exponent needs two or more ranks and as many positive values; given {list(ranks)} and {list(values)}.")
    x, y = torch.tensor(ranks, dtype=torch.float64).log(), torch.tensor(values, dtype=torch.float64).log()
    x = x - x.mean()
    return (x @ y / (x @ x)).item()


def slope_of_means(pairs: Iterable[tuple[int, float]]) -> float:
    """The exponent of r in the mean of the values of each rank, from (rank, value); nan where a mean is not positive.

    The logarithm of one draw lies below that of the mean, most of all at low ranks: `slope` of each draw inherits that, this does not.
    """
    groups: dict[int, list[float]] = {}
    for rank, value in pairs:
        groups.setdefault(rank, []).append(value)
    means = [mean(values) for values in groups.values()]
    return slope(list(groups), means) if min(means) > 0 else math.nan


def break_even_rank(in_features: int, out_features: int) -> float:
    """The rank at which A and B hold as many numbers as the weight: in · out / (in + out)."""
    return in_features * out_features / (in_features + out_features)


# ---------------------------------------------------------------- before the first step


@dataclass(frozen=True)
class Start:
    """A network with LoRA before any training: ‖ΔW‖ and the gradients' norms over all layers, and its accuracy."""

    name: str
    delta: float
    gradient_A: float
    gradient_B: float
    accuracy: float


def four_starts(base: nn.Module, mnist: Mnist, *, rank: int = 4, digit: int = 9, seed: int = 0) -> list[Start]:
    """Each of A and B random, N(0, 1), or zero: what one batch of `digit` would change in them.

    Source: Hu et al., arXiv 2106.09685, section 4.1 (A Gaussian, B zero).
    """
    device = next(base.parameters()).device
    images, labels = (t[:10].to(device) for t in as_tensors(only_digit(mnist.train, digit)))
    table = []
    for a_word, b_word in (("random", "zero"), ("zero", "random"), ("zero", "zero"), ("random", "random")):
        net = start_lora(base, Setting(rank=rank, seed=seed))
        adapters = _adapters(net).values()
        generator = torch.Generator().manual_seed(seed + 1)
        for adapter in adapters:
            if a_word == "zero":
                nn.init.zeros_(adapter.lora_A)
            if b_word == "random":
                _draw(adapter.lora_B, nn.init.normal_, generator)
        F.cross_entropy(net(images), labels).backward()
        norms = [_norm_of(tensors) for tensors in zip(*((a.delta.detach(), a.lora_A.grad, a.lora_B.grad) for a in adapters))]
        table.append(Start(f"A {a_word}, B {b_word}", *norms, evaluate(net, mnist.test).accuracy))
    return table


# ---------------------------------------------------------------- the first step


@dataclass(frozen=True)
class FirstStep:
    """ΔW after one step from B = 0: its norm, and its useful part ⟨−ΔW, G⟩ (the fall in the loss, to first order)."""

    optimizer: str
    rule: str
    rank: int
    seed: int
    norm: float
    useful: float


def low_rank_gradient(out_features: int = 2000, in_features: int = 1000, rank: int = 10, seed: int = 0) -> torch.Tensor:
    """A random gradient of a given rank, out_features × in_features, float32: a batch of 10 gives at most rank 10."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*shape, generator=generator, device="cpu") for shape in ((out_features, rank), (rank, in_features)))
    return (left @ right / rank**0.5).to(torch.get_default_device())


def weight_gradient(net: RichBoyNet, dataset: TensorDataset, layer: str = "linear2", batch_size: int = 10, seed: int = 0) -> torch.Tensor:
    """G, the gradient of the loss with respect to the weight of `layer`, on one random batch of `dataset`."""
    images, labels = as_tensors(dataset)
    batch = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed), device="cpu")[:batch_size]
    weight = net.get_submodule(layer).weight
    loss = F.cross_entropy(net(images[batch].to(weight.device)), labels[batch].to(weight.device))
    return torch.autograd.grad(loss, weight)[0]


def first_steps(
    gradient: torch.Tensor,
    *,
    ranks: Iterable[int] = (1, 2, 4, 8, 16, 32, 64),
    seeds: Iterable[int] = range(10),
    lr: float = 1e-3,
    a_std: float = 1.0,
) -> list[FirstStep]:
    """One real step of SGD and of Adam from B = 0 and A ~ N(0, a_std²), on the loss whose gradient in W is `gradient`.

    Neither ΔW nor anything else of the weight's size is made: the loss ⟨G, s·BA⟩ is ⟨s·B, G Aᵀ⟩,
    and ‖BA‖² is the trace of (BᵀB)(AAᵀ).

    Source: algebra of Hu et al., arXiv 2106.09685, equation (3): the gradient in B is s · G Aᵀ.
    """
    table = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for rank in ranks:
            a = a_std * torch.randn(rank, gradient.shape[1], generator=generator, dtype=gradient.dtype, device="cpu").to(gradient.device)
            projected = gradient @ a.T
            for rule, rule_of in RULES.items():
                scale = rule_of(rank)
                for name, optimizer_class in OPTIMIZERS.items():
                    b = torch.zeros_like(projected, requires_grad=True)
                    optimizer = optimizer_class([b], lr=lr)
                    (scale * (b * projected).sum()).backward()
                    optimizer.step()
                    b = b.detach()
                    table.append(FirstStep(name, rule, rank, seed, product_norm(b, a, scale), -scale * (b * projected).sum().item()))
    return table


def first_step_slopes(table: Sequence[FirstStep], quantity: str) -> dict[tuple[str, str], list[float]]:
    """For each (optimizer, rule) the fitted exponent of r of each seed; `quantity` is "norm" or "useful"."""
    slopes = {}
    for key in dict.fromkeys((row.optimizer, row.rule) for row in table):
        rows = [row for row in table if (row.optimizer, row.rule) == key]
        by_seed = {seed: [r for r in rows if r.seed == seed] for seed in dict.fromkeys(r.seed for r in rows)}
        slopes[key] = [slope([r.rank for r in some], [getattr(r, quantity) for r in some]) for some in by_seed.values()]
    return slopes


def product_norm(b: torch.Tensor, a: torch.Tensor, scale: float = 1.0) -> float:
    """The Frobenius norm of scale · B A, from the two r × r matrices BᵀB and AAᵀ."""
    return scale * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()


# ---------------------------------------------------------------- whole trainings


@dataclass(frozen=True)
class Size:
    """ΔW of one layer: its Frobenius norm, and its part along a direction D, ⟨ΔW, D⟩ / ‖D‖ (nan without one)."""

    norm: float
    along: float = math.nan


@dataclass(frozen=True)
class Setting:
    """One fine-tuning to run. `rule` and `alpha` give the scale: alpha · 1, alpha/√r or alpha/r."""

    rank: int = 1
    alpha: float = 1.0
    rule: str = "α/r"
    optimizer: str = "Adam"
    lr: float = 1e-3
    start: str = "normal"
    seed: int = 0

    @property
    def scale(self) -> float:
        return alpha_for(self.rule, self.rank, self.alpha) / self.rank


@dataclass(frozen=True)
class Run:
    """A fine-tuning on one digit. `sizes[n][layer]` is ΔW after n batches; `wrong` counts that digit's wrong answers, and
    `called` is the share of all test images that are answered with it, 0 to 1."""

    setting: Setting
    sizes: dict[int, dict[str, Size]] = field(repr=False)
    wrong: int
    accuracy: float
    called: float
    finite: bool = True  # False where training diverged

    @property
    def final(self) -> dict[str, Size]:
        return self.sizes[max(self.sizes)]


def start_lora(base: nn.Module, setting: Setting) -> nn.Module:
    """A twin of `base` with LoRA as `setting` says; the global random stream is left alone.

    Its base is frozen and shares the memory of `base`: do not merge it.
    """
    _choice("start", setting.start, STARTS)
    net = frozen_twin(base)
    generator = torch.Generator().manual_seed(setting.seed)
    add_lora(net, rank=setting.rank, alpha=alpha_for(setting.rule, setting.rank, setting.alpha), generator=generator)
    if setting.start == "kaiming":  # loralib and PEFT: uniform within ±1/√in, standard deviation 1/√(3·in)
        for adapter in _adapters(net).values():
            _draw(adapter.lora_A, partial(nn.init.kaiming_uniform_, a=5**0.5), generator)
    return freeze_base(net)


def sweep(
    base: nn.Module,
    mnist: Mnist,
    settings: Iterable[Setting],
    *,
    batches: int = 100,
    at: Iterable[int] = (),
    directions: dict[str, torch.Tensor] | None = None,
    digit: int = 9,
    known: Iterable[Run] = (),
    progress: bool = True,
) -> list[Run]:
    """Fine-tunes a copy of `base` on one digit for each setting, in batches of 10, and tests it; with a progress bar.

    Several are trained side by side, each as if alone. Settings of one scale (as all rules at rank 1) are run once.

    Args:
        at: after which batches ΔW is measured, besides the last.
        directions: D for each layer, of the weight's shape; the part of ΔW along it is measured after the last batch.
        known: runs of earlier sweeps with the same base, images, batches and digit, measured at least as asked for here; they are
            not trained again.
    """
    settings = list(settings)
    done, wanted = {_essence(run.setting): run for run in known}, {*at, batches}
    distinct = [key for key in _by_rank(map(_essence, settings)) if key not in done]
    test = SharedTest(start_lora(base, Setting()), mnist.test)
    parts = math.ceil(len(distinct) / TOGETHER)
    with tqdm(total=len(distinct), disable=not progress, unit="run") as bar:
        for part in range(parts):
            chunk = distinct[part * len(distinct) // parts : (part + 1) * len(distinct) // parts]
            nets = [start_lora(base, setting) for setting in chunk]
            sizes = [{} for _ in chunk]

            def measure(batch: int) -> None:
                if batch in wanted:
                    along = directions if directions and batch == batches else {}
                    for net, size in zip(nets, sizes):
                        size[batch] = {name: _size(adapter, along.get(name)) for name, adapter in _adapters(net).items()}

            losses = _train_together(nets, chunk, only_digit(mnist.train, digit), batches, measure)
            for setting, net, size, own in zip(chunk, nets, sizes, losses):
                result = test(net)
                called = (result.predictions == digit).float().mean().item()
                done[setting] = Run(setting, size, result.wrong_counts[digit], result.accuracy, called, math.isfinite(own[-1]))
                bar.update()
    return [replace(done[_essence(setting)], setting=setting) for setting in settings]


def _essence(setting: Setting) -> Setting:
    """The same for settings of one scale, by whichever rule they come to it."""
    return replace(setting, rule="α", alpha=setting.scale)


def ladder(
    ranks: Iterable[int] = (1, 4, 16, 64), rules: Iterable[str] = tuple(RULES), seeds: Iterable[int] = range(3), **common
) -> list[Setting]:
    """Settings for all ranks, rules and seeds; `common` as in `Setting`."""
    return [Setting(rank=rank, rule=rule, seed=seed, **common) for rule in rules for rank in ranks for seed in seeds]


def grid(alphas: Iterable[float], lrs: Iterable[float], **common) -> list[Setting]:
    """Settings for each α (outer) and learning rate (inner), scale α/r; `common` as in `Setting`."""
    return [Setting(alpha=alpha, lr=lr, **common) for alpha in alphas for lr in lrs]


def accuracy_gaps(runs: Sequence[Run], columns: int) -> list[float]:
    """In a `grid` of one seed, how far apart in accuracy (0 to 1) two runs are that lie one α and `columns` learning rates apart:
    the first has the higher α, the second the higher rate. Pairs of which one diverged are left out."""
    cell = {(run.setting.alpha, run.setting.lr): run for run in runs}
    alphas, lrs = (sorted(set(values)) for values in zip(*cell))
    pairs = [(cell[high, left], cell[low, right]) for low, high in zip(alphas, alphas[1:]) for left, right in zip(lrs, lrs[columns:])]
    return [abs(one.accuracy - other.accuracy) for one, other in pairs if one.finite and other.finite]


def end(values: Sequence[float], window: int = 20) -> float:
    """The mean of the last `window` values."""
    return mean(values[-window:])


def norm_slopes(runs: Sequence[Run], layer: str = "linear2", batches: int | None = None, quantity: str = "norm") -> dict[str, list[float]]:
    """For each rule the exponent of r in ‖ΔW‖ of one layer, fitted for each seed; or, with `quantity` "along", in its part along D,
    for the seeds at which that is positive at every rank."""
    slopes = {}
    for rule in dict.fromkeys(r.setting.rule for r in runs):
        slopes[rule] = []
        for seed in dict.fromkeys(r.setting.seed for r in runs):
            some = [r for r in runs if (r.setting.rule, r.setting.seed) == (rule, seed)]
            values = [getattr((r.sizes[batches] if batches else r.final)[layer], quantity) for r in some]
            if quantity == "norm" or min(values) > 0:
                slopes[rule].append(slope([r.setting.rank for r in some], values))
    return slopes


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation over seeds, as text; "–" without any."""
    if not values:
        return "–"
    sd = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):+.{digits}f} ± {sd:.{digits}f}"


# ---------------------------------------------------------------- full fine-tuning and its low-rank part


def full_fine_tuning(
    base: nn.Module, mnist: Mnist, *, lr: float = 1e-3, batches: int = 100, digit: int = 9, seed: int = 0, progress: bool = True
) -> dict[str, torch.Tensor]:
    """ΔW of each `Linear` layer when weights (not biases, which LoRA leaves alone too) are all trained with Adam."""
    net = copy.deepcopy(base)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.endswith("weight"))
    train(net, only_digit(mnist.train, digit), max_batches=batches, lr=lr, seed=seed, progress=progress)
    return {name: (net.get_submodule(name).weight - base.get_submodule(name).weight).detach() for name in WEIGHTS}


def parts_along(updates: dict[str, torch.Tensor], directions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of each ΔW its part along the direction D of that layer: ⟨ΔW, D⟩ / ‖D‖² · D."""
    return {name: (delta * directions[name]).sum() / directions[name].square().sum() * directions[name] for name, delta in updates.items()}


@torch.no_grad()
def with_updates(base: nn.Module, updates: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of `base` with ΔW added to the weight of each layer named."""
    net = copy.deepcopy(base)
    for name, delta in updates.items():
        net.get_submodule(name).weight += delta
    return net


def best_low_rank(matrix: torch.Tensor, ranks: Iterable[int]) -> dict[int, torch.Tensor]:
    """The nearest matrix of each rank, in the Frobenius norm: the singular value decomposition, cut off.

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1 (1936).
    """
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    return {rank: (u[:, :rank] * values[:rank]) @ v[:rank] for rank in ranks}


def spectra(base: nn.Module, updates: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """By layer, the singular values, largest first, of "ΔW", of "W" and of a "random" matrix of the same shape."""
    generator = torch.Generator().manual_seed(0)
    table = {}
    for name, delta in updates.items():
        matrices = {"ΔW": delta, "W": base.get_submodule(name).weight.detach(), "random": torch.randn(delta.shape, generator=generator, device="cpu")}
        table[name] = {kind: torch.linalg.svdvals(matrix).cpu() for kind, matrix in matrices.items()}
    return table


# ---------------------------------------------------------------- α against the learning rate


def twins_apart(
    base: nn.Module, mnist: Mnist, *, c: float = 3.0, rescale_A: bool = True, optimizer: str = "Adam", steps: int = 20, rank: int = 4, digit: int = 9,
    eps: float = 1e-30,
) -> float:  # fmt: skip
    """Trains two adapters that ought to agree, in float64, and returns how far apart their ΔW are, relative to the first.

    The twin has α and the learning rate exchanged. With `rescale_A`, exactly: scale c²·s, initial A divided by c, rate
    η/c under Adam or η/c² under SGD. Without, roughly: scale c·s and rate η/c (Adam) or η/c² (SGD), A as it was.
    Adam's epsilon, `eps`, is as good as taken away, for it alone breaks the symmetry; PyTorch's default is 1e-8.
    """
    exponent, usual = {"Adam": (1, 1e-3), "SGD": (2, 1e-2)}[optimizer]
    nines, updates = only_digit(mnist.train, digit), []
    for scale, a_factor, lr in ((1.0, 1.0, usual), (c * c if rescale_A else c, 1 / c if rescale_A else 1.0, usual / c**exponent)):
        net = start_lora(base, Setting(rank=rank, alpha=scale)).double()
        adapters = _adapters(net).values()
        for adapter in adapters:
            adapter.lora_A.data.mul_(a_factor)
        data = TensorDataset(nines.tensors[0].double(), nines.tensors[1])
        train(net, data, max_batches=steps, lr=lr, seed=0, progress=False, optimizer_class=_exact(optimizer, eps))
        updates.append([adapter.delta.detach() for adapter in adapters])
    return _norm_of([x - y for x, y in zip(*updates)]) / _norm_of(updates[0])


# ---------------------------------------------------------------- long training


@dataclass(frozen=True)
class Curve:
    """A long training. At each batch the loss, and the norm of the gradient in A and B together. At the end, on the test
    images, the accuracy and the two signals through the adapter of `linear2`, as root mean squares: forwards what it adds to
    the layer's output, ΔWx, and backwards what it adds to the gradient of an image's loss in the layer's input, ΔWᵀ∂L/∂(Wx)."""

    setting: Setting
    losses: list[float] = field(repr=False)
    gradients: list[float] = field(repr=False)
    forwards: float
    backwards: float
    accuracy: float


def shuffled_pixels(mnist: Mnist, seed: int = 0) -> Mnist:
    """The same digits with their pixels in another order, one order for all: all is to be learned anew, at a high rank."""
    order = torch.randperm(28 * 28, generator=torch.Generator().manual_seed(seed), device="cpu")
    parts = [TensorDataset(x.flatten(1)[:, order].view_as(x), y) for x, y in (mnist.train.tensors, mnist.test.tensors)]
    return Mnist(*parts, mnist.source)


def learning_curves(base: nn.Module, mnist: Mnist, settings: Iterable[Setting], *, batches: int = 300, progress: bool = True) -> list[Curve]:
    """Trains on all digits of `mnist` for many batches, all settings side by side; one curve for each, with a progress bar.

    Source: the two signals are those of Kalajdzievski, arXiv 2312.03732, definition 3.1.
    """
    settings = list(settings)
    distinct = _by_rank(settings)
    nets = [start_lora(base, setting) for setting in distinct]
    trained = [[p for p in net.parameters() if p.requires_grad] for net in nets]
    gradients = torch.zeros(batches, len(nets))
    with tqdm(total=batches, disable=not progress, unit="batch") as bar:

        def measure(batch: int) -> None:
            gradients[batch - 1] = torch.stack([nn.utils.get_total_norm([p.grad for p in own]) for own in trained])
            bar.update()

        losses = _train_together(nets, distinct, mnist.train, batches, measure)
    images, labels = (t.to(next(base.parameters()).device) for t in as_tensors(mnist.test))
    images = with_first_products(nets[0], images)  # the same for every adapter
    curves = {}
    for setting, net, own_losses, own_gradients in zip(distinct, nets, losses, gradients.T.tolist()):
        curves[setting] = Curve(setting, own_losses, own_gradients, *_signals_and_accuracy(net, images, labels))
    return [curves[setting] for setting in settings]


def _signals_and_accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, layer: str = "linear2") -> tuple[float, float, float]:
    seen = []
    watch = net.get_submodule(layer).register_forward_hook(lambda _, inputs, output: seen.extend((*inputs, output)))
    try:
        with factorised(net):
            logits = net(images)
    finally:
        watch.remove()
    x, output = seen
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), output)
    adapter = _adapters(net)[layer]
    with torch.no_grad():  # ΔWx and ΔWᵀ∂L/∂(Wx) by the thin A and B
        added = (x @ adapter.lora_A.T @ adapter.lora_B.T, gradient @ adapter.lora_B @ adapter.lora_A)
        forwards, backwards = (adapter.scale * signal.square().mean().sqrt().item() for signal in added)
        return forwards, backwards, (logits.argmax(dim=1) == labels).float().mean().item()


# ---------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class Cost:
    """Of one way to fine-tune: numbers trained, bytes of Adam's state and of a checkpoint, milliseconds a step."""

    method: str
    rank: int | None
    trained: int
    optimizer_bytes: int
    checkpoint_bytes: int
    milliseconds: float


def costs(base: nn.Module, dataset: TensorDataset, *, ranks: Iterable[int] = (1, 8, 64), steps: int = 10, lr: float = 1e-5) -> list[Cost]:
    """Full fine-tuning, LoRA as a parametrization and LoRA factorised, for each rank; each measured, none estimated.

    The time is the best of `steps` training steps of 10 images (the least disturbed by other work); the checkpoint
    is what safetensors writes of the trained tensors.
    """
    device = next(base.parameters()).device
    images, labels = (t[:10].to(device) for t in as_tensors(dataset))
    table = []
    for method, rank in [("full", None)] + [(m, r) for m in ("parametrization", "factorised") for r in ranks]:
        net = copy.deepcopy(base).train()
        if rank:
            freeze_base(add_lora(net, rank=rank, generator=torch.Generator().manual_seed(0)))
        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        optimizer = torch.optim.Adam(trained.values(), lr=lr, fused=True)

        def step_time() -> float:
            begin = time.perf_counter()
            loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return time.perf_counter() - begin

        with factorised(net) if method == "factorised" else nullcontext():
            best = min(step_time() for _ in range(steps))
        state = sum(t.nbytes for slots in optimizer.state.values() for t in slots.values() if t.ndim)
        written = len(save({name: p.detach().contiguous() for name, p in trained.items()}))
        table.append(Cost(method, rank, count_parameters(net).trainable, state, written, 1000 * best))
    return table


def _adapters(net: nn.Module) -> dict[str, LoRAParametrization]:
    return {name: adapters[0] for name, adapters in lora_layers(net).items()}


def _by_rank(settings: Iterable[Setting]) -> list[Setting]:
    """Each once, and those of one rank together: adapters of one rank are trained in one product."""
    return sorted(dict.fromkeys(settings), key=lambda setting: setting.rank)


def _train_together(
    nets: Sequence[nn.Module], settings: Sequence[Setting], dataset: TensorDataset, batches: int, after_batch: Callable[[int], None]
) -> list[list[float]]:
    """Trains each of `nets` by its own setting, on its own order of the images; the losses of each are returned."""
    images, labels = as_tensors(dataset)
    parts = [[p for p in net.parameters() if p.requires_grad] for net in nets]
    device = parts[0][0].device
    images, labels = images.to(device), labels.to(device)
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}  # one step for many parameters is quicker
    for own, setting in zip(parts, settings):
        groups.setdefault((setting.optimizer, setting.lr), []).extend(own)
    optimizers = [make_optimizer(_choice("optimizer", name, OPTIMIZERS), group, lr) for (name, lr), group in groups.items()]
    backpropagate, losses = Backpropagation(nets), torch.zeros(batches, len(nets), device=device)
    orders = zip(*(shuffled_batches(len(labels), 10, setting.seed) for setting in settings))
    if len(images) <= 10 * batches * len(nets):  # else most of them are never drawn
        images = with_first_products(nets[0], images)
    for batch, chosen in zip(range(batches), orders):
        rows = torch.cat(chosen).to(device)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses[batch] = backpropagate(images[rows], labels[rows])
        for optimizer in optimizers:
            optimizer.step()
        after_batch(batch + 1)
    return losses.T.tolist()


def _exact(optimizer: str, eps: float) -> Callable[..., torch.optim.Optimizer]:
    return torch.optim.SGD if optimizer == "SGD" else partial(torch.optim.Adam, eps=eps)


@torch.no_grad()
def _draw(parameter: nn.Parameter, initialise: Callable, generator: torch.Generator) -> None:
    # On the CPU, so that a seed gives one adapter on every device.
    parameter.copy_(initialise(torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu"), generator=generator))


def mean_cosine(adapter: LoRAParametrization) -> float:
    """The mean cosine between two different rank-one terms bᵢaᵢ of ΔW: 0 where they are perpendicular, 1 where all are alike."""
    a, b = adapter.lora_A.detach(), adapter.lora_B.detach()
    products = (b.T @ b) * (a @ a.T)
    lengths = products.diagonal().sqrt()
    cosines = products / (lengths[:, None] * lengths)
    return (cosines.sum() - cosines.trace()).item() / (len(a) * (len(a) - 1))


@torch.no_grad()
def _size(adapter: LoRAParametrization, direction: torch.Tensor | None) -> Size:
    a, b = adapter.lora_A, adapter.lora_B
    norm = product_norm(b, a, adapter.scale)
    if direction is None:
        return Size(norm)
    return Size(norm, adapter.scale * (b * (direction @ a.T)).sum().item() / direction.norm().item())


def _norm_of(tensors: Iterable[torch.Tensor]) -> float:
    """The norm of all numbers of several tensors together."""
    return math.sqrt(sum(t.square().sum().item() for t in tensors))


def _choice(name: str, value: str, allowed: dict):
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")
    return allowed[value]


# ---------------------------------------------------------------- all of it, on the command line


RESULT = Path(__file__).with_name("scaling_full_mnist.txt")


def stored_result(title: str) -> str:
    """From the stored result on the full MNIST: how it was made, and the part that begins with `title`.

    Raises:
        ValueError: there is no such part.
    """
    head, *parts = RESULT.read_text(encoding="utf-8").strip().split("\n\n")
    for part in parts:
        if part.startswith(title):
            return f"{head}\n\n{part}"
    raise ValueError(f"title is {title!r}; the parts begin with: {'; '.join(part.splitlines()[0] for part in parts)}.")


def main() -> None:
    """Prints the tables of notebook 2 with more seeds, on the sample or on the full MNIST."""
    parser = argparse.ArgumentParser(prog="python -m lora_helpers.scaling", description=main.__doc__)
    parser.add_argument("--full", action="store_true", help="the full MNIST instead of the bundled sample")
    parser.add_argument("--root", help="folder that holds MNIST/raw")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    mnist = load_mnist("full" if options.full else "sample", root=options.root)
    base = pretrained_base(mnist)
    before = evaluate(base, mnist.test)
    print(f"uv run python -m lora_helpers.scaling{' --full' * options.full} --seeds {options.seeds} (torch {torch.__version__.split('+')[0]})")
    print(f"{mnist}\nbase: nines wrong {before.wrong_counts[9]}, accuracy {before.accuracy:.3f}")

    for title, gradient in (("random G of rank 10", low_rank_gradient()), ("G of the network", weight_gradient(base, only_digit(mnist.train, 9)))):
        steps = first_steps(gradient)
        norms, useful = first_step_slopes(steps, "norm"), first_step_slopes(steps, "useful")
        print(f"\nFirst step, {title}: exponents of r, mean ± standard deviation over draws\n(last, that of the mean of ⟨−ΔW, G⟩)")
        for key in norms:
            of_the_mean = slope_of_means((step.rank, step.useful) for step in steps if (step.optimizer, step.rule) == key)
            print(f"{key[0]:4} · scale {key[1]:4} · ‖ΔW‖ {spread(norms[key])} · ⟨−ΔW, G⟩ {spread(useful[key])} · {of_the_mean:+.2f}")

    directions = full_fine_tuning(base, mnist, lr=1e-4, progress=False)
    for common in ({}, {"optimizer": "SGD", "lr": 1e-2}, {"start": "kaiming"}):
        runs = sweep(base, mnist, ladder(seeds=range(options.seeds), **common), at=(1, 5, 25), directions=directions)
        print(f"\n{runs[0].setting.optimizer}, {STARTS[runs[0].setting.start]}, learning rate {runs[0].setting.lr:g}, {options.seeds} seeds")
        print("exponent of r in ‖ΔW‖ after 1 · 5 · 25 · 100 batches")
        for layer in WEIGHTS:
            slopes = [norm_slopes(runs, layer, batches) for batches in (1, 5, 25, 100)]
            for rule in RULES:
                print(f"{layer} · scale {rule:4} · " + " · ".join(spread(by_rule[rule]) for by_rule in slopes))
        print("exponent of r in the part along full fine-tuning after 100 batches, of the mean over seeds: linear1 · linear2 · linear3")
        for rule in RULES:
            some = [run for run in runs if run.setting.rule == rule]
            powers = [slope_of_means((run.setting.rank, run.final[layer].along) for run in some) for layer in WEIGHTS]
            print(f"scale {rule:4} · " + " · ".join(f"{power:+.2f}" for power in powers))
        print("nines wrong · accuracy · ‖ΔW₂‖ · ΔW₂ along full fine-tuning, from least to most")
        for rule in RULES:
            for rank in (1, 4, 16, 64):
                some = [r for r in runs if (r.setting.rule, r.setting.rank) == (rule, rank)]
                columns = ([r.wrong for r in some], [r.accuracy for r in some], *zip(*((r.final["linear2"].norm, r.final["linear2"].along) for r in some)))
                ranges = [_least_to_most(values, digits) for values, digits in zip(columns, (0, 3, 2, 2))]
                print(f"scale {rule:4} · r {rank:2} · " + " · ".join(ranges))

    _print_split(base, mnist, directions, options.seeds)
    _print_grids(base, mnist, options.seeds)
    _print_rslora(base, mnist, options.seeds)


def _print_split(base: nn.Module, mnist: Mnist, directions: dict[str, torch.Tensor], seeds: int) -> None:
    print(f"\nSplit, Adam, α/r: ΔW along full fine-tuning and the rest, each alone added to the base, {seeds} seeds")
    print("nines wrong · accuracy, from least to most")
    for rank in (1, 64):
        results: dict[str, list[Evaluation]] = {"whole ΔW": [], "part along": [], "the rest": []}
        for seed in range(seeds):
            net = start_lora(base, Setting(rank=rank, seed=seed))
            train(net, only_digit(mnist.train, 9), max_batches=100, seed=seed, progress=False)
            whole = {name: adapter.delta.detach() for name, adapter in _adapters(net).items()}
            part = parts_along(whole, directions)
            rest = {name: whole[name] - part[name] for name in whole}
            for found, updates in zip(results.values(), (whole, part, rest)):
                found.append(evaluate(with_updates(base, updates), mnist.test))
        for what, found in results.items():
            wrong, right = [result.wrong_counts[9] for result in found], [result.accuracy for result in found]
            print(f"r {rank:2} · {what:10} · {_least_to_most(wrong, 0)} · {_least_to_most(right, 3)}")


def _print_grids(base: nn.Module, mnist: Mnist, seeds: int) -> None:
    for optimizer, usual in (("Adam", 1e-3), ("SGD", 1e-2)):
        lrs = [usual * factor for factor in FACTORS]
        grids = [sweep(base, mnist, grid(ALPHAS, lrs, rank=4, optimizer=optimizer, seed=seed)) for seed in range(seeds)]
        print(f"\nGrid, {optimizer}: α by learning rate {', '.join(f'{lr:.2g}' for lr in lrs)}, rank 4, {seeds} seeds")
        print("mean of nines wrong, and of accuracy")
        cells = [
            f"{mean(r.wrong for r in runs):5.1f} {mean(r.accuracy for r in runs):.3f}" if all(r.finite for r in runs) else "   diverged"
            for runs in zip(*grids)
        ]
        for row, alpha in enumerate(ALPHAS):
            print(f"α {alpha:5} · " + " · ".join(cells[row * len(lrs) : (row + 1) * len(lrs)]))
        for columns in (1, 2):
            gaps = _least_to_most([mean(accuracy_gaps(runs, columns)) for runs in grids], 3)
            print(f"one α up, {columns} to the left: accuracy {gaps} apart, the mean over the pairs of each seed")


def _print_rslora(base: nn.Module, mnist: Mnist, seeds: int) -> None:
    print(f"\nrsLoRA, pixels shuffled, α = 16, A ~ Kaiming-uniform, 300 batches, {seeds} seeds")
    print("last loss · accuracy · signal forwards · backwards, from least to most")
    shuffled = shuffled_pixels(mnist)
    for optimizer, lr, ranks in (("Adam", 1e-4, (4, 16, 64)), ("SGD", 1e-2, (4, 64))):
        settings = [Setting(rank, 16, rule, optimizer, lr, "kaiming") for rule in ("α/r", "α/√r") for rank in ranks]
        if optimizer == "Adam":
            settings.append(Setting(4, 128, "α/r", optimizer, lr, "kaiming"))  # the step of rank 64 with α/√r
        by_seed = [learning_curves(base, shuffled, [replace(setting, seed=seed) for setting in settings]) for seed in range(seeds)]
        for setting, curves in zip(settings, zip(*by_seed)):
            losses, accuracies, forwards, backwards = zip(*((end(c.losses), c.accuracy, c.forwards, c.backwards) for c in curves))
            ranges = [_least_to_most(values, digits) for values, digits in ((losses, 2), (accuracies, 2), (forwards, 3), (backwards, 5))]
            larger = f", α = {setting.alpha}" if setting.alpha != 16 else ""
            print(f"{optimizer:4} · scale {setting.rule:4} · r {setting.rank:2}{larger} · " + " · ".join(ranges))


def _least_to_most(values: Sequence[float], digits: int) -> str:
    return f"{min(values):.{digits}f}–{max(values):.{digits}f}"


if __name__ == "__main__":
    main()
