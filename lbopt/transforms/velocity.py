"""Momentum that decays with the learning rate."""

from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from lbopt import checks
from lbopt._typing import Array, Params, Scalar, ScalarOrSchedule, Updates


class VelocityState(NamedTuple):
    """State of ``scale_by_velocity``, as in the paper.

    Attributes:
      count: steps taken; the argument of schedules.
      initial_rate: η₀, the rate at the first step.
      previous: the parameters of the step before, w_{t−1}; zeros until there is one.
    """

    count: Any
    initial_rate: Any
    previous: Any


class VelocityBufferState(NamedTuple):
    """State of ``scale_by_velocity``, as in the released code.

    Attributes:
      count: steps taken; the argument of schedules.
      previous_rate: η_{t−1}, the rate of the step before.
      velocity: the last update, v.
    """

    count: Any
    previous_rate: Any
    velocity: Any


def scale_by_velocity(
    learning_rate: ScalarOrSchedule,
    momentum: Scalar,
    *,
    velocity: Literal["paper", "code"] = "paper",
) -> optax.GradientTransformationExtraArgs:
    r"""Steps down the preconditioned gradient P and along the last change of weights.

    .. math:: u_t = -\eta_t P_t + m_t (w_t - w_{t-1}), \qquad
              m_t = \frac{m_0}{\eta_0} \eta_t

    so that the momentum decays as the rate does.  The velocity is the true change of
    the weights: it includes the effect of later transformations, such as
    ``rescale_weights``.  It is zero at the first step.

    The authors' released code has another form, ``velocity="code"``:

    .. math:: u_t = v_t = m_t v_{t-1} - \eta_t P_t, \qquad
              m_t = m_0 \min\left(1, \frac{\eta_t}{\eta_{t-1}}\right)

    whose buffer v contains only its own updates.  As long as the rate does not grow, it
    is ``optax.trace(momentum)`` with the rate outside: the momentum does not decay.

    The rate is applied here, with its sign: leave ``optax.scale_by_learning_rate`` out
    of the chain.

    Args:
      learning_rate: η, a number or a schedule of the step.
      momentum: m₀, in [0, 1).
      velocity: the form, ``"paper"`` or ``"code"``.

    Returns:
      A transformation; its ``update`` takes ``params``, which ``"code"`` ignores.

    Raises:
      ValueError: for settings out of range.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from lbopt.transforms.velocity import scale_by_velocity
      >>> rate = lambda step: 0.5 / (1 + step)
      >>> tx = scale_by_velocity(rate, momentum=0.5)
      >>> params = {"w": jnp.array([2.0])}
      >>> state = tx.init(params)
      >>> for _ in range(2):  # 2 - 0.5, then 1.5 - 0.25 + 0.25 (1.5 - 2)
      ...     updates, state = tx.update({"w": jnp.array([1.0])}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(params["w"][0])
      1.125

    Source: Osawa et al. 2022 (SP-NGD), Eq. 22 and 23, and the authors' released code.
    The paper leaves the first velocity open; it is zero here, as in the code.  η₀ is
    the rate at the first step, so a schedule must not start at zero.  In ``"code"``
    the ratio is 1 after a step at rate zero, whose buffer is zero.
    """
    _check(learning_rate, momentum, velocity)
    make = _from_weights if velocity == "paper" else _from_buffer
    return make(learning_rate, momentum)


def _from_weights(
    learning_rate: ScalarOrSchedule, momentum: Scalar
) -> optax.GradientTransformationExtraArgs:
    """Eq. 22 and 23."""

    def init_fn(params: Params) -> VelocityState:
        rate = _rate_at(learning_rate, 0)
        # A traced rate cannot be checked; after one of zero there is no momentum.
        if not isinstance(rate, jax.core.Tracer) and not 0 < rate < jnp.inf:
            raise ValueError(
                f"learning_rate is {rate} at step 0 and must be positive there, "
                "because the momentum is in proportion to its first value; start the "
                'schedule above zero, or use velocity="code"'
            )
        # Zeros, not the parameters, so that init works on shapes and shares no buffer.
        return VelocityState(_zero(), rate, optax.tree.zeros_like(params))

    def update_fn(
        updates: Updates,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, VelocityState]:
        del extra_args
        if params is None:
            raise ValueError(
                "scale_by_velocity.update needs params, whose change is the velocity; "
                "call tx.update(grads, state, params)"
            )
        eta = _rate_at(learning_rate, state.count)
        known = state.initial_rate > 0  # as ``init`` requires of all but traced ones
        m = momentum * jnp.where(
            known, eta / jnp.where(known, state.initial_rate, 1), 0
        )
        moved = state.count > 0  # before that there are no previous parameters

        def step(p: Array, w: Array, previous: Array) -> Array:
            velocity = jnp.where(moved, w - previous, 0)
            return (m * velocity - eta * p).astype(p.dtype)

        updates = jax.tree.map(step, updates, params, state.previous)
        # Copies, because the caller may donate both the parameters and this state.
        previous = jax.tree.map(jnp.copy, params)
        count = optax.safe_increment(state.count)
        return updates, VelocityState(count, state.initial_rate, previous)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _from_buffer(
    learning_rate: ScalarOrSchedule, momentum: Scalar
) -> optax.GradientTransformationExtraArgs:
    """The released code's form."""

    def init_fn(params: Params) -> VelocityBufferState:
        rate = _rate_at(learning_rate, 0)
        return VelocityBufferState(_zero(), rate, optax.tree.zeros_like(params))

    def update_fn(
        updates: Updates,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, VelocityBufferState]:
        del params, extra_args
        eta = _rate_at(learning_rate, state.count)
        # A growing rate has the full momentum; the guard keeps division by 0 out.
        shrinks = (eta < state.previous_rate) & (state.previous_rate > 0)
        m = momentum * jnp.where(
            shrinks, eta / jnp.where(shrinks, state.previous_rate, 1), 1
        )
        velocity = jax.tree.map(
            lambda v, p: (m * v - eta * p).astype(v.dtype), state.velocity, updates
        )
        updates = jax.tree.map(lambda v, p: jnp.array(v, p.dtype), velocity, updates)
        count = optax.safe_increment(state.count)
        return updates, VelocityBufferState(count, eta, velocity)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rate_at(learning_rate: ScalarOrSchedule, count: Any) -> Array:
    """Returns the rate at a step, as a new array that may be donated."""
    value = learning_rate(count) if callable(learning_rate) else learning_rate
    return jnp.array(value, float)


def _zero() -> Array:
    return jnp.zeros([], jnp.int32)


def _check(learning_rate: Any, momentum: Any, velocity: Any) -> None:
    # Schedules, and arrays of optax.inject_hyperparams, may begin at zero in the
    # released code's form; ``init`` refuses it for the paper's.
    varies = callable(learning_rate) or isinstance(learning_rate, jax.Array)
    check = checks.not_negative if varies else checks.positive
    check("learning_rate", learning_rate, "the step is subtracted", schedule=True)
    checks.below_one("momentum", momentum, "0 for none")
    checks.one_of("velocity", velocity, ["paper", "code"])
