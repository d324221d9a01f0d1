"""Predict, then reveal: a guess made before a result is seen, and both side by side afterwards.

Nothing waits for a guess: who skips it sees the result alone.
"""

import html
import math

import ipywidgets as widgets
import traitlets

GUESS_COLOR, TRUTH_COLOR = "#56B4E9", "#E69F00"  # Okabe and Ito; each bar has its name beside it
_ORDINALS = ("1st", "2nd", "3rd", "4th", "5th", "6th")


class Prediction(widgets.VBox):
    """A question with controls for a guess and a button that keeps it.

    Attributes:
        guess: what was guessed, or None. It stands still once the button is pressed.
        kept: whether the button was pressed.
    """

    guess = traitlets.Any(None, allow_none=True)
    kept = traitlets.Bool(False)

    def __init__(self, question: str, controls: list[widgets.Widget], box: widgets.Widget | None = None):
        self.question, self._controls = question, controls
        self.button = widgets.Button(description="Keep this guess", tooltip="Keep this guess, then run the next cell", layout=widgets.Layout(width="auto"))
        self._status = widgets.HTML()
        self.button.on_click(self._keep)
        for control in controls:
            control.observe(self._guessed, names="value")
        super().__init__([widgets.HTML(f"<b>Predict:</b> {html.escape(question)}"), *([box] if box else controls), widgets.HBox([self.button, self._status])])
        self.add_class("lora-prediction")

    def _read(self):
        """The guess that the controls stand for, or None while it is not whole."""
        raise NotImplementedError

    def _guessed(self, change=None) -> None:
        if not self.kept:
            self.guess = self._read()
            self._say("" if self.guess is None else f"Your guess: {self._words(self.guess)}.")

    def _keep(self, button=None) -> None:
        self.guess = self._read()
        if self.guess is None:
            self._say("Choose first; or skip this and run the next cell.")
            return
        self.kept = True
        for control in (*self._controls, self.button):
            control.disabled = True
        self._say(f"Kept: {self._words(self.guess)}. Now run the next cell.")

    def _say(self, words: str) -> None:
        self._status.value = f"<output>{html.escape(words)}</output>"

    def _words(self, value) -> str:
        return str(value)

    def _verdict(self, truth) -> str:
        return "You had it." if self.guess == truth else "A surprise: what made you think otherwise?"

    def reveal(self, truth, note: str = "") -> "Revealed":
        """The guess and the truth, side by side.

        Args:
            truth: of the kind guessed.
            note: a sentence to stand below.
        """
        guess = None if self.guess is None else self._words(self.guess)
        verdict = "" if self.guess is None else self._verdict(truth)
        return Revealed(guess, self._words(truth), " ".join(filter(None, (verdict, note))), self._shares(truth))

    def _shares(self, truth) -> tuple[float, float] | None:
        """How long to draw the two bars, 0 to 1; None for no bars."""
        return None

    def _choices(self) -> str:
        return ""

    def __repr__(self) -> str:
        return f"Predict: {self.question}"

    def _repr_mimebundle_(self, **kwargs):
        # Where widgets do not run, the question stands in their place.
        data = super()._repr_mimebundle_(**kwargs)
        data["text/html"] = f"<p><b>Predict:</b> {html.escape(self.question)}</p>{self._choices()}"
        return data


class PredictNumber(Prediction):
    """A guess on a slider, or typed into the field beside it.

    Args:
        low, high, step: whole numbers, or floats where one of them is a float.
        unit: written after the number.
    """

    def __init__(self, question: str, low: float, high: float, *, step: float = 1, unit: str = ""):
        self._range, self._unit = (low, high), unit
        whole = all(isinstance(value, int) for value in (low, high, step))
        settings = {"min": low, "max": high, "step": step, "value": low}
        slider = (widgets.IntSlider if whole else widgets.FloatSlider)(**settings, readout=False, tooltip=question)
        self.field = (widgets.BoundedIntText if whole else widgets.BoundedFloatText)(
            **settings, description="my guess", tooltip=question, layout=widgets.Layout(width="170px")
        )
        traitlets.link((self.field, "value"), (slider, "value"))
        self.slider = slider
        self._touched = False  # the number that the field starts with is nobody's guess
        super().__init__(question, [self.field, slider], widgets.HBox([self.field, slider]))

    def _guessed(self, change=None) -> None:
        self._touched = True
        super()._guessed()

    def _read(self):
        return self.field.value if self._touched else None

    def _keep(self, button=None) -> None:
        self._touched = True  # who keeps the lowest number has guessed it
        super()._keep(button)

    def _words(self, value) -> str:
        return f"{round(value, 3):,}{self._unit}"

    def _verdict(self, truth) -> str:
        difference = self.guess - truth
        if abs(difference) <= 0.05 * (self._range[1] - self._range[0]):
            return "Close."
        return f"Too {'high' if difference > 0 else 'low'} by {self._words(abs(difference))}."

    def _shares(self, truth) -> tuple[float, float] | None:
        if self.guess is None:
            return None
        top = max(abs(self.guess), abs(truth), 1e-12)
        return abs(self.guess) / top, abs(truth) / top

    def _choices(self) -> str:
        return f"<p>A number from {self._words(self._range[0])} to {self._words(self._range[1])}.</p>"


