"""LoRA without building W + ΔW: the same outputs from two thin products, several times faster to train."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lora_helpers.checks import check_network
from lora_helpers.lora import LoRAParametrization, lora_layers
from lora_helpers.model import RichBoyNet


@contextmanager
def factorised(net: nn.Module) -> Iterator[nn.Module]:
    """Within the `with` block, adapted layers compute x Wᵀ + b + (α/r) · (x Aᵀ) Bᵀ.

    This equals x (W + (α/r) · B A)ᵀ + b up to float rounding, and switches and named adapters are
    obeyed, but neither the sum W + ΔW nor a gradient of its size is ever made. The parametrization
    stays registered. Layers with another parametrization beside LoRA, layers with a `forward` of their
    own, and networks without LoRA compute as ever.

    Raises:
        TypeError: `net` is no network.

    Source: Hu et al., arXiv 2106.09685, equation (3).
    """
    check_network(net)
    with _computing_by({layer: MethodType(_thin_forward, layer) for layer in net.modules() if _has_only_lora(layer)}):
        yield net


@contextmanager
def side_by_side(nets: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Within the `with` block, one network computes for all of `nets` at once: copies of one base, each with its own LoRA.

    Its input is one block of rows for each of `nets`, all of one length; its output likewise. The frozen weights,
    which cost most, are multiplied once for all blocks. The adapters stay those of their own networks.

    Raises:
        ValueError: there is no network, or one twice; they do not have LoRA on the same layers of the same base; a base
            is not frozen, LoRA is off; or, at a call, the rows cannot be parted into blocks of one length.
        TypeError: `nets` is no list, or one is no network. Nothing is changed then.
    """
    if not isinstance(nets, (list, tuple)):
        raise TypeError(f"nets is a {type(nets).__name__}; it must be a list of networks.")
    if not nets:
        raise ValueError("nets is empty; it must hold at least one network with LoRA.")
    for net in nets:
        check_network(net)
    if len(set(nets)) < len(nets):
        raise ValueError("nets holds one network twice; each must be a copy of its own: make it with copy.deepcopy(base).")
    names = [name for name, layer in nets[0].named_modules() if _has_only_lora(layer)]
    for net in nets:
        modules = dict(net.named_modules())
        if not names or list(lora_layers(net)) != names or not all(_has_only_lora(modules[name]) for name in names) or not _same_base(net, nets[0]):
            raise ValueError("The networks must be copies of one base, with LoRA on the same layers; make each with copy.deepcopy(base).")
    for net in nets:
        if any(parameter.requires_grad for parameter in _base(net).values() if isinstance(parameter, nn.Parameter)):
            raise ValueError("A base is not frozen, and the networks share its computation; call freeze_base(net) for each first.")
        if not any(adapter.applied for adapters in lora_layers(net).values() for adapter in adapters):
            raise ValueError("LoRA is off in one of the networks; call set_lora_enabled(net, True) first.")
    with _computing_by({nets[0].get_submodule(name): partial(_forward_of_all, [net.get_submodule(name) for net in nets]) for name in names}):
        yield nets[0]


