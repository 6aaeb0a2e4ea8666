"""Checks of settings: each raises ValueError with the setting's name and a way out.

Scalars of NumPy and JAX count as numbers.  Under ``jit``, where every number of
``optax.inject_hyperparams`` is an array of unknown value, its shape and type are
checked alone.  A schedule is checked at step 0.
"""

import enum
import math
import numbers
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def positive(name: str, value: Any, way_out: str, *, schedule: bool = False) -> None:
    """Raises ValueError unless a number is positive and finite.

    Args:
      name: the argument's name.
      value: its value.
      way_out: a value that works, or what to do instead; the message ends with it.
      schedule: whether a function of the step is accepted too; it must return such a
        number at step 0.

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
    """Raises ValueError if a number is negative or not finite; see ``positive``.

    Raises:
      ValueError: ``name=value must be 0 or positive; way_out``.
    """
    _require(lambda x: x >= 0, "0 or positive", name, value, way_out, schedule)


def below_one(name: str, value: Any, way_out: str) -> None:
    """Raises ValueError unless a number, such as a decay, lies in [0, 1).

    Raises:
      ValueError: ``name=value must lie in [0, 1); way_out``.
    """
    _require(lambda x: 0 <= x < 1, "in [0, 1)", name, value, way_out)


def share(name: str, value: Any, way_out: str, *, zero: bool = False) -> None:
    """Raises ValueError unless a number lies in (0, 1], or in [0, 1] with ``zero``.

    Raises:
      ValueError: ``name=value must lie in (0, 1]; way_out``.
    """
    if zero:
        _require(lambda x: 0 <= x <= 1, "in [0, 1]", name, value, way_out)
    else:
        _require(lambda x: 0 < x <= 1, "in (0, 1]", name, value, way_out)


def whole(
    name: str, value: Any, way_out: str, *, least: int = 1, static: bool = False
) -> None:
    """Raises ValueError unless a value is a whole number of at least ``least``.

    Args:
      name: the argument's name.
      value: its value.
      way_out: see ``positive``.
      least: the smallest number accepted.
      static: whether shapes depend on the number, so that no JAX array is accepted.

    Raises:
      ValueError: ``name=value must be a whole number, ≥ least; way_out``.
    """
    if isinstance(value, jax.Array) and static:
        raise ValueError(
            f"{name}={value} must be a Python int, because shapes depend on it; "
            "name it in static_args= of optax.inject_hyperparams"
        )
    number = _number(value)
    try:
        # Booleans have an index, but no setting of ours means one by a number.
        sound = not isinstance(number, bool)
        sound = sound and (number is UNKNOWN or operator.index(number) >= least)
    except TypeError:
        sound = False
    if number is UNKNOWN and not jnp.issubdtype(value.dtype, jnp.integer):
        sound = False
    if not sound:
        raise ValueError(
            f"{name}={value!r} must be a whole number, ≥ {least}; {way_out}"
        )


def one_of(name: str, value: Any, options: Iterable[Any]) -> None:
    """Raises ValueError unless a value is one of a few strings, or None.

    Raises:
      ValueError: ``name=value must be … or …``.
    """
    options = list(options)
    if not any(value is option or _same_string(value, option) for option in options):
        *others, last = map(repr, options)
        raise ValueError(f"{name}={value!r} must be {', '.join(others)} or {last}")


def _same_string(value: Any, option: Any) -> bool:
    # An array passed instead of a string would compare entry by entry.
    return isinstance(value, str) and value == option


def _require(
    sound: Callable[[Any], bool],
    wanted: str,
    name: str,
    value: Any,
    way_out: str,
    schedule: bool = False,
) -> None:
    if schedule and callable(value):
        # An array, as the optimizers have it: a schedule may use it as one.
        value = value(jnp.zeros([], jnp.int32))
        name = f"{name}(0)"
    number = _number(value)
    if number is UNKNOWN:
        return
    real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not real:
        kind = "a number or a schedule" if schedule else "a number"
        raise ValueError(f"{name}={value!r} must be {kind}, {wanted}; {way_out}")
    # NaN fails every comparison; infinity would pass some.
    if not math.isfinite(number) or not sound(number):
        verb = "lie" if wanted.startswith("in ") else "be"
        raise ValueError(f"{name}={value!r} must {verb} {wanted}; {way_out}")


class _Unknown(enum.Enum):
    """The type of ``UNKNOWN``."""

    UNKNOWN = enum.auto()


UNKNOWN = _Unknown.UNKNOWN
"""A real number whose value is not known before the program runs."""


def _number(value: Any) -> Any:
    """Returns a scalar of NumPy or JAX as a Python number, and all else as it is."""
    # NumPy scalars are registered as numbers, its arrays without axes are not.
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return value.item()
    if not isinstance(value, jax.Array) or value.ndim:
        return value
    if value.dtype == bool or jnp.issubdtype(value.dtype, jnp.complexfloating):
        return value
    if isinstance(value, jax.core.Tracer):
        return UNKNOWN
    # Of an array that lies on other processes' devices too, each may read its own copy.
    if not (value.is_fully_addressable or value.is_fully_replicated):
        return UNKNOWN
    return np.asarray(value).item()
