"""The explorer: a rank slider and a LoRA switch that act on a real network.

Three parts: `fine_tune` computes, `render` draws, `LoRAExplorer` is the thin widget between them.
"""

import base64
import copy
import html
from dataclasses import dataclass
from threading import Lock

import ipywidgets as widgets
import torch

from lora_helpers.data import Mnist, only_digit
from lora_helpers.lora import add_lora, count_parameters, freeze_base, lora_disabled, lora_layers
from lora_helpers.model import RichBoyNet
from lora_helpers.plots import Picture, plot_wrong_counts
from lora_helpers.training import Evaluation, evaluate, train


@dataclass(frozen=True, eq=False)
class FineTuning:
    """One fine-tuning: its settings, and the network tested with LoRA off and on."""

    rank: int
    alpha: float
    digit: int
    batches: int
    seed: int
    off: Evaluation
    on: Evaluation
    trainable: int
    norms: dict[str, float]  # Frobenius norm of ΔW, by layer


def fine_tune(
    base: RichBoyNet, mnist: Mnist, *, rank: int = 1, alpha: float = 1, digit: int = 9, batches: int = 100, seed: int = 0
) -> FineTuning:
    """Fine-tunes a copy of `base` on one digit and tests it; `base` and the global random stream are left alone."""
    net = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    freeze_base(add_lora(net, rank=rank, alpha=alpha, generator=generator))
    train(net, only_digit(mnist.train, digit), max_batches=batches, seed=seed, progress=False)
    on = evaluate(net, mnist.test)
    with lora_disabled(net):
        off = evaluate(net, mnist.test)
    norms = {name: adapters[0].delta.norm().item() for name, adapters in lora_layers(net).items()}
    return FineTuning(rank, alpha, digit, batches, seed, off, on, count_parameters(net).trainable, norms)


def summarise(result: FineTuning, enabled: bool) -> str:
    """One line of text that says what the picture shows."""
    shown = result.on if enabled else result.off
    others = sum(shown.wrong_counts) - shown.wrong_counts[result.digit]
    return (
        f"LoRA {'on' if enabled else 'off'} · rank {result.rank} · α {result.alpha:g} · "
        f"{result.batches} batches of digit {result.digit} · seed {result.seed} · {result.trainable:,} trained parameters · "
        f"accuracy {shown.accuracy:.1%} · {result.digit} wrong {shown.wrong_counts[result.digit]} · others wrong {others}"
    )


def render(result: FineTuning, enabled: bool) -> Picture:
    """Wrong answers per digit of the base beside those of the network as it is switched now."""
    return plot_wrong_counts(result.off, result.on if enabled else result.off, labels=("base", f"LoRA {'on' if enabled else 'off'}"))


class LoRAExplorer(widgets.VBox):
    """A rank slider and a LoRA switch. A new rank trains and tests a real adapter on a private copy of `base`.

    Traits to read and set: `rank_slider.value` (1 to 64), `switch.value` (bool). `result` is the
    `FineTuning` shown, `summary` its line of text.
    """

    def __init__(self, base: RichBoyNet, mnist: Mnist, *, rank: int = 1, alpha: float = 1, digit: int = 9):
        self._base, self._mnist = copy.deepcopy(base), mnist
        self._settings = {"alpha": alpha, "digit": digit}
        self._memory: dict[int, FineTuning] = {}
        self._lock = Lock()  # JupyterLab may run callbacks on several threads
        self.result: FineTuning | None = None
        self.summary = ""
        wide = {"style": {"description_width": "5em"}, "layout": widgets.Layout(width="28em")}
        self.rank_slider = widgets.SelectionSlider(
            options=[1, 2, 4, 8, 16, 32, 64], value=rank, description="rank r", continuous_update=False, **wide
        )
        self.switch = widgets.Checkbox(value=True, description="LoRA on", indent=False)
        self._text, self._picture = widgets.HTML(), widgets.HTML(layout=widgets.Layout(min_height="300px"))
        self._status = widgets.HTML()
        super().__init__([widgets.HBox([self.rank_slider, self.switch]), self._text, self._picture, self._status])
        for control in (self.rank_slider, self.switch):
            control.observe(self._update, names="value")
        self._update()

    def _update(self, change=None) -> None:
        # Synchronous on purpose: the front end merges the moves made meanwhile, so no work queues up.
        with self._lock:
            try:
                rank, enabled = self.rank_slider.value, self.switch.value
                if rank not in self._memory:
                    self._memory[rank] = fine_tune(self._base, self._mnist, rank=rank, **self._settings)
                self.result = self._memory[rank]
                self.summary = summarise(self.result, enabled)
                self._png = render(self.result, enabled).png()
                self._text.value = f"<output>{html.escape(self.summary)}</output>"
                data = base64.b64encode(self._png).decode()
                self._picture.value = f'<img alt="{html.escape(self.summary)}" src="data:image/png;base64,{data}" style="max-width: 100%">'
                self._status.value = ""
            except Exception as error:
                self._status.value = f"<b>Not updated:</b> {html.escape(str(error))} Move the slider to try again."

    def __repr__(self) -> str:
        return "LoRAExplorer: run this notebook to move the rank slider and the LoRA switch"

    def _repr_mimebundle_(self, **kwargs):
        # Where widgets do not run, the picture stands in their place.
        data = super()._repr_mimebundle_(**kwargs)
        data = dict(data[0] if isinstance(data, tuple) else data or {})
        data["text/plain"] = repr(self)
        data["image/png"] = base64.b64encode(self._png).decode()
        return data, {"image/png": {"alt": self.summary}}
