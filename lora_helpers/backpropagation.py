"""Adapters trained side by side: backpropagation written out for copies of one frozen `RichBoyNet`."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lora_helpers.checks import check_network
from lora_helpers.factorisation import frozen_backward, frozen_linear, has_only_lora
from lora_helpers.lora import LoRAParametrization, lora_layers, lora_parameters
from lora_helpers.model import LAYERS, RichBoyNet


def check_copies(nets: Sequence[nn.Module]) -> None:
    """Refuses what `Backpropagation` cannot compute together.

    Raises:
        ValueError: there is no network, or one twice; two share an adapter, or one has none to train; they do not have LoRA on the
            same layers of the same base; a base is not frozen, LoRA is off, or a network is not as `RichBoyNet` makes it, with one
            adapter in use on each adapted layer and no hooks.
        TypeError: `nets` is no list, or one is no network.
    """
    if not isinstance(nets, (list, tuple)):
        raise TypeError(f"nets is a {type(nets).__name__}; it must be a list of networks.")
    if not nets:
        raise ValueError("nets is empty; it must hold at least one network with LoRA.")
    for net in nets:
        check_network(net)
    if len(set(nets)) < len(nets):
        raise ValueError("nets holds one network twice; each must be a copy of its own: make it with copy.deepcopy(base).")
    names = list(lora_layers(nets[0]))
    if not names or any(list(lora_layers(net)) != names or not _same_base(net, nets[0]) for net in nets[1:]):
        raise ValueError("The networks must be copies of one base, with LoRA on the same layers; make each with copy.deepcopy(base).")
    parameters = [id(p) for net in nets for p in lora_parameters(net)]
    if len(set(parameters)) < len(parameters):
        raise ValueError("Two of the networks share an adapter; make each a copy of its own, with copy.deepcopy(base), before add_lora.")
    for net in nets:
        if any(parameter.requires_grad for parameter in _base(net).values()):
            raise ValueError("A base is not frozen, and the networks share its computation; call freeze_base(net) for each first.")
        if not any(adapter.applied for adapters in lora_layers(net).values() for adapter in adapters):
            raise ValueError("LoRA is off in one of the networks; call set_lora_enabled(net, True) first.")
        if not any(p.requires_grad for found in lora_layers(net).values() for adapter in found if adapter.applied for p in adapter.parameters()):
            raise ValueError("A network has nothing to train: every parameter of the adapter in use is frozen; call freeze_base(net) for each first.")
        if not _is_plain(net):
            raise ValueError(
                "A network is no RichBoyNet as it was made, has a hook, or two adapters in use on one layer; train each by itself: train(net, dataset)."
            )


class Backpropagation:
    """The losses of adapters on copies of one frozen base, and their gradients, without autograd: made once for a training.

    Without autograd's graph a step is quicker, and copies of one base share its large products. For a layer with input x,
    s = α/r and output z = x Wᵀ + b + s (x Aᵀ) Bᵀ, the chain rule makes of D = ∂L/∂z

        ∂L/∂B = Dᵀ s (x Aᵀ)      ∂L/∂A = (s D B)ᵀ x      ∂L/∂x = D W + (s D B) A

    and begins, behind the last layer, with D = (softmax(z) − one-hot label) / images. Units behind the first ReLU that are zero for
    every image of a batch add nothing to z, and the ReLU lets no gradient through to them. Ten images of one digit leave four in five
    silent so. On the CPU, where they are more than a quarter, they are left out of the products with the frozen weight.

    Args:
        nets: such as `check_copies` lets pass. Which adapters are in use, their scales and the base must stay so.
        transposed: what `transposed_weight` gave for another net of the same base, which saves time.

    Source: Goodfellow, Bengio and Courville, Deep Learning (2016), section 6.5; Hu et al., arXiv 2106.09685, equation (3).
    """

    def __init__(self, nets: Sequence[RichBoyNet], transposed: torch.Tensor | None = None):
        self._copies = len(nets)
        first, second, third = ([net.get_submodule(name) for net in nets] for name in LAYERS)
        self._layers = _Layer(first), _Layer(second, transposed_weight(nets[0]) if transposed is None else transposed), _Layer(third)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The losses, and the gradients as `.grad` of every trainable A and B, as autograd leaves them but for rounding.

        Args:
            images: a block of rows for each network, all of one length; N×1×28×28, N×784, or as `with_first_products` gives them.
            labels: int64, N.

        Returns:
            A loss for each network, the mean over its own rows.
        """
        first, second, third = self._layers
        labels = self._blocks(labels.unsqueeze(1))
        hidden_1, hidden_2, logits = self._forward(images)
        log_probabilities = F.log_softmax(logits, dim=-1)
        losses = -log_probabilities.gather(-1, labels).mean(dim=(-2, -1))

        D = log_probabilities.exp()
        D.scatter_add_(-1, labels, -torch.ones_like(labels, dtype=D.dtype)).div_(labels.shape[-2])
        third.set_gradients(D)
        if second.adapted or first.adapted:
            D = third.backward(D).mul_(hidden_2 > 0)
            second.set_gradients(D)
        if first.adapted:
            first.set_gradients(second.backward(D).mul_(hidden_1 > 0))
        return losses.flatten()

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """The logits, N×10, for images as above."""
        return self._forward(images)[-1].flatten(0, -2)

    def _forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first, second, third = self._layers
        x, product = images.flatten(start_dim=1), None
        if x.shape[1] > first.in_features:
            x, product = x.split((first.in_features, first.out_features), dim=1)
            product = self._blocks(product).clone()
        hidden_1 = first.forward(self._blocks(x), product).relu_()
        hidden_2 = second.forward(hidden_1).relu_()
        return hidden_1, hidden_2, third.forward(hidden_2)

    def _blocks(self, rows: torch.Tensor) -> torch.Tensor:
        # One network alone has no dimension of its own: for small matrices each further view is felt.
        return rows if self._copies == 1 else rows.unflatten(0, (self._copies, -1))


