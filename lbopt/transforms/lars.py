"""Layer-wise adaptive rates: each layer's step is in proportion to its weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_map_with_path

from lbopt._typing import Array, Params, Scalar, ScalarOrSchedule, Updates
from lbopt.parameter_paths import matching


class LarsState(NamedTuple):
    """State of ``scale_by_lars``.

    Attributes:
      count: steps taken; the argument of schedules.
      inner_state: the state of ``inner``.
      trust_ratio: λ of the last step: a number for each parameter, a row for each
        stacked one.
    """

    count: Any
    inner_state: Any
    trust_ratio: Any


def scale_by_lars(
    *,
    weight_decay: Scalar = 5e-4,
    trust_coefficient: Scalar = 1e-3,
    eps: Scalar = 0.0,
    skip: str | None = None,
    stacked: str | None = None,
    clip: ScalarOrSchedule | None = None,
    inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives every layer a step whose length is a share of its weights' norm.

    .. math:: u_\ell = \lambda_\ell\, (g_\ell + \beta w_\ell), \qquad
              \lambda_\ell = \frac{\eta \lVert w_\ell \rVert}
              {\lVert g_\ell \rVert + \beta \lVert w_\ell \rVert + \epsilon}

    for every array of the parameters by itself, biases and the scales of norm layers
    among them; λ is 1 where the weights or the gradient are zero.  A step is never
    longer than η‖w‖, and that long where β is 0.

    It differs from ``optax.scale_by_trust_ratio`` after ``optax.add_decayed_weights``
    in the denominator, which is ‖g + βw‖ there, so that every step has the length η‖w‖;
    and in what optax does not have: one norm for each slice of a stack, the clip of
    LARC, and a momentum that λ multiplies.

    The norms are taken in float32 or better, of the gradient that is handed in:
    average it over devices and micro-batches before (``training.make_train_step``
    does), and undo any loss scaling.  After ``scale_by_kfac`` g is the natural
    gradient.

    Args:
      weight_decay: β.
      trust_coefficient: η.
      eps: ε.
      skip: a regular expression; parameters in whose path, such as
        ``"Conv_0/kernel"``, it is found pass as they are: λ = 1, no decay.
      stacked: likewise for parameters whose first axis numbers the copies of a layer
        under ``nn.scan`` or ``nn.vmap``; each copy has its own λ.
      clip: the learning rate γ, a number or a schedule, for LARC: the rate of a layer
        is min(γ, λ) instead of γλ.  It must be the rate that is multiplied by later.
      inner: what becomes of g + βw before λ multiplies it, such as ``optax.trace``;
        None for nothing.

    Returns:
      A transformation whose ``update`` takes ``params``.

    Raises:
      ValueError: for settings out of range, and, at ``init``, for an expression that
        matches no parameter.

    Examples:
      >>> import jax.numpy as jnp, lbopt
      >>> tx = lbopt.scale_by_lars(weight_decay=0.0, trust_coefficient=0.01)
      >>> params = {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.zeros(1)}
      >>> grads = {"kernel": jnp.array([0.0, 2.0]), "bias": jnp.ones(1)}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates["kernel"]  # of length 0.01 × 5
      Array([0.  , 0.05], dtype=float32)
      >>> updates["bias"]  # zero weights give no scale
      Array([1.], dtype=float32)

    Source: You, Gitman & Ginsburg 2017, Algorithm 1 and Eq. 6; what happens at zero
    norms is that of the authors' code (NVIDIA Caffe), which has no ε; LARC is its later
    form.
    """
    check_settings(weight_decay, trust_coefficient, eps)
    if isinstance(clip, (int, float)) and not clip > 0:
        raise ValueError(
            f"clip={clip} must be the positive learning rate, a schedule of it, or None"
        )
    skipped, in_stack = matching("skip", skip), matching("stacked", stacked)
    inner = optax.with_extra_args_support(inner or optax.identity())

    def init_fn(params: Params) -> LarsState:
        for matches in (skipped, in_stack):
            matches.require(params)

        def ones(path: Any, w: Any) -> Array:  # or the shape of an array
            copies = w.shape[:1] if in_stack(path) else ()
            return jnp.ones(copies, _precise(w))

        ratios = tree_map_with_path(ones, params)
        return LarsState(jnp.zeros([], jnp.int32), inner.init(params), ratios)

    def update_fn(
        updates: Updates,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, LarsState]:
        if params is None:
            raise ValueError(
                "scale_by_lars.update needs params, whose norms it takes; call "
                "tx.update(grads, state, params)"
            )
        gamma = clip(state.count) if callable(clip) else clip

        def ratio(path: Any, g: Array, w: Array) -> Array:
            if skipped(path):
                return jnp.ones(w.shape[:1] if in_stack(path) else (), _precise(w))
            first = 1 if in_stack(path) else 0
            g_norm, w_norm = _norm(g, first), _norm(w, first)
            moves = (g_norm > 0) & (w_norm > 0)
            length = jnp.where(moves, g_norm + weight_decay * w_norm + eps, 1)
            adapted = trust_coefficient * w_norm / length
            if gamma is not None:
                shorter = gamma > adapted
                adapted = jnp.where(shorter, adapted / jnp.where(shorter, gamma, 1), 1)
            return jnp.where(moves, adapted, 1).astype(_precise(w))

        def decayed(path: Any, g: Array, w: Array) -> Array:
            return g if skipped(path) else (g + weight_decay * w).astype(g.dtype)

        ratios = tree_map_with_path(ratio, updates, params)
        updates, inner_state = inner.update(
            tree_map_with_path(decayed, updates, params),
            state.inner_state,
            params,
            **extra_args,
        )
        updates = jax.tree.map(_scaled, updates, ratios)
        count = optax.safe_increment(state.count)
        return updates, LarsState(count, inner_state, ratios)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _precise(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _norm(x: Array, first: int) -> Array:
    """The norm over all axes from ``first`` on."""
    x = x.astype(_precise(x))
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(first, x.ndim))))


def _scaled(u: Array, ratio: Array) -> Array:
    ratio = ratio.reshape(ratio.shape + (1,) * (u.ndim - ratio.ndim))
    return (ratio * u).astype(u.dtype)


def check_settings(weight_decay: Any, trust_coefficient: Any, eps: Any) -> None:
    """Refuses settings out of range; see ``scale_by_lars`` for what they are.

    Raises:
      ValueError: naming the setting, its value and what it may be.
    """
    for name, value in (("weight_decay", weight_decay), ("eps", eps)):
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f"{name}={value} must not be negative; 0 for none")
    if isinstance(trust_coefficient, (int, float)) and not trust_coefficient > 0:
        raise ValueError(
            f"trust_coefficient={trust_coefficient} must be positive; 1e-3 is the "
            "paper's"
        )
