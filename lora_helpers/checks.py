"""Checks of what a caller passed: each error says what was given and what is allowed. And `no_autocast`."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

LARGEST_SEED = 2**63 - 1  # of torch.Generator


@contextmanager
def no_autocast() -> Iterator[None]:
    """Within it a torch.autocast block further out changes no figure. Also a decorator."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no value is NaN or infinite; no tensor may be empty."""
    # The largest of values with a NaN among them is NaN, so two numbers a tensor tell; quicker than
    # isfinite().
    return all(value.isfinite() for tensor in tensors for value in torch.aminmax(tensor.detach()))


def check_whole(name: str, value: int, low: int = 1, high: int | None = None) -> None:
    """Raises ValueError unless `value` is an int (no bool) from `low` to `high`."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} is {value!r}; it must be a whole number {allowed}.{_advice(value, 'int')}")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless `value` is an int or a float (no bool), positive and finite."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(
            f"{name} is {value!r}; it must be a positive, finite number.{_advice(value, 'float')}"
        )


def check_bool(name: str, value: bool) -> None:
    """Raises TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False.")


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in list(allowed):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def check_network(net: nn.Module) -> None:
    """Raises TypeError unless `net` is a `torch.nn.Module`."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net is a {type(net).__name__}; it must be a network, such as RichBoyNet().")


def _advice(value, kind: str) -> str:
    # A NumPy or PyTorch number prints like a plain one, so the error must say that it is not.
    is_scalar = hasattr(value, f"__{kind}__") and not isinstance(value, (int, float, str))
    return f" It is of type {type(value).__name__}: write {kind}(…)." if is_scalar else ""
