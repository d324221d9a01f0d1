"""LoRA as a parametrization: adding it, freezing the base, switching, merging, removing, counting."""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lora_helpers.checks import check_bool, check_network, check_positive, check_whole


class LoRAParametrization(nn.Module):
    """Adds a low-rank update to a weight: forward(W) = W + (alpha / rank) · B A.

    `lora_A` is rank × in_features, drawn from N(0, 1); `lora_B` is out_features × rank, zeros:
    so B A = 0 and nothing changes before the first step. While `enabled` (the switch) or `active`
    (whether this is the adapter in use, of several) is False, forward returns W itself.

    Args:
        in_features, out_features: of the layer; its weight is out_features × in_features.
        rank: a whole number of at least 1. alpha: positive and finite.
        device, dtype: those of the weight (the parameters are created there; one moved
            afterwards would no longer be a parameter).
        generator: draws `lora_A`; on the CPU, so that a seed gives one adapter on every device.
        name: tells several adapters on one base apart.
        rank_stabilised: scales by alpha / √rank instead, as rsLoRA does.

    A state dict holds A and B, but neither `alpha` nor the rest: the network that it is loaded into
    must have been given the same. A file of `save_adapter` holds them all.

    Raises:
        ValueError: a size, `rank`, `alpha` or `name` is not as above, or `dtype` is not floating-point or cannot hold the scale.
        TypeError: `rank_stabilised` is not a bool, or `generator` no `torch.Generator`.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685,
    section 4.1; rsLoRA, arXiv 2312.03732; torch.nn.utils.parametrize,
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
        name: str = "default",
        rank_stabilised: bool = False,
    ):
        super().__init__()
        for argument, value in (("in_features", in_features), ("out_features", out_features), ("rank", rank)):
            check_whole(argument, value)
        check_positive("alpha", alpha)
        _check_dtype(dtype)
        check_bool("rank_stabilised", rank_stabilised)
        _check_name(name)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator is {generator!r}; it must be a torch.Generator, such as torch.Generator().manual_seed(0).")
        device = torch.get_default_device() if device is None else device
        a = torch.randn(rank, in_features, dtype=dtype, generator=generator, device="cpu").to(device)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        self.rank, self.rank_stabilised = rank, rank_stabilised
        self.alpha = alpha if isinstance(alpha, int) else float(alpha)  # a NumPy float64 is a float too, and prints otherwise
        self.name = name
        self.enabled = self.active = True
        if not 0 < torch.tensor(self.scale, dtype=a.dtype, device="cpu") < math.inf:
            raise ValueError(f"alpha is {alpha}, so the scale is {self.scale:g}, which {a.dtype} cannot hold; choose an alpha nearer to 1.")

    @property
    def scale(self) -> float:
        """α/r (α/√r if rank-stabilised), the factor on B A: defined here and nowhere else."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

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
        return f"{self.base:,} base + {self.lora:,} LoRA = {self.total:,} parameters, {self.trainable:,} trainable{share}"


def lora_layers(net: nn.Module) -> dict[str, list[LoRAParametrization]]:
    """The adapted layers of `net` by name, each with the LoRA parametrizations on its weight.

    Raises:
        TypeError: `net` is no `torch.nn.Module`.
    """
    check_network(net)
    found = {}
    for name, layer in net.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            adapters = [p for p in layer.parametrizations.weight if isinstance(p, LoRAParametrization)]
            if adapters:
                found[name] = adapters
    return found


