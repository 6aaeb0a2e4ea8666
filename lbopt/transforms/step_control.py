"""A multiplier of the learning rate that reacts to the loss."""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from lbopt._typing import Array, Count, Scalar

StepControl: TypeAlias = Literal["step", "online"]

_LOSS_DECAY = 0.7
_SMALLEST = 1e-4
# Columns: a relative rise of the loss, the factor on b beyond it, and the share of the
# last step that is undone.  The last row whose rise is exceeded applies.
_RISES = (
    (0.01, 1.0, 0.1),
    (0.025, 0.975, 0.1),
    (0.05, 0.95, 0.2),
    (0.075, 0.9, 0.3),
    (0.10, 0.8, 0.5),
    (0.125, 0.7, 0.7),
    (0.15, 0.5, 0.9),
)
_GROWTH = {"step": 1.05, "online": 1.02}


class StepControlState(NamedTuple):
    """State of the step control.

    Attributes:
      multiplier: b, between 1e-4 and 1.
      average: E, the running average of the loss.
      reference: E at the last decision (``"step"``).
    """

    multiplier: Any
    average: Any
    reference: Any


def init() -> StepControlState:
    """Returns the state before the first loss."""
    return StepControlState(jnp.ones([]), jnp.zeros([]), jnp.zeros([]))


def update(
    mode: StepControl,
    period: Count,
    state: StepControlState,
    loss: Scalar,
    count: Array,
) -> tuple[StepControlState, Array]:
    r"""Decides on the multiplier b and on the share ρ of the last step to undo.

    .. math:: E \leftarrow 0.7 E + 0.3 \ell

    ``"step"`` compares E with E at the last decision, every ``period`` steps;
    ``"online"`` compares the loss with E at every step.  If the ratio is below 1.01, b
    grows by 5 % (2 %) up to 1; above, b shrinks and a part of the last step is undone,
    more for larger rises.  A loss that is not finite changes nothing.

    Args:
      mode: ``"step"`` or ``"online"``.
      period: steps from one decision to the next.
      state: the state.
      loss: ℓ, the batch's loss, positive.
      count: steps taken.

    Returns:
      The new state, whose multiplier is b, and ρ.

    Source: Adya, Palakkode & Tuzel 2018, the authors' released code, in which the order
    of these operations is undefined: variables are read while they are written.  Here E
    is updated first, and the undone step is the one before.
    """
    loss = jnp.asarray(loss, state.average.dtype)
    first = count == 0
    average = jnp.where(
        first, loss, _LOSS_DECAY * state.average + (1 - _LOSS_DECAY) * loss
    )
    if mode == "step":
        decides = ~first & (count % period == 0)
        last = state.reference
        reference = jnp.where(first | decides, average, last)
        ratio = average / jnp.where(decides & (last > 0), last, 1)
        decides &= last > 0  # of a loss of zero nothing can be told
    else:
        decides, reference = ~first & (average > 0), average
        ratio = loss / jnp.where(decides, average, 1)
    limits, factors, shares = (
        jnp.asarray(x, ratio.dtype) for x in zip(*_RISES, strict=True)
    )
    # Limits ascend, so that the number of those exceeded is the row; −1 for none.
    row = jnp.sum(ratio > 1 + limits) - 1
    rises = decides & (row >= 0)
    grows = decides & (ratio < 1 + limits[0])
    b = state.multiplier
    shrunk = jnp.maximum(factors[row] * b, _SMALLEST)
    grown = jnp.minimum(_GROWTH[mode] * b, 1)
    b = jnp.where(rises, shrunk, jnp.where(grows, grown, b)).astype(b.dtype)
    undone = jnp.where(rises, shares[row], 0)
    # The average would never forget a loss that is not finite.
    finite = jnp.isfinite(loss)
    after = StepControlState(b, average, reference)
    after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
    return after, jnp.where(finite, undone, 0)
