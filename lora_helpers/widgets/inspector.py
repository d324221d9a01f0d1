"""Inside one small layer: what is stored, what is computed, what is trained."""

import copy
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
import traitlets
from matplotlib.patches import Rectangle
from torch import nn
from torch.nn import functional as F

from lora_helpers.lora import add_lora, freeze_base, lora_disabled, lora_layers, lora_scale
from lora_helpers.plots import AFTER, BEFORE
from lora_helpers.widgets.panel import Panel, row
from lora_helpers.widgets.pictures import LivePicture

MAX_RANK, MAX_STEPS = 4, 200
RATE, SEED = 0.05, 0
CELL = 0.29  # inches
FROZEN, TRAINED, COMPUTED = (
    {"color": color, "linestyle": line} for color, line in (("#444444", "-"), (AFTER, "--"), (BEFORE, ":"))
)


@dataclass(frozen=True, eq=False)
class Inspection:
    """The tensors of one adapted layer: `update` is (α/r)·BA, `effective` what `layer.weight` gives."""

    rank: int
    alpha: float
    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    update: torch.Tensor
    effective: torch.Tensor
    effective_off: torch.Tensor
    loss_before: float
    loss: float

    @property
    def scale(self) -> float:
        return lora_scale(self.alpha, self.rank)


@torch.inference_mode(False)  # whatever a cell has set; it turns gradients on too
@torch.autocast("cpu", enabled=False)
def inspect(layer: nn.Linear, *, rank: int = 1, alpha: float = 1, steps: int = 50) -> Inspection:
    """Adds LoRA to a copy of `layer`, trains A and B on a small task, and returns all tensors.

    The task: on 64 random inputs, give the outputs of another random layer of the same shape. In each step
    every entry moves by the rate, against the sign of its gradient (signSGD: Bernstein et al.,
    arXiv 1802.04434). This stands in for Adam, and needs no state. The rate falls to zero.

    Args:
        layer: in_features and out_features of at least `rank`, float32.
        rank, alpha: as in `add_lora`.
        steps: from 0, where B is still zero.
    """
    generator = torch.Generator().manual_seed(SEED)  # of the task and of A
    inputs = torch.randn(64, layer.in_features, generator=generator, dtype=torch.float32)
    targets = F.linear(inputs, torch.randn(layer.weight.shape, generator=generator, dtype=torch.float32))
    net = nn.Sequential(copy.deepcopy(layer))
    freeze_base(add_lora(net, rank=rank, alpha=alpha, generator=generator))
    (adapter,) = lora_layers(net)["0"]
    factors = [adapter.lora_A, adapter.lora_B]
    losses = []
    for step in range(steps + 1):
        loss = F.mse_loss(net(inputs), targets)
        losses.append(loss.item())
        if step < steps:
            rate = RATE * (1 - step / MAX_STEPS)
            for factor, gradient in zip(factors, torch.autograd.grad(loss, factors)):
                factor.data -= rate * gradient.sign()
    with torch.no_grad():
        on, update = net[0].weight.clone(), adapter.delta
        with lora_disabled(net):
            off = net[0].weight.clone()
    A, B, weight = (t.detach() for t in (*factors, net[0].parametrizations.weight.original))
    return Inspection(rank, alpha, weight, A, B, update, on, off, losses[0], losses[-1])


class InspectorPicture(LivePicture):
    """W + (α/r)·BA = the effective weight, and B and A below: heat maps of one colour scale, with numbers.

    Args:
        shape: rows and columns of the weight.
    """

    def __init__(self, shape: tuple[int, int]):
        self._shape = shape
        self._tops = 2 * CELL * shape[0] + 1.05, CELL * shape[0] + 0.35  # of the two rows
        super().__init__(9.1, self._tops[0] + 0.3)

    def build(self) -> None:
        rows, columns = self._shape
        self._lefts = [0.2 + n * (CELL * columns + 0.75) for n in range(3)]
        (first, second, third), (top, below) = self._lefts, self._tops
        self._maps = [
            self._map(first, top, rows, columns, FROZEN),
            self._map(second, top, rows, columns, COMPUTED),
            self._map(third, top, rows, columns, COMPUTED),
            self._map(third - 0.7 - CELL * MAX_RANK, below, rows, MAX_RANK, TRAINED),
            self._map(third, below, MAX_RANK, columns, TRAINED),
        ]
        bar = self.place(0.4, 0.3, 2.2, 0.12)
        bar.imshow(np.linspace(0, 1, 256)[None], cmap="PuOr", aspect="auto", extent=(-1, 1, 0, 1))
        bar.set(yticks=[], xticks=[])
        bar.set_title("one colour scale for all", fontsize=9.5, pad=3)

    def _map(self, left, top, rows, columns, style):
        axes = self.place(left, top - CELL * rows, CELL * columns, CELL * rows)
        axes.axis("off")
        image = axes.imshow(np.zeros((rows, columns)), cmap="PuOr", aspect="auto")
        frame = Rectangle((-0.5, -0.5), columns, rows, fill=False, linewidth=2.5, clip_on=False, **style)
        axes.add_patch(frame)
        self.moving += [image, frame]
        return image, frame

    def update(self, shown: Inspection, enabled: bool) -> "InspectorPicture":
        """Shows `shown` with LoRA on or off; returns the picture itself."""
        self.erase()
        weight = shown.effective if enabled else shown.effective_off
        tensors = (shown.weight, shown.update, weight, shown.lora_B, shown.lora_A)
        limit = max(tensor.abs().max().item() for tensor in (*tensors, shown.effective))
        names = ("W", "(α/r)·BA", "layer.weight", "B", "A")
        added = "computed" if enabled else "not added: LoRA is off"
        roles = ("stored, frozen", added, "computed at every access", "stored, trained", "stored, trained")
        for place, (tensor, name, role) in enumerate(zip(tensors, names, roles)):
            self._fill(place, tensor, limit, name, role, pale=place == 1 and not enabled)
        middle, below = (top - CELL * self._shape[0] / 2 for top in self._tops)
        self.write(self._lefts[1] - 0.375, middle, "+", size=14, color="black" if enabled else "#aaaaaa")
        self.write(self._lefts[2] - 0.375, middle, "=", size=14)
        product = f"(α/r)·BA  =  {shown.scale:.3g}  ·"
        self.write(self._lefts[2] - 0.85 - CELL * shown.rank, below, product, size=14, anchor="rm")
        self.write(self._lefts[2] - 0.35, below, "·", size=14)
        for x, value in ((0.4, -limit), (1.5, 0), (2.6, limit)):
            self.write(x, 0.18, f"{value:.1f}".replace("-", "−"))
        return self

    def _fill(self, place, tensor, limit, name, role, pale) -> None:
        image, frame = self._maps[place]
        values = np.full(image.get_array().shape, np.nan)  # B and A have room for the highest rank
        rows, columns = tensor.shape
        first = values.shape[1] - columns  # B stands at the right
        values[:rows, first:] = tensor.numpy()
        image.set_clim(-limit, limit)
        image.set_alpha(0.25 if pale else 1)
        frame.set_bounds(first - 0.5, -0.5, columns, rows)
        words = [
            "" if np.isnan(v) else f"{v:.1f}".replace("-", "−").replace("−0.0", "0.0") for v in values.flat
        ]
        self.fill(image, values, words, size=7.5)
        self.write(first - 0.5, -0.9, f"{name}   {rows}×{columns}", axes=image.axes, size=11, anchor="lm")
        self.write(first - 0.5, rows - 0.05, role, axes=image.axes, size=10, anchor="lm")


