"""LoRA as a parametrization: adding it, freezing the base, switching, merging, removing, counting."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize


class LoRAParametrization(nn.Module):
    """Adds a low-rank update to a weight: forward(W) = W + (alpha / rank) · B A.

    `lora_A` is rank × in_features, drawn from N(0, 1); `lora_B` is out_features × rank, zeros:
    so B A = 0 and nothing changes before the first step. With `enabled` False, forward returns W itself.

    Args:
        in_features, out_features: of the layer; its weight is out_features × in_features.
        rank: a whole number of at least 1. alpha: positive and finite.
        device, dtype: those of the weight (the parameters are created there; one moved
            afterwards would no longer be a parameter).
        generator: draws `lora_A`; on the CPU, so that a seed gives one adapter on every device.

    Raises:
        ValueError: a size, `rank` or `alpha` is not as above.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685,
    section 4.1; torch.nn.utils.parametrize,
    https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.parametrize.register_parametrization.html
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 1,
        alpha: float = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features), ("rank", rank)):
            _check_whole(name, value)
        _check_alpha(alpha)
        a = torch.randn(rank, in_features, dtype=dtype, generator=generator).to(device)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        self.rank, self.alpha = rank, alpha
        self.enabled = True

    @property
    def scale(self) -> float:
        """α/r, the factor on B A: defined here and nowhere else."""
        return self.alpha / self.rank

    @property
    def delta(self) -> torch.Tensor:
        """ΔW = (α/r) · B A, out_features × in_features, whether enabled or not."""
        return self.scale * (self.lora_B @ self.lora_A)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.delta if self.enabled else weight

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, enabled={self.enabled}"


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a network holds: the base's, LoRA's, and those that training may change."""

    base: int
    lora: int
    trainable: int

    @property
    def total(self) -> int:
        return self.base + self.lora

    def __str__(self) -> str:
        return (
            f"{self.base:,} base + {self.lora:,} LoRA = {self.total:,} parameters, {self.trainable:,} trainable "
            f"(LoRA adds {self.lora / self.base:.3%})"
        )


def lora_layers(net: nn.Module) -> dict[str, list[LoRAParametrization]]:
    """The adapted layers of `net` by name, each with the LoRA parametrizations on its weight."""
    found = {}
    for name, layer in net.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            adapters = [p for p in layer.parametrizations.weight if isinstance(p, LoRAParametrization)]
            if adapters:
                found[name] = adapters
    return found


def count_parameters(net: nn.Module) -> ParameterCount:
    """Counts base and LoRA parameters apart; a tensor used in two places counts once."""
    lora = {id(p) for p in _lora_parameters(net)}
    sizes = [(id(p) in lora, p.requires_grad, p.numel()) for p in net.parameters()]
    return ParameterCount(
        base=sum(n for is_lora, _, n in sizes if not is_lora),
        lora=sum(n for is_lora, _, n in sizes if is_lora),
        trainable=sum(n for _, trainable, n in sizes if trainable),
    )


def add_lora(
    net: nn.Module,
    rank: int = 1,
    alpha: float = 1,
    layers: Iterable[str] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Registers a `LoRAParametrization` on the weight of each layer; biases stay as they are.

    Args:
        rank: from 1 to the smaller side of the largest adapted layer.
        alpha: positive and finite; the update is scaled by alpha / rank.
        layers: names of `Linear` layers in `net`; default: all of them.
        generator: draws A; default: PyTorch's global random stream.

    Returns:
        `net` itself, changed.

    Raises:
        ValueError: bad `rank` or `alpha`, an unknown layer, a layer that already has LoRA or
            another parametrization or shares its weight. Nothing is changed then.
        TypeError: a named layer is no `Linear`.
    """
    _check_whole("rank", rank)
    _check_alpha(alpha)
    chosen = _choose_layers(net, layers)
    largest = max(min(layer.weight.shape) for layer in chosen.values())
    if rank > largest:
        raise ValueError(
            f"rank is {rank}; for {', '.join(chosen)} it must be at most {largest}, "
            "the smaller side of the largest weight: no update has a higher rank."
        )
    for layer in chosen.values():
        out_features, in_features = layer.weight.shape
        adapter = LoRAParametrization(
            in_features, out_features, rank, alpha,
            device=layer.weight.device, dtype=layer.weight.dtype, generator=generator,
        )  # fmt: skip
        parametrize.register_parametrization(layer, "weight", adapter)
    return net


def freeze_base(net: nn.Module) -> nn.Module:
    """Leaves only LoRA's A and B trainable. They are found by their class, not by their name.

    Raises:
        ValueError: `net` has no LoRA (freezing would leave nothing to train).
    """
    _require_lora(net)
    lora = {id(p) for p in _lora_parameters(net)}
    for parameter in net.parameters():
        parameter.requires_grad_(id(parameter) in lora)
    return net


