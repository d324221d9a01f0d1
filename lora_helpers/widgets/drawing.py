"""Draw your own digit: what the base and the adapted network make of it."""

from collections.abc import Sequence

import ipywidgets as widgets
import numpy as np
import torch
import traitlets
from ipycanvas import Canvas, hold_canvas

from lora_helpers.data import MEAN, STD, as_tensors
from lora_helpers.plots import AFTER, BEFORE
from lora_helpers.widgets.common import FIELD, Panel, tie
from lora_helpers.widgets.explorer import LoRAExplorer
from lora_helpers.widgets.main_thread import on_main_thread
from lora_helpers.widgets.pictures import LivePicture

SIDE = 28  # pixels of an MNIST image
BOX = 20  # pixels into which MNIST fits a digit
PEN = 2.3  # pixels; gives drawings about as much ink as MNIST's digits have
CANVAS = 280  # screen pixels

Stroke = Sequence[tuple[float, float]]


def as_mnist(strokes: Sequence[Stroke]) -> torch.Tensor:
    """Turns pen strokes into an image like MNIST's.

    The drawing is scaled, its shape kept, to fit a box of 20×20 pixels, and moved so that its centre of mass is the
    centre of the 28×28 image.

    Args:
        strokes: each a list of points (x, y), x to the right and y down, in any unit.

    Returns:
        float32, 1×28×28, normalised as in `load_mnist`.

    Raises:
        ValueError: there is no point, or one that is not two finite numbers.

    Source: how MNIST was made: http://yann.lecun.com/exdb/mnist/
    """
    strokes = [torch.tensor(stroke, dtype=torch.float32) for stroke in strokes if len(stroke)]
    if not strokes:
        raise ValueError("There is nothing drawn; give at least one stroke with one point.")
    if not all(stroke.shape[1:] == (2,) and stroke.isfinite().all() for stroke in strokes):
        raise ValueError("Each point of a stroke must be (x, y), two finite numbers.")
    starts = torch.cat([stroke[:-1] if len(stroke) > 1 else stroke for stroke in strokes])
    ends = torch.cat([stroke[1:] if len(stroke) > 1 else stroke for stroke in strokes])
    points = torch.cat(strokes)
    low, high = points.min(dim=0).values, points.max(dim=0).values
    scale = (BOX - PEN) / max((high - low).max().item(), 1e-6)
    middle = (SIDE - 1) / 2  # pixel centres are at 0, 1, … 27
    starts, ends = ((part - (low + high) / 2) * scale + middle for part in (starts, ends))
    ink = _ink(starts, ends)
    positions = torch.arange(SIDE, dtype=torch.float32)
    mass = torch.stack([ink.sum(dim=0) @ positions, ink.sum(dim=1) @ positions]) / ink.sum()
    return (_ink(starts + middle - mass, ends + middle - mass).unsqueeze(0) - MEAN) / STD


