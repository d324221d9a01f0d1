"""Training and testing of `RichBoyNet` written out, with LoRA or without: plain products instead of autograd.

Three things make it quick. Each changes rounding only.

1. ΔW is never built: x (W + s·BA)ᵀ = x Wᵀ + s·(x Aᵀ) Bᵀ, with s = α/r.
2. The chain rule is written out, so there is no graph to make. From D = ∂L/∂z of a layer z = x Wᵀ + b +
s·(x Aᵀ) Bᵀ:

       ∂L/∂B = Dᵀ s(x Aᵀ)      ∂L/∂A = (s·D B)ᵀ x      ∂L/∂x = D W + (s·D B) A
       ∂L/∂W = Dᵀ x            ∂L/∂b = the sum of D over the images

3. Most hidden units are silent: behind a ReLU they are zero. They add nothing to z, and the ReLU lets no
   gradient through to them. In training, the units that are silent for a whole batch are left out. In a
   test, x Wᵀ of an image is the sum of the rows of Wᵀ whose units are awake: of the first hidden layer, one
   in thirty.

Several copies of one frozen base, each with an adapter of its own, share the products with the frozen
weights.

Source: Goodfellow, Bengio and Courville, Deep Learning (2016), section 6.5; Hu et al., arXiv 2106.09685,
equation (3).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lora_helpers.lora import LoRAParametrization, lora_layers, original_weight
from lora_helpers.model import LAYERS, RichBoyNet

# More units awake than this: the plain product is quicker. Of a batch's units, and of all values in a test.
AWAKE_IN_BATCH, AWAKE_IN_TEST = 0.5, 0.1
PART = 500  # test images computed together
AHEAD = 20  # batches whose first products are made in one go, which costs less than batch by batch


class Fast:
    """The written-out arithmetic of `nets`: one network, or n copies of one frozen base with an adapter each.

    Make one for each training or test: it reads once which adapters are in use.
    """

    def __init__(self, nets: Sequence[RichBoyNet]):
        self.layers = [_Layer([net.get_submodule(name) for net in nets]) for name in LAYERS]

    def first_products(self, images: torch.Tensor) -> torch.Tensor | None:
        """x W₁ᵀ + b₁, … × hidden_size_1, of images, … × 784. None if W₁ is trained, for then it changes."""
        first = self.layers[0]
        return None if first.weight.requires_grad else first.products(images)

    def batches(
        self, images: torch.Tensor, labels: torch.Tensor, chosen: Iterator[torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Images, labels and first products, n × N × …, of each batch `chosen`, n × N places."""
        while ahead := list(islice(chosen, max(1, AHEAD // len(self.layers[0].adapters)))):
            sizes, places = [batch.shape[1] for batch in ahead], torch.cat(ahead, dim=1).to(images.device)
            x, y = images[places], labels[places]
            products = self.first_products(x)
            parts = [None] * len(ahead) if products is None else products.split(sizes, dim=1)
            yield from zip(x.split(sizes, dim=1), y.split(sizes, dim=1), parts)

    @torch.no_grad()
    def logits(self, images: torch.Tensor, products: torch.Tensor | None = None) -> torch.Tensor:
        """n × N × 10 logits for n × N × 784 images (and their first products, n × N × hidden_size_1)."""
        return self._forward(images, products, self.layers[1].sum_of_rows)

    def _forward(self, images, products, second_products: Callable) -> torch.Tensor:
        first, second, third = self.layers
        products = first.products(images) if products is None else products.clone()
        self.hidden_1 = first.forward(images, products).relu_()  # n × N × hidden_size_1
        products = second_products(self.hidden_1)
        self.hidden_2 = second.forward(self.hidden_1, products).relu_()  # n × N × hidden_size_2
        return third.forward(self.hidden_2, third.products(self.hidden_2))

    @torch.no_grad()
    def backpropagate(
        self, images: torch.Tensor, labels: torch.Tensor, products: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The n losses for n × N × 784 images and n × N labels. Every trainable parameter gets `.grad`."""
        first, second, third = self.layers
        logits = self._forward(images, products, second.products_without_silent)
        log_probabilities = F.log_softmax(logits, dim=-1)  # n × N × 10
        label = labels.unsqueeze(-1)  # n × N × 1
        losses = -log_probabilities.gather(-1, label).mean(dim=(1, 2))  # n
        D = log_probabilities.exp()  # softmax(z) − one-hot label, divided by the number of images: ∂L/∂z₃
        D.scatter_add_(-1, label, torch.full_like(D[..., :1], -1.0)).div_(labels.shape[1])
        D = third.backward(D).mul_(self.hidden_2 > 0)  # n × N × hidden_size_2
        D = second.backward(D).mul_(self.hidden_1 > 0)  # n × N × hidden_size_1
        first.backward(D, last=True)
        return losses


class _Layer:
    """One layer of n copies: one weight W, out × in, and the adapter in use of each copy, or None."""

    def __init__(self, copies: Sequence[nn.Linear]):
        self.weight, self.bias = original_weight(copies[0]), copies[0].bias
        self.adapters = [adapter_in_use(layer) for layer in copies]
        self.on_cpu = self.weight.device.type == "cpu"  # elsewhere the plain products are quicker
        self.rows = None  # Wᵀ, in × out, laid out so that some of its rows can be picked quickly
        self.awake = self.picked = None  # kept from forward to backward: units awake, and their rows of Wᵀ

    def products(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + b, n × N × out."""
        return F.linear(x, self.weight, self.bias)

    def products_without_silent(self, x: torch.Tensor) -> torch.Tensor:
        """The same for x after a ReLU, in training: units that are silent for all images are left out."""
        self.awake = None
        awake = x.sum(dim=(0, 1)).nonzero().flatten()  # after a ReLU nothing is negative: nothing cancels
        if not self.on_cpu or len(awake) > AWAKE_IN_BATCH * x.shape[-1]:
            return self.products(x)
        self.awake = awake
        if self.weight.requires_grad:  # it changes at every step
            self.picked = self.weight.detach().index_select(1, awake).T  # awake × out
        else:
            self.picked = self._rows().index_select(0, awake)
        return (x.index_select(-1, awake) @ self.picked).add_(self.bias)

    def sum_of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The same for x after a ReLU, in a test: for each image the rows of Wᵀ that are awake, times x."""
        image, unit = x.flatten(0, 1).nonzero(as_tuple=True)
        if not self.on_cpu or len(unit) > AWAKE_IN_TEST * x.numel():
            return self.products(x)
        counts = image.bincount(minlength=x.shape[0] * x.shape[1])  # of each image, its units awake
        starts, values = counts.cumsum(0) - counts, x.flatten(0, 1)[image, unit]
        sums = F.embedding_bag(unit, self._rows(), starts, mode="sum", per_sample_weights=values)
        return sums.add_(self.bias).unflatten(0, x.shape[:2])

    def _rows(self) -> torch.Tensor:
        if self.rows is None:
            self.rows = self.weight.detach().T.contiguous()
        return self.rows

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """z, n × N × out: adds to the frozen products z what the adapters make of x, n × N × in."""
        self.x = x
        self.inner = [
            None if a is None else a.scale * (rows @ a.lora_A.T) for a, rows in zip(self.adapters, x)
        ]
        for adapter, inner, rows in zip(self.adapters, self.inner, z):
            if adapter is not None:
                rows.addmm_(inner, adapter.lora_B.T)  # N × r times r × out
        return z

    def backward(self, D: torch.Tensor, last: bool = False) -> torch.Tensor | None:
        """Sets the gradients; returns ∂L/∂x, n × N × in, right where x is not zero. `last`: not needed."""
        flat = D.flatten(0, 1)
        if self.weight.requires_grad:
            if self.weight.grad is None:  # kept from step to step: fresh memory of this size is slow
                self.weight.grad = torch.empty_like(self.weight)
            torch.mm(flat.T, self.x.flatten(0, 1), out=self.weight.grad)
            self.bias.grad = flat.sum(dim=0)
        # of each adapter, N × r
        back = [None if a is None else a.scale * (rows @ a.lora_B) for a, rows in zip(self.adapters, D)]
        for adapter, inner, thin, rows, x in zip(self.adapters, self.inner, back, D, self.x):
            if adapter is not None and adapter.lora_A.requires_grad:
                adapter.lora_B.grad, adapter.lora_A.grad = rows.T @ inner, thin.T @ x
        if last:
            return None
        gradient = self._frozen_backward(flat).unflatten(0, D.shape[:2])
        for adapter, thin, rows in zip(self.adapters, back, gradient):
            if adapter is not None:
                rows.addmm_(thin, adapter.lora_A)
        return gradient

    def _frozen_backward(self, D: torch.Tensor) -> torch.Tensor:
        if self.awake is None:
            return D @ self.weight
        gradient = D.new_zeros(len(D), self.weight.shape[1])
        return gradient.index_copy_(1, self.awake, D @ self.picked.T)


class ImagesToTest:
    """Images to test, with the first layer's products, made once for every adapter on one base.

    Args:
        images: N × 784.
    """

    def __init__(self, net: RichBoyNet, images: torch.Tensor):
        self.parts = images.split(PART)
        weight, bias = original_weight(net.linear1).detach(), net.linear1.bias.detach()
        self.products = [F.linear(part, weight, bias) for part in self.parts]

    def answers(self, net: RichBoyNet) -> torch.Tensor:
        """The answers of `net`, int64, N. Its first layer's weight must be as it was."""
        fast = Fast([net])
        pairs = zip(self.parts, self.products)
        return torch.cat([fast.logits(x[None], product[None])[0].argmax(dim=1) for x, product in pairs])


def adapter_in_use(layer: nn.Linear) -> LoRAParametrization | None:
    """The adapter that the layer's weight is computed with now, or None."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return next((adapter for adapter in layer.parametrizations.weight if adapter.applied), None)


def is_plain(net: nn.Module) -> bool:
    """Whether `Fast` computes what `net` does: a `RichBoyNet` as it was made, with at most one adapter in
    use a layer."""
    if type(net) is not RichBoyNet or any(m._forward_hooks or m._forward_pre_hooks for m in net.modules()):
        return False
    adapted = lora_layers(net)
    for name, layer in ((name, net.get_submodule(name)) for name in LAYERS):
        stack = layer.parametrizations.weight if name in adapted else ()
        only_lora = all(type(p) is LoRAParametrization for p in stack) and len(stack) == len(
            adapted.get(name, ())
        )
        if not only_lora or sum(p.applied for p in stack) > 1 or (not stack and type(layer) is not nn.Linear):
            return False
        if "bias" in getattr(layer, "parametrizations", ()):
            return False
    return True


def is_trainable_plain(net: nn.Module) -> bool:
    """Whether `Fast` finds all gradients of `net`: of a base without LoRA, or of A and B on a frozen base."""
    if not is_plain(net):
        return False
    in_use = [a for a in (adapter_in_use(net.get_submodule(name)) for name in LAYERS) if a is not None]
    trained = {id(p) for p in net.parameters() if p.requires_grad}
    wanted = {id(p) for a in in_use for p in a.parameters()} if in_use else {id(p) for p in net.parameters()}
    return trained == wanted
