"""Inside one small layer: what is stored, what is computed, what is trained."""

import copy
from dataclasses import dataclass
from functools import lru_cache, partial

import ipywidgets as widgets
import torch
import traitlets
from matplotlib.patches import Rectangle
from torch import nn
from torch.nn import functional as F

from lora_helpers.lora import add_lora, freeze_base, lora_disabled, lora_layers
from lora_helpers.plots import AFTER, BEFORE, ink
from lora_helpers.widgets.common import FIELD, WRAP, Finite, Panel, paired, powers_of_two, tie
from lora_helpers.widgets.pictures import LivePicture, Words

MAX_RANK, MAX_STEPS = 4, 200
RATE, SEED = 0.05, 0
CELL = 0.29  # inches
FROZEN, TRAINED, COMPUTED = ({"color": color, "linestyle": line} for color, line in (("#444444", "-"), (AFTER, "--"), (BEFORE, ":")))


@dataclass(frozen=True, eq=False)
class Inspection:
    """The tensors of one adapted layer. `update` is (α/r)·BA; `effective` is what `layer.weight` gives, on or off."""

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


@torch.enable_grad()  # whatever a cell has set for the main thread
def inspect(layer: nn.Linear, *, rank: int = 1, alpha: float = 1, steps: int = 50, seed: int = 0) -> Inspection:
    """Adds LoRA to a copy of `layer`, trains A and B on a small task, and returns all tensors; `layer` is left alone.

    The task: on 64 random inputs, give the outputs of another random layer of the same shape. Gradient descent in
    which every entry moves by about the rate times the sign of its gradient (signSGD: Bernstein et al.,
    arXiv 1802.04434), a stand-in for Adam that needs no state, the rate falling to zero.

    Args:
        layer: in_features and out_features of at least `rank`.
        rank, alpha: as in `add_lora`. steps: from 0, at which B is still zero. seed: of the task and of A.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, weight = (torch.randn(*shape, generator=generator, device="cpu").to(layer.weight) for shape in ((64, layer.in_features), layer.weight.shape))
    targets = F.linear(inputs, weight)
    net = nn.Sequential(copy.deepcopy(layer))
    freeze_base(add_lora(net, rank=rank, alpha=alpha, generator=generator))
    (adapter,) = lora_layers(net)["0"]
    losses = []
    for step in range(MAX_STEPS + 1):
        loss = F.mse_loss(net(inputs), targets)
        losses.append(loss.item())
        if step == steps:
            break
        gradients = torch.autograd.grad(loss, [adapter.lora_A, adapter.lora_B])
        with torch.no_grad():
            for parameter, gradient in zip((adapter.lora_A, adapter.lora_B), gradients):
                parameter -= RATE * (1 - step / MAX_STEPS) * gradient.sign()
    with torch.no_grad():
        on = net[0].weight.clone()
        with lora_disabled(net):
            off = net[0].weight.clone()
        return Inspection(
            rank, alpha, net[0].parametrizations.weight.original.detach(), adapter.lora_A.detach(), adapter.lora_B.detach(),
            adapter.delta, on, off, losses[0], losses[-1],
        )  # fmt: skip


class InspectorPicture(LivePicture):
    """W + (α/r)·BA = the effective weight, and B and A below, as heat maps with one colour scale, the numbers written in."""

    def __init__(self, shown: Inspection, enabled: bool, summary: str, caption: bool = False):
        super().__init__(9.1, 4.7, caption)
        self.describe(summary)
        self._limit = max(part.abs().max().item() for part in (shown.weight, shown.lora_A, shown.lora_B, shown.update, shown.effective))
        out_features, in_features = shown.weight.shape
        width, gap, top, below = CELL * in_features, 0.75, 4.4, 1.95
        second, third = 0.2 + width + gap, 0.2 + 2 * (width + gap)
        self._map(shown.weight, 0.2, top, "W", "stored, frozen", FROZEN)
        self._map(shown.update, second, top, "(α/r)·BA", "computed" if enabled else "not added: LoRA is off", COMPUTED, enabled)
        self._map(shown.effective if enabled else shown.effective_off, third, top, "layer.weight", "computed at every access", COMPUTED)
        row = top - CELL * out_features / 2
        self._sign("+", 0.2 + width + gap / 2, row, enabled)
        self._sign("=", second + width + gap / 2, row)
        start = third - 0.7 - CELL * shown.rank
        self._sign(f"(α/r)·BA  =  {shown.alpha / shown.rank:.3g}  ·", start - 0.15, below - CELL * out_features / 2, ha="right")
        self._map(shown.lora_B, start, below, "B", "stored, trained", TRAINED)
        self._sign("·", start + CELL * shown.rank + 0.35, below - CELL * out_features / 2)
        axes = self._map(shown.lora_A, third, below - CELL * (out_features - shown.rank) / 2, "A", "stored, trained", TRAINED)
        bar = self._place(0.4, 0.3, 2.2, 0.12)
        self.colorbar(axes.images[0], cax=bar, orientation="horizontal")
        bar.tick_params(labelsize=9, length=2)
        bar.set_title("one colour scale for all", fontsize=9.5, pad=3)

    def _map(self, values, left, top, name, role, style, strong=True):
        rows, columns = values.shape
        axes = self._place(left, top - CELL * rows, CELL * columns, CELL * rows)
        image = axes.imshow(values.numpy(), cmap="PuOr", vmin=-self._limit, vmax=self._limit, aspect="auto", alpha=1 if strong else 0.25)
        axes.axis("off")
        axes.add_patch(Rectangle((-0.5, -0.5), columns, rows, fill=False, linewidth=2.5, clip_on=False, **style))
        Words(axes, fontsize=8, room=4).write(
            (column, row, f"{value:.1f}".replace("-", "−").replace("−0.0", "0.0"), ink(image.to_rgba(value)) if strong else "black")
            for row, entries in enumerate(values.tolist())
            for column, value in enumerate(entries)
        )
        self._write(left, top + 0.09, fontsize=11).set_text(f"{name}   {rows}×{columns}")
        self._write(left, top - CELL * rows - 0.09, fontsize=10, va="top").set_text(role)
        return axes

    def _sign(self, text, left, middle, strong=True, ha="center"):
        self._write(left, middle, fontsize=14, ha=ha, va="center", alpha=1 if strong else 0.25).set_text(text)


class ParametrizationInspector(Panel):
    """A small layer, opened: rank, α, training steps and the switch move its tensors.

    Traits to read, set and observe: `rank` (1 to 4), `alpha` (1/4 to 16), `steps` (0 to 200) and `enabled`.
    `result` is the `Inspection` shown. A `layer` of one's own may have up to 8 inputs and 8 outputs, and at least 4.

    Raises:
        ValueError: `layer` is too large to be drawn, or too small. TypeError: it is no plain `nn.Linear` of float32.
    """

    rank = traitlets.Int(1, min=1, max=MAX_RANK)
    alpha = Finite(1.0, min=1 / 4, max=16.0)
    steps = traitlets.Int(50, min=0, max=MAX_STEPS)
    enabled = traitlets.Bool(True)
    result = traitlets.Instance(Inspection, allow_none=True)

    def __init__(self, layer: nn.Linear | None = None):
        if layer is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                layer = nn.Linear(8, 6)
        if type(layer) is not nn.Linear:
            raise TypeError(f"layer is a {type(layer).__name__}; it must be an nn.Linear as it was made, such as nn.Linear(8, 6).")
        if layer.weight.dtype != torch.float32:
            raise TypeError(f"layer holds {layer.weight.dtype}; it must hold torch.float32: call layer.float() first.")
        if not all(MAX_RANK <= side <= 8 for side in layer.weight.shape):
            raise ValueError(f"The weight is {tuple(layer.weight.shape)}; both sides must be {MAX_RANK} to 8 for its numbers to be read.")
        self._layer = copy.deepcopy(layer).cpu()  # so small a one is quickest there
        self._inspect = lru_cache(maxsize=128)(partial(inspect, self._layer, seed=SEED))
        rank_tip, alpha_tip, steps_tip = "rank r: rows of A, columns of B", "α: the update is scaled by α/r", "steps of training; at 0, B = 0"
        slider = {"readout": False, "continuous_update": False, "layout": widgets.Layout(width="190px")}
        self.rank_slider = widgets.IntSlider(self.rank, min=1, max=MAX_RANK, tooltip=rank_tip, **slider)
        self.alpha_slider = powers_of_two(-2, 4, self.alpha, alpha_tip)
        self.steps_slider = widgets.IntSlider(self.steps, min=0, max=MAX_STEPS, step=10, tooltip=steps_tip, **slider)
        self.rank_field = widgets.BoundedIntText(self.rank, min=1, max=MAX_RANK, description="rank r", tooltip=rank_tip, **FIELD)
        self.alpha_field = widgets.BoundedFloatText(self.alpha, min=1 / 4, max=16, step=0.25, description="α", tooltip=alpha_tip, **FIELD)
        self.steps_field = widgets.BoundedIntText(self.steps, min=0, max=MAX_STEPS, description="steps", tooltip=steps_tip, **FIELD)
        self.switch = widgets.Checkbox(self.enabled, description="LoRA on", indent=False, tooltip="off: the weight is W itself",
                                       layout=widgets.Layout(width="110px"))  # fmt: skip
        rows = [
            paired(self, "rank", self.rank_field, self.rank_slider),
            paired(self, "alpha", self.alpha_field, self.alpha_slider),
            paired(self, "steps", self.steps_field, self.steps_slider),
            tie(self, "enabled", self.switch),
        ]
        super().__init__([widgets.HBox(rows, layout=WRAP)])
        self._follow("rank", "alpha", "steps", "enabled")

    def _refresh(self, state):
        rank, alpha, steps, enabled = state
        remembered = self._inspect.cache_info().hits
        result = self._inspect(rank=rank, alpha=alpha, steps=steps)
        origin = "remembered" if self._inspect.cache_info().hits > remembered else "just trained"
        summary = _summarise(result, enabled, steps, origin)
        return InspectorPicture(result, enabled, summary), summary, {"result": result}

    def _draw(self) -> InspectorPicture:
        return InspectorPicture(self.result, self._shown.state[-1], self.summary, caption=True)


def _summarise(shown: Inspection, enabled: bool, steps: int, origin: str) -> str:
    trained = shown.lora_A.numel() + shown.lora_B.numel()
    same = "the weight is W, to the bit" if torch.equal(shown.effective if enabled else shown.effective_off, shown.weight) else (
        f"‖ΔW‖ {shown.update.norm():.2f}, of rank {torch.linalg.matrix_rank(shown.update).item()}"
    )  # fmt: skip
    return (
        f"LoRA {'on' if enabled else 'off'} · rank {shown.rank} · α {shown.alpha:g} · α/r {shown.alpha / shown.rank:.3g} · {same} · "
        f"stored: {shown.weight.numel()} frozen in W, {trained} trained in A and B · "
        f"loss {shown.loss_before:.2f} → {shown.loss if enabled else shown.loss_before:.2f} after {steps} steps · seed {SEED}, {origin}"
    )
