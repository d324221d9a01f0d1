"""Exercises that check themselves and answer in words.

An exercise is one function, its judge: it takes the learner's answer, raises `Wrong` with the misconception that the
answer looks like, and returns a sentence when the answer is right. `@exercise` adds hints, a solution and the rest.
"""

import ast
import inspect
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper

import torch

RIGHT, WRONG, NOT_ATTEMPTED, UNCHECKABLE = "right", "wrong", "not attempted", "cannot be checked"
_OPENING = {
    RIGHT: "✔ **Right.**",
    WRONG: "✘ **Not yet right.**",
    NOT_ATTEMPTED: "… **Not attempted yet.**",
    UNCHECKABLE: "⚠ **Cannot be checked.**",
}


class Said:
    """Words in Markdown, shown by a notebook as the value of a cell; plain text without the stars elsewhere."""

    text: str

    def __repr__(self) -> str:
        return self.text.replace("**", "")

    def _repr_markdown_(self) -> str:
        return self.text


@dataclass(frozen=True, repr=False)
class Verdict(Said):
    """What a check found.

    Attributes:
        state: "right", "wrong", "not attempted" or "cannot be checked".
        words: why, and what to look at.
        misconception: the short name of the mistake that the answer looks like, or None.
    """

    state: str
    words: str
    misconception: str | None = None

    @property
    def text(self) -> str:
        named = f" It looks like: **{self.misconception}**." if self.misconception else ""
        return f"{_OPENING[self.state]}{named} {self.words}"


@dataclass(frozen=True, repr=False)
class Words(Said):
    """A hint or a solution."""

    text: str


class Wrong(Exception):
    """Raised by a judge. `misconception` is a short name, or None where the mistake is not a known one."""

    def __init__(self, misconception: str | None, words: str):
        super().__init__(words)
        self.misconception, self.words = misconception, words


class Uncheckable(Exception):
    """Raised by a judge when the answer is of a kind that cannot be judged; the text says what is needed."""


class LearnerError(Uncheckable):
    """The learner's own code stopped; `error` is what it raised."""

    def __init__(self, error: BaseException, words: str):
        super().__init__(words)
        self.error = error


class _Blank(Exception):
    pass


class Exercise:
    """One exercise: `check(answer)`, `hint()` (a step further at each call), `solution()`."""

    def __init__(self, judge: Callable[..., str], hints: tuple[str, ...], solution: str, reason: str):
        update_wrapper(self, judge)
        self._judge, self._hints, self._shown = judge, hints, 0
        self.solution_code, self._reason = textwrap.dedent(solution).strip(), reason

    def check(self, *answers) -> Verdict:
        """Judges the answer in words. Nothing that the answer does raises here, except an interrupt."""
        wanted = len(inspect.signature(self._judge).parameters)
        if any(_is_blank(answer) for answer in answers):
            return self._not_attempted()
        if len(answers) != wanted:
            return Verdict(UNCHECKABLE, f"`check` takes {wanted} answer{'s' * (wanted > 1)} here; {len(answers)} came.")
        try:
            # The learner's cells see the same random numbers whether or not they checked.
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(0)
                return Verdict(RIGHT, self._judge(*answers))
        except _Blank:
            return self._not_attempted()
        except Wrong as wrong:
            return Verdict(WRONG, wrong.words, wrong.misconception)
        except Uncheckable as error:
            return Verdict(UNCHECKABLE, str(error))
        except (Exception, SystemExit) as error:
            return Verdict(UNCHECKABLE, f"The check itself stopped on this answer, with {_name(error)}. Is it of the kind asked for?")

    def hint(self) -> Words:
        """The next hint; after the last one, the last again."""
        self._shown = min(self._shown + 1, len(self._hints))
        more = "Call `hint()` again for more." if self._shown < len(self._hints) else "That was the last; `solution()` shows one."
        return Words(f"**Hint {self._shown} of {len(self._hints)}.** {self._hints[self._shown - 1]} {more}")

    def solution(self) -> Words:
        """One solution, with its reason."""
        return Words(f"**One solution.** {self._reason}\n\n```python\n{self.solution_code}\n```")

    def _not_attempted(self) -> Verdict:
        return Verdict(NOT_ATTEMPTED, "There is still a `...`: put your answer in its place (or delete its line, in a repair), and run the cell again.")

    def __repr__(self) -> str:
        return f"Exercise {self.__name__}: {self.__doc__} Call .check(answer), .hint() or .solution()."