def count_parameters(net: nn.Module) -> ParameterCount:
    """Counts base and LoRA parameters apart; a tensor used in two places counts once.

    Raises:
        TypeError: `net` is no `torch.nn.Module`.
    """
    lora = {id(p) for p in lora_parameters(net)}
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
    name: str = "default",
    rank_stabilised: bool = False,
) -> nn.Module:
    """Registers a `LoRAParametrization` on the weight of each layer; biases stay as they are.

    A is rank × in_features and B out_features × rank, of the weight's device and dtype; both can be trained.
    On a network with adapters of other names the new one comes beside them and is the one in use.
    An error or an interrupt leaves `net` as it was. A state dict does not carry `alpha`: see `LoRAParametrization`.

    Args:
        rank: from 1 to the smaller side of the largest adapted layer.
        alpha: positive and finite; the update is scaled by alpha / rank.
        layers: names of `Linear` layers in `net`; default: all of them.
        generator: draws A; default: PyTorch's global random stream.
        name: of the adapter, see `use_adapter`.
        rank_stabilised: scale by alpha / √rank (rsLoRA) instead of alpha / rank.

    Returns:
        `net` itself, changed.

    Raises:
        ValueError: bad `rank` or `alpha`, an unknown layer, a name that is taken, a layer with
            another parametrization, a computed or a shared weight, or within `parametrize.cached()`.
        TypeError: `net` is no network, `layers` no list of names, a named layer no `Linear`, or
            `generator` no `torch.Generator`. Nothing is changed then.

    Source: Hu et al., arXiv 2106.09685, section 4.1; https://docs.pytorch.org/tutorials/intermediate/parametrizations.html
    """
    _refuse_in_cache()
    check_whole("rank", rank)
    check_positive("alpha", alpha)
    _check_name(name)
    if name in adapter_names(net):
        raise ValueError(
            f"The network already has an adapter named {name!r}. Call remove_lora(net) or merge_lora(net) first, "
            "start from a fresh network, or give this adapter another name."
        )
    chosen = _choose_layers(net, layers)
    largest = max(min(layer.weight.shape) for layer in chosen.values())
    if rank > largest:
        raise ValueError(
            f"rank is {rank}; for {', '.join(chosen)} it must be at most {largest}, "
            "the smaller side of the largest weight: no update has a higher rank."
        )
    adapters = [
        LoRAParametrization(
            layer.weight.shape[1], layer.weight.shape[0], rank, alpha,
            device=layer.weight.device, dtype=layer.weight.dtype, generator=generator,
            name=name, rank_stabilised=rank_stabilised,
        )
        for layer in chosen.values()
    ]  # fmt: skip
    with all_or_nothing(net):
        for layer, adapter in zip(chosen.values(), adapters):
            if parametrize.is_parametrized(layer):  # its bias, or by another adapter
                _give_own_class(layer)
            # PyTorch's check would compute each whole weight, only to see that its shape and dtype stay: those were seen to above.
            parametrize.register_parametrization(layer, "weight", adapter, unsafe=True)
        use_adapter(net, name)
    return net


@contextmanager
def all_or_nothing(net: nn.Module) -> Iterator[None]:
    """An error or an interrupt within the block leaves `net` with the modules, parameters and flags that it had before.

    What was written into a tensor in place is not undone.
    """
    gradients = torch.is_grad_enabled()
    modules = [
        (module, type(module), {**vars(module), "_parameters": copy.copy(module._parameters), "_modules": copy.copy(module._modules)})
        for module in net.modules()
    ]
    values = [(parameter, parameter.data) for parameter in net.parameters()]
    try:
        yield
    except BaseException:
        torch.set_grad_enabled(gradients)  # an interrupt at the very end of a no_grad block leaves them off
        for module, kind, attributes in modules:
            module.__class__ = kind
            vars(module).update(attributes)
        for parameter, data in values:
            parameter.data = data
        raise


def adapter_names(net: nn.Module) -> list[str]:
    """The names of the adapters on `net`: layer by layer, on each in the order in which they were added."""
    return list(dict.fromkeys(adapter.name for adapters in lora_layers(net).values() for adapter in adapters))


def use_adapter(net: nn.Module, name: str) -> None:
    """Makes the adapter `name` the one in use; the others rest. The switch `set_lora_enabled` stays as it is.

    Raises:
        ValueError: `net` has no LoRA, or no adapter of that name.
    """
    adapters = _require_lora(net)
    if name not in adapter_names(net):
        raise ValueError(f"There is no adapter {name!r}; this network has: {', '.join(map(repr, adapter_names(net)))}.")
    switch = all(adapter.enabled for adapter in adapters)
    for adapter in adapters:
        adapter.active = adapter.name == name
        adapter.enabled = switch