class ParametrizationInspector(Panel):
    """A small layer, opened: rank, α, training steps and the switch move its tensors.

    Traits to read, set and observe: `rank` (1 to 4), `alpha` (1/4 to 16), `steps` (0 to 200) and `enabled`.
    `result` is the `Inspection` shown. A `layer` of your own may have 4 to 8 inputs and 4 to 8 outputs.

    Raises:
        ValueError: `layer` is too large to be drawn, or too small.
        TypeError: it is not a plain `nn.Linear` of float32.
    """

    rank = traitlets.Int(1, min=1, max=MAX_RANK)
    alpha = traitlets.Float(1.0, min=1 / 4, max=16.0)
    steps = traitlets.Int(50, min=0, max=MAX_STEPS)
    enabled = traitlets.Bool(True)
    result = traitlets.Instance(Inspection, allow_none=True)
    moves = ("rank", "alpha", "steps", "enabled")

    def __init__(self, layer: nn.Linear | None = None):
        if layer is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                layer = nn.Linear(8, 6, dtype=torch.float32)
        if type(layer) is not nn.Linear:
            kind = type(layer).__name__
            raise TypeError(
                f"layer is a {kind}; it must be an nn.Linear without LoRA, such as nn.Linear(8, 6)."
            )
        shape, dtype = tuple(layer.weight.shape), layer.weight.dtype
        if dtype != torch.float32:
            raise TypeError(f"layer holds {dtype}; it must hold torch.float32: call layer.float() first.")
        if not all(MAX_RANK <= side <= 8 for side in shape):
            raise ValueError(f"The weight of layer is {shape}; both sides must be {MAX_RANK} to 8.")
        self._picture = InspectorPicture(shape)
        self._inspect = lru_cache(maxsize=128)(partial(inspect, copy.deepcopy(layer).cpu()))
        super().__init__()

    def arrange(self):
        controls = [
            self.control("rank", "rank r", "rank r: rows of A, columns of B", step=1),
            self.control("alpha", "α", "α: the update is scaled by α/r", powers=(-2, 4)),
            self.control("steps", "steps", "steps of training; at 0, B = 0", step=10),
            self.switch("off: the weight is W itself"),
        ]
        return [row(*controls), self._words, self._image]

    def compute(self, rank, alpha, steps, enabled):
        result = self._inspect(rank=rank, alpha=alpha, steps=steps)
        draw = partial(self._picture.update, result, enabled)
        return draw, _summarise(result, enabled, steps), {"result": result}


def _summarise(shown: Inspection, enabled: bool, steps: int) -> str:
    loss = shown.loss if enabled else shown.loss_before
    trained = shown.lora_A.numel() + shown.lora_B.numel()
    weight = f"‖ΔW‖ {shown.update.norm():.2f}, of rank {torch.linalg.matrix_rank(shown.update).item()}"
    if torch.equal(shown.effective if enabled else shown.effective_off, shown.weight):
        weight = "the weight is W, to the bit"
    parts = [
        f"LoRA {'on' if enabled else 'off'}",
        f"rank {shown.rank}",
        f"α {shown.alpha:g}",
        f"α/r {shown.scale:.3g}",
        weight,
        f"stored: {shown.weight.numel()} frozen in W, {trained} trained in A and B",
        "learns to give the outputs of another random layer: "
        f"loss {shown.loss_before:.2f} → {loss:.2f} after {steps} steps",
    ]
    return " · ".join(parts)