def exercise(*, hints: tuple[str, ...], solution: str, reason: str) -> Callable[[Callable[..., str]], Exercise]:
    """Makes an `Exercise` of a judge, a function from the learner's answers to a sentence of praise."""
    return lambda judge: Exercise(judge, hints, solution, reason)


def call(function, *arguments):
    """What the learner's function returns.

    Raises:
        Uncheckable: it is no function; it raised, called itself without end, or returned nothing.
    """
    result = run(function, *arguments)
    if result is None:
        raise Uncheckable("Your function returned `None`: it says nothing back. `print` only shows; does every way through it end in `return`?")
    return result


def run(function, *arguments):
    """As `call`, for a function that acts and need not return anything."""
    if not callable(function):
        raise Uncheckable(f"A function is asked for; this is {kind_of(function)}. Pass its name, without calling it.")
    try:
        result = function(*arguments)
    except (Wrong, Uncheckable, _Blank):
        raise
    except RecursionError as error:
        raise LearnerError(error, "Your function calls itself without end. What should stop it?") from None
    except (Exception, SystemExit) as error:
        raise LearnerError(error, f"Your code stopped with {_name(error)}{_where(error)}. {_advice(error)}") from None
    if _is_blank(result):
        raise _Blank
    return result


def mentions(function, *names: str) -> bool:
    """Whether the code of a learner's function uses one of `names`; True where its code cannot be seen."""
    code = getattr(function, "__code__", None)
    return code is None or not set(names).isdisjoint(code.co_names)


def same(given, truth) -> bool:
    """Whether two numbers, lists or tensors of numbers have one shape and the same values, rounding aside."""
    given, truth = numbers(given), numbers(truth)
    return given.shape == truth.shape and torch.allclose(given, truth, rtol=1e-4, atol=1e-6)


def compare(given, truth, misconceptions: dict[str, tuple[object, str]], otherwise: str) -> None:
    """Passes when `given` is `truth`; else raises `Wrong` for the misconception whose value it has, or with `otherwise`.

    Args:
        misconceptions: by name, the value that the mistake leads to, and the reply to it.
    """
    if same(given, truth):
        return
    for name, (value, words) in misconceptions.items():
        if same(given, value):
            raise Wrong(name, words)
    if any(same(given, numbers(truth).round(decimals=places)) for places in (2, 3)):
        raise Wrong("rounded", "Right but for the rounding: return the number itself, and round only what you print.")
    flat, wanted = numbers(given).flatten(), numbers(truth).flatten()
    if same(flat, wanted):
        raise Wrong(None, f"The right numbers, but in the shape {tuple(numbers(given).shape)}; asked is {_shape(truth)}.")
    if len(wanted) == 1 and len(flat) > 1 and same(flat.sum(), wanted[0]):
        raise Wrong(None, "Right in its parts: add them up, for one number is asked for.")
    if len(wanted) == 1 and isinstance(given, tuple) and all(isinstance(part, int) for part in given) and all(part < 1000 for part in given[1:]):
        raise Wrong("a comma within a number", f"In Python a comma makes two numbers, here {given}: write 6794 or 6_794 for 6,794.")
    raise Wrong(None, f"{otherwise} Yours gave {_short(given)}.")


