"""Fine-tuning on one digit as a pure computation: settings in, a tested adapter out, remembered."""

import copy
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock

import torch
from torch import nn
from torch.utils.data import TensorDataset

from lora_helpers.checks import LARGEST_SEED, all_finite, check_positive, check_whole
from lora_helpers.data import Mnist, as_tensors, check_mnist, only_digit
from lora_helpers.factorisation import factorised
from lora_helpers.lora import add_lora, count_parameters, freeze_base, frozen_twin, lora_disabled, lora_layers, remove_lora
from lora_helpers.model import RichBoyNet
from lora_helpers.training import Evaluation, SharedTest, evaluate, train, train_side_by_side

# The numbers of batches at which a training keeps its A and B, so that one can go back and forth through it.
STOPS = (0, 1, 2, 5, 10, 20, 30, 50, 70, 100, 150, 200, 300)
USUAL_LENGTH = 100  # most questions end here; one that asks for more is trained to the last stop
MEMORY = 150_000_000  # bytes of remembered A and B


@dataclass(frozen=True)
class Settings:
    """All that determines a fine-tuning, beside the base and the images.

    Attributes:
        rank, alpha: of the adapters on all layers.
        batches: of 10 images, from 0 (nothing trained yet).
        digit: 0 to 9, the one to learn.
        share: of the training images, how many show other digits; 0 to 0.8.
        seed: of A and of the order of the images.

    Raises:
        ValueError: one of them is not as above (that the rank is not too high is checked where it is used).
    """

    rank: int = 1
    alpha: float = 1
    batches: int = 100
    digit: int = 9
    share: float = 0
    seed: int = 0

    def __post_init__(self):
        check_whole("rank", self.rank)
        check_positive("alpha", self.alpha)
        check_whole("batches", self.batches, 0)
        check_whole("digit", self.digit, 0, 9)
        check_whole("seed", self.seed, 0, LARGEST_SEED)
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 <= self.share <= 0.8:
            raise ValueError(f"share is {self.share!r}; it must be a number from 0 (the digit alone) to 0.8.")


@dataclass(frozen=True, eq=False)
class FineTuning:
    """One fine-tuning, tested.

    Attributes:
        settings: what it was trained with.
        off, on: the network tested with LoRA off and on.
        repaired, broken: int64, positions in the test set of the images that LoRA made right and wrong.
        trainable, base_parameters: how many numbers were trained, and how many the base holds.
        singular_values: those of ΔW by layer, float32, falling, min(rank, out_features) of them.
    """

    settings: Settings
    off: Evaluation
    on: Evaluation
    repaired: torch.Tensor
    broken: torch.Tensor
    trainable: int
    base_parameters: int
    singular_values: dict[str, torch.Tensor]

    @property
    def norms(self) -> dict[str, float]:
        """The Frobenius norm of ΔW by layer: the root of the sum of its squared singular values."""
        return {name: values.norm().item() for name, values in self.singular_values.items()}

    def __repr__(self) -> str:
        wrong, digit = self.on.wrong_counts, self.settings.digit
        return f"FineTuning({self.settings}, accuracy={self.on.accuracy:.3f}, wrong {digit}s: {wrong[digit]})"


@dataclass(eq=False)
class _Training:
    """A and B of each layer at each stop, and the tests made of them."""

    adapters: dict[int, list[tuple[torch.Tensor, torch.Tensor]]]
    results: dict[int, FineTuning]

    @property
    def size(self) -> int:
        return sum(t.numel() * t.element_size() for pairs in self.adapters.values() for pair in pairs for t in pair)


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
    """Fine-tunes a copy of `base` on one digit and tests it; `base` and the global random stream are left alone.

    The recipe is the notebooks': Adam, learning rate 0.001, batches of 10. The arguments are those of `Settings`.

    Raises:
        ValueError: an argument out of range, `base` already has LoRA or holds NaN, or the training diverges.
    """
    settings = Settings(rank=rank, alpha=alpha, batches=batches, digit=digit, share=share, seed=seed)
    result = FineTuner(base, mnist).run(settings, stops=(batches,))[0]
    gc.collect()  # parametrized layers refer to themselves: without this, each call would keep its copy of the base for long
    return result