def set_lora_enabled(net: nn.Module, enabled: bool) -> None:
    """Switches LoRA on or off. Off, each weight *is* its original, to the bit.

    Raises:
        ValueError: `net` has no LoRA. TypeError: `enabled` is not a bool.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled is {enabled!r}; it must be True or False.")
    for adapter in _require_lora(net):
        adapter.enabled = enabled


@contextmanager
def lora_disabled(net: nn.Module) -> Iterator[nn.Module]:
    """Within the `with` block LoRA is off; afterwards each adapter is as it was, also after an error.

    Raises:
        ValueError: `net` has no LoRA.
    """
    adapters = _require_lora(net)
    before = [adapter.enabled for adapter in adapters]
    try:
        set_lora_enabled(net, False)
        yield net
    finally:
        for adapter, enabled in zip(adapters, before):
            adapter.enabled = enabled


def merge_lora(net: nn.Module) -> nn.Module:
    """Writes W + ΔW into each weight and removes the parametrization: an ordinary network again.

    The old weights are overwritten; keep a copy, or call `remove_lora`, to have the base's bits back.
    Which parameters are trainable stays as it was (after `freeze_base`: none).

    Raises:
        ValueError: `net` has no LoRA; LoRA is off (merging would discard it); or a weight
            carries another parametrization. Nothing is changed then.
    """
    if not all(adapter.enabled for adapter in _require_lora(net)):
        raise ValueError(
            "LoRA is off, so merging would discard it. Call set_lora_enabled(net, True) first, "
            "or remove_lora(net) if discarding is what you want."
        )
    return _unregister(net, keep_update=True)


def remove_lora(net: nn.Module) -> nn.Module:
    """Discards the adapters; each weight is its original again, to the bit.

    Raises:
        ValueError: `net` has no LoRA, or a weight carries another parametrization. Nothing is changed then.
    """
    _require_lora(net)
    return _unregister(net, keep_update=False)


def _unregister(net: nn.Module, keep_update: bool) -> nn.Module:
    found = lora_layers(net)
    for name, adapters in found.items():
        if len(adapters) != len(net.get_submodule(name).parametrizations.weight):
            raise ValueError(
                f"The weight of {name} carries another parametrization beside LoRA; "
                "remove that one first with torch.nn.utils.parametrize.remove_parametrizations."
            )
    for name in found:
        layer = net.get_submodule(name)
        _give_own_class(layer)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=keep_update)
    return net


def _give_own_class(layer: nn.Module) -> None:
    # A deepcopy shares its generated class with the original, and PyTorch removes `.weight` from
    # that class: without this, removing LoRA from a copy would break the original.
    shared = type(layer)
    body = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    layer.__class__ = type(shared.__name__, shared.__bases__, body)


def _lora_parameters(net: nn.Module) -> list[nn.Parameter]:
    return [p for adapters in lora_layers(net).values() for adapter in adapters for p in adapter.parameters()]


def _require_lora(net: nn.Module) -> list[LoRAParametrization]:
    adapters = [adapter for found in lora_layers(net).values() for adapter in found]
    if not adapters:
        raise ValueError(f"This {type(net).__name__} has no LoRA; call add_lora(net) first.")
    return adapters


def _choose_layers(net: nn.Module, layers: Iterable[str] | None) -> dict[str, nn.Linear]:
    modules = dict(net.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if isinstance(layers, str):
        raise TypeError(f"layers is the text {layers!r}; it must be a list of names, such as [{layers!r}].")
    names = linear if layers is None else list(dict.fromkeys(layers))
    if not names:
        raise ValueError(f"No layer to adapt; this network's Linear layers are: {', '.join(linear) or 'none'}.")
    for name in names:
        if name not in modules:
            raise ValueError(f"There is no layer {name!r}; this network's Linear layers are: {', '.join(linear)}.")
        layer = modules[name]
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{name!r} is a {type(layer).__name__}; LoRA here adapts Linear layers: {', '.join(linear)}.")
        if parametrize.is_parametrized(layer, "weight"):
            kinds = {type(p).__name__ for p in layer.parametrizations.weight}
            raise ValueError(
                f"The weight of {name!r} already carries {', '.join(sorted(kinds))}. "
                "Call remove_lora(net) or merge_lora(net) first, or start from a fresh network."
            )
        owners = [other for other, module in modules.items() if getattr(module, "weight", None) is layer.weight]
        if len(owners) > 1:
            raise ValueError(f"{' and '.join(owners)} share one weight; adapting one of them would untie them.")
    return {name: modules[name] for name in names}


def _check_whole(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")


def _check_alpha(alpha: float) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha is {alpha!r}; it must be a positive, finite number.")
