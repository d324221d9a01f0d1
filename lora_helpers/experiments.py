"""Settings in, a tested fine-tuning out, remembered: the one engine of notebooks, panels and sweeps."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock

import torch
from torch import nn

from lora_helpers.checks import (
    LARGEST_SEED,
    all_finite,
    check_choice,
    check_positive,
    check_whole,
    no_autocast,
)
from lora_helpers.data import Mnist, as_tensors, check_mnist
from lora_helpers.fast import Fast, ImagesToTest
from lora_helpers.lora import (
    LoRAParametrization,
    add_lora,
    count_parameters,
    freeze_base,
    frozen_twin,
    lora_disabled,
    lora_layers,
    lora_parameters,
    lora_scale,
    remove_lora,
)
from lora_helpers.model import RichBoyNet
from lora_helpers.training import Evaluation, compare, make_optimizer, progress_bar, shuffled_batches

# The factor on BA as the rank grows: LoRA's, rsLoRA's, or none. All agree at rank 1.
RULES = ("α/r", "α/√r", "α")
OPTIMIZERS = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
STARTS = {"normal": "A ~ N(0, 1)", "kaiming": "A ~ Kaiming-uniform"}
# After these numbers of batches the explorer keeps A and B, so that it can go back and forth in a training.
STOPS = (0, 1, 2, 5, 10, 20, 30, 50, 70, 100, 150, 200, 300)
USUAL_LENGTH = 100  # most questions end here; one that asks for more is trained to the last stop
TOGETHER = 32  # adapters trained side by side, at most
MEMORY = 150_000_000  # bytes of remembered A and B

Progress = Callable[[int, int], None]  # is told how much is done, and how much there is to do
Adapters = dict[
    str, tuple[torch.Tensor, torch.Tensor]
]  # by layer: A, rank × in_features, and B, out_features × rank


@dataclass(frozen=True)
class Setting:
    """All that determines a fine-tuning, beside the base and the images.

    Attributes:
        rank, alpha: of the adapters on all layers. rule: "α/r", "α/√r" or "α", see `scale`.
        batches: of 10 images, from 0 (nothing trained yet).
        digit: 0 to 9, the one to learn; None for all digits as they come.
        share: of the training images, how many show other digits; 0 to 0.8.
        seed: of A and of the order of the images.
        optimizer: "Adam" or "SGD". lr: its learning rate.
        start: "normal", A from N(0, 1); or "kaiming", the smaller A of loralib and PEFT.
        strength: a dial after the training: ΔW is used this many times; from 0, as if LoRA were off.

    Raises:
        ValueError: one of them is not as above. (A rank that is too high is refused when it is used.)
    """

    rank: int = 1
    alpha: float = 1
    rule: str = "α/r"
    batches: int = 100
    digit: int | None = 9
    share: float = 0
    seed: int = 0
    optimizer: str = "Adam"
    lr: float = 1e-3
    start: str = "normal"
    strength: float = 1

    def __post_init__(self):
        check_whole("rank", self.rank)
        check_positive("alpha", self.alpha)
        check_choice("rule", self.rule, RULES)
        check_whole("batches", self.batches, 0)
        if self.digit is not None:
            check_whole("digit", self.digit, 0, 9)
        if (
            isinstance(self.share, bool)
            or not isinstance(self.share, (int, float))
            or not 0 <= self.share <= 0.8
        ):
            raise ValueError(f"share is {self.share!r}; it must be a number from 0 (the digit alone) to 0.8.")
        check_whole("seed", self.seed, 0, LARGEST_SEED)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_positive("lr", self.lr)
        check_choice("start", self.start, STARTS)
        if self.strength != 0:
            check_positive("strength", self.strength)

    @property
    def scale(self) -> float:
        """The factor on BA, strength included."""
        return self.strength * lora_scale(self._alpha, self.rank, self.rule == "α/√r")

    @property
    def _alpha(self) -> float:
        # LoRA always divides by r: no scale, "α", is given to it as r times α.
        return self.alpha * self.rank if self.rule == "α" else self.alpha

    def add_to(self, net: nn.Module) -> nn.Module:
        """Adds this adapter, untrained and at strength 1, to `net` and freezes the base.

        The global random stream is left alone.
        """
        generator = torch.Generator().manual_seed(self.seed)
        add_lora(net, self.rank, self._alpha, generator=generator, rank_stabilised=self.rule == "α/√r")
        if self.start == "kaiming":
            # Uniform within ±1/√in_features, so its standard deviation is 1/√(3·in_features).
            for adapter in adapters_of(net).values():
                drawn = torch.empty(adapter.lora_A.shape, dtype=torch.float32, device="cpu")
                nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
                adapter.lora_A.data.copy_(drawn)
        return freeze_base(net)


@dataclass(frozen=True, eq=False)
class FineTuning:
    """One fine-tuning, tested.

    Attributes:
        setting: what it was trained with.
        off, on: the network tested with LoRA off and on.
        repaired, broken: int64, positions in the test set of the images that LoRA made right and wrong.
        adapters: by layer, A and B. earlier: the same after fewer batches, by their number, where asked for.
        trained, base_parameters: how many numbers were trained, and how many the base holds.
        losses: of each batch.
    """

    setting: Setting
    off: Evaluation
    on: Evaluation
    repaired: torch.Tensor
    broken: torch.Tensor
    adapters: Adapters
    earlier: dict[int, Adapters]
    trained: int
    base_parameters: int
    losses: Sequence[float]

    @property
    def scale(self) -> float:
        """The factor on BA."""
        return self.setting.scale

    @property
    def norms(self) -> dict[str, float]:
        """The Frobenius norm of ΔW by layer."""
        return {name: product_norm(A, B, self.scale) for name, (A, B) in self.adapters.items()}

    @property
    def singular_values(self) -> dict[str, torch.Tensor]:
        """Those of ΔW by layer: float32, falling, min(rank, out_features) of them."""
        return {
            name: self.scale * singular_values(A.float(), B.float()) for name, (A, B) in self.adapters.items()
        }

    @property
    def wrong(self) -> int:
        """How many images of the learned digit are answered wrongly with LoRA on."""
        return self.on.wrong_counts[self.setting.digit]

    @property
    def others_wrong(self) -> int:
        """How many images of the other digits are answered wrongly with LoRA on."""
        return sum(self.on.wrong_counts) - self.wrong

    @property
    def called(self) -> float:
        """The share of all test images that LoRA calls the learned digit, 0 to 1."""
        return (self.on.predictions == self.setting.digit).float().mean().item()

    @property
    def diverged(self) -> bool:
        return bool(self.losses) and not math.isfinite(self.losses[-1])

    def __repr__(self) -> str:
        wrong = "" if self.setting.digit is None else f", wrong {self.setting.digit}s: {self.wrong}"
        return f"FineTuning({self.setting}, accuracy={self.on.accuracy:.3f}{wrong})"


@dataclass(eq=False)
class Training:
    """A and B after some numbers of batches, all losses, and the tests so far, by batches and strength."""

    stops: dict[int, Adapters]
    losses: list[float]
    tested: dict[tuple[int, float], FineTuning]

    @property
    def size(self) -> int:
        """Bytes of A and B."""
        return sum(t.nbytes for pairs in self.stops.values() for pair in pairs.values() for t in pair)


class FineTuner:
    """Fine-tunes one private copy of `base` again and again, and remembers.

    All trainings use the same frozen weights, so `proofs` can show that none of them moved by one bit.
    Several threads may call it: it serves one at a time.

    Attributes:
        mnist: the digits to train and to test on.
        base_weights: copies of the base's weights and biases, by name, taken at the start.

    Raises:
        ValueError: `base` already has LoRA, or holds NaN or infinite values.
        TypeError: `base` is not a `RichBoyNet`, or `mnist` is not a `Mnist`.
    """

    @torch.inference_mode(False)
    def __init__(self, base: RichBoyNet, mnist: Mnist):
        check_mnist(mnist)
        if not isinstance(base, RichBoyNet):
            raise TypeError(
                f"base is a {type(base).__name__}; it must be a RichBoyNet, such as pretrained_base()."
            )
        if lora_layers(base):
            raise ValueError(
                "This base already has LoRA; call remove_lora(net) first, or pass pretrained_base()."
            )
        if not all_finite(base.parameters()):
            raise ValueError(
                "The base holds NaN or infinite values: its training diverged. Pass pretrained_base()."
            )
        self.mnist = mnist
        self._net = copy.deepcopy(base)
        self.base_weights = {name: p.detach().clone() for name, p in base.named_parameters()}
        images, self._labels = as_tensors(mnist.test)
        self._lessons = as_tensors(mnist.train)  # checked once
        self._probe = self._like_the_net(images[:: max(1, len(images) // 50)])
        self._memory: OrderedDict[Setting, Training] = OrderedDict()
        self._lock = RLock()
        with self._alone(), torch.no_grad():
            self._test = ImagesToTest(self._net, self._like_the_net(images.flatten(1)))
            self._off = compare(self._test.answers(self._net), self._labels)
            self._probe_logits = self._net(self._probe)

    def run(self, setting: Setting, progress: Progress | None = None) -> tuple[FineTuning, str]:
        """The fine-tuning of `setting`, and where the result came from.

        A and B are kept at each of `STOPS` on the way: up to 100 batches or, if `setting` asks for more, all.

        Args:
            progress: called after each batch with the number done and the number to do.

        Returns:
            The result, and "just trained", "just tested" (a stop of a remembered training) or "remembered".

        Raises:
            ValueError: the training diverged.
        """
        with self._alone():
            origin = self._origin(setting)
            if origin == "just trained":
                length = USUAL_LENGTH if setting.batches <= USUAL_LENGTH else max(STOPS[-1], setting.batches)
                self._train([setting], length, {*STOPS, setting.batches}, progress)
            result = self._tested(setting)
            if not all_finite(tensor for pair in result.adapters.values() for tensor in pair):
                raise ValueError(
                    f"The training with {setting} diverged. Choose a smaller α: A and B hold NaN."
                )
            return result, origin

    def run_all(
        self, settings: Iterable[Setting], *, stops: Iterable[int] = (), progress: Progress | None = None
    ) -> list[tuple[FineTuning, str]]:
        """As `run` for each of `settings`; what is not remembered is trained side by side: quicker.

        Args:
            stops: numbers of batches after which A and B are kept too, in `FineTuning.earlier`.
            progress: called after each batch of all trainings with the number done and the number to do.
        """
        with self._alone():
            settings, stops = list(settings), set(stops)
            origins = [self._origin(setting, stops) for setting in settings]
            missing = {
                (_key(s), s.batches): s for s, origin in zip(settings, origins) if origin == "just trained"
            }
            chunks = list(_chunks(missing.values()))
            total, before = sum(chunk[0].batches for chunk in chunks), 0
            results = {}
            for chunk in chunks:
                step = progress and (lambda done, _, before=before: progress(before + done, total))
                self._train(chunk, chunk[0].batches, {*stops, chunk[0].batches}, step)
                before += chunk[0].batches
                trained = {(_key(setting), setting.batches) for setting in chunk}
                # Tested now, before memory lets go of them.
                results |= {s: self._tested(s) for s in settings if (_key(s), s.batches) in trained}
            return [(results.get(s) or self._tested(s), origin) for s, origin in zip(settings, origins)]

    def proofs(self, setting: Setting) -> dict[str, bool]:
        """Four claims about the network at `setting`, each computed now from its tensors.

        The base's weights and biases equal the copies taken at the start (`torch.equal`). With LoRA off,
        the logits of some 50 test images equal the base's to the bit; with LoRA on and B = 0 they do so
        too. And ΔW has at most rank r: the product of ΔW with r + 5 random columns has the rank of ΔW, or r
        + 5 if that is more (Halko, Martinsson and Tropp, arXiv 0909.4061, section 1.5), by float32's
        rounding.
        """
        with self._alone(), self._loaded(setting), torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            adapters = adapters_of(self._net).values()
            low_rank = all(_has_rank_at_most(adapter.delta, setting.rank, generator) for adapter in adapters)
            with lora_disabled(self._net):
                off = torch.equal(self._net(self._probe), self._probe_logits)
            for adapter in adapters:
                adapter.lora_B.zero_()
            zero = torch.equal(self._net(self._probe), self._probe_logits)
            now = {
                name.replace(".parametrizations.weight.original", ".weight"): p
                for name, p in self._net.named_parameters()
            }
            unmoved = all(torch.equal(now[name], copied) for name, copied in self.base_weights.items())
        return {
            "base weights unchanged to the bit": unmoved,
            "LoRA off = base, to the bit": off,
            f"rank of ΔW at most {setting.rank}": low_rank,
            "B = 0 changes nothing": zero,
        }

    def probabilities(self, setting: Setting, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The probabilities of the ten digits, N×10 each, by the base and by what `setting` made of it.

        Args:
            images: float32, N×1×28×28, normalised as in `load_mnist`.
        """
        with self._alone(), self._loaded(setting), torch.no_grad():
            on = self._net(self._like_the_net(images)).softmax(dim=1).cpu()
            with lora_disabled(self._net):
                off = self._net(self._like_the_net(images)).softmax(dim=1).cpu()
        return off, on

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock, no_autocast(), torch.inference_mode(False):
            yield

    def _like_the_net(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(self.base_weights["linear1.bias"])

    def _remembers(self, setting: Setting, stops: Iterable[int] = ()) -> bool:
        training = self._memory.get(_key(setting))
        return training is not None and {setting.batches, *stops} <= training.stops.keys()

    def _origin(self, setting: Setting, stops: Iterable[int] = ()) -> str:
        """Where the result of `setting` will come from."""
        if not self._remembers(setting, stops):
            return "just trained"
        tested = self._memory[_key(setting)].tested
        return "remembered" if (setting.batches, setting.strength) in tested else "just tested"

    def _train(
        self, settings: Sequence[Setting], batches: int, stops: set[int], progress: Progress | None
    ) -> None:
        with torch.enable_grad():
            trainings = train_adapters(self._net, *self._lessons, settings, batches, stops, progress)
        for setting, training in zip(settings, trainings):
            self._memory[_key(setting)] = training
            self._memory.move_to_end(_key(setting))
        while len(self._memory) > len(settings) and sum(t.size for t in self._memory.values()) > MEMORY:
            self._memory.popitem(last=False)

    def _tested(self, setting: Setting) -> FineTuning:
        training = self._memory[_key(setting)]
        stop = setting.batches, setting.strength
        if stop not in training.tested:
            training.tested[stop] = self._test_of(setting, training)
        return replace(training.tested[stop], setting=setting)

    def _test_of(self, setting: Setting, training: Training) -> FineTuning:
        labels = self._labels
        with self._loaded(setting):
            # With ΔW = 0 nothing has changed, and other rounding must not look as if something had.
            changed = setting.batches and setting.strength
            on = compare(self._test.answers(self._net), labels) if changed else self._off
            counts = count_parameters(self._net)
        was_right, is_right = self._off.predictions == labels, on.predictions == labels
        return FineTuning(
            setting=setting,
            off=self._off,
            on=on,
            repaired=(is_right & ~was_right).nonzero().flatten(),
            broken=(was_right & ~is_right).nonzero().flatten(),
            adapters=training.stops[setting.batches],
            earlier={stop: pairs for stop, pairs in training.stops.items() if stop < setting.batches},
            trained=counts.trainable,
            base_parameters=counts.base,
            losses=training.losses[: setting.batches],
        )

    @contextmanager
    def _loaded(self, setting: Setting) -> Iterator[None]:
        """Within it the network wears the adapters of `setting`; afterwards it is the plain base again."""
        if not self._remembers(setting):  # memory has let go of it
            self.run(setting)
        pairs = self._memory[_key(setting)].stops[setting.batches]
        setting.add_to(self._net)
        try:
            set_adapters(self._net, pairs)
            for adapter in adapters_of(self._net).values():
                adapter.alpha *= setting.strength  # so the adapter's scale is the setting's
            yield
        finally:
            remove_lora(self._net)


def fine_tune(
    base: RichBoyNet,
    mnist: Mnist,
    *,
    rank: int = 1,
    alpha: float = 1,
    digit: int = 9,
    batches: int = 100,
    share: float = 0,
    seed: int = 0,
) -> FineTuning:
    """Fine-tunes a copy of `base` on one digit and tests it; `base` and the random stream are left alone.

    The recipe is the notebooks': Adam, rate 0.001, batches of 10. The arguments are those of `Setting`.

    Raises:
        ValueError: an argument out of range, or `base` already has LoRA or holds NaN.
    """
    setting = Setting(rank=rank, alpha=alpha, batches=batches, digit=digit, share=share, seed=seed)
    return FineTuner(base, mnist).run_all([setting])[0][0]


def sweep(
    base: RichBoyNet,
    mnist: Mnist,
    settings: Iterable[Setting],
    *,
    stops: Iterable[int] = (),
    progress: bool = True,
) -> list[FineTuning]:
    """Fine-tunes and tests a copy of `base` for each of `settings`, many side by side; with a bar."""
    with progress_bar(None, progress) as bar:

        def show(done: int, total: int) -> None:
            if bar.total != total:
                bar.reset(total)
            bar.update(done - bar.n)

        return [result for result, _ in FineTuner(base, mnist).run_all(settings, stops=stops, progress=show)]


def train_adapters(
    base: RichBoyNet,
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: Sequence[Setting],
    batches: int,
    stops: Iterable[int],
    progress: Progress | None = None,
    after_batch: Callable[[Sequence[nn.Module]], None] | None = None,
) -> list[Training]:
    """Trains one adapter for each of `settings`, side by side, each as if alone; `base` is left alone.

    Args:
        images, labels: to train on, as in `Mnist`; each setting draws its lesson from them.
        batches: how many, of 10 images each. stops: the numbers of batches after which A and B are kept.
        after_batch: looks at the networks after each batch, while they have their gradients.
    """
    images, labels = images.flatten(1).to(base.linear1.bias), labels.to(base.linear1.bias.device)
    nets = [setting.add_to(frozen_twin(base)) for setting in settings]
    places = [lesson_places(labels, setting) for setting in settings]
    orders = [shuffled_batches(len(own), 10, setting.seed) for own, setting in zip(places, settings)]
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}  # one step for many parameters is quicker
    for net, setting in zip(nets, settings):
        groups.setdefault((setting.optimizer, setting.lr), []).extend(lora_parameters(net))
    optimizers = [make_optimizer(OPTIMIZERS[name], group, lr) for (name, lr), group in groups.items()]
    fast, losses = Fast(nets), torch.zeros(batches, len(nets), dtype=torch.float32, device=images.device)
    trainings = [Training({0: copied_adapters(net)} if 0 in stops else {}, [], {}) for net in nets]

    def drawn() -> Iterator[torch.Tensor]:
        for _ in range(batches):
            yield torch.stack([own[next(order)] for own, order in zip(places, orders)])  # n × 10

    for batch, (x, y, products) in enumerate(fast.batches(images, labels, drawn())):
        losses[batch] = fast.backpropagate(x, y, products)
        for optimizer in optimizers:
            optimizer.step()
        if after_batch:
            after_batch(nets)
        if batch + 1 in stops:
            for net, training in zip(nets, trainings):
                training.stops[batch + 1] = copied_adapters(net)
        if progress:
            progress(batch + 1, batches)
    for training, own in zip(trainings, losses.T.tolist()):
        training.losses = own
    return trainings


