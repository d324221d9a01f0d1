"""LoRA without building W + ΔW: the same outputs from two thin products, several times faster to train."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lora_helpers.checks import check_network
from lora_helpers.lora import LoRAParametrization, lora_layers


@contextmanager
def factorised(net: nn.Module) -> Iterator[nn.Module]:
    """Within the `with` block, adapted layers compute x Wᵀ + b + (α/r) · (x Aᵀ) Bᵀ.

    This equals x (W + (α/r) · B A)ᵀ + b up to float rounding, and switches and named adapters are
    obeyed, but neither the sum W + ΔW nor a gradient of its size is ever made. The parametrization
    stays registered. Layers with another parametrization beside LoRA, and networks without LoRA,
    compute as ever.

    Raises:
        TypeError: `net` is no network.

    Source: Hu et al., arXiv 2106.09685, equation (3).
    """
    check_network(net)
    changed = []
    try:
        for layer in net.modules():
            if _has_only_lora(layer):
                changed.append(layer)  # noted first: an interrupt may come between the two
                layer.forward = MethodType(_thin_forward, layer)
        yield net
    finally:
        for layer in changed:
            vars(layer).pop("forward", None)


@contextmanager
def side_by_side(nets: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Within the `with` block, one network computes for all of `nets` at once: copies of one base, each with its own LoRA.

    Its input is one block of rows for each of `nets`, all of one length; its output likewise. The frozen weights,
    which cost most, are multiplied once for all blocks. The adapters stay those of their own networks.

    Raises:
        ValueError: there is no network, or they do not have LoRA on the same layers of the same base.
        TypeError: one is no network. Nothing is changed then.
    """
    if not nets:
        raise ValueError("nets is empty; it must hold at least one network with LoRA.")
    for net in nets:
        check_network(net)
    names = [name for name, layer in nets[0].named_modules() if _has_only_lora(layer)]
    for net in nets:
        layers = [(net.get_submodule(name), nets[0].get_submodule(name)) for name in names]
        if not names or list(lora_layers(net)) != names or not all(_same_base(*pair) for pair in layers):
            raise ValueError("The networks must be copies of one base, with LoRA on the same layers; make each with copy.deepcopy(base).")
    chosen = [nets[0].get_submodule(name) for name in names]
    try:
        for name, layer in zip(names, chosen):
            layer.forward = partial(_forward_of_all, [net.get_submodule(name) for net in nets])
        yield nets[0]
    finally:
        for layer in chosen:
            vars(layer).pop("forward", None)


def _same_base(layer: nn.Linear, other: nn.Linear) -> bool:
    return _has_only_lora(layer) and torch.equal(layer.parametrizations.weight.original, other.parametrizations.weight.original)


def _has_only_lora(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Linear)
        and parametrize.is_parametrized(layer, "weight")
        and not parametrize.is_parametrized(layer, "bias")
        and all(isinstance(p, LoRAParametrization) for p in layer.parametrizations.weight)
    )


def _thin_forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return _forward_of_all([layer], x)


def _forward_of_all(layers: list[nn.Linear], x: torch.Tensor) -> torch.Tensor:
    weight = layers[0].parametrizations.weight.original
    if not any(adapter.applied for layer in layers for adapter in layer.parametrizations.weight):
        return F.linear(x, weight, layers[0].bias)  # off, LoRA leaves the base's outputs to the bit
    output = _frozen_linear(x, weight, layers[0].bias)
    blocks = [_add_updates(layer, *block) for layer, *block in zip(layers, output.chunk(len(layers)), x.chunk(len(layers)))]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _add_updates(layer: nn.Linear, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    for adapter in layer.parametrizations.weight:
        if adapter.applied:
            output = torch.addmm(output, adapter.scale * (x @ adapter.lora_A.T), adapter.lora_B.T)
    return output


def _frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # For the few rows of a training batch, PyTorch's one large product keeps the cores badly busy:
    # giving each core its slice of the outputs takes two thirds of the time (tests/benchmark.py).
    slices = torch.get_num_threads()
    if x.device.type != "cpu" or x.ndim != 2 or len(x) > 32 or len(weight) % slices:
        return F.linear(x, weight, bias)
    parts = torch.bmm(x.expand(slices, *x.shape), weight.view(slices, -1, x.shape[1]).mT)
    output = parts.transpose(0, 1).reshape(len(x), len(weight))
    return output if bias is None else output + bias
