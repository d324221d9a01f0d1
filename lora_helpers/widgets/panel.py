"""What all panels share: controls, a line of text, a picture, a status line; a stand-in without a kernel."""

import base64
import html
import io
import math
import time
from collections.abc import Callable
from threading import RLock
from typing import Any

import ipywidgets as widgets
import traitlets
from PIL import Image

from lora_helpers import plots
from lora_helpers.plots import as_html
from lora_helpers.widgets.pictures import LivePicture, as_png, with_caption

REMEMBERED = 32  # drawings, of some 100 kB each
# Room for two lines, so that nothing jumps.
TEXT = 'aria-live="polite" style="display: block; line-height: 1.4; min-height: 2.8em; font-size: 1.1em"'
PATIENCE = 0.8  # seconds of training before a progress bar appears: drawing it slows a short training


class Panel(widgets.VBox):
    """A column of controls, summary, picture and status.

    A subclass names the traits that move it (`moves`), and gives `arrange` and `compute`. A move computes
    everything, then takes it on in one assignment, then shows it. An error, or the stop button, before that
    assignment puts the controls back, and the status line says so. JupyterLab may call back on several
    threads: a lock lets in one move at a time. The callback returns when everything is shown; until then the
    page merges further moves, so no work queues up.

    Attributes:
        summary: one line that says what the picture shows; also the picture's text alternative.
        status: what went wrong at the last move, or a remark on it, or "".
        fields, sliders: the controls by trait.

    Raises:
        ValueError: the first picture could not be made.
    """

    summary = traitlets.Unicode()
    status = traitlets.Unicode()
    moves: tuple[str, ...] = ()

    def __init__(self, **settings):
        super().__init__(**settings)
        self._lock = RLock()
        self._shown: tuple | None = None  # the state that is shown
        self._drawn: dict[tuple, bytes] = {}  # what was drawn lately: back and forth is quicker so
        self._png = b""
        self._text, self._image, self._alert = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._progress = widgets.IntProgress(description="training", layout={"visibility": "hidden"})
        self._words = widgets.VBox([row(self._alert, self._progress), self._text])
        self.fields: dict[str, widgets.Widget] = {}
        self.sliders: dict[str, widgets.Widget] = {}
        self.children = self.arrange()
        self.add_class("lora-panel")
        self.observe(self.update, names=list(self.moves))
        self.update()
        if self.status:
            raise ValueError(self.status)

    def arrange(self) -> list[widgets.Widget]:
        """Makes the controls; returns the rows of the panel, with `_words` and `_image` among them."""
        raise NotImplementedError

    def compute(self, *state) -> tuple[Callable[[], LivePicture], str, dict[str, Any]]:
        """For `state`: what draws the picture; the summary; the attributes to set. It sets none itself."""
        raise NotImplementedError

    def state(self) -> tuple:
        """Everything that the picture depends on, the traits of `moves` first."""
        return tuple(getattr(self, name) for name in self.moves)

    def update(self, change=None) -> None:
        """Shows the present state, if it is not shown yet."""
        with self._lock:
            state = self.state()
            if state == self._shown:
                return
            self.tell("")
            try:
                draw, summary, attributes = self.compute(*state)
                png = self._draw_once((state, plots._type_scale), draw)
                self._shown, self._png = state, png
                self._image.value = as_html(png, summary)
                self._text.value = f"<output {TEXT}>{html.escape(summary)}</output>"
                self.move(attributes | {"summary": summary})
            except BaseException as error:
                if self._shown and self._shown != state == self.state():
                    self.move(dict(zip(self.moves, self._shown)))
                self.tell(_reason(error))
                if not isinstance(error, Exception):
                    raise  # the stop button ends the cell
            finally:
                self._progress.layout.visibility = "hidden"

    def _draw_once(self, key: tuple, draw: Callable[[], LivePicture]) -> bytes:
        if key not in self._drawn:
            self._drawn[key] = as_png(draw().pixels(), compress_level=1)
            if len(self._drawn) > REMEMBERED:
                del self._drawn[next(iter(self._drawn))]
        return self._drawn[key]

    def move(self, values: dict[str, Any]) -> None:
        """Sets several traits before anyone is told of the first. If one value is refused, none changes."""
        with self._lock, self.hold_trait_notifications():
            for name, value in values.items():
                setattr(self, name, value)

    def tell(self, status: str) -> None:
        """Shows `status` above the summary."""
        self.status = status
        self._alert.value = f'<div role="alert"><b>{html.escape(status)}</b></div>' if status else ""

    def show_training(self) -> Callable[[int, int], None]:
        """A function of (done, total) that shows a bar when a training takes long."""
        start = time.monotonic()

        def progress(done: int, total: int) -> None:
            if done % 10 == 0 and time.monotonic() - start > PATIENCE:
                self._progress.max, self._progress.value = total, done
                self._progress.layout.visibility = "visible"

        return progress

    def control(self, trait: str, label: str, tip: str, *, options=None, powers=None, step=None):
        """A field for `trait` with its label, and a slider over `options`, over powers of two, or by `step`.

        A screen reader is told the label of the field, not of the slider. The field shows the slider's value.
        """
        limits, slider = self.traits()[trait], None
        field = widgets.FloatText(step=1 / 16) if isinstance(limits, traitlets.Float) else widgets.IntText()
        look = {"tooltip": tip, "readout": False, "continuous_update": False, "layout": {"width": "170px"}}
        if options:
            field = widgets.Dropdown(options=options)
            slider = widgets.SelectionSlider(options=options, **look)
        elif powers:
            slider = widgets.FloatLogSlider(base=2, min=powers[0], max=powers[1], step=1, **look)
        elif step:
            slider = widgets.IntSlider(min=limits.min, max=limits.max, step=step, **look)
        field.description, field.tooltip = label, tip
        field.layout.width, field.style.description_width = "150px", "76px"
        self.fields[trait] = tie(self, trait, field)
        if slider is None:
            return field
        self.sliders[trait] = tie(self, trait, slider)
        return row(field, slider)

    def switch(self, tip: str) -> widgets.Checkbox:
        """A checkbox for the trait `enabled`."""
        box = widgets.Checkbox(description="LoRA on", indent=False, tooltip=tip, layout={"width": "110px"})
        self.fields["enabled"] = tie(self, "enabled", box)
        return box

    @traitlets.validate("alpha")
    def _refuse_nan(self, proposal):
        if math.isnan(proposal.value):  # neither too small nor too large, and not equal to itself
            raise traitlets.TraitError("alpha is nan; it must be a number.")
        return proposal.value

    def _repr_mimebundle_(self, **kwargs):
        # Where no kernel answers, as `plots.Picture`: HTML for its alt, PNG for places without HTML.
        data = super()._repr_mimebundle_(**kwargs)
        with self._lock:
            picture = with_caption(Image.open(io.BytesIO(self._png)), self.summary)
            png = as_png(picture.quantize(256, dither=Image.Dither.NONE), optimize=True)
            data["text/html"] = as_html(png, self.summary)
        data["image/png"] = base64.b64encode(png).decode()
        return data, {"image/png": {"alt": self.summary}}

    def __repr__(self) -> str:
        return f"{type(self).__name__}: run this notebook to use its controls"


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted. Set the value again."
    return f"{error} ({type(error).__name__}). Set another value, or run the cell again."


def row(*children: widgets.Widget) -> widgets.HBox:
    """Widgets in line, and on further lines where there is no room."""
    layout = {"flex_flow": "row wrap", "align_items": "center", "overflow": "visible"}
    return widgets.HBox(children, layout=layout)


def tie(panel: Panel, trait: str, control: widgets.Widget) -> widgets.Widget:
    """Keeps `panel.trait` and `control.value` the same, and returns `control`.

    A value out of range is refused in words.
    """
    kind = type(getattr(panel, trait))

    def move(change):
        try:
            setattr(panel, trait, kind(change.new))
        except traitlets.TraitError:
            follow()
            limits = panel.traits()[trait]
            allowed = f"from {limits.min:g} to {limits.max:g}"
            panel.tell(f"{control.description} must be {allowed}, so {change.new:g} was not taken.")

    def follow(change=None):
        if getattr(panel, trait) is not None:
            control.value = getattr(panel, trait)

    follow()
    control.observe(move, names="value")
    panel.observe(follow, names=trait)
    return control