def lesson_places(labels: torch.Tensor, setting: Setting) -> torch.Tensor:
    """Where the lesson's images stand in the training set: all of the digit, and the share of others, drawn.

    Args:
        labels: int64, N.

    Raises:
        ValueError: there is no such digit, or there are not enough others.
    """
    if setting.digit is None:
        return torch.arange(len(labels), device=labels.device)
    is_own = labels == setting.digit
    own, others = is_own.nonzero().flatten(), (~is_own).nonzero().flatten()
    wanted = round(len(own) * setting.share / (1 - setting.share))
    if not len(own) or wanted > len(others):
        raise ValueError(
            f"digit is {setting.digit} and share {setting.share}; that asks for {wanted:,} other images "
            f"beside {len(own):,} of the digit, and there are {len(others):,}. "
            "Choose another digit or a smaller share."
        )
    generator = torch.Generator().manual_seed(setting.seed)
    drawn = torch.randperm(len(others), generator=generator, device="cpu")[:wanted]
    return torch.cat([own, others[drawn.to(labels.device)]])


def adapters_of(net: nn.Module) -> dict[str, LoRAParametrization]:
    """The adapter of each adapted layer of a network that has one."""
    return {name: adapters[0] for name, adapters in lora_layers(net).items()}


def copied_adapters(net: nn.Module) -> Adapters:
    """Copies of A and B, by layer."""
    pairs = {name: (adapter.lora_A, adapter.lora_B) for name, adapter in adapters_of(net).items()}
    return {name: (A.detach().clone(), B.detach().clone()) for name, (A, B) in pairs.items()}


