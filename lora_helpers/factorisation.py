"""LoRA without building W + ΔW: the same outputs from two thin products, several times faster to train."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    stays registered. Layers with another parametrization beside LoRA, layers or parametrizations with a
    `forward` of their own or a hook on the parametrization, and networks without LoRA compute as ever.

    Raises:
        TypeError: `net` is no network.

    Source: Hu et al., arXiv 2106.09685, equation (3).
    """
    check_network(net)
    with _computing_by({layer: MethodType(_thin_forward, layer) for layer in net.modules() if has_only_lora(layer)}):
        yield net


def with_first_products(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What `net` may be given for `images` where LoRA is computed thinly: the first layer's frozen products come along.

    Those weights do not change, so x Wᵀ + b can be computed for many images in one product, which costs a fraction of what
    it costs batch by batch. Only of a `RichBoyNet` is it known that its first layer sees the images as they are, and a
    hook must not see anything else: otherwise the images are given back as they came. The products are understood in a
    `factorised` block and by `Backpropagation`, nowhere else.

    Args:
        images: N×1×28×28 or N×784.

    Returns:
        N × (784 + hidden_size_1), each row an image and its products; or `images`.
    """
    layer = net.linear1 if type(net) is RichBoyNet else None
    if layer is None or not has_only_lora(layer) or any(m._forward_hooks or m._forward_pre_hooks for m in (net, layer)):
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


def has_only_lora(layer: nn.Module) -> bool:
    own = vars(layer).get("forward")
    return (
        isinstance(layer, nn.Linear)
        and (type(layer).forward is nn.Linear.forward if own is None else getattr(own, "__func__", None) is _thin_forward)
        and parametrize.is_parametrized(layer, "weight")
        and not parametrize.is_parametrized(layer, "bias")
        and all(type(p) is LoRAParametrization and "forward" not in vars(p) for p in layer.parametrizations.weight)
        and not any(p._forward_hooks or p._forward_pre_hooks for p in layer.parametrizations.weight)
    )


def _thin_forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if "parametrizations" not in layer._modules:  # merged within the block, or in a copy made there, which keeps this forward
        return F.linear(x, layer.weight, layer.bias)
    weight, product = layer.parametrizations.weight.original, None
    if x.shape[1:] == (sum(weight.shape),):  # see with_first_products
        x, product = x.split(weight.shape[::-1], dim=1)
    used = [adapter for adapter in layer.parametrizations.weight if adapter.applied]
    if not used:
        return F.linear(x, weight, layer.bias)  # off, LoRA leaves the base's outputs to the bit
    output = frozen_linear(x, weight, layer.bias) if product is None else product
    for adapter in used:
        update = adapter.scale * (x @ adapter.lora_A.T)
        # addmm is quicker, but takes matrices only
        output = torch.addmm(output, update, adapter.lora_B.T) if x.ndim == 2 else output + update @ adapter.lora_B.T
    return output


SLICES = 8  # of a frozen weight's rows, see below


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` but for rounding, and quicker for the few rows of a training batch on the CPU.

    There PyTorch's one large product keeps the cores badly busy: in eight slices it takes little more than half the time,
    on one core as on two.
    """
    if not _pays_to_slice(x, weight):
        return F.linear(x, weight, bias)
    parts = torch.bmm(x.expand(SLICES, *x.shape), weight.view(SLICES, -1, weight.shape[1]).mT)
    output = parts.transpose(0, 1).reshape(len(x), len(weight))
    return output if bias is None else output + bias


def frozen_backward(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient in the input of `frozen_linear`, N × in, from that in its output, N × out: their product with the weight."""
    if not _pays_to_slice(gradient, weight):
        return gradient @ weight
    parts = gradient.reshape(len(gradient), SLICES, -1).transpose(0, 1)
    return torch.bmm(parts, weight.view(SLICES, -1, weight.shape[1])).sum(dim=0)


def _pays_to_slice(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.ndim == 2 and len(x) <= 40 and len(weight) % SLICES == 0 and weight.is_contiguous()
