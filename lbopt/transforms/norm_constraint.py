"""A bound on the KL divergence between the predictions before and after a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lbopt import checks, norms
from lbopt._typing import AxisName, Params, ScalarOrSchedule, Updates
from lbopt.curvature.refresh import lost_types
from lbopt.transforms import validation


class ClipByKlState(NamedTuple):
    """State of ``clip_by_kl``.

    Attributes:
      count: steps taken; the argument of schedules.
      inner_state: the preconditioner's state.
      scale: the factor on the last step.
    """

    count: Any
    inner_state: Any
    scale: Any


def clip_by_kl(
    inner: optax.GradientTransformation,
    c: ScalarOrSchedule,
    learning_rate: ScalarOrSchedule,
    *,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales a preconditioned gradient so that its squared length in F̂ is at most c.

    With :math:`\Delta = \hat F^{-1} \nabla h` and the rate η that a later transform
    applies,

    .. math:: \Delta \leftarrow \Delta\, \min\left(1,
              \sqrt{\frac{c}{\eta^2\, \Delta^\top \nabla h}}\right)

    because :math:`\Delta^\top \hat F \Delta = \Delta^\top \nabla h` for the damped
    curvature that was inverted.  The KL divergence between the predictions before and
    after the step is about c / 2.

    Args:
      inner: any preconditioner of gradients.
      c: the bound, twice the KL divergence; a number or a schedule.
      learning_rate: η, a number or a schedule, the same as the later transform's.
      axis_name: the mesh axis of ``inner``, if that takes each device's own gradients
        and returns the same updates on all.

    Returns:
      A transformation with the extra arguments of ``inner``.

    Raises:
      ValueError: if c is not positive, or the rate negative; at ``update`` with
        parameters, for gradients of other shapes than theirs.

    Examples:
      >>> import jax.numpy as jnp, lbopt, optax
      >>> tx = lbopt.clip_by_kl(optax.identity(), c=1.0, learning_rate=0.5)
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> [round(float(u), 6) for u in updates["w"]]  # 0.5 * 5 = 2.5 is clipped to 1
      [1.2, 1.6]

    Source: Ba, Grosse & Martens 2017, §5.  The paper leaves open an inner product that
    is not positive; the scale is then 1.  It is 0 where a schedule's c is not positive.
    """
    checks.positive("c", c, "leave clip_by_kl out for no bound", schedule=True)
    checks.not_negative(
        "learning_rate",
        learning_rate,
        "pass that of the later transform",
        schedule=True,
    )
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Params) -> ClipByKlState:
        return ClipByKlState(jnp.zeros([], jnp.int32), inner.init(params), jnp.ones([]))

    def update_fn(
        updates: Updates,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, ClipByKlState]:
        if params is not None:
            validation.check_like(params, updates)
        if not isinstance(state, ClipByKlState):
            way_out = lost_types(state) or "pass what init or the last update gave"
            raise ValueError(
                f"state={type(state).__name__} must be the state of clip_by_kl; "
                f"{way_out}"
            )
        natural, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        # With this transformation's count, which equals that of the later transform.
        eta = learning_rate(state.count) if callable(learning_rate) else learning_rate
        bound = c(state.count) if callable(c) else c
        # Linear in the gradient, so that averaging products averages gradients.
        product = norms.inner(natural, updates)
        if axis_name is not None:
            product = jax.lax.pmean(product, axis_name)
        length = jnp.square(eta) * product
        sound = length > 0  # F̂ is positive definite, but other preconditioners are not
        # No step is within a bound below zero, nor known to be within one of NaN.
        bound = jnp.where(bound > 0, bound, 0)
        scale = jnp.minimum(
            1.0, jnp.where(sound, jnp.sqrt(bound / jnp.where(sound, length, 1)), 1.0)
        )
        natural = jax.tree.map(lambda u: (u * scale).astype(u.dtype), natural)
        count = optax.safe_increment(state.count)
        scale = scale.astype(state.scale.dtype)
        return natural, ClipByKlState(count, inner_state, scale)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
