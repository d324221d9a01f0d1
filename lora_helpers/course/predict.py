"""Predict, then reveal: the learner guesses before seeing a result, and then sees both side by side.

Nothing waits for a guess. Without one, the answer is folded until the learner opens it.
"""

import html
import math

import ipywidgets as widgets
import traitlets

GUESS_COLOR, TRUTH_COLOR = "#56B4E9", "#E69F00"  # Okabe and Ito; each bar also has its name beside it
_ORDINALS = ("1st", "2nd", "3rd", "4th", "5th", "6th")


class Prediction(widgets.VBox):
    """A question with controls for a guess and a button that keeps it.

    Attributes:
        guess: what was guessed, or None. It does not change any more once it is kept.
        kept: whether the button was pressed.
    """

    guess = traitlets.Any(None, allow_none=True)
    kept = traitlets.Bool(False)

    def __init__(self, question: str, controls: list[widgets.Widget], box: widgets.Widget):
        self.question, self._controls = question, controls
        self.button = widgets.Button(
            description="Keep this guess",
            tooltip="Keep this guess; the answer comes in a cell below",
            layout=widgets.Layout(width="auto"),
        )
        self._status = widgets.HTML()
        self.button.on_click(self._keep)
        for control in controls:
            control.observe(self._guessed, names="value")
        title = widgets.HTML(f"<b>Predict:</b> {html.escape(question)}")
        super().__init__([title, box, widgets.HBox([self.button, self._status])])
        self.add_class("lora-prediction")

    def _read(self):
        """The guess that the controls show, or None if it is not complete."""
        raise NotImplementedError

    def _missing(self) -> str:
        return "Choose first, or skip this and run the next cell."

    def _guessed(self, change=None) -> None:
        if not self.kept:
            self.guess = self._read()
            self._say(self._missing() if self.guess is None else f"Your guess: {self._format(self.guess)}.")

    def _keep(self, button=None) -> None:
        self.guess = self._read()
        if self.guess is None:
            self._say(self._missing())
            return
        self.kept = True
        for control in (*self._controls, self.button):
            control.disabled = True
        self._say(f"Kept: {self._format(self.guess)}. The answer comes in a cell below.")

    def _say(self, text: str) -> None:
        self._status.value = f"<output>{html.escape(text)}</output>"

    def _format(self, value) -> str:
        return str(value)

    def _verdict(self, truth) -> str:
        return "You had it." if self.guess == truth else "A surprise: what made you expect something else?"

    def _bars(self, truth) -> list[float] | None:
        """The lengths of two bars for guess and truth, 0 to 1; None for no bars."""
        return None

    def reveal(self, truth, note: str = "") -> "Revealed":
        """The guess and the truth, side by side. Without a guess: the truth, folded.

        Args:
            truth: a value like the guess.
            note: a sentence below it.
        """
        if self.guess is None:
            return Revealed([("measured", self._format(truth), TRUTH_COLOR)], note, None)
        rows = [
            ("your guess", self._format(self.guess), GUESS_COLOR),
            ("measured", self._format(truth), TRUTH_COLOR),
        ]
        return Revealed(rows, f"{self._verdict(truth)} {note}".strip(), self._bars(truth))

    def _choices(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"Predict: {self.question}"

    def _repr_mimebundle_(self, **kwargs):
        # Where widgets do not run, the notebook shows the question.
        text = f"<p><b>Predict:</b> {html.escape(self.question)}</p>{self._choices()}"
        return super()._repr_mimebundle_(**kwargs) | {"text/html": text}


class PredictNumber(Prediction):
    """A guess on a slider, or typed into the field beside it.

    Args:
        low, high, step: whole numbers, or floats if one of them is a float.
        unit: written after the number.
    """

    def __init__(self, question: str, low: float, high: float, *, step: float = 1, unit: str = ""):
        self._range, self._unit = (low, high), unit
        whole = all(isinstance(value, int) for value in (low, high, step))
        slider = widgets.IntSlider if whole else widgets.FloatSlider
        field = widgets.BoundedIntText if whole else widgets.BoundedFloatText
        settings = {"min": low, "max": high, "step": step, "value": low, "tooltip": question}
        self.slider = slider(**settings, readout=False)
        self.field = field(**settings, description="my guess", layout=widgets.Layout(width="170px"))
        traitlets.link((self.field, "value"), (self.slider, "value"))
        self._touched = False  # the number that the field starts with is not a guess
        super().__init__(question, [self.field, self.slider], widgets.HBox([self.field, self.slider]))

    def _guessed(self, change=None) -> None:
        self._touched = True
        super()._guessed()

    def _keep(self, button=None) -> None:
        self._touched = True  # a learner may mean the number that the field starts with
        super()._keep()

    def _read(self):
        return self.field.value if self._touched else None

    def _format(self, value) -> str:
        return f"{round(value, 3):,}{self._unit}"

    def _verdict(self, truth) -> str:
        difference = self.guess - truth
        if abs(difference) <= 0.05 * (self._range[1] - self._range[0]):
            return "Close."
        return f"Too {'high' if difference > 0 else 'low'} by {self._format(abs(difference))}."

    def _bars(self, truth) -> list[float] | None:
        top = max(abs(self.guess), abs(truth), 1e-12)
        return [abs(self.guess) / top, abs(truth) / top] if math.isfinite(truth) else None

    def _choices(self) -> str:
        return f"<p>A number from {self._format(self._range[0])} to {self._format(self._range[1])}.</p>"


class PredictChoice(Prediction):
    """A guess among a few choices.

    Raises:
        TypeError: `options` is not a list of at least one choice.
    """

    def __init__(self, question: str, options: list[str]):
        self._options = _checked_list("options", options)
        self.radio = _radio(self._options, question)
        super().__init__(question, [self.radio], self.radio)

    def _read(self):
        return self.radio.value

    def _choices(self) -> str:
        return f"<ul>{''.join(f'<li>{html.escape(option)}</li>' for option in self._options)}</ul>"


class PredictRanking(Prediction):
    """A guess of an order: one column of choices for each place.

    Raises:
        TypeError: `items` is not a list of at least one item. ValueError: it has more than six.
    """

    def __init__(self, question: str, items: list[str]):
        self._items = _checked_list("items", items)
        if len(self._items) > len(_ORDINALS):
            raise ValueError(f"items has {len(self._items)}; a ranking has at most {len(_ORDINALS)} places.")
        # Not drop-down menus: JupyterLab does not pass them the arrow keys.
        self._ordinals = _ORDINALS[: len(self._items)]
        self.places = [_radio(self._items, f"{question} {ordinal}") for ordinal in self._ordinals]
        columns = [
            widgets.VBox([widgets.Label(ordinal), radio], layout=widgets.Layout(margin="0 1.5em 0 0"))
            for ordinal, radio in zip(self._ordinals, self.places)
        ]
        super().__init__(question, self.places, widgets.HBox(columns))

    def _read(self):
        order = tuple(place.value for place in self.places)
        return order if None not in order and len(set(order)) == len(order) else None

    def _missing(self) -> str:
        for item in self._items:
            chosen = [ordinal for ordinal, place in zip(self._ordinals, self.places) if place.value == item]
            if len(chosen) > 1:
                return f"You chose {item} for the places {' and '.join(chosen)}. Choose it only once."
        return (
            super()._missing() if all(place.value is None for place in self.places) else "Fill every place."
        )

    def reveal(self, truth, note: str = "") -> "Revealed":
        return super().reveal(tuple(str(item) for item in truth), note)

    def _format(self, value) -> str:
        return " > ".join(value)

    def _verdict(self, truth) -> str:
        right = sum(guessed == true for guessed, true in zip(self.guess, truth))
        return "The same order." if right == len(truth) else f"{right} of {len(truth)} in the right place."

    def _choices(self) -> str:
        return f"<p>Put in order: {html.escape(', '.join(self._items))}.</p>"


def _radio(options: list[str], tooltip: str) -> widgets.RadioButtons:
    return widgets.RadioButtons(
        options=options, value=None, tooltip=tooltip, layout=widgets.Layout(width="auto")
    )


def _checked_list(name: str, choices: list[str]) -> list[str]:
    if not isinstance(choices, (list, tuple)) or not choices:
        raise TypeError(f"{name} is {choices!r}; it must be a list of choices, such as ['yes', 'no'].")
    return [str(choice) for choice in choices]


class Revealed:
    """Guess and truth: a small table in a notebook, one line as text. Without a guess the table is folded."""

    def __init__(self, rows: list[tuple[str, str, str]], note: str, bars: list[float] | None):
        self._rows, self._note, self._bars = rows, note, bars

    def __repr__(self) -> str:
        line = " · ".join(f"{name}: {value}" for name, value, _ in self._rows)
        return f"{line}. {self._note}".strip()

    def _repr_html_(self) -> str:
        rows = ""
        for place, (name, value, color) in enumerate(self._rows):
            bar = ""
            if self._bars:
                style = f"background: {color}; height: 1em; width: {self._bars[place]:.0%}"
                bar = f'<td style="width: 16em"><div style="{style}"></div></td>'
            heading = f'<th scope="row" style="text-align: left">{name}</th>'
            rows += f'<tr>{heading}<td style="text-align: left">{html.escape(value)}</td>{bar}</tr>'
        answer = f"<table>{rows}</table><p>{html.escape(self._note)}</p>"
        folded = f"<details><summary>Answer</summary>{answer}</details>"
        return folded if len(self._rows) == 1 else answer