def numbers(value) -> torch.Tensor:
    """The value as a float64 tensor.

    Raises:
        Uncheckable: it holds something that is no number.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", torch.float64)
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return torch.as_tensor(_plain(value), dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        quotes = " Without the quotes it is one." if isinstance(value, str) and value.strip().replace(".", "", 1).isdigit() else ""
        raise Uncheckable(f"Numbers are asked for; this is {kind_of(value)}: {_short(value)}.{quotes}") from None


def need_tensor(value, what: str) -> torch.Tensor:
    """The value, if it is a tensor.

    Raises:
        Uncheckable: it is not.
    """
    if not isinstance(value, torch.Tensor):
        raise Uncheckable(f"{what} should be a tensor; this is {kind_of(value)}.")
    return value


def kind_of(value) -> str:
    """What kind of thing a value is, in a learner's words."""
    if value is None:
        return "`None`"
    name = type(value).__name__
    plain = {"str": "text (str)", "int": "a number (int)", "float": "a number (float)", "bool": "True or False (bool)", "dict": "a dictionary"}
    return plain.get(name, f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}")


def _shape(value) -> str:
    shape = tuple(numbers(value).shape)
    return f"the shape {shape}" if shape else "one number, without brackets"


_MODULES = ("math", "np", "numpy", "copy", "F", "torch", "nn", "parametrize")
# What a learner should look at, by a piece of what Python or PyTorch says.
_LOOK = {
    "Boolean value of Tensor": "`not`, `and` and `or` want a single True or False; for each entry of a tensor use `~`, `&` and `|`.",
    "could not infer output dtype": "A mean needs numbers with a point: put `.float()` before it.",
    "must match the size": "`*`, `+` and `==` go entry by entry. Print the `.shape` of both sides; the matrix product is `@`.",
    "shapes cannot be multiplied": "Print the `.shape` of both sides: in `A @ B` the columns of A must be as many as the rows of B.",
    "not callable": "Is a `*` missing before the bracket, or `[…]` meant?",
    "must be tuple of Tensors": "`torch.cat` takes the tensors in one list: `torch.cat([a, b], dim=…)`.",
    "method' object": "Are the brackets of a call missing, as in `net.modules()` and `p.detach()`?",
    "in-place operation": "Change a parameter inside `with torch.no_grad():`, or make a new tensor with `+`.",
    "weight' already exists": "A parametrized weight is computed and takes no assignment: remove the parametrization first.",
    "right_inverse": "A parametrized weight is computed and takes no assignment: remove the parametrization first.",
    "as parameter": "In place of a parameter goes another `nn.Parameter`; or change its numbers inside `with torch.no_grad():`.",
    "context manager protocol": "What follows `with` must be called: are its brackets missing, as in `with torch.no_grad():`?",
    "to unpack": "Do you take more names than each item holds? Print one item.",
}


def _advice(error: Exception) -> str:
    if isinstance(error, NameError):
        return _about_name(error)
    if isinstance(error, KeyError) and "exists" not in str(error):
        return "That key is not in the dictionary: print its keys."
    if isinstance(error, AttributeError) and "method'" not in str(error):
        return "Is the name behind the point spelled right? Print the `type` of what stands before it."
    if isinstance(error, TypeError) and not _where(error):  # it never came into the function
        return "The check calls your function with all its arguments: leave the line `def …` as it was."
    return next((words for piece, words in _LOOK.items() if piece in str(error)), "Run it by hand on a small example.")


def _about_name(error: NameError) -> str:
    if error.name in _MODULES:
        return f"`{error.name}` must be imported first, in a cell above."
    code = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    if "self" in code.co_varnames[: code.co_argcount]:
        return f"Does it belong to the object? Then it is `self.{error.name}`."
    return ("A name must be spelled as in the line `def …`, or belong to something that a cell above made. "
            "(What a `for` within brackets makes exists only within them.)")  # fmt: skip


def _plain(value):
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
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
    # An index such as x[..., 0] is no blank.
    indices = {id(n) for part in ast.walk(tree) if isinstance(part, ast.Subscript) for n in ast.walk(part.slice)}
    return any(isinstance(n, ast.Constant) and n.value is ... and id(n) not in indices for n in ast.walk(tree))


def _name(error: BaseException) -> str:
    first = str(error).strip().splitlines()
    return f"`{type(error).__name__}`" + (f": {first[0][:200]}" if first else "")


def _where(error: BaseException) -> str:
    frame = error.__traceback__.tb_next if error.__traceback__ else None  # the first frame is `run` itself
    return f" (line {frame.tb_lineno} of its cell)" if frame else ""


def _short(value) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "…"