def with_first_products(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What `net` may be given for `images` in a `factorised` or `side_by_side` block: the first layer's frozen products come along.

    Those weights do not change, so x Wᵀ + b can be computed for many images in one product, which costs a fraction of what
    it costs batch by batch. Only of a `RichBoyNet` is it known that its first layer sees the images as they are, and a
    hook must not see anything else: otherwise the images are given back as they came.

    Args:
        images: N×1×28×28 or N×784.

    Returns:
        N × (784 + hidden_size_1), each row an image and its products; or `images`.
    """
    layer = net.linear1 if type(net) is RichBoyNet else None
    if layer is None or not _computes_thinly(layer) or any(m._forward_hooks or m._forward_pre_hooks for m in (net, layer)):
        return images
    weight, bias = layer.parametrizations.weight.original, layer.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return images
    x = images.flatten(start_dim=1)
    return torch.cat((x, F.linear(x, weight, bias)), dim=1)


@contextmanager
def _computing_by(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    before = {layer: vars(layer).get("forward") for layer in forwards}
    try:
        for layer, forward in forwards.items():
            layer.forward = forward
        yield
    finally:
        for layer, forward in before.items():
            if forward is None:
                vars(layer).pop("forward", None)
            else:  # that of a block around this one
                layer.forward = forward


def _base(net: nn.Module) -> dict[str, torch.Tensor]:
    lora = {id(p) for adapters in lora_layers(net).values() for adapter in adapters for p in adapter.parameters()}
    return {name: tensor for name, tensor in (*net.named_parameters(), *net.named_buffers()) if id(tensor) not in lora}


def _same_base(net: nn.Module, other: nn.Module) -> bool:
    one, two = _base(net), _base(other)
    return one.keys() == two.keys() and all(
        (t.dtype, t.device) == (two[name].dtype, two[name].device) and torch.equal(t, two[name]) for name, t in one.items()
    )


def _has_only_lora(layer: nn.Module) -> bool:
    own = vars(layer).get("forward")
    return (
        isinstance(layer, nn.Linear)
        and (type(layer).forward is nn.Linear.forward if own is None else getattr(own, "__func__", None) is _thin_forward)
        and parametrize.is_parametrized(layer, "weight")
        and not parametrize.is_parametrized(layer, "bias")
        and all(isinstance(p, LoRAParametrization) for p in layer.parametrizations.weight)
    )


def _computes_thinly(layer: nn.Linear) -> bool:
    own = vars(layer).get("forward")
    return getattr(own, "__func__", None) is _thin_forward or getattr(own, "func", None) is _forward_of_all


def _thin_forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if "parametrizations" not in layer._modules:  # merged within the block, or in a copy made there, which keeps this forward
        return F.linear(x, layer.weight, layer.bias)
    return _forward_of_all([layer], x)


def _forward_of_all(layers: list[nn.Linear], x: torch.Tensor) -> torch.Tensor:
    weight = layers[0].parametrizations.weight.original
    if len(layers) > 1 and (x.ndim < 2 or len(x) % len(layers)):
        raise ValueError(f"The input of shape {tuple(x.shape)} does not hold one block of rows for each of {len(layers)} networks, all of one length.")
    product = None
    if x.shape[1:] == (sum(weight.shape),):  # see with_first_products
        x, product = x.split(weight.shape[::-1], dim=1)
    if not any(adapter.applied for layer in layers for adapter in layer.parametrizations.weight):
        return F.linear(x, weight, layers[0].bias)  # off, LoRA leaves the base's outputs to the bit
    if product is None:
        product = _frozen_linear(x, weight, layers[0].bias)
    if len(layers) == 1:
        return _add_updates(layers[0], product, x)
    blocks = zip(layers, product.chunk(len(layers)), x.chunk(len(layers)))
    return torch.cat([_add_updates(*block) for block in blocks])


def _add_updates(layer: nn.Linear, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    for adapter in layer.parametrizations.weight:
        if adapter.applied:
            update = adapter.scale * (x @ adapter.lora_A.T)
            # addmm is quicker, but takes matrices only
            output = torch.addmm(output, update, adapter.lora_B.T) if x.ndim == 2 else output + update @ adapter.lora_B.T
    return output


def _frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # For the few rows of a training batch, PyTorch's one large product keeps the cores badly busy:
    # the outputs in eight slices take little more than half the time, on one core as on two.
    slices = 8
    if x.device.type != "cpu" or x.ndim != 2 or len(x) > 100 or len(weight) % slices:
        return F.linear(x, weight, bias)
    parts = torch.bmm(x.expand(slices, *x.shape), weight.reshape(slices, -1, weight.shape[1]).mT)
    output = parts.transpose(0, 1).reshape(len(x), len(weight))
    return output if bias is None else output + bias
