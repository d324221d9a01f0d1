"""LoRA as a parametrization: adding it, freezing the base, switching, naming, merging, removing, counting."""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from lora_helpers.checks import check_bool, check_network, check_positive, check_whole, no_autocast


def lora_scale(alpha: float, rank: int, rank_stabilised: bool = False) -> float:
    """The factor on B A: α/r, or α/√r if rank-stabilised. It is computed here and nowhere else.

    Source: Hu et al., arXiv 2106.09685, section 4.1; rsLoRA: Kalajdzievski, arXiv 2312.03732.
    """
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


class LoRAParametrization(nn.Module):
    """Adds a low-rank update to a weight: forward(W) = W + (alpha / rank) · B A.

    `lora_A` is rank × in_features, drawn from N(0, 1). `lora_B` is out_features × rank, zeros: so B A = 0,
    and nothing changes before the first step. Forward adds the update only while the adapter is `enabled`
    (the switch) and `active` (the one in use, of several).

    Args:
        in_features, out_features: of the layer; its weight is out_features × in_features.
        rank: a whole number of at least 1. alpha: positive and finite.
        device, dtype: those of the weight. The parameters are created there; one that is moved later
            would no longer be a parameter.
        generator: draws `lora_A`; a seed gives the same adapter on every device.
        name: tells several adapters on one base apart.
        rank_stabilised: scales by alpha / √rank instead, as rsLoRA does.

    The scale is kept nowhere: files hold rank, alpha and rank_stabilised, and all else reads `scale`, which
    is computed from them. For a scale s of your own, pass alpha = s · rank.

    A state dict holds A and B only. A file of `save_adapter` also holds alpha and the rest.

    Raises:
        ValueError: a size, `rank`, `alpha` or `name` is not as above.
        TypeError: `rank_stabilised` is not a bool, or `generator` is not a `torch.Generator`.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.parametrize.register_parametrization.html
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 1,
        alpha: float = 1,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        name: str = "default",
        rank_stabilised: bool = False,
    ):
        super().__init__()
        for argument, value in (("in_features", in_features), ("out_features", out_features), ("rank", rank)):
            check_whole(argument, value)
        check_positive("alpha", alpha)
        check_bool("rank_stabilised", rank_stabilised)
        if not isinstance(name, str) or not name:
            raise ValueError(f"name is {name!r}; it must be a text such as 'nine'.")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator is {generator!r}; it must be a torch.Generator, "
                "such as torch.Generator().manual_seed(0)."
            )
        # Drawn on the CPU in float32, so that a seed gives the same A on every device and in every dtype.
        drawn = torch.randn(rank, in_features, dtype=torch.float32, generator=generator, device="cpu")
        self.lora_A = nn.Parameter(
            drawn.to(
                torch.get_default_device() if device is None else device, dtype or torch.get_default_dtype()
            )
        )
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        self.rank, self.alpha, self.rank_stabilised, self.name = rank, alpha, rank_stabilised, name
        self.enabled = self.active = True

    @property
    def scale(self) -> float:
        """The factor on B A: see `lora_scale`."""
        return lora_scale(self.alpha, self.rank, self.rank_stabilised)

    @property
    def applied(self) -> bool:
        """Whether forward adds the update now."""
        return self.enabled and self.active

    @property
    def delta(self) -> torch.Tensor:
        """ΔW = (α/r) · B A, out_features × in_features, whether enabled or not."""
        return self.scale * (self.lora_B @ self.lora_A)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.delta if self.applied else weight

    def extra_repr(self) -> str:
        name = "" if self.name == "default" else f", name={self.name!r}, active={self.active}"
        return f"rank={self.rank}, alpha={self.alpha}, enabled={self.enabled}{name}"


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
        share = f" (LoRA adds {self.lora / self.base:.3%})" if self.base else ""
        numbers = f"{self.base:,} base + {self.lora:,} LoRA = {self.total:,} parameters"
        return f"{numbers}, {self.trainable:,} trainable{share}"


def lora_layers(net: nn.Module) -> dict[str, list[LoRAParametrization]]:
    """The adapted layers of `net` by name, each with the LoRA parametrizations on its weight.

    Raises:
        TypeError: `net` is not a `torch.nn.Module`.
    """
    check_network(net)
    found = {}
    for name, layer in net.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            adapters = [p for p in layer.parametrizations.weight if isinstance(p, LoRAParametrization)]
            if adapters:
                found[name] = adapters
    return found


def lora_parameters(net: nn.Module) -> list[nn.Parameter]:
    """A and B of all adapters of `net`."""
    return [p for adapters in lora_layers(net).values() for adapter in adapters for p in adapter.parameters()]


def original_weight(layer: nn.Linear) -> nn.Parameter:
    """The stored weight of a layer, out_features × in_features, with LoRA or without."""
    return (
        layer.parametrizations.weight.original
        if parametrize.is_parametrized(layer, "weight")
        else layer.weight
    )


def count_parameters(net: nn.Module) -> ParameterCount:
    """Counts base and LoRA parameters apart; a tensor used in two places counts once.

    Raises:
        TypeError: `net` is not a `torch.nn.Module`.
    """
    lora = {id(p) for p in lora_parameters(net)}
    sizes = [(id(p) in lora, p.requires_grad, p.numel()) for p in net.parameters()]
    return ParameterCount(
        base=sum(n for is_lora, _, n in sizes if not is_lora),
        lora=sum(n for is_lora, _, n in sizes if is_lora),
        trainable=sum(n for _, trainable, n in sizes if trainable),
    )


@torch.inference_mode(False)  # else A and B could not be trained later
def add_lora(
    net: nn.Module,
    rank: int = 1,
    alpha: float = 1,
    layers: Iterable[str] | None = None,
    *,
    generator: torch.Generator | None = None,
    name: str = "default",
    rank_stabilised: bool = False,
) -> nn.Module:
    """Registers LoRA on the weight (not the bias) of each `Linear` layer, and puts the new adapter in use.

    Which parameters are trainable stays as it was: call `freeze_base` next. Make optimisers afterwards.

    Args:
        rank, alpha: as in `LoRAParametrization`.
        layers: names of the layers to adapt; by default all `Linear` ones.
        generator: draws every A; None takes PyTorch's global random stream.
        name: of the adapter, see `use_adapter`.
        rank_stabilised: scale by alpha / √rank (rsLoRA) instead of alpha / rank.

    Returns:
        `net` itself, changed.

    Raises:
        ValueError: bad `rank` or `alpha`, an unknown layer, a name that is taken, or a layer whose weight
            is shared, computed, or has another parametrization. Nothing is changed then.
        TypeError: `net` is no network, `layers` no list of names, or a named layer no `Linear`.

    Source: Hu et al., arXiv 2106.09685, section 4.1;
    https://docs.pytorch.org/tutorials/intermediate/parametrizations.html
    """
    _refuse_in_cache()
    check_whole("rank", rank)
    if name in adapter_names(net):
        raise ValueError(
            f"The network already has an adapter named {name!r}. Call remove_lora(net) or merge_lora(net) "
            "first, start from a fresh network, or give this adapter another name."
        )
    chosen = _choose_layers(net, layers)
    largest = max(min(layer.weight.shape) for layer in chosen)
    if rank > largest:
        raise ValueError(
            f"rank is {rank}; it must be at most {largest}: no update of these layers has a higher rank."
        )
    options = {"generator": generator, "name": name, "rank_stabilised": rank_stabilised}
    adapters = []  # all are made before the first is registered: an error leaves the network as it was
    for layer in chosen:
        where = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        sides = layer.in_features, layer.out_features
        adapters.append(LoRAParametrization(*sides, rank, alpha, **where, **options))
    for layer, adapter in zip(chosen, adapters):
        if parametrize.is_parametrized(layer):  # its bias, or by another adapter
            _give_own_class(layer)
        # "Unsafe" leaves out PyTorch's check, which would compute each whole weight to look at its shape.
        parametrize.register_parametrization(layer, "weight", adapter, unsafe=True)
    use_adapter(net, name)
    return net


def adapter_names(net: nn.Module) -> list[str]:
    """The names of the adapters on `net`: layer by layer, on each in the order in which they were added."""
    return list(dict.fromkeys(adapter.name for adapters in lora_layers(net).values() for adapter in adapters))


def use_adapter(net: nn.Module, name: str) -> None:
    """Puts the adapter `name` in use; the others rest. The switch `set_lora_enabled` stays as it is.

    Raises:
        ValueError: `net` has no LoRA, or no adapter of that name.
    """
    adapters = _require_lora(net)
    _require_name(net, name)
    switch = all(adapter.enabled for adapter in adapters)
    for adapter in adapters:
        adapter.active = adapter.name == name
        adapter.enabled = switch


def freeze_base(net: nn.Module) -> nn.Module:
    """Leaves only A and B of the adapter in use trainable. They are found by their class, not by their name.

    Raises:
        ValueError: `net` has no LoRA.

    Source: Hu et al., arXiv 2106.09685, section 4.1: W is frozen, A and B are trained.
    """
    trained = {id(p) for adapter in _require_lora(net) if adapter.active for p in adapter.parameters()}
    for parameter in net.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return net


def frozen_twin(net: nn.Module) -> nn.Module:
    """A copy of `net`, frozen, that shares its memory: many copies cost little. Do not merge them."""
    return copy.deepcopy(
        net, {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in net.parameters()}
    )


def set_lora_enabled(net: nn.Module, enabled: bool) -> None:
    """Switches LoRA on or off. Off, each weight *is* its original, to the bit.

    Raises:
        ValueError: `net` has no LoRA. TypeError: `enabled` is not a bool.
    """
    check_bool("enabled", enabled)
    for adapter in _require_lora(net):
        adapter.enabled = enabled


@contextmanager
def lora_disabled(net: nn.Module) -> Iterator[nn.Module]:
    """Within the `with` block LoRA is off; afterwards each adapter is as it was, also after an error.

    Raises:
        ValueError: `net` has no LoRA.
    """
    before = {adapter: adapter.enabled for adapter in _require_lora(net)}
    try:
        set_lora_enabled(net, False)
        yield net
    finally:
        for adapter, enabled in before.items():
            adapter.enabled = enabled


@no_autocast()
def merge_lora(net: nn.Module) -> nn.Module:
    """Writes W + ΔW into each weight and removes the parametrization: an ordinary network again.

    The old weights are overwritten: keep a copy, or call `remove_lora`, to have the base's bits back.
    Which parameters are trainable stays as it was (after `freeze_base`: none).

    Raises:
        ValueError: `net` has no LoRA; LoRA is off or an adapter is not in use (merging would discard it); a
            weight has another parametrization, or would not be finite. Nothing is changed then.

    Source: Hu et al., arXiv 2106.09685, section 4.1, "No additional inference latency";
    https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.parametrize.remove_parametrizations.html
    """
    adapters = _require_lora(net)
    if not all(adapter.enabled for adapter in adapters):
        raise ValueError(
            "LoRA is off, so merging would discard it. Call set_lora_enabled(net, True) first, "
            "or remove_lora(net) if you want to discard it."
        )
    resting = sorted({adapter.name for adapter in adapters if not adapter.active})
    if resting:
        raise ValueError(
            f"Merging would discard the adapters that are not in use: {', '.join(map(repr, resting))}. "
            "Save each with save_adapter(net, folder, name), then call remove_lora(net, name)."
        )
    layers = _layers_with_only_lora(net)
    for name, layer in layers.items():
        if not layer.weight.isfinite().all():
            raise ValueError(
                f"Merged, the weight of {name} would hold values that are not finite. "
                "Discard the adapter with remove_lora(net) and train it again, with a smaller learning rate."
            )
    for layer in layers.values():
        _unparametrize(layer, leave_parametrized=True)
    return net


def remove_lora(net: nn.Module, name: str | None = None) -> nn.Module:
    """Discards the adapter `name`, by default all; then each weight is its original again, to the bit.

    If others remain and none of them is in use, the last of `adapter_names` is put in use.

    Raises:
        ValueError: `net` has no LoRA or no adapter `name`, or a weight has another parametrization.
            Nothing is changed then.
    """
    _require_lora(net)
    if name is not None:
        _require_name(net, name)
    layers, before = _layers_with_only_lora(net), lora_layers(net)
    for layer_name, layer in layers.items():
        _unparametrize(layer, leave_parametrized=False)
        for adapter in before[layer_name]:
            if name is not None and adapter.name != name:
                parametrize.register_parametrization(layer, "weight", adapter, unsafe=True)
    rest = [adapter for adapters in lora_layers(net).values() for adapter in adapters]
    if rest and not any(adapter.active for adapter in rest):
        use_adapter(net, adapter_names(net)[-1])
    return net


def _layers_with_only_lora(net: nn.Module) -> dict[str, nn.Linear]:
    layers = {name: net.get_submodule(name) for name in lora_layers(net)}
    for name, adapters in lora_layers(net).items():
        if len(adapters) != len(layers[name].parametrizations.weight):
            raise ValueError(
                f"The weight of {name} has another parametrization beside LoRA; "
                "remove that one first with torch.nn.utils.parametrize.remove_parametrizations."
            )
    return layers


def _unparametrize(layer: nn.Linear, leave_parametrized: bool) -> None:
    _give_own_class(layer)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=leave_parametrized)
    if isinstance(
        layer._parameters.get("bias"), nn.Parameter
    ):  # put it after the weight, as in any other Linear
        layer._parameters["bias"] = layer._parameters.pop("bias")


def _give_own_class(layer: nn.Module) -> None:
    # A deepcopy shares its generated class with the original, and PyTorch adds `.weight` to that class and
    # removes it there: without this, removing LoRA from a copy would break the original.
    shared = type(layer)
    body = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    layer.__class__ = type(shared.__name__, shared.__bases__, body)


def _require_name(net: nn.Module, name: str) -> None:
    names = adapter_names(net)
    if name not in names:
        raise ValueError(f"There is no adapter {name!r}; this network has: {', '.join(map(repr, names))}.")


def _require_lora(net: nn.Module) -> list[LoRAParametrization]:
    _refuse_in_cache()
    adapters = [adapter for found in lora_layers(net).values() for adapter in found]
    if not adapters:
        raise ValueError(f"This {type(net).__name__} has no LoRA; call add_lora(net) first.")
    return adapters


def _refuse_in_cache() -> None:
    if parametrize._cache_enabled:  # PyTorch tells it nowhere else
        raise ValueError(
            "Inside torch.nn.utils.parametrize.cached() weights stay as they were first read, so this would "
            "have no effect there. Do it before or after that block."
        )


def _choose_layers(net: nn.Module, layers: Iterable[str] | None) -> list[nn.Linear]:
    modules = dict(net.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    there = f"this network's Linear layers are: {', '.join(map(repr, linear)) or 'none'}."
    names = linear if layers is None else layers
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise TypeError(f"layers is {names!r}; it must be a list of names; {there}")
    names = list(names)
    if not names:
        raise ValueError(f"There is no layer to adapt; {there}")
    if len(set(map(str, names))) < len(names):
        raise ValueError(f"layers is {names!r}, which names a layer twice; name each once.")
    for name in names:
        if not isinstance(name, str) or name not in modules:
            raise ValueError(f"There is no layer {name!r}; {there}")
        if not isinstance(modules[name], nn.Linear):
            raise TypeError(
                f"{name!r} is a {type(modules[name]).__name__}; LoRA here adapts Linear layers; {there}"
            )
        _check_weight(net, name, modules[name])
    return [modules[name] for name in names]


def _check_weight(net: nn.Module, name: str, layer: nn.Linear) -> None:
    if parametrize.is_parametrized(layer, "weight"):
        kinds = {
            type(p).__name__ for p in layer.parametrizations.weight if not isinstance(p, LoRAParametrization)
        }
        if kinds:
            raise ValueError(
                f"The weight of {name!r} already has {', '.join(sorted(kinds))}; remove that first "
                "with torch.nn.utils.parametrize.remove_parametrizations."
            )
    elif layer._parameters.get("weight") is None:
        raise ValueError(
            f"The weight of {name!r} is computed from other tensors; LoRA needs a weight that is a parameter."
        )
    weight = original_weight(layer)
    own = [(name, key, p) for name, module in net.named_modules() for key, p in module._parameters.items()]
    users = [f"{name}.{key}".lstrip(".") for name, key, parameter in own if parameter is weight]
    if len(users) > 1:
        raise ValueError(
            f"{' and '.join(users)} share one weight; adapting one of them would change the other too."
        )