def transposed_weight(net: nn.Module) -> torch.Tensor | None:
    """Of a `RichBoyNet` the frozen weight behind the first ReLU, so laid out in memory that the part of a few inputs is quickly taken.

    None on a GPU, where taking parts does not pay, and for other networks.
    """
    layer = net.linear2 if type(net) is RichBoyNet else None
    if not (type(layer) is nn.Linear or (layer is not None and has_only_lora(layer))):
        return None
    weight = _frozen_weight(layer)
    return weight.detach().T.contiguous() if weight.device.type == "cpu" else None


def _frozen_weight(layer: nn.Linear) -> torch.Tensor:
    return layer.parametrizations.weight.original if parametrize.is_parametrized(layer, "weight") else layer.weight


class _Layer:
    """One layer of several copies of a network: one frozen weight, and everybody's adapter."""

    def __init__(self, copies: list[nn.Linear], by_input: torch.Tensor | None = None):
        layer = copies[0]
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.adapted = parametrize.is_parametrized(layer, "weight")
        self.weight = _frozen_weight(layer)
        self._by_input, self._awake = by_input, None
        self._groups, start = [], 0
        if self.adapted:
            adapters = [next(a for a in copy.parametrizations.weight if a.applied) for copy in copies]
            for _, some in groupby(adapters, key=lambda adapter: len(adapter.lora_A)):
                neighbours = list(some)
                rows = slice(start, start + len(neighbours)) if len(copies) > 1 else ...
                self._groups.append(_Neighbours(rows, neighbours))
                start += len(neighbours)

    def forward(self, x: torch.Tensor, product: torch.Tensor | None = None) -> torch.Tensor:
        z = self._frozen(x.flatten(0, -2)).view(*x.shape[:-1], -1) if product is None else product
        for group in self._groups:
            group.add_update(z, x)
        return z

    def set_gradients(self, D: torch.Tensor) -> None:
        for group in self._groups:
            group.set_gradients(D)

    def backward(self, D: torch.Tensor) -> torch.Tensor:
        """∂L/∂x, if it is masked by the ReLU before x: where that is silent, a part is left out. `set_gradients` must have been called."""
        gradient = self._frozen_backward(D.flatten(0, -2)).view(*D.shape[:-1], -1)
        for group in self._groups:
            group.add_backwards(gradient)
        return gradient

    def _frozen(self, x: torch.Tensor) -> torch.Tensor:
        self._awake = None
        if self._by_input is not None:
            awake = x.sum(dim=0).nonzero().flatten()
            if len(awake) < 0.75 * self.in_features:  # else taking their part costs more than it saves
                self._awake, self._taken = awake, self._by_input.index_select(0, awake)
                return F.linear(x.index_select(1, awake), self._taken.T, self.bias)
        return frozen_linear(x, self.weight, self.bias)

    def _frozen_backward(self, D: torch.Tensor) -> torch.Tensor:
        if self._awake is None:
            return frozen_backward(D, self.weight)
        return D.new_zeros(len(D), self.in_features).index_copy_(1, self._awake, D @ self._taken.T)


