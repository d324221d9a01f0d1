"""What all panels share: controls, one picture, one line of text, a status line, and a stand-in where no widget runs."""

import base64
import html
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any

import ipywidgets as widgets
import traitlets

from lora_helpers.plots import Picture
from lora_helpers.widgets.main_thread import on_main_thread

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


@dataclass(frozen=True, eq=False)
class Shown:
    """What a panel shows: the state it was made for, the picture as HTML, the summary, and the attributes that go with them."""

    state: tuple
    picture: str
    summary: str
    attributes: dict[str, Any]


class Panel(widgets.VBox):
    """A column of controls, summary, picture and status.

    A subclass fills `controls`, computes in `_refresh`, and gives `_draw`, which makes its picture from its state.

    A move is made in three steps, so that an interrupt (the stop button) leaves nothing half done: all is computed while the old
    stays in place; one assignment to `_shown` makes it valid; then `_show` puts it into place. After an interrupt before that
    assignment, the controls go back; after a later one, `_show` is run again. Either way controls, picture and attributes agree.

    Attributes:
        summary: one line that says what the picture shows; also the picture's text alternative.
        status: what went wrong at the last move, or a remark on it, or "".

    Raises:
        ValueError: the first picture could not be made.
    """

    summary = traitlets.Unicode()
    status = traitlets.Unicode()
    _watched: tuple[str, ...] = ()  # the traits that move the panel

    def __init__(self, controls: list[widgets.Widget], below: list[widgets.Widget] = (), beside: list[widgets.Widget] = ()):
        self._lock = RLock()  # JupyterLab may run callbacks on several threads at once
        self._shown: Shown | None = None
        self._in_place: Shown | None = None  # what `_show` has put into place, to the end
        self._held = False
        self._text, self._image = widgets.HTML(), widgets.HTML()
        self._trouble = widgets.HTML(layout=widgets.Layout(min_height="32px"))  # room for a line, so that nothing jumps
        middle = widgets.HBox([*beside, self._image], layout=WRAP) if beside else self._image
        super().__init__([*controls, self._text, middle, *below, self._trouble])
        self.add_class("lora-panel")

    def _state(self) -> tuple:
        """All that the picture depends on, the watched traits first. Equal states are not drawn twice."""
        return tuple(getattr(self, name) for name in self._watched)

    def _refresh(self, state: tuple) -> tuple[Picture, str, dict[str, Any]]:
        """Computes what `state` asks for: the picture, the summary, and the attributes to set with them. Sets none itself."""
        raise NotImplementedError

    def _draw(self) -> Picture:
        """The picture of the present state, made anew, with its summary written in it: for places that run no widgets."""
        raise NotImplementedError

    def __setattr__(self, name, value):
        if name not in self._watched:
            super().__setattr__(name, value)
            return
        try:
            same = getattr(self, name) == value
            super().__setattr__(name, value)
            if same:  # traitlets tells nobody, but what an interrupt left behind is made good
                self._update()
        except BaseException as error:  # an interrupt too, also one before `_update` has begun
            self._settle(error)
            raise

    def _together(self, values: dict[str, Any]) -> None:
        """Moves several controls at once, with at most one refresh."""
        with self._lock:
            try:
                self._held = True
                for name, value in values.items():
                    setattr(self, name, value)
                self._held = False
                self._update()
            except BaseException as error:
                self._held = False
                self._settle(error)
                raise

    def _update(self, change=None) -> None:
        # Synchronous on purpose: the front end merges the moves made while this runs, so no work queues up. Where
        # moves come on several threads, each waits here, then finds the latest state already shown, or shows it.
        with self._lock:
            if self._held:
                return
            self._tell("")
            state, tried = self._state(), None
            while state != tried:  # a move made meanwhile is shown too: its own thread may have been interrupted while it waited
                tried = state
                try:
                    if self._shown is None or state != self._shown.state:
                        picture, summary, attributes = self._refresh(state)
                        self._shown = Shown(state, _as_html(picture, summary), summary, attributes)
                    self._put_into_place()
                except BaseException as error:
                    self._settle(error, tried)
                    if not isinstance(error, Exception):
                        raise  # an interrupt ends the cell
                state = self._state()

    def _put_into_place(self) -> None:
        if self._in_place is not self._shown:
            self._show()
            self._in_place = self._shown

    def _show(self) -> None:
        """Puts all of `_shown` into place. Can be run again; its followers come last, for they may look at the rest, or move it."""
        self._image.value = self._shown.picture
        self._text.value = f'<output aria-live="polite" style="{TEXT_STYLE}">{html.escape(self._shown.summary)}</output>'
        self.summary = self._shown.summary
        for name in self._shown.attributes:
            setattr(self, name, self._shown.attributes[name])

    def _settle(self, error: BaseException, failed: tuple | None = None) -> None:
        """After an error or an interrupt: all agrees again, so that the same move can be made once more.

        Args:
            failed: the state that was at work; if the controls have left it since, that later move stands.
        """
        if not self._lock.acquire(blocking=False):
            return  # another thread is at work: it will show the last move too
        try:
            if self._held:
                return  # `_together` goes back as a whole
            state = self._state()
            if self._shown is None or (failed or state) != self._shown.state:
                self._tell(f"Not updated: {_reason(error)}")
                if self._shown and failed in (None, state):
                    self._go_back()
            elif failed and isinstance(error, Exception):
                self._tell_follower_failed(error)
            self._put_into_place()
        finally:
            self._lock.release()

    def _go_back(self) -> None:
        self._held = True
        try:
            for name, value in zip(self._watched, self._shown.state):
                self.set_trait(name, value)
        finally:
            self._held = False

    def _follow(self, *traits: str) -> None:
        """Brings the panel up to date whenever one of `traits` moves, and now."""
        self._watched = traits
        self.observe(self._update, names=list(traits))
        self._update()
        if self.status:
            raise ValueError(self.status)

    @contextmanager
    def _trouble_shown(self) -> Iterator[None]:
        self._tell("")
        try:
            yield
        except BaseException as error:
            self._tell(f"Not updated: {_reason(error)}")
            if not isinstance(error, Exception):
                raise

    def _tell(self, status: str) -> None:
        self.status = status
        self._trouble.value = f'<div role="alert"><b>{html.escape(status)}</b></div>' if status else ""

    def _tell_follower_failed(self, error: Exception) -> None:
        self._tell(f"Updated, but what follows failed: {error} ({type(error).__name__}).")

    def _repr_mimebundle_(self, **kwargs):
        data = super()._repr_mimebundle_(**kwargs)
        with self._lock:
            data["image/png"] = base64.b64encode(self._draw().png()).decode()
        return data, {"image/png": {"alt": self.summary}}

    def __repr__(self) -> str:
        return f"{type(self).__name__}: run this notebook to use its controls"


def _as_html(picture: Picture, summary: str) -> str:
    # The size is fixed beforehand and decoding does not wait, so that nothing jumps or flickers.
    data = base64.b64encode(picture.png()).decode()
    width, height = (round(side * picture.dpi) for side in picture.get_size_inches())
    return (
        f'<img alt="{html.escape(summary)}" width="{width}" height="{height}" decoding="sync" src="data:image/png;base64,{data}" '
        'style="max-width: 100%; height: auto; border-radius: 4px; display: block">'
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted. Set the value again."
    return f"{error} ({type(error).__name__}). Set another value, or run the cell again."


def tie(panel: Panel, trait: str, control: widgets.Widget) -> widgets.Widget:
    """Keeps `panel.trait` and `control.value` the same, and returns `control`.

    Unlike `traitlets.link`, it drops no move that comes on another thread while the panel is at work on the last one.
    """
    inward, outward = type(getattr(panel, trait)), type(control.value)

    @on_main_thread
    def move(change):
        try:
            value = inward(change.new)
            if value != getattr(panel, trait):  # if it is equal, it was the panel that moved the control
                setattr(panel, trait, value)
        except BaseException:
            control.value = outward(getattr(panel, trait))
            raise

    control.observe(move, names="value")
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
