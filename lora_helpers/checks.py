"""What a caller passed, checked: each error says what was given and what is allowed."""

import sys
from collections.abc import Iterable

import torch
from torch import nn

LARGEST_SEED = 2**63 - 1  # of torch.Generator


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no value is NaN or infinite; no tensor may be empty."""
    return all(value.isfinite() for tensor in tensors for value in torch.aminmax(tensor.detach()))  # NaN is passed on; far quicker than isfinite()


def check_whole(name: str, value: int, low: int = 1, high: int | None = None) -> None:
    """Raises ValueError unless `value` is an int (no bool) from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        # A NumPy or PyTorch scalar reads like an int, so the error says that it is none.
        advice = f" It is of type {type(value).__name__}: write int(…)." if hasattr(value, "__index__") and not isinstance(value, int) else ""
        raise ValueError(f"{name} is {value!r}; it must be a whole number {allowed}.{advice}")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless `value` is an int or a float (no bool), positive and finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        advice = f" It is of type {type(value).__name__}: write float(…)." if hasattr(value, "__float__") and not isinstance(value, (int, float)) else ""
        raise ValueError(f"{name} is {value!r}; it must be a positive, finite number.{advice}")


def check_bool(name: str, value: bool) -> None:
    """Raises TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False.")


def check_network(net: nn.Module) -> None:
    """Raises TypeError unless `net` is a `torch.nn.Module`."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net is a {type(net).__name__}; it must be a network, such as RichBoyNet().")
