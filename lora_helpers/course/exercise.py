"""Exercises that check themselves and answer in words.

An exercise is data (hints, a solution, replies to misconceptions) and a judge, which is a function. The judge
takes the learner's answer. If the answer is right, it returns a sentence. If not, it raises `Wrong`.
"""

import ast
import inspect
import re
import textwrap
import traceback
from collections.abc import Callable
from functools import update_wrapper

import torch

RIGHT, WRONG, NOT_ATTEMPTED, UNCHECKABLE = "right", "wrong", "not attempted", "cannot be checked"
_OPENING = {
    RIGHT: "✔ **Right.**",
    WRONG: "✘ **Not yet right.**",
    NOT_ATTEMPTED: "… **Not attempted yet.**",
    UNCHECKABLE: "⚠ **Cannot be checked.**",
}


class Reply:
    """A text in Markdown for a notebook to show; without the stars where Markdown is not shown."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text.replace("**", "")

    def _repr_markdown_(self) -> str:
        return self.text


class Verdict(Reply):
    """What a check found.

    Attributes:
        state: "right", "wrong", "not attempted" or "cannot be checked".
        words: why, and what to look at.
        misconception: the short name of the mistake that the answer looks like, or None.
    """

    def __init__(self, state: str, words: str, misconception: str | None = None):
        named = f" It looks like: **{misconception}**." if misconception else ""
        super().__init__(f"{_OPENING[state]}{named} {words}")
        self.state, self.words, self.misconception = state, words, misconception


class Wrong(Exception):
    """A judge raises this when the answer is wrong.

    Args:
        misconception: its name among the exercise's `replies`, or None if the mistake is not a known one.
        words: what to say before the reply.
    """

    def __init__(self, misconception: str | None, words: str = ""):
        super().__init__(misconception, words)
        self.misconception, self.words = misconception, words


class Uncheckable(Exception):
    """A judge raises this when the answer is not of the kind that is needed; the text says what is needed."""


class _Blank(Exception):
    pass


class Exercise:
    """One exercise: `check(answer)`, `hint()` (one step further at each call), `solution()`.

    Attributes:
        replies: the reply to each misconception, by its name.
        solution_code: one solution, as Python code.
    """

    def __init__(self, judge: Callable, hints: list[str], solution: str, reason: str, replies: dict):
        update_wrapper(self, judge)
        self._judge, self._hints, self._hints_shown, self._reason = judge, hints, 0, reason
        self.solution_code, self.replies = textwrap.dedent(solution).strip(), replies

    def check(self, *answers) -> Verdict:
        """Judges the answer in words. Whatever the answer does, only an interrupt raises here."""
        try:
            if _is_blank(answers):
                raise _Blank
            wanted = len(inspect.signature(self._judge).parameters)
            if len(answers) != wanted:
                raise Uncheckable(f"Give `check` {wanted} answer{'s' * (wanted > 1)}, not {len(answers)}.")
            # The learner's next cells draw the same random numbers whether or not they checked an answer.
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(0)
                return Verdict(RIGHT, self._judge(*answers))
        except _Blank:
            advice = "put your answer in its place (or delete its line, in a repair), and run the cell again."
            return Verdict(NOT_ATTEMPTED, f"There is still a `...`: {advice}")
        except Wrong as wrong:
            words = f"{wrong.words} {self.replies.get(wrong.misconception, '')}".strip()
            return Verdict(WRONG, words, wrong.misconception)
        except Uncheckable as error:
            return Verdict(UNCHECKABLE, str(error))
        except (Exception, SystemExit) as error:
            stopped = f"The check itself stopped on this answer, with {_name(error)}."
            return Verdict(UNCHECKABLE, f"{stopped} Is it of the kind that the exercise asks for?")

    def hint(self) -> Reply:
        """The next hint. After the last one, the last again."""
        self._hints_shown = min(self._hints_shown + 1, len(self._hints))
        last = self._hints_shown == len(self._hints)
        more = "Call `solution()` to see a solution." if last else "Call `hint()` again for more."
        text = self._hints[self._hints_shown - 1]
        return Reply(f"**Hint {self._hints_shown} of {len(self._hints)}.** {text} {more}")

    def solution(self) -> Reply:
        """One solution, with its reason."""
        return Reply(f"**One solution.** {self._reason}\n\n```python\n{self.solution_code}\n```")

    def __repr__(self) -> str:
        return f"Exercise {self.__name__}: {self.__doc__} Call .check(answer), .hint() or .solution()."


def exercise(*, hints: str, solution: str, reason: str, replies: str) -> Callable[[Callable], Exercise]:
    """A decorator that makes an `Exercise` of a judge: a function from answers to a sentence of praise.

    Args:
        hints: one a line. replies: one a line, "misconception: reply". See `items`.
    """
    named = dict(item.split(": ", 1) for item in items(replies))
    return lambda judge: Exercise(judge, items(hints), solution, reason, named)


def items(text: str) -> list[str]:
    """The lines of a text block; a line that is indented further continues the line before."""
    return re.sub(r"\n +", " ", textwrap.dedent(text).strip()).splitlines()


def call(function, *arguments, errors: dict[str, str] | None = None):
    """What the learner's function returns.

    Args:
        errors: a misconception for each piece of text that shows it in what Python says when the code stops.

    Raises:
        Wrong: the code stopped with one of these errors.
        Uncheckable: `function` is not a function, stopped with another error, or returned nothing.
    """
    result = run(function, *arguments, errors=errors)
    if result is None:
        advice = "Does every branch end with `return`? (`print` only shows a value.)"
        raise Uncheckable(f"Your function returned `None`. {advice}")
    return result


def run(function, *arguments, errors: dict[str, str] | None = None):
    """As `call`, for a function that need not return anything."""
    if not callable(function):
        given = f"The exercise asks for a function. This is {kind_of(function)}."
        raise Uncheckable(f"{given} Give the function's name, without calling it.")
    try:
        result = function(*arguments)
    except (Wrong, Uncheckable, _Blank):
        raise
    except RecursionError:
        raise Uncheckable("Your function calls itself without end. What should stop it?") from None
    except (Exception, SystemExit) as error:
        for piece, misconception in (errors or {}).items():
            if piece in f"{type(error).__name__}: {error}":
                raise Wrong(misconception) from None
        raise Uncheckable(f"Your code stopped with {_name(error)}{_where(error)}. {_advice(error)}") from None
    if _is_blank(result):
        raise _Blank
    return result


def mentions(function, *names: str) -> bool:
    """Whether the code of a learner's function uses one of `names`. False where its code cannot be seen."""
    code = getattr(function, "__code__", None)
    return code is not None and not set(names).isdisjoint(code.co_names)


