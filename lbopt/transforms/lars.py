"""Layer-wise adaptive rates: each layer's step is in proportion to its weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_map_with_path

from lbopt import checks
from lbopt._typing import Array, Params, Scalar, ScalarOrSchedule, Updates
from lbopt.norms import precise_dtype, squared_norm
from lbopt.parameter_paths import matching


class LarsState(NamedTuple):
    """State of ``scale_by_lars``.

    Attributes:
      count: steps taken; the argument of schedules.
      trust_ratio: λ of the last step, a number for each array of the parameters.
    """

    count: Any
    trust_ratio: Any


def scale_by_lars(
    *,
    weight_decay: Scalar = 5e-4,
    trust_coefficient: Scalar = 1e-3,
    least_rms: Scalar = 0.0,
    skip: str | None = None,
    clip: ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives every layer a step whose length is a share of its weights' norm.

    .. math:: u_\ell = \lambda_\ell\, (g_\ell + \beta w_\ell), \qquad
              \lambda_\ell = \frac{\eta \lVert w_\ell \rVert}
              {\lVert g_\ell \rVert + \beta \lVert w_\ell \rVert}

    for every array of the parameters separately, including biases and the scales of
    norm layers; λ is 1 if the weights or the gradient are zero.  A step is at most as
    long as η‖w‖, and exactly so if β is 0.

    An array that starts at zero (a bias, a head) therefore takes the gradient itself,
    times a rate that is usually of the order of 10, and then grows from wherever that
    leads by η of its norm.  With ``least_rms`` = r the numerator of λ is
    :math:`\eta \max(\lVert w_\ell \rVert, r \sqrt n)` for an array of n numbers: its
    step is as long as that of weights of size r, until it is larger.

    It differs from ``optax.scale_by_trust_ratio`` after ``optax.add_decayed_weights``
    in the denominator, which is ‖g + βw‖ there, so that every step has the length η‖w‖;
    and in LARC's clip, which optax does not have.

    The norms are taken in float32 or better, of the gradient as passed: average it over
    devices and micro-batches before (``training.make_train_step`` does), and undo any
    loss scaling.  After ``scale_by_kfac`` g is the natural gradient.

    Args:
      weight_decay: β.
      trust_coefficient: η.
      least_rms: r, the root mean square below which weights count as r; 0 for the
        paper's λ.
      skip: a regular expression, searched for in parameters' paths such as
        ``"Conv_0/kernel"``; gradients of parameters that match pass unchanged.
      clip: the learning rate γ, a number or a schedule, for LARC: the rate of a layer
        is min(γ, λ) instead of γλ.  It must equal the rate that is applied later.

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

    Source: You, Gitman & Ginsburg 2017, Algorithm 1 and Eq. 6; zero norms are treated
    as in the authors' code (NVIDIA Caffe), which has no ε; LARC is its later form.
    ``least_rms`` is ours; LAMB's bounds on φ(‖w‖) are its kin (You et al. 2020).
    """
    check_settings(weight_decay, trust_coefficient)
    checks.not_negative("least_rms", least_rms, "0 for the paper's ratio")
    if clip is not None:
        # Schedules, and arrays of optax.inject_hyperparams, may begin at zero.
        varies = callable(clip) or isinstance(clip, jax.Array)
        check = checks.not_negative if varies else checks.positive
        check("clip", clip, "pass the learning rate or None", schedule=True)
    skipped = matching("skip", skip)

    def init_fn(params: Params) -> LarsState:
        skipped.require(params)
        ratios = jax.tree.map(lambda w: jnp.ones([], precise_dtype(w)), params)
        return LarsState(jnp.zeros([], jnp.int32), ratios)

    def update_fn(
        updates: Updates,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, LarsState]:
        del extra_args
        if params is None:
            raise ValueError(
                "scale_by_lars.update needs params, whose norms it takes; call "
                "tx.update(grads, state, params)"
            )
        # With this transformation's own count, which is the later one's too.
        gamma = clip(state.count) if callable(clip) else clip

        def ratio(path: Any, g: Array, w: Array) -> Array:
            if skipped(path):
                return jnp.ones([], precise_dtype(w))
            g_norm, w_norm = (jnp.sqrt(squared_norm(x)) for x in (g, w))
            size = jnp.maximum(w_norm, least_rms * w.size**0.5)
            moves = (g_norm > 0) & (size > 0)  # otherwise λ is 1, as in Caffe
            length = jnp.where(moves, g_norm + weight_decay * w_norm, 1)
            adapted = trust_coefficient * size / length
            if gamma is not None:
                # min(γ, λ) / γ, because γ is applied later; 1 also for γ = 0.
                shorter = gamma > adapted
                adapted = jnp.where(shorter, adapted / jnp.where(shorter, gamma, 1), 1)
            return jnp.where(moves, adapted, 1).astype(precise_dtype(w))

        def scaled(path: Any, g: Array, w: Array, ratio: Array) -> Array:
            if skipped(path):
                return g
            decayed = (g + weight_decay * w).astype(g.dtype)
            return (ratio * decayed).astype(g.dtype)

        ratios = tree_map_with_path(ratio, updates, params)
        updates = tree_map_with_path(scaled, updates, params, ratios)
        return updates, LarsState(optax.safe_increment(state.count), ratios)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_settings(weight_decay: Any, trust_coefficient: Any) -> None:
    """Raises ValueError for settings of ``scale_by_lars`` that are out of range.

    Raises:
      ValueError: naming the setting, its value and the way out.
    """
    checks.not_negative("weight_decay", weight_decay, "0 for none")
    checks.positive("trust_coefficient", trust_coefficient, "1e-3 is the paper's")
