"""A recall quiz: a few questions, each answered in words as soon as the learner chooses."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import ipywidgets as widgets

from lora_helpers.course.exercise import items


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        right: the right choice.
        replies: the reply to each choice, in the order in which the choices are shown.

    Raises:
        TypeError: `replies` is not a dict. ValueError: `right` is not one of the choices.
    """

    ask: str
    right: str
    replies: dict[str, str]

    def __post_init__(self):
        if not isinstance(self.replies, dict):
            raise TypeError(f"replies is {self.replies!r}; it must be a dict from each choice to its reply.")
        if self.right not in self.replies:
            raise ValueError(f"The right choice {self.right!r} is not among {list(self.replies)}.")


class Quiz(widgets.VBox):
    """The questions, one below the other, and how many were right at the first try.

    Attributes:
        questions: as given. radios: the widget of each. answers: the reply shown below each, as text.

    Raises:
        TypeError: `questions` is not a list of questions.
    """

    def __init__(self, questions: Sequence[Question]):
        is_list = isinstance(questions, (list, tuple)) and len(questions) > 0
        if not is_list or not all(isinstance(question, Question) for question in questions):
            raise TypeError(f"questions is {questions!r}; it must be a list of questions.")
        self.questions, self.answers = questions, ["" for _ in questions]
        self.radios = [_radio(question) for question in questions]
        self._first_tries, self._replies = {}, [widgets.HTML() for _ in questions]
        self._total, parts = widgets.HTML(self._total_text()), []
        for place, (question, radio) in enumerate(zip(questions, self.radios)):
            radio.observe(lambda change, place=place: self._answer(place), names="value")
            heading = widgets.HTML(f"<b>{place + 1}.</b> {html.escape(question.ask)}")
            parts += [heading, radio, self._replies[place]]
        super().__init__([*parts, self._total])
        self.add_class("lora-quiz")

    @property
    def score(self) -> int:
        """How many questions were answered right at the first try."""
        return sum(self._first_tries.values())

    def _answer(self, place: int) -> None:
        question, choice = self.questions[place], self.radios[place].value
        if choice is None:
            return
        right = choice == question.right
        self._first_tries.setdefault(place, right)
        self.answers[place] = f"{'✔ Right.' if right else '✘ Not so.'} {question.replies[choice]}"
        self._replies[place].value = f"<output>{html.escape(self.answers[place])}</output>"
        self._total.value = self._total_text()

    def _total_text(self) -> str:
        return f"<output>Right at the first try: {self.score} of {len(self.questions)}.</output>"

    def __repr__(self) -> str:
        return f"Quiz: {len(self.questions)} questions; run this notebook to answer them"

    def _repr_mimebundle_(self, **kwargs):
        # Where widgets do not run, the notebook shows the questions, and each answer folded.
        items = "".join(map(_as_html, self.questions))
        return super()._repr_mimebundle_(**kwargs) | {"text/html": f"<ol>{items}</ol>"}


def _radio(question: Question) -> widgets.RadioButtons:
    layout = widgets.Layout(width="auto")
    return widgets.RadioButtons(
        options=list(question.replies), value=None, layout=layout, tooltip=question.ask
    )


def _as_html(question: Question) -> str:
    choices = "".join(f"<li>{html.escape(choice)}</li>" for choice in question.replies)
    answer = html.escape(f"{question.right}. {question.replies[question.right]}")
    folded = f"<details><summary>Answer</summary>{answer}</details>"
    return f"<li>{html.escape(question.ask)}<ul>{choices}</ul>{folded}</li>"


def read_quiz(text: str) -> Quiz:
    """A quiz from text, as in ex1_mlp.py.

    A blank line separates the questions. Below each are its choices: "✔ choice: reply" or "✘ choice: reply".
    """
    questions = []
    for block in text.split("\n\n"):
        ask, *choices = items(block)
        replies = dict(choice[2:].split(": ", 1) for choice in choices)
        (right,) = (choice[2:].split(": ", 1)[0] for choice in choices if choice.startswith("✔"))
        questions.append(Question(ask, right, replies))
    return Quiz(questions)