def same(given, truth) -> bool:
    """Whether two numbers, lists or tensors have the same shape and, apart from rounding, the same values."""
    given, truth = numbers(given), numbers(truth)
    return given.shape == truth.shape and torch.allclose(given, truth, rtol=1e-4, atol=1e-6)


def compare(given, truth, mistakes: dict[str, object], words: str) -> None:
    """Passes if `given` is `truth`. If not, raises `Wrong`.

    Args:
        mistakes: the value that each misconception leads to, by its name among the exercise's `replies`.
        words: what to say if `given` has none of these values.
    """
    if same(given, truth):
        return
    for misconception, value in mistakes.items():
        if same(given, value):
            raise Wrong(misconception)
    if any(same(given, numbers(truth).round(decimals=places)) for places in (2, 3)):
        raise Wrong("rounded", "The value is right but rounded. Round only what you print.")
    flat, wanted = numbers(given).flatten(), numbers(truth).flatten()
    if same(flat, wanted):
        right = tuple(numbers(truth).shape)
        needed = f"the shape {right}" if right else "one number, without brackets"
        shape = tuple(numbers(given).shape)
        raise Wrong(None, f"The numbers are right, but they have the shape {shape}. Return {needed}.")
    if len(wanted) == 1 and len(flat) > 1:
        if same(flat.sum(), wanted[0]):
            raise Wrong(None, "The parts are right. Now add them up: the exercise asks for one number.")
        if isinstance(given, tuple) and all(isinstance(part, int) and part < 1000 for part in given[1:]):
            advice = f"In Python a comma makes two numbers, here {given}. Write 6794 or 6_794 for 6,794."
            raise Wrong("a comma within a number", advice)
    raise Wrong(None, f"{words} Your answer gave {_short(given)}.")


