"""Draw your own digit: what the base and the adapted network make of it."""

from collections.abc import Sequence
from functools import partial

import ipywidgets as widgets
import numpy as np
import torch
import traitlets
from ipycanvas import Canvas
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import normalize, pil_to_tensor, resize

from lora_helpers.data import MEAN, STD, as_tensors
from lora_helpers.widgets.explorer import LoRAExplorer
from lora_helpers.widgets.explorer_picture import alpha_of
from lora_helpers.widgets.panel import Panel, row
from lora_helpers.widgets.pictures import LivePicture

SIDE = 28  # pixels of an MNIST image
BOX = 20  # pixels into which MNIST fits a digit
PEN = 2.3  # pixels; gives drawings about as much ink as MNIST's digits have
ZOOM = 10  # screen pixels of the canvas for each of the image

Stroke = Sequence[tuple[float, float]]


def as_mnist(strokes: Sequence[Stroke]) -> torch.Tensor:
    """Turns pen strokes into an image like MNIST's.

    The drawing keeps its shape, is scaled to fit a box of 20×20 pixels, and is moved so that its centre of
    mass is the centre of the 28×28 image.

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
    low, high = torch.cat(strokes).aminmax(dim=0)
    scale = (BOX - PEN) / max((high - low).max().item(), 1e-6)
    strokes = [(stroke - (low + high) / 2) * scale + SIDE / 2 for stroke in strokes]
    ink = _ink(strokes)
    middles = torch.arange(SIDE, dtype=torch.float32) + 0.5  # of the pixels
    mass = torch.stack([(ink.sum(dim=side) * middles).sum(dim=1) for side in (1, 2)], dim=1) / ink.sum()
    return normalize(_ink([stroke + SIDE / 2 - mass for stroke in strokes]), [MEAN], [STD])


def _ink(strokes: list[torch.Tensor]) -> torch.Tensor:
    """1×28×28 values in [0, 1]: drawn with a round pen, ten times as large, then reduced."""
    sheet = Image.new("L", (SIDE * ZOOM, SIDE * ZOOM))
    pen, radius = ImageDraw.Draw(sheet), PEN * ZOOM / 2
    for stroke in strokes:
        points = [tuple(point) for point in (stroke * ZOOM).tolist()]
        pen.line(points, fill=255, width=round(2 * radius))
        for x, y in points:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return resize(pil_to_tensor(sheet).float() / 255, [SIDE, SIDE], antialias=True)


class ProbabilityPicture(LivePicture):
    """The image as the networks see it, and ten probabilities from each of them."""

    def __init__(self):
        super().__init__(5.2, 2.8)

    def build(self) -> None:
        axes = self.place(0.1, 0.9, 1.4, 1.4, "what they see")
        self._image = axes.imshow(np.zeros((SIDE, SIDE)), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color="0.8")
        self.moving.append(self._image)
        axes = self._axes = self.place(2.05, 0.4, 3.05, 1.9, "probability")
        self._bars = self.bars(axes)
        axes.set(xlim=(-1.6, 10.4), ylim=(0, 1.15))
        axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        axes.set_xlabel("digit", fontsize=9, labelpad=1)

    def update(self, image, base, adapted, label: str) -> "ProbabilityPicture":
        """Shows `image` (1×28×28, normalised) and two times ten probabilities; returns the picture itself."""
        self.erase()
        self._image.set_data((image[0] * STD + MEAN).cpu().numpy())
        self.write(4.43, 2.42, label, size=10, anchor="lm")
        for bars, values, anchor, shift in zip(self._bars, (base, adapted), ("rm", "lm"), (-0.03, 0.03)):
            for bar, value in zip(bars, values.tolist()):
                bar.set_height(value)
            best = values.argmax().item()
            x, y = best + shift, values[best].item() + 0.06
            if values.any():  # all are 0 where nothing is drawn
                self.write(x, y, f"{values[best]:.0%}", axes=self._axes, anchor=anchor)
        return self


class DigitPad(Panel):
    """Draw a digit with mouse, pen or touch, or pick a test image by keyboard, and see two networks' answers.

    The networks are the explorer's: its base, and its base with LoRA as the explorer's controls stand, live.

    Traits: `index`, the test image shown, or None for the drawing. `image` is what the networks see, 1×28×28;
    `base` and `adapted` are the ten probabilities.

    Raises:
        TypeError: `explorer` is not a `LoRAExplorer`. ValueError: there is no such test image.
    """

    index = traitlets.Int(0, min=0, max=9_999, allow_none=True)
    moves = ("index",)

    def __init__(self, explorer: LoRAExplorer, index: int | None = None):
        if not isinstance(explorer, LoRAExplorer):
            raise TypeError(f"explorer is a {type(explorer).__name__}; it must be a LoRAExplorer.")
        self._explorer = explorer
        self._images, self._labels = as_tensors(explorer.tuner.mnist.test)
        self._strokes: list[list[tuple[float, float]]] = []
        self._drawing = False
        self._picture = ProbabilityPicture()
        self.image = self.base = self.adapted = self._painted = None
        super().__init__(index=self._first_repaired() if index is None else index)
        explorer.attach(self.update)
        self.update()  # the explorer may have moved meanwhile

    def draw(self, strokes: Sequence[Stroke]) -> None:
        """Shows `strokes`, points (x, y) on a canvas of 280×280, as if drawn by hand."""
        with self._lock:
            self._strokes = [list(stroke) for stroke in strokes]
            self.index = None
            self.update()

    def arrange(self) -> list[widgets.Widget]:
        self._make_canvas()
        actions = {
            "show": ("the test image of this number, after a drawing", self._show),
            "next repaired": ("the next test image that LoRA repairs", lambda: self._next("repaired")),
            "next broken": ("the next test image that LoRA breaks", lambda: self._next("broken")),
            "clear": ("wipe the box and draw", lambda: self.draw([])),
        }
        self.buttons = {}
        for name, (tip, action) in actions.items():
            self.buttons[name] = widgets.Button(description=name, tooltip=tip, layout={"width": "auto"})
            self.buttons[name].on_click(lambda _, action=action: action())
        field = self.control("index", "test image", "which test image to show")
        controls = row(widgets.Label("Draw in the box, or pick:"), field, *self.buttons.values())
        return [controls, self._words, row(self.canvas, self._image)]

    def state(self):
        strokes = tuple(map(tuple, self._strokes)) if self.index is None else None
        return self.index, strokes, self._explorer.result.setting, self._explorer.enabled

    def compute(self, index, strokes, setting, enabled):
        if index is None and not strokes:
            image, base = torch.full_like(self._images[0], -MEAN / STD), torch.zeros(10, dtype=torch.float32)
            adapted = base
            text = "nothing drawn yet: draw in the box with mouse, pen or finger"
        else:
            if index is not None and index >= len(self._images):
                raise ValueError(f"test image is {index}; it must be from 0 to {len(self._images) - 1}.")
            image = as_mnist(strokes) if index is None else self._images[index]
            (base,), (adapted,) = self._explorer.tuner.probabilities(setting, image.unsqueeze(0))
            adapted = adapted if enabled else base
            what = "your drawing" if index is None else f"test image {index}, a {self._labels[index]}"
            text = f"{what} · the base says {_answer(base)} · now {_answer(adapted)}"
        switch = "LoRA on" if enabled else "LoRA off"
        summary = f"{switch} · rank {setting.rank} · {alpha_of(setting)} · {text}"
        attributes = {"image": image, "base": base, "adapted": adapted}
        return partial(self._picture.update, image, base, adapted, switch), summary, attributes

    def update(self, change=None) -> None:
        """Shows the present state, on the canvas too."""
        with self._lock:
            super().update()
            if self._shown and self._painted != self._shown[:2]:
                self._painted = self._shown[:2]
                self._paint(*self._painted)

    def _paint(self, index, strokes) -> None:
        self.canvas.fill_style = "white"  # black on white in a dark theme too
        self.canvas.fill_rect(0, 0, self.canvas.width, self.canvas.height)
        for stroke in strokes or ():
            self.canvas.stroke_lines(list(stroke) if len(stroke) > 1 else [stroke[0], stroke[0]])
        if index is not None:
            ink = (self._images[index] * STD + MEAN).clamp(0, 1)
            pixels = np.kron(255 * (1 - ink[0].cpu().numpy()), np.ones((ZOOM, ZOOM))).astype(np.uint8)
            self.canvas.put_image_data(np.stack(3 * [pixels], axis=2), 0, 0)

    def _first_repaired(self) -> int:
        result = self._explorer.result
        learned = result.repaired[self._labels[result.repaired] == result.setting.digit]
        return [*learned.tolist(), *result.repaired.tolist(), 0][0]

    def _next(self, kind: str) -> None:
        places = getattr(self._explorer.result, kind)
        if not len(places):
            self.tell(f"With these settings no test image is {kind}.")
            return
        later = places[places > (-1 if self.index is None else self.index)]
        self.index = (later if len(later) else places)[0].item()

    def _show(self) -> None:
        self.index = self.fields["index"].value

    def _make_canvas(self) -> None:
        # The border is drawn by the page, so that the canvas keeps its place and size whatever is on it.
        side = SIDE * ZOOM
        layout = {"width": f"{side}px", "height": f"{side}px", "border": "1px solid gray", "flex": "none"}
        self.canvas = Canvas(width=side, height=side, layout=layout)
        self.canvas.line_width, self.canvas.line_cap, self.canvas.line_join = PEN * ZOOM, "round", "round"
        self.canvas.on_mouse_down(self._pen_down)
        self.canvas.on_mouse_move(self._pen_move)
        self.canvas.on_mouse_up(self._pen_up)
        self.canvas.on_mouse_out(self._pen_up)
        self.canvas.on_touch_start(lambda points: self._pen_down(*points[0]))
        self.canvas.on_touch_move(lambda points: self._pen_move(*points[0]))
        self.canvas.on_touch_end(lambda points: self._pen_up())
        self.canvas.on_touch_cancel(lambda points: self._pen_up())

    def _pen_down(self, x: float, y: float) -> None:
        with self._lock:
            if self.index is not None:  # the first stroke takes the test image away
                self.draw([])
            self._drawing = True
            self._strokes.append([(x, y)])
            self.canvas.stroke_line(x, y, x, y)

    def _pen_move(self, x: float, y: float) -> None:
        with self._lock:
            if self._drawing:
                self.canvas.stroke_line(*self._strokes[-1][-1], x, y)
                self._strokes[-1].append((x, y))

    def _pen_up(self, *point: float) -> None:
        with self._lock:
            if self._drawing:
                self._drawing = False
                self._painted = self.state()[:2]  # stroke by stroke
                self.update()


def _answer(probabilities: torch.Tensor) -> str:
    return f"{probabilities.argmax()} ({probabilities.max():.0%})"
