"""State that is changed only now and then, and not copied in between."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from lbopt._typing import Due

T = TypeVar("T")


def update_if(flag: Due, update: Callable[[T], T], state: T) -> T:
    """``update(state)`` if the flag is set, else ``state``, in the same memory.

    A loop of one turn or none.  XLA copies state that passes unchanged through nested
    conditionals; what a loop carries stays where it is.

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

    def body(carry: tuple[jax.Array, T]) -> tuple[jax.Array, T]:
        return jnp.zeros_like(carry[0]), update(carry[1])

    carry = (jnp.asarray(flag), state)
    return jax.lax.while_loop(lambda carry: carry[0], body, carry)[1]