@torch.no_grad()
def set_adapters(net: nn.Module, adapters: Adapters) -> None:
    """Writes A and B into the adapter of each layer: the opposite of `copied_adapters`."""
    for name, adapter in adapters_of(net).items():
        adapter.lora_A.copy_(adapters[name][0])
        adapter.lora_B.copy_(adapters[name][1])


def product_norm(A: torch.Tensor, B: torch.Tensor, scale: float = 1.0) -> float:
    """The Frobenius norm of scale · B A: ‖BA‖² is the trace of (BᵀB)(AAᵀ), both r × r."""
    with no_autocast():
        return scale * ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt().item()


def singular_values(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The singular values of B A without building it: of the r × r core between two orthogonal factors.

    With B = Q₁R₁ and Aᵀ = Q₂R₂, B A = Q₁(R₁R₂ᵀ)Q₂ᵀ (Golub and Van Loan, Matrix Computations, section 5.2
    for QR).

    Args:
        A: r × in_features. B: out_features × r.

    Returns:
        min(r, in_features, out_features) values, falling, on the CPU.
    """
    with no_autocast():
        return torch.linalg.svdvals(torch.linalg.qr(B)[1] @ torch.linalg.qr(A.T)[1].T).cpu()


def _has_rank_at_most(delta: torch.Tensor, rank: int, generator: torch.Generator) -> bool:
    shape = delta.shape[1], rank + 5
    columns = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    product = delta @ columns.to(delta)
    # The rounding is that of the wide ΔW: by matrix_rank's own measure, for the narrow product, a true
    # rank could look higher.
    return (
        torch.linalg.matrix_rank(product, rtol=max(delta.shape) * torch.finfo(delta.dtype).eps).item() <= rank
    )


def _key(setting: Setting) -> Setting:
    # Its stops and strengths share one training. At rank 1 all rules are one.
    return replace(setting, batches=0, strength=1, rule="α/r" if setting.rank == 1 else setting.rule)


def _chunks(settings: Iterable[Setting]) -> Iterator[list[Setting]]:
    """Settings that can be trained side by side: as many batches of as many images."""
    groups: dict[tuple, list[Setting]] = {}
    for setting in settings:
        groups.setdefault((setting.batches, setting.digit, setting.share), []).append(setting)
    for group in groups.values():
        for start in range(0, len(group), TOGETHER):
            yield group[start : start + TOGETHER]
