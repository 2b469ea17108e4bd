"""Values of ``data.*``, checked where they come in: each returns the value or raises ``UserError``."""

from collections.abc import Sequence
from math import inf
from typing import Any

from vit_attn.errors import UserError, unknown_name


def whole(name: str, value: Any, *, least: int, prefix: str = "data.") -> int:
    """A whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{prefix}{name} must be a whole number of at least {least}, not {value!r}")
    return value


def number(name: str, value: Any, *, least: float, below: float = inf) -> float:
    """A number in ``[least, below)``."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < below:
        limit = "" if below == inf else f" and below {below}"
        raise UserError(f"data.{name} must be a number of at least {least}{limit}, not {value!r}")
    return float(value)


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of ``allowed``."""
    if value not in allowed:
        raise UserError(unknown_name(f"data.{name}", value, allowed))
    return value


def channel_values(name: str, values: Any, *, positive: bool = False) -> tuple[float, ...]:
    """Three numbers, one per colour channel."""
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    right = listed and len(values) == 3 and all(isinstance(v, int | float) for v in values)
    if not right or (positive and min(values) <= 0):
        kind = "positive numbers" if positive else "numbers"
        raise UserError(f"data.{name} must be three {kind}, one per colour channel, not {values!r}")
    return tuple(float(value) for value in values)