class PredictChoice(Prediction):
    """A guess among a few choices."""

    def __init__(self, question: str, options: list[str]):
        self._options = _listed("options", options)
        self.radio = widgets.RadioButtons(options=options, value=None, layout=widgets.Layout(width="auto"), tooltip=question)
        super().__init__(question, [self.radio])

    def _read(self):
        return self.radio.value

    def _choices(self) -> str:
        return f"<ul>{''.join(f'<li>{html.escape(option)}</li>' for option in self._options)}</ul>"


class PredictRanking(Prediction):
    """A guess of an order: one column of choices for each place.

    Raises:
        TypeError: `items` is no list. ValueError: it holds more than there are places.
    """

    def __init__(self, question: str, items: list[str]):
        self._items = [str(item) for item in _listed("items", items)]
        if len(self._items) > len(_ORDINALS):
            raise ValueError(f"items holds {len(self._items)}; a ranking has at most {len(_ORDINALS)} places.")
        # Not menus: JupyterLab keeps their arrow keys to itself.
        self.places = [
            widgets.RadioButtons(options=self._items, value=None, tooltip=f"{question} {place}", layout=widgets.Layout(width="auto"))
            for place, _ in zip(_ORDINALS, self._items)
        ]
        apart = widgets.Layout(margin="0 1.5em 0 0")
        columns = [widgets.VBox([widgets.Label(place), choice], layout=apart) for place, choice in zip(_ORDINALS, self.places)]
        super().__init__(question, self.places, widgets.HBox(columns))

    def _read(self):
        order = tuple(place.value for place in self.places)
        return order if None not in order and len(set(order)) == len(order) else None

    def _guessed(self, change=None) -> None:
        super()._guessed()
        chosen = [place.value for place in self.places if place.value is not None]
        twice = sorted({item for item in chosen if chosen.count(item) > 1})
        if twice:
            self._say(f"{twice[0]} has two places.")

    def reveal(self, truth, note: str = "") -> "Revealed":
        return super().reveal(tuple(str(item) for item in truth), note)

    def _words(self, value) -> str:
        return " > ".join(value)

    def _verdict(self, truth) -> str:
        right = sum(a == b for a, b in zip(self.guess, truth))
        return "The same order." if right == len(truth) else f"{right} of {len(truth)} in their place."

    def _choices(self) -> str:
        return f"<p>Put in order: {html.escape(', '.join(self._items))}.</p>"


def _listed(name: str, choices: list[str]) -> list[str]:
    if not isinstance(choices, (list, tuple)) or not choices:
        raise TypeError(f"{name} is {choices!r}; it must be a list of at least one choice, such as ['yes', 'no'].")
    return list(choices)


class Revealed:
    """A guess beside the truth, with a sentence: a small table in a notebook, one line elsewhere."""

    def __init__(self, guess: str | None, truth: str, words: str, shares: tuple[float, float] | None = None):
        self._rows = [("measured", truth, TRUTH_COLOR)]
        if guess is not None:
            self._rows.insert(0, ("your guess", guess, GUESS_COLOR))
        self._words, self._shares = words, shares

    def __repr__(self) -> str:
        line = " · ".join(f"{name}: {value}" for name, value, _ in self._rows)
        return f"{line}. {self._words}".strip()

    def _repr_html_(self) -> str:
        rows = ""
        for place, (name, value, color) in enumerate(self._rows):
            bar = ""
            if self._shares and math.isfinite(self._shares[place]):
                bar = f'<td style="width: 16em"><div style="background: {color}; height: 1em; width: {self._shares[place]:.0%}"></div></td>'
            rows += f'<tr><th scope="row" style="text-align: left">{name}</th><td style="text-align: left">{html.escape(value)}</td>{bar}</tr>'
        return f"<table>{rows}</table><p>{html.escape(self._words)}</p>"