def numbers(value) -> torch.Tensor:
    """The value as a float64 tensor.

    Raises:
        Uncheckable: it holds something that is not a number.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", torch.float64)
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return torch.as_tensor(_without_tensors(value), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        quoted = isinstance(value, str) and value.strip().replace(".", "", 1).isdigit()
        advice = " Remove the quotes to make it a number." if quoted else ""
        found = f"This is {kind_of(value)}: {_short(value)}."
        raise Uncheckable(f"The exercise asks for numbers. {found}{advice}") from None


def need_tensor(value, what: str) -> torch.Tensor:
    """The value, if it is a tensor.

    Raises:
        Uncheckable: it is not.
    """
    if not isinstance(value, torch.Tensor):
        raise Uncheckable(f"{what} should be a tensor. This is {kind_of(value)}.")
    return value


def kind_of(value) -> str:
    """What kind of thing a value is, in a learner's words."""
    name = type(value).__name__
    plain = {"NoneType": "`None`", "str": "text (str)", "int": "a number (int)", "float": "a number (float)"}
    plain |= {"bool": "True or False (bool)", "dict": "a dictionary"}
    return plain.get(name, f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}")


_MODULES = ("math", "np", "numpy", "copy", "F", "torch", "nn", "parametrize")
_COMPUTED = "A parametrized weight is computed and cannot be assigned. Remove the parametrization first."
# What a learner should look at, for a piece of what Python or PyTorch says.
_LOOK = {
    "Boolean value of Tensor": "`not`, `and`, `or` need one True or False. For each entry use `~`, `&`, `|`.",
    "could not infer output dtype": "A mean needs floating-point numbers: put `.float()` before it.",
    "must match the size": "`*`, `+`, `==` work entry by entry. For matrices use `@`. Print both shapes.",
    "shapes cannot be multiplied": "In `A @ B`, A has as many columns as B has rows. Print both shapes.",
    "not callable": "Is a `*` missing before the bracket, or did you mean `[…]`?",
    "must be tuple of Tensors": "`torch.cat` takes the tensors in one list: `torch.cat([a, b], dim=…)`.",
    "method' object": "Are the brackets of a call missing, as in `net.modules()` and `p.detach()`?",
    "in-place operation": "Change a parameter inside `with torch.no_grad():`, or make a new tensor with `+`.",
    "weight' already exists": _COMPUTED,
    "right_inverse": _COMPUTED,
    "as parameter": "Assign another `nn.Parameter`, or change the numbers inside `with torch.no_grad():`.",
    "context manager protocol": "Are the brackets of a call missing, as in `with torch.no_grad():`?",
    "to unpack": "Do you unpack more names than each item holds? Print one item.",
}


def _advice(error: BaseException) -> str:
    if isinstance(error, NameError):
        return _advice_about_name(error)
    if isinstance(error, KeyError) and "exists" not in str(error):
        return "This key is not in the dictionary: print its keys."
    if isinstance(error, AttributeError) and "method'" not in str(error):
        return "Is the name after the dot spelled right? Print the `type` of what stands before the dot."
    if isinstance(error, TypeError) and not _where(error):  # Python did not enter the function
        return "The check calls your function with all its arguments: leave the line `def …` as it was."
    found = [words for piece, words in _LOOK.items() if piece in str(error)]
    return found[0] if found else "Run it by hand on a small example."


def _advice_about_name(error: NameError) -> str:
    if error.name in _MODULES:
        return f"`{error.name}` must be imported first, in a cell above."
    code = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    if "self" in code.co_varnames[: code.co_argcount]:
        return f"Does it belong to the object? Then write `self.{error.name}`."
    return (
        "Spell the name as in the line `def …`, or as in the cell above that made it. (A name that a `for` "
        "inside brackets makes exists only inside them.)"
    )


def _without_tensors(value):
    if isinstance(value, (list, tuple)):
        return [_without_tensors(part) for part in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _is_blank(answer) -> bool:
    if isinstance(answer, (list, tuple)):
        return any(_is_blank(part) for part in answer)
    if isinstance(answer, dict):
        return any(_is_blank(part) for part in answer.values())
    return answer is ... or _has_blank_in_source(answer)


def _has_blank_in_source(function) -> bool:
    if not inspect.isfunction(function):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # typed at a prompt, or part of a longer line
        return False
    # The dots of an index such as x[..., 0] are not a blank.
    indexes = [n.slice for n in ast.walk(tree) if isinstance(n, ast.Subscript)]
    in_index = {id(n) for index in indexes for n in ast.walk(index)}
    constants = [n for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    return any(n.value is ... and id(n) not in in_index for n in constants)


def _name(error: BaseException) -> str:
    first_line = str(error).strip().splitlines()
    return f"`{type(error).__name__}`" + (f": {first_line[0][:200]}" if first_line else "")


def _where(error: BaseException) -> str:
    frame = error.__traceback__.tb_next if error.__traceback__ else None  # the first frame is `run` itself
    return f" (line {frame.tb_lineno} of its cell)" if frame else ""


def _short(value) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "…"