class _Neighbours:
    """The adapters on one layer of neighbouring networks, all of one rank r: n × r × in_features, n × out_features × r.

    That of one network alone has no first dimension, and its rows are all there are.
    """

    def __init__(self, rows, adapters: list[LoRAParametrization]):
        self._rows, self._adapters, self._alone = rows, adapters, rows is ...
        scales = [adapter.scale for adapter in adapters]
        self._scale = scales[0] if self._alone else adapters[0].lora_B.new_tensor(scales).view(-1, 1, 1)

    def add_update(self, z: torch.Tensor, x: torch.Tensor) -> None:
        self._A, self._B = self._stack([a.lora_A for a in self._adapters]), self._stack([a.lora_B for a in self._adapters])
        self._x = x[self._rows]
        self._inner = (self._x @ self._A.mT).mul_(self._scale)
        _add_product(z[self._rows], self._inner, self._B.mT)

    def set_gradients(self, D: torch.Tensor) -> None:
        D = D[self._rows]
        self._back = (D @ self._B).mul_(self._scale)
        pairs = self._back.mT @ self._x, D.mT @ self._inner
        for adapter, for_A, for_B in zip(self._adapters, *([found] if self._alone else found for found in pairs)):
            for parameter, gradient in ((adapter.lora_A, for_A), (adapter.lora_B, for_B)):
                if parameter.requires_grad:
                    parameter.grad = gradient

    def add_backwards(self, gradient: torch.Tensor) -> None:
        _add_product(gradient[self._rows], self._back, self._A)

    def _stack(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0] if self._alone else torch.stack(tensors)


def _add_product(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    (total.addmm_ if total.ndim == 2 else total.baddbmm_)(one, other)


def _is_plain(net: nn.Module) -> bool:
    if type(net) is not RichBoyNet or "forward" in vars(net) or type(net.relu) is not nn.ReLU:
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks")
    if any(getattr(part, name, None) for part in (*net.modules(), *net.parameters()) for name in hooks):
        return False
    adapted = lora_layers(net)
    layers = {name: net.get_submodule(name) for name in LAYERS}
    return (
        all(has_only_lora(layer) if name in adapted else type(layer) is nn.Linear and "forward" not in vars(layer) for name, layer in layers.items())
        and all(sum(adapter.applied for adapter in stack) == 1 for stack in adapted.values())
        and all(p.is_contiguous() for p in lora_parameters(net))
        and layers["linear3"].out_features == 10
    )


def _base(net: nn.Module) -> dict[str, torch.Tensor]:
    lora = {id(p) for p in lora_parameters(net)}
    return {name: tensor for name, tensor in (*net.named_parameters(), *net.named_buffers()) if id(tensor) not in lora}


def _same_base(net: nn.Module, other: nn.Module) -> bool:
    one, two = _base(net), _base(other)
    return one.keys() == two.keys() and all(
        (t.dtype, t.device) == (two[name].dtype, two[name].device) and torch.equal(t, two[name]) for name, t in one.items()
    )
