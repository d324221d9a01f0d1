"""What all panels share: controls, one picture, one line of text, a status line, and a stand-in where no widget runs."""

import base64
import html
import math
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import ipywidgets as widgets
import traitlets

from lora_helpers.plots import Picture

FIELD = {"layout": widgets.Layout(width="150px"), "style": {"description_width": "76px"}}

WRAP = widgets.Layout(flex_flow="row wrap")
TEXT_STYLE = "display: block; line-height: 1.4; min-height: 2.8em; font-size: 1.1em"  # room for two lines, so that nothing jumps


class Finite(traitlets.Float):
    """A float trait that refuses NaN too, which is neither below `min` nor above `max`, nor equal to itself."""

    def validate(self, obj, value):
        value = super().validate(obj, value)
        if math.isnan(value):
            raise traitlets.TraitError(f"{self.name} is {value}; it must be a number from {self.min:g} to {self.max:g}.")
        return value


class Panel(widgets.VBox):
    """A column of controls, summary, picture and status.

    A subclass fills `controls`, computes in `_refresh`, and gives `_draw`, which makes its picture from its state.

    Attributes:
        summary: one line that says what the picture shows; also the picture's text alternative.
        status: what went wrong at the last move, or a remark on it, or "".

    Raises:
        ValueError: the first picture could not be made.
    """

    summary = traitlets.Unicode()
    status = traitlets.Unicode()

    def __init__(self, controls: list[widgets.Widget], below: list[widgets.Widget] = (), beside: list[widgets.Widget] = ()):
        self._lock = RLock()  # JupyterLab may run callbacks on several threads at once
        self._shown = None
        self._held = False
        self._watched, self._settled = (), {}  # the traits that move the panel, and their values when it was last brought up to date
        self._text, self._image, self._trouble = widgets.HTML(), widgets.HTML(), widgets.HTML()
        middle = widgets.HBox([*beside, self._image], layout=WRAP) if beside else self._image
        super().__init__([*controls, self._text, middle, *below, self._trouble])
        self.add_class("lora-panel")

    def _state(self):
        """All that the picture depends on. Equal states are not drawn twice."""
        raise NotImplementedError

    def _refresh(self, state) -> None:
        """Computes what `state` asks for, then calls `_show`."""
        raise NotImplementedError

    def _draw(self) -> Picture:
        """The picture of the present state, made anew, with its summary written in it: for places that run no widgets."""
        raise NotImplementedError

    def _update(self, change=None) -> None:
        # Synchronous on purpose: the front end merges the moves made while this runs, so no work queues up. Where
        # moves come on several threads, each waits here, then finds the latest state already shown, or shows it.
        with self._lock:
            if self._held:
                return
            with self._trouble_shown():
                state = self._state()
                if state != self._shown:
                    try:
                        self._refresh(state)
                    except BaseException:  # an interrupt too
                        self._go_back(state)
                        raise
                    self._shown = state
                    self._settled = {name: getattr(self, name) for name in self._watched}

    def _follow(self, *traits: str) -> None:
        """Brings the panel up to date whenever one of `traits` moves, and now."""
        self._watched = traits
        self.observe(self._update, names=list(traits))
        self._update()
        if self.status:
            raise ValueError(self.status)

    @contextmanager
    def _together(self) -> Iterator[None]:
        # traitlets tells of held changes one by one: without this, the first would train with the others' controls unmoved.
        with self._lock:
            self._held = True
            try:
                with self.hold_trait_notifications():
                    yield
            finally:
                self._held = False

    def _go_back(self, failed) -> None:
        # The controls agree with the picture again, so that the same move can be made once more. A later move stands.
        if self._state() == failed:
            with self._together():
                for name, value in self._settled.items():
                    self.set_trait(name, value)

    @contextmanager
    def _trouble_shown(self) -> Iterator[None]:
        self._tell("")
        try:
            yield
        except Exception as error:
            self._tell(f"Not updated: {error} ({type(error).__name__}). Set another value, or run the cell again.")
        except KeyboardInterrupt:
            self._tell("Not updated: interrupted. Set the value again.")
            raise

    def _tell(self, status: str) -> None:
        self.status = status
        self._trouble.value = f'<div role="alert"><b>{html.escape(status)}</b></div>' if status else ""

    def _show(self, picture: Picture, summary: str) -> None:
        # The size is fixed beforehand and decoding does not wait, so that nothing jumps or flickers.
        data = base64.b64encode(picture.png()).decode()
        width, height = (round(side * picture.dpi) for side in picture.get_size_inches())
        self._image.value = (
            f'<img alt="{html.escape(summary)}" width="{width}" height="{height}" decoding="sync" src="data:image/png;base64,{data}" '
            'style="max-width: 100%; height: auto; border-radius: 4px; display: block">'
        )
        self._text.value = f'<output aria-live="polite" style="{TEXT_STYLE}">{html.escape(summary)}</output>'
        self.summary = summary

    def _repr_mimebundle_(self, **kwargs):
        data = super()._repr_mimebundle_(**kwargs)
        with self._lock:
            data["image/png"] = base64.b64encode(self._draw().png()).decode()
        return data, {"image/png": {"alt": self.summary}}

    def __repr__(self) -> str:
        return f"{type(self).__name__}: run this notebook to use its controls"


def tie(panel: Panel, trait: str, control: widgets.Widget) -> widgets.Widget:
    """Keeps `panel.trait` and `control.value` the same, and returns `control`.

    Unlike `traitlets.link`, it drops no move that comes on another thread while the panel is at work on the last one.
    """
    inward, outward = type(getattr(panel, trait)), type(control.value)
    control.observe(lambda change: panel.set_trait(trait, inward(change.new)), names="value")
    panel.observe(lambda change: setattr(control, "value", outward(change.new)), names=trait)
    return control


def paired(panel: Panel, trait: str, field: widgets.Widget, slider: widgets.Widget) -> widgets.HBox:
    """A labelled field and a slider for one trait of `panel`. A screen reader is told the label of the field."""
    return widgets.HBox([tie(panel, trait, field), tie(panel, trait, slider)])


def powers_of_two(low: int, high: int, value: float, tooltip: str) -> widgets.FloatLogSlider:
    """A slider from 2**low to 2**high; the number itself stands in the field beside it."""
    return widgets.FloatLogSlider(
        base=2, min=low, max=high, step=1, value=value, readout=False, continuous_update=False, tooltip=tooltip,
        layout=widgets.Layout(width="190px"),
    )  # fmt: skip


def stops(options, value, tooltip: str) -> widgets.SelectionSlider:
    """A slider that stops at `options`; the choice itself stands in the field beside it."""
    return widgets.SelectionSlider(
        options=options, value=value, readout=False, continuous_update=False, tooltip=tooltip, layout=widgets.Layout(width="190px")
    )
