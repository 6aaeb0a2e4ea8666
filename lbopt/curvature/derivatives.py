"""Tells the layers of a loss that contains derivatives of the network.

A tap sees the first derivative of a layer's output only.  Where a loss holds a
derivative of the network (by its inputs, or by the parameters), the gradient reaches
the parameters through the second, and the tap sees nothing of it.
"""

from collections.abc import Callable
from typing import Any

import jax

from lbopt._typing import Array


def on_derivative(x: Array, note: Callable[[], None]) -> Array:
    """Returns ``x``; calls ``note`` whenever it is differentiated, in either mode."""

    @jax.custom_jvp
    def identity(x):
        return x

    @identity.defjvp
    def rule(primals, tangents):
        note()
        return primals[0], tangents[0]

    return identity(x)


def on_cotangent(x: Array, note: Callable[[int], None], order: int = 0) -> Array:
    """Returns ``x``; calls ``note`` with the order of every cotangent that reaches it.

    Args:
      x: an array of a function that will be differentiated in reverse mode.
      note: takes the number of differentiations that ``x`` had already undergone when
        the cotangent arrived: 0 for the first, 1 for a derivative of its value or of
        its cotangent, and so on.
      order: the number that it has undergone so far.

    Returns:
      ``x``.
    """

    @jax.custom_vjp
    def identity(x):
        return x

    def forward(x: Array) -> tuple[Array, None]:
        return on_cotangent(x, note, order + 1), None

    def backward(_: None, g: Any) -> tuple[Any]:
        note(order)
        return (on_cotangent(g, note, order + 1),)

    identity.defvjp(forward, backward)
    return identity(x)