def freeze_base(net: nn.Module) -> nn.Module:
    """Leaves only A and B of the adapter in use trainable. They are found by their class, not by their name.

    Raises:
        ValueError: `net` has no LoRA, or none in use (freezing would leave nothing to train).

    Source: Hu et al., arXiv 2106.09685, section 4.1: W is frozen, A and B are trained.
    """
    trained = {id(p) for adapter in _require_lora(net) if adapter.active for p in adapter.parameters()}
    if not trained:
        raise ValueError(f"No adapter is in use; call use_adapter(net, name) with one of: {', '.join(map(repr, adapter_names(net)))}.")
    for parameter in net.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return net


def frozen_twin(net: nn.Module) -> nn.Module:
    """A copy of `net`, frozen, whose parameters share the memory of those of `net`: many cost little, and none may be merged."""
    return copy.deepcopy(net, {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in net.parameters()})


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

    An adapter that was added within the block is on afterwards if the others are.

    Raises:
        ValueError: `net` has no LoRA.
    """
    before = {adapter: adapter.enabled for adapter in _require_lora(net)}
    try:
        set_lora_enabled(net, False)
        yield net
    finally:
        for adapters in lora_layers(net).values():
            for adapter in adapters:
                adapter.enabled = before.get(adapter, all(before.values()))


def merge_lora(net: nn.Module) -> nn.Module:
    """Writes W + ΔW into each weight and removes the parametrization: an ordinary network again.

    The old weights are overwritten; keep a copy, or call `remove_lora`, to have the base's bits back.
    Which parameters are trainable stays as it was (after `freeze_base`: none). An interrupt leaves `net` as it was.

    Raises:
        ValueError: `net` has no LoRA; LoRA is off or an adapter is not in use (merging would
            discard it); a weight carries another parametrization, or would not be finite. Nothing is changed then.

    Source: Hu et al., arXiv 2106.09685, section 4.1, "No additional inference latency";
    https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.parametrize.remove_parametrizations.html
    """
    adapters = _require_lora(net)
    if not all(adapter.enabled for adapter in adapters):
        raise ValueError(
            "LoRA is off, so merging would discard it. Call set_lora_enabled(net, True) first, "
            "or remove_lora(net) if discarding is what you want."
        )
    resting = sorted({adapter.name for adapter in adapters if not adapter.active})
    if resting:
        raise ValueError(
            f"Not in use, so merging would discard: {', '.join(map(repr, resting))}. "
            "Of each, save_adapter(net, folder, name) if you want to keep it, then remove_lora(net, name); "
            "what is left, use_adapter(net, name) puts in use."
        )
    _require_only_lora(net)
    layers = {name: net.get_submodule(name) for name in lora_layers(net)}
    for name, layer in layers.items():
        if not layer.weight.isfinite().all():
            raise ValueError(
                f"Merged, the weight of {name} would hold values that are not finite numbers. "
                "Discard the adapter with remove_lora(net) and train it again, with a smaller learning rate."
            )
    with all_or_nothing(net):
        for layer in layers.values():
            _unparametrize(layer, leave_parametrized=True)
    return net


def remove_lora(net: nn.Module, name: str | None = None) -> nn.Module:
    """Discards the adapter `name`, by default all; without adapters each weight is its original again, to the bit.

    If others remain and none of them is in use, the last of `adapter_names` is put in use.
    An error or an interrupt leaves `net` as it was.

    Raises:
        ValueError: `net` has no LoRA or no adapter `name`, or a weight carries another parametrization.
            Nothing is changed then.
    """
    _require_lora(net)
    if name is not None and name not in adapter_names(net):
        raise ValueError(f"There is no adapter {name!r}; this network has: {', '.join(map(repr, adapter_names(net)))}.")
    _require_only_lora(net)
    with all_or_nothing(net):
        for layer_name, adapters in lora_layers(net).items():
            layer = net.get_submodule(layer_name)
            _unparametrize(layer, leave_parametrized=False)
            for adapter in adapters:
                if name is not None and adapter.name != name:
                    parametrize.register_parametrization(layer, "weight", adapter)
        rest = [adapter for adapters in lora_layers(net).values() for adapter in adapters]
        if rest and not any(adapter.active for adapter in rest):
            use_adapter(net, adapter_names(net)[-1])
    return net


def _require_only_lora(net: nn.Module) -> None:
    for name, adapters in lora_layers(net).items():
        if len(adapters) != len(net.get_submodule(name).parametrizations.weight):
            raise ValueError(
                f"The weight of {name} carries another parametrization beside LoRA; "
                "remove that one first with torch.nn.utils.parametrize.remove_parametrizations."
            )


def _unparametrize(layer: nn.Linear, leave_parametrized: bool) -> None:
    _give_own_class(layer)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=leave_parametrized)
    bias = dict(layer.named_parameters(recurse=False)).get("bias")
    if bias is not None:  # registered again, so that it comes after the weight as in any other Linear
        del layer.bias
        layer.register_parameter("bias", bias)


def _give_own_class(layer: nn.Module) -> None:
    # A deepcopy shares its generated class with the original, and PyTorch adds `.weight` to that class and
    # removes it there: without this, LoRA on a copy, or its removal, would break the original.
    shared = type(layer)
    body = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    layer.__class__ = type(shared.__name__, shared.__bases__, body)


def lora_parameters(net: nn.Module) -> list[nn.Parameter]:
    """A and B of all adapters of `net`."""
    return [p for adapters in lora_layers(net).values() for adapter in adapters for p in adapter.parameters()]


def _require_lora(net: nn.Module) -> list[LoRAParametrization]:
    _refuse_in_cache()
    adapters = [adapter for found in lora_layers(net).values() for adapter in found]
    if not adapters:
        raise ValueError(f"This {type(net).__name__} has no LoRA; call add_lora(net) first.")
    return adapters


def _refuse_in_cache() -> None:
    if parametrize._cache_enabled:  # PyTorch tells it nowhere else
        raise ValueError(
            "Within torch.nn.utils.parametrize.cached() weights stay as they were first read, so a switch, a merge or a removal "
            "would act on old ones, or not at all. Do it before or after that block."
        )


def _choose_layers(net: nn.Module, layers: Iterable[str] | None) -> dict[str, nn.Linear]:
    modules = dict(net.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    there = f"this network's Linear layers are: {', '.join(map(repr, linear)) or 'none'}."
    names = linear if layers is None else layers
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise TypeError(f"layers is {names!r}; it must be a list of names; {there}")
    names = list(names)
    if not names:
        raise ValueError(f"No layer to adapt; {there}")
    if len(set(map(str, names))) < len(names):
        raise ValueError(f"layers is {names!r}, which names a layer twice; name each once.")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"layers holds {name!r}, which is no name; {there}")
        if name not in modules:
            same = dict(net.named_modules(remove_duplicate=False)).get(name)
            for first, module in modules.items():
                if module is same:
                    raise ValueError(f"{name!r} is another name of the layer {first!r}; write {first!r}.")
            raise ValueError(f"There is no layer {name!r}; {there}")
        layer = modules[name]
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{name!r} is a {type(layer).__name__}; LoRA here adapts Linear layers; {there}")
        if parametrize.is_parametrized(layer, "weight"):
            foreign = sorted({type(p).__name__ for p in layer.parametrizations.weight if not isinstance(p, LoRAParametrization)})
            if foreign:
                raise ValueError(
                    f"The weight of {name!r} already carries {', '.join(foreign)}; remove that first "
                    "with torch.nn.utils.parametrize.remove_parametrizations."
                )
            weight = layer.parametrizations.weight.original
        elif layer._parameters.get("weight") is None:
            raise ValueError(
                f"The weight of {name!r} is no parameter, but computed from others or set by hand; if weight_norm, spectral_norm "
                "or a pruning of torch.nn.utils does it, take that off first (remove_weight_norm, remove_spectral_norm, prune.remove)."
            )
        else:
            weight = layer.weight
        if is_lazy(weight):
            raise ValueError(f"The weight of {name!r} has no shape yet; run the network once on a batch first.")
        owners = [
            f"{other}.{attribute}".removeprefix(".") for other, module in modules.items()
            for attribute, parameter in module._parameters.items() if parameter is weight
        ]  # fmt: skip
        if len(owners) > 1:
            raise ValueError(f"{' and '.join(owners)} share one weight; adapting one of them would untie them.")
    return {name: modules[name] for name in names}


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"name is {name!r}; it must be a text such as 'nine'.")


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}; it must be float16, bfloat16, float32 or float64.")
