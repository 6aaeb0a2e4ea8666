"""Conditional updates that leave unchanged state where it is."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from lbopt._typing import Flag

T = TypeVar("T")


def update_if(flag: Flag, update: Callable[[T], T], state: T) -> T:
    """Returns ``update(state)`` if the flag is set, else ``state`` in the same memory.

    Args:
      flag: whether to update.
      update: keeps the structure, shapes and dtypes of the state.
      state: a tree of arrays.

    Returns:
      The state afterwards.  It has no reverse-mode derivative.

    Raises:
      TypeError: if ``update`` changes a shape or a dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lbopt.in_place import update_if
      >>> float(update_if(True, lambda x: 2 * x, jnp.ones([])))
      2.0
    """

    # A loop of at most one iteration: XLA copies state that passes unchanged through
    # nested conditionals, but keeps the carry of a loop in place.
    def body(carry: tuple[jax.Array, T]) -> tuple[jax.Array, T]:
        return jnp.zeros_like(carry[0]), update(carry[1])

    carry = (jnp.asarray(flag), state)
    return jax.lax.while_loop(lambda carry: carry[0], body, carry)[1]