def _ink(starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """28×28 values in [0, 1]: line segments drawn with a round pen, their edges softened over one pixel."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    pixels = torch.stack([x, y], dim=-1).reshape(-1, 1, 2).float()
    along = ends - starts
    position = ((pixels - starts) * along).sum(dim=-1) / along.square().sum(dim=-1).clamp(min=1e-12)
    nearest = starts + position.clamp(0, 1).unsqueeze(-1) * along
    distance = (pixels - nearest).norm(dim=-1).min(dim=1).values
    return (PEN / 2 + 0.5 - distance).clamp(0, 1).reshape(SIDE, SIDE)


class ProbabilityPicture(LivePicture):
    """The image as the networks see it, and ten probabilities from each of them."""

    def __init__(self, caption: bool = False):
        super().__init__(7.6, 2.8, caption)
        axes = self._place(0.1, 0.3, 2.0, 2.0)
        self._image = axes.imshow(np.zeros((SIDE, SIDE)), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_title("what they see: 28 × 28", fontsize=11)
        axes = self._place(2.65, 0.35, 4.85, 1.95)
        digits = np.arange(10)
        self._bars = [
            axes.bar(digits + shift, np.ones(10), 0.4, color=color, hatch=hatch, edgecolor="white", linewidth=0.5)
            for shift, color, hatch in ((-0.2, BEFORE, ""), (0.2, AFTER, "///"))
        ]
        axes.set(xlim=(-0.9, 9.9), ylim=(0, 1.13), xticks=digits)
        axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        axes.tick_params(labelsize=10, length=0)
        axes.set_title("probability of each digit", loc="left", fontsize=11)
        axes.legend(self._bars, ["base", " " * 14], loc="lower right", frameon=False, fontsize=10, ncols=2, borderpad=0,
                    bbox_to_anchor=(1, 1.02), handlelength=1.4, columnspacing=1)  # fmt: skip
        self._label = axes.text(0.865, 1.072, "", fontsize=10, transform=axes.transAxes)
        self._peaks = [axes.text(0, 0, "", ha=side, va="bottom", fontsize=9) for side in ("right", "left")]
        self._moving += [self._image, self._label, *self._bars[0], *self._bars[1], *self._peaks]

    def update(self, image: torch.Tensor, base: torch.Tensor, adapted: torch.Tensor, label: str, summary: str) -> "ProbabilityPicture":
        """Shows `image` (1×28×28, normalised) and two times ten probabilities; returns the picture itself."""
        self.describe(summary)
        self._image.set_data((image.squeeze() * STD + MEAN).cpu().numpy())
        self._label.set_text(label)
        for bars, values, peak, aside in zip(self._bars, (base, adapted), self._peaks, (-0.03, 0.03)):
            for bar, value in zip(bars, values.tolist()):
                bar.set_height(value)
            best = values.argmax().item()
            peak.set_position((best + aside, values[best].item() + 0.01))
            peak.set_text(f"{values[best]:.0%}")
        return self


class DigitPad(Panel):
    """Draw a digit with mouse, pen or touch, or pick a test image by keyboard, and see two networks' answers.

    The networks are those of `explorer`: its base, and its base with LoRA as the explorer's controls stand, live.

    Traits: `index`, the test image shown, or -1 for the drawing. `image` is what the networks see, 1×28×28;
    `base` and `adapted` are the ten probabilities.

    Raises:
        TypeError: `explorer` is no `LoRAExplorer`. TraitError: there is no such test image.
    """

    index = traitlets.Int(0)

    def __init__(self, explorer: LoRAExplorer, index: int | None = None):
        if not isinstance(explorer, LoRAExplorer):
            raise TypeError(f"explorer is a {type(explorer).__name__}; it must be a LoRAExplorer, whose networks the pad asks.")
        self._explorer = explorer
        self._images, self._labels = as_tensors(explorer.tuner.mnist.test)
        self._strokes: list[list[tuple[float, float]]] = []
        self._drawing = False
        self._picture = ProbabilityPicture()
        self._painted = None
        self.image = self.base = self.adapted = None
        self._make_canvas()
        last = len(self._images) - 1
        self.set_trait("index", self._first_repaired() if index is None else index)
        self.index_field = tie(self, "index", widgets.BoundedIntText(
            self.index, min=-1, max=last, description="test image", tooltip="which test image; -1: your drawing", **FIELD
        ))  # fmt: skip
        buttons = [
            self._button("clear", "wipe the canvas and draw", self.clear),
            self._button("next repaired", "the next test image that LoRA repairs", lambda: self._next("repaired")),
            self._button("next broken", "the next test image that LoRA breaks", lambda: self._next("broken")),
        ]
        self.buttons = {button.description: button for button in buttons}
        hint = widgets.Label("Draw in the box, or pick:")
        super().__init__([widgets.HBox([hint, self.index_field, *buttons])], beside=[self.canvas])
        self._follow("index")
        explorer.attach(self._update)
        self._update()  # the explorer may have moved just before

    @traitlets.validate("index")
    def _check_index(self, proposal):
        last = len(self._images) - 1
        if not -1 <= proposal.value <= last:
            raise traitlets.TraitError(f"index is {proposal.value}; it must be -1 (your drawing) or a test image, 0 to {last}.")
        return proposal.value

    def draw(self, strokes: Sequence[Stroke]) -> None:
        """Shows `strokes`, points (x, y) on a canvas of 280×280, as if drawn by hand."""
        with self._lock:
            self._strokes = [list(stroke) for stroke in strokes]
            self.index = -1
            self._update()

    def clear(self) -> None:
        """Wipes the canvas."""
        self.draw([])

    def _button(self, name, tip, action) -> widgets.Button:
        button = widgets.Button(description=name, tooltip=tip, layout=widgets.Layout(width="auto"))
        button.on_click(on_main_thread(lambda _: action()))
        return button

    def _first_repaired(self) -> int:
        repaired, digit = self._explorer.result.repaired, self._explorer.result.settings.digit
        learned = repaired[self._labels[repaired] == digit]
        return [*learned.tolist(), *repaired.tolist(), 0][0]

    def _next(self, kind: str) -> None:
        places = getattr(self._explorer.result, kind)
        if not len(places):
            self._tell(f"With these settings no test image is {kind}.")
            return
        later = places[places > self.index]
        self.index = (later if len(later) else places)[0].item()

    def _make_canvas(self) -> None:
        # The border is drawn by the page, so that the canvas keeps its place and size whatever is on it.
        layout = widgets.Layout(width=f"{CANVAS}px", height=f"{CANVAS}px", border="1px solid gray", flex="none")
        self.canvas = Canvas(width=CANVAS, height=CANVAS, layout=layout)
        self.canvas.line_width, self.canvas.line_cap, self.canvas.line_join = PEN * CANVAS / SIDE, "round", "round"
        pen_down, pen_up = on_main_thread(self._pen_down), on_main_thread(self._pen_up)
        self.canvas.on_mouse_down(pen_down)
        self.canvas.on_mouse_move(self._pen_move)
        self.canvas.on_mouse_up(pen_up)
        self.canvas.on_mouse_out(pen_up)
        self.canvas.on_touch_start(lambda points: pen_down(*points[0]))
        self.canvas.on_touch_move(lambda points: self._pen_move(*points[0]))
        self.canvas.on_touch_end(lambda points: pen_up())
        self.canvas.on_touch_cancel(lambda points: pen_up())

    def _pen_down(self, x: float, y: float) -> None:
        with self._lock, self._trouble_shown():
            if self.index >= 0:  # the first stroke takes the test image away
                self.clear()
            self._drawing = True
            self._strokes.append([(x, y)])
            self.canvas.stroke_line(x, y, x, y)

    def _pen_move(self, x: float, y: float) -> None:
        with self._lock, self._trouble_shown():
            if self._drawing:
                self.canvas.stroke_line(*self._strokes[-1][-1], x, y)
                self._strokes[-1].append((x, y))

    def _pen_up(self, *point: float) -> None:
        with self._lock:
            if self._drawing:
                self._drawing = False
                self._update()

    def _state(self):
        drawn = tuple(tuple(stroke) for stroke in self._strokes) if self.index < 0 else None
        return *super()._state(), drawn, *self._explorer.shown

    def _refresh(self, state):
        index, strokes, settings, enabled = state
        if index < 0 and not strokes:
            image = (torch.zeros(1, SIDE, SIDE) - MEAN) / STD
            base = adapted = torch.zeros(10)
            text = "nothing drawn yet: draw in the box with mouse, pen or finger"
        else:
            image = self._images[index] if index >= 0 else as_mnist(strokes)
            (base,), (adapted,) = self._explorer.tuner.probabilities(settings, image.unsqueeze(0))
            adapted = adapted if enabled else base
            what = f"test image {index}, a {self._labels[index]}" if index >= 0 else "your drawing"
            text = f"{what} · the base says {_answer(base)} · now {_answer(adapted)}"
        switch = "LoRA on" if enabled else "LoRA off"
        summary = f"{switch} · rank {settings.rank} · α {settings.alpha:g} · {text}"
        arguments = image, base, adapted, switch, summary
        return self._picture.update(*arguments), summary, {"image": image, "base": base, "adapted": adapted, "_arguments": arguments}

    def _show(self) -> None:
        index, strokes = self._shown.state[:2]
        self.index_field.description = "test image" if index >= 0 else "your drawing"
        if self._painted != (index, strokes):
            self._painted = None  # an interrupt leaves half of it
            self._paint(index, strokes)
            self._painted = index, strokes
        super()._show()

    def _paint(self, index: int, strokes) -> None:
        stopped = None
        with hold_canvas():  # if an error left this block, ipycanvas would hold all later strokes back
            try:
                self.canvas.fill_style = "white"  # black on white in a dark theme too
                self.canvas.fill_rect(0, 0, CANVAS, CANVAS)
                for stroke in strokes or ():
                    self.canvas.stroke_lines(list(stroke) if len(stroke) > 1 else [stroke[0], stroke[0]])
                if index >= 0:
                    pixels = 255 * (1 - (self._images[index].squeeze() * STD + MEAN).clamp(0, 1))
                    grey = pixels.byte().repeat_interleave(CANVAS // SIDE, dim=0).repeat_interleave(CANVAS // SIDE, dim=1)
                    self.canvas.put_image_data(grey.unsqueeze(-1).repeat(1, 1, 3).cpu().numpy(), 0, 0)
            except BaseException as error:
                stopped = error
        if stopped:
            raise stopped

    def _draw(self) -> ProbabilityPicture:
        return ProbabilityPicture(caption=True).update(*self._arguments)


def _answer(probabilities: torch.Tensor) -> str:
    return f"{probabilities.argmax()} ({probabilities.max():.0%})"
