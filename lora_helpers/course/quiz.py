"""A recall quiz: a few questions, each answered in words as soon as a choice is made."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import ipywidgets as widgets


@dataclass(frozen=True)
class Question:
    """One question: `replies` gives each choice, in the order shown, its reply; `right` is the choice that is right."""

    ask: str
    right: str
    replies: dict[str, str]

    def __post_init__(self):
        if not isinstance(self.replies, dict):
            raise TypeError(f"replies is {self.replies!r}; it must be a dict that gives each choice its reply.")
        if self.right not in self.replies:
            raise ValueError(f"The right choice {self.right!r} is not among {list(self.replies)}.")


class Quiz(widgets.VBox):
    """The questions below each other, and how many were right at the first try.

    Attributes:
        radios: the choices of each question; `answers`: the reply shown below each, as text.

    Raises:
        TypeError: `questions` is no list of questions.
    """

    def __init__(self, questions: Sequence[Question]):
        if not isinstance(questions, (list, tuple)) or not questions or not all(isinstance(question, Question) for question in questions):
            raise TypeError(f"questions is {questions!r}; it must be a list of at least one Question(ask, right, replies).")
        self._questions, self._first = questions, {}
        self.radios, self.answers, parts = [], ["" for _ in questions], []
        self._replies = [widgets.HTML() for _ in questions]
        self._total = widgets.HTML(self._score())
        for place, question in enumerate(questions):
            radio = widgets.RadioButtons(options=list(question.replies), value=None, layout=widgets.Layout(width="auto"), tooltip=question.ask)
            radio.observe(lambda change, place=place: self._answer(place, change["new"]), names="value")
            self.radios.append(radio)
            parts += [widgets.HTML(f"<b>{place + 1}.</b> {html.escape(question.ask)}"), radio, self._replies[place]]
        super().__init__([*parts, self._total])
        self.add_class("lora-quiz")

    @property
    def score(self) -> int:
        """How many questions were answered rightly at the first try."""
        return sum(self._first.values())

    def _answer(self, place: int, choice: str | None) -> None:
        if choice is None:
            return
        question = self._questions[place]
        right = choice == question.right
        self._first.setdefault(place, right)
        self.answers[place] = f"{'✔ Right.' if right else '✘ Not so.'} {question.replies[choice]}"
        self._replies[place].value = f"<output>{html.escape(self.answers[place])}</output>"
        self._total.value = self._score()

    def _score(self) -> str:
        return f"<output>Right at the first try: {self.score} of {len(self._questions)}.</output>"

    def __repr__(self) -> str:
        return f"Quiz: {len(self._questions)} questions; run this notebook to answer them"

    def _repr_mimebundle_(self, **kwargs):
        # Where widgets do not run, the questions stand in their place, each answer folded away.
        data = super()._repr_mimebundle_(**kwargs)
        parts = []
        for question in self._questions:
            choices = "".join(f"<li>{html.escape(choice)}</li>" for choice in question.replies)
            answer = html.escape(f"{question.right}. {question.replies[question.right]}")
            parts.append(f"<li>{html.escape(question.ask)}<ul>{choices}</ul><details><summary>Answer</summary>{answer}</details></li>")
        data["text/html"] = f"<ol>{''.join(parts)}</ol>"
        return data
