"""Checks of settings: each refuses a value by name, with a way out.

Arrays of JAX pass unread: ``optax.inject_hyperparams`` makes one of every number, and
under ``jit`` its value is not known.  NumPy's numbers are numbers.
"""

import math
import numbers
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np


def positive(name: str, value: Any, way_out: str, *, schedule: bool = False) -> None:
    """Refuses a number that is not positive and finite.

    Args:
      name: the argument's name.
      value: what was passed for it.
      way_out: a value that serves, or what to do instead; ends the message.
      schedule: whether a function of the step may stand in place of the number.

    Raises:
      ValueError: ``name=value must be positive; way_out``.

    Examples:
      >>> from lbopt import checks
      >>> checks.positive("damping", -1.0, "1e-3 is a usual start")
      Traceback (most recent call last):
      ValueError: damping=-1.0 must be positive; 1e-3 is a usual start
    """
    _require(lambda x: x > 0, "positive", name, value, way_out, schedule)


def not_negative(
    name: str, value: Any, way_out: str, *, schedule: bool = False
) -> None:
    """Refuses a number that is negative or not finite; see ``positive``.

    Raises:
      ValueError: ``name=value must be 0 or positive; way_out``.
    """
    _require(lambda x: x >= 0, "0 or positive", name, value, way_out, schedule)


def below_one(name: str, value: Any, way_out: str) -> None:
    """Refuses a number outside [0, 1), such as a decay or a momentum.

    Raises:
      ValueError: ``name=value must lie in [0, 1); way_out``.
    """
    _require(lambda x: 0 <= x < 1, "in [0, 1)", name, value, way_out)


def share(name: str, value: Any, way_out: str) -> None:
    """Refuses a number outside (0, 1].

    Raises:
      ValueError: ``name=value must lie in (0, 1]; way_out``.
    """
    _require(lambda x: 0 < x <= 1, "in (0, 1]", name, value, way_out)


def whole(name: str, value: Any, way_out: str, *, least: int = 1) -> None:
    """Refuses what is not a whole number of at least ``least``.

    Raises:
      ValueError: ``name=value must be a whole number, ≥ least; way_out``.
    """
    if isinstance(value, jax.Array):
        return
    try:
        sound = not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        sound = False
    if not sound:
        raise ValueError(
            f"{name}={value!r} must be a whole number, ≥ {least}; {way_out}"
        )


def one_of(name: str, value: Any, options: Iterable[Any]) -> None:
    """Refuses what is not among a few strings or None.

    Raises:
      ValueError: ``name=value must be one of …``.
    """
    options = list(options)
    if not any(value is option or _same_string(value, option) for option in options):
        *others, last = map(repr, options)
        raise ValueError(f"{name}={value!r} must be {', '.join(others)} or {last}")


def _same_string(value: Any, option: Any) -> bool:
    # An array in the place of a string would compare entry by entry.
    return isinstance(value, str) and value == option


def _require(
    sound: Callable[[Any], bool],
    wanted: str,
    name: str,
    value: Any,
    way_out: str,
    schedule: bool = False,
) -> None:
    if isinstance(value, jax.Array) or (schedule and callable(value)):
        return
    number = value
    if isinstance(value, np.ndarray) and value.ndim == 0:
        number = value.item()
    real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    # NaN fails every comparison, infinity is no setting.
    if not real or not math.isfinite(number) or not sound(number):
        verb = "lie" if wanted.startswith("in ") else "be"
        raise ValueError(f"{name}={value!r} must {verb} {wanted}; {way_out}")