class FineTuner:
    """Fine-tunes one private copy of `base` again and again, and remembers.

    All trainings go through the same frozen weights, so that `proofs` can show that none of them moved one bit.
    Safe to call from several threads: one at a time is served.

    Raises:
        ValueError: `base` already has LoRA, or holds NaN or infinite values. TypeError: `base` is no network, or `mnist` no `Mnist`.
    """

    def __init__(self, base: RichBoyNet, mnist: Mnist):
        check_mnist(mnist)
        if lora_layers(base):
            raise ValueError("This base already has LoRA; call remove_lora(net) first, or pass pretrained_base(mnist).")
        if not all_finite(base.parameters()):
            raise ValueError("The base holds values that are NaN or infinite: its training diverged. Take a new one: pretrained_base(mnist).")
        self.mnist = mnist
        self._net = copy.deepcopy(base)
        self._copies = {name: p.detach().clone() for name, p in base.named_parameters()}
        self._off = evaluate(self._net, mnist.test)
        self._probe = self._like_the_net(as_tensors(mnist.test)[0][:: max(1, len(mnist.test) // 50)])
        with torch.no_grad():
            self._probe_logits = self._net(self._probe)
        self._shared_test: SharedTest | None = None
        self._memory: OrderedDict[tuple, _Training] = OrderedDict()
        self._lock = RLock()

    def run(
        self, settings: Settings, *, stops: Iterable[int] = STOPS, progress: Callable[[int, int], None] | None = None
    ) -> tuple[FineTuning, str]:
        """The fine-tuning of `settings`, and how it was come by.

        Args:
            stops: numbers of batches to remember on the way. The training goes on to the last one, or where `settings.batches` is not
                above 100, to the last that is not either.
            progress: called after each batch with the number done and the number to do.

        Returns:
            The result, and "just trained", "just tested" (a stop of a remembered training) or "remembered".
        """
        with self._lock:
            found = self._remembered(settings)
            if found and settings.batches in found.results:
                return found.results[settings.batches], "remembered"
            origin = "just tested" if found else "just trained"
            training = found or self._train(settings, stops, progress)
            result = self._test(settings, training)
            training.results[settings.batches] = result  # not before: an interrupted test is no result
            return result, origin

    def train_ahead(self, wanted: Iterable[Settings], progress: Callable[[int, int], None] | None = None) -> None:
        """Trains those of `wanted` that are not remembered side by side, which is quicker than one after the other; `run` then finds them.

        `progress` is as in `run`.

        Raises:
            ValueError: they differ in more than rank and alpha.
        """
        wanted = list(wanted)
        if len({replace(settings, rank=1, alpha=1) for settings in wanted}) > 1:
            raise ValueError(f"Side by side, only rank and alpha may differ; given {wanted}.")
        with self._lock:
            missing = [settings for settings in wanted if not self._remembered(settings)]
            if not missing:
                return
            first = missing[0]
            nets = [_with_new_lora(frozen_twin(self._net), settings) for settings in missing]
            train_side_by_side(
                nets, _lesson(self.mnist.train, first), max_batches=first.batches, seed=first.seed,
                after_batch=progress and (lambda done: progress(done, first.batches)),
            )  # fmt: skip
            for settings, net in zip(missing, nets):
                self._remember(settings, _Training({settings.batches: _copied_adapters(net)}, {}))

    def proofs(self, settings: Settings) -> dict[str, bool]:
        """Four claims about the network at `settings`, each computed now from its tensors.

        The base's weights and biases equal the copies taken at the start (`torch.equal`). With LoRA off, the logits
        of some 50 test images equal the base's to the bit; with B = 0 they do so too, LoRA being on. And ΔW has
        at most rank r: the product of ΔW with r + 5 random columns has the rank of ΔW, or r + 5 if that is more
        (Halko, Martinsson and Tropp, arXiv 0909.4061, section 1.5); in float32, where singular values below the larger side
        times 1.2e-7 of the largest count as zero.
        """
        with self._lock, self._loaded(settings), torch.no_grad():
            adapters = [adapter for (adapter,) in lora_layers(self._net).values()]
            generator = torch.Generator().manual_seed(0)
            deltas = [copy.deepcopy(adapter).float().delta for adapter in adapters]  # rounded to half precision it would have full rank
            low_rank = all(_has_rank_at_most(delta, settings.rank, generator) for delta in deltas)
            with lora_disabled(self._net):
                off = torch.equal(self._net(self._probe), self._probe_logits)
            for adapter in adapters:
                adapter.lora_B.zero_()
            zero = torch.equal(self._net(self._probe), self._probe_logits)
            now = {name.replace("parametrizations.weight.original", "weight"): p for name, p in self._net.named_parameters()}
            unmoved = all(torch.equal(now[name], copied) for name, copied in self._copies.items())
        return {
            "base weights unchanged to the bit": unmoved,
            "LoRA off = base, to the bit": off,
            f"rank of ΔW at most {settings.rank}": low_rank,
            "B = 0 changes nothing": zero,
        }

    def probabilities(self, settings: Settings, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The probabilities of the ten digits, N×10 each, by the base and by the network fine-tuned with `settings`.

        Args:
            images: float32, N×1×28×28, normalised as in `load_mnist`.
        """
        with self._lock, self._loaded(settings), torch.no_grad(), factorised(self._net):
            on = self._net(self._like_the_net(images)).softmax(dim=1).cpu()
            with lora_disabled(self._net):
                off = self._net(self._like_the_net(images)).softmax(dim=1).cpu()
        return off, on

    def _like_the_net(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(next(self._net.parameters()))

    def _remembered(self, settings: Settings) -> _Training | None:
        key = replace(settings, batches=0)
        training = self._memory.get(key)
        if training is None or settings.batches not in training.adapters:
            return None
        self._memory.move_to_end(key)
        return training

    def _train(self, settings: Settings, stops: Iterable[int], progress: Callable[[int, int], None] | None) -> _Training:
        lesson = _lesson(self.mnist.train, settings)
        stops = {*stops, settings.batches}
        length = max(stops if settings.batches > USUAL_LENGTH else (s for s in stops if s <= USUAL_LENGTH))
        _with_new_lora(self._net, settings)
        training = _Training({}, {})

        def keep(done: int) -> None:
            if done in stops:
                training.adapters[done] = _copied_adapters(self._net)
            if progress:
                progress(done, length)

        keep(0)
        if length:
            with torch.enable_grad():  # whatever a cell has set for the main thread
                train(self._net, lesson, max_batches=length, seed=settings.seed, progress=False, after_batch=keep)
        self._remember(settings, training)
        return training

    def _remember(self, settings: Settings, training: _Training) -> None:
        key = replace(settings, batches=0)
        self._memory[key] = training
        self._memory.move_to_end(key)
        while len(self._memory) > 1 and sum(t.size for t in self._memory.values()) > MEMORY:
            self._memory.popitem(last=False)

    def _test(self, settings: Settings, training: _Training) -> FineTuning:
        pairs = training.adapters[settings.batches]
        if not all_finite(t for pair in pairs for t in pair):
            raise ValueError(f"The training with {settings} diverged: A and B hold NaN. Choose a smaller alpha.")
        self._put(settings, pairs)
        labels = as_tensors(self.mnist.test)[1]
        if self._shared_test is None:
            self._shared_test = SharedTest(self._net, self.mnist.test)
        # With B = 0 nothing has changed, and rounding in another order must not look as if something had.
        on = self._shared_test(self._net) if settings.batches else self._off
        was_right, is_right = self._off.predictions == labels, on.predictions == labels
        layers = lora_layers(self._net)
        scale = settings.alpha / settings.rank
        counts = count_parameters(self._net)
        return FineTuning(
            settings=settings,
            off=self._off,
            on=on,
            repaired=(is_right & ~was_right).nonzero().flatten(),
            broken=(was_right & ~is_right).nonzero().flatten(),
            trainable=counts.trainable,
            base_parameters=counts.base,
            singular_values={name: scale * singular_values(A.float(), B.float()) for name, (A, B) in zip(layers, pairs)},
        )

    @contextmanager
    def _loaded(self, settings: Settings) -> Iterator[None]:
        """The network wears the adapters of `settings`; they are trained if they are no longer remembered."""
        training = self._remembered(settings) or self._train(settings, STOPS, None)
        self._put(settings, training.adapters[settings.batches])
        yield

    def _put(self, settings: Settings, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        worn = [(adapter.rank, adapter.alpha) for (adapter,) in lora_layers(self._net).values()]
        if worn != len(pairs) * [(settings.rank, settings.alpha)]:  # registering them anew takes longer than all else here
            _with_new_lora(self._net, settings)
        with torch.no_grad():
            for (adapter,), (A, B) in zip(lora_layers(self._net).values(), pairs):
                adapter.lora_A.copy_(A)
                adapter.lora_B.copy_(B)


def _with_new_lora(net: nn.Module, settings: Settings) -> nn.Module:
    if lora_layers(net):
        remove_lora(net)
    generator = torch.Generator().manual_seed(settings.seed)
    return freeze_base(add_lora(net, rank=settings.rank, alpha=settings.alpha, generator=generator))


def _copied_adapters(net: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(adapter.lora_A.detach().clone(), adapter.lora_B.detach().clone()) for (adapter,) in lora_layers(net).values()]


def singular_values(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The singular values of B A, without building it: those of the small r × r core between two orthogonal factors.

    With B = Q₁R₁ and Aᵀ = Q₂R₂, B A = Q₁(R₁R₂ᵀ)Q₂ᵀ (Golub and Van Loan, Matrix Computations, section 5.2 for QR).

    Args:
        A: r × in_features. B: out_features × r.

    Returns:
        min(r, in_features, out_features) values, falling, on the CPU.
    """
    return torch.linalg.svdvals(torch.linalg.qr(B)[1] @ torch.linalg.qr(A.T)[1].T).cpu()


def _has_rank_at_most(delta: torch.Tensor, rank: int, generator: torch.Generator) -> bool:
    product = delta @ torch.randn(delta.shape[1], rank + 5, generator=generator, device="cpu").to(delta)
    # The rounding is that of the wide ΔW: by matrix_rank's own measure, for the narrow product, a true rank could look higher.
    return torch.linalg.matrix_rank(product, rtol=max(delta.shape) * torch.finfo(delta.dtype).eps).item() <= rank


def _lesson(dataset: TensorDataset, settings: Settings) -> TensorDataset:
    """The training images of the digit, and as many others, drawn at random, as `share` asks for."""
    chosen = only_digit(dataset, settings.digit)
    wanted = round(len(chosen) * settings.share / (1 - settings.share))
    if not wanted:
        return chosen
    images, labels = as_tensors(dataset)
    others = (labels != settings.digit).nonzero().flatten()
    if wanted > len(others):
        raise ValueError(f"share is {settings.share}; with {len(chosen)} images of {settings.digit} that asks for {wanted:,} others, "
                         f"and there are {len(others):,}. Choose a smaller share.")  # fmt: skip
    generator = torch.Generator().manual_seed(settings.seed)
    others = others[torch.randperm(len(others), generator=generator, device="cpu")[:wanted].to(others.device)]
    parts = zip(chosen.tensors, (images[others], labels[others]))
    return TensorDataset(*(torch.cat(part) for part in parts))
