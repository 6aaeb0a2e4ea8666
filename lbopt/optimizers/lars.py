"""LARS as a ready optimizer."""

from typing import Any, Literal

import optax

from lbopt._typing import Scalar, ScalarOrSchedule
from lbopt.parameter_paths import matching
from lbopt.transforms.lars import check_settings, scale_by_lars


def lars(
    learning_rate: ScalarOrSchedule,
    *,
    weight_decay: Scalar = 5e-4,
    momentum: Scalar = 0.9,
    trust_coefficient: Scalar = 1e-3,
    variant: Literal["paper", "mlperf", "optax"] = "paper",
    eps: Scalar = 0.0,
    nesterov: bool = False,
    scaled_momentum: bool = False,
    clip: bool = False,
    skip: str | None = None,
    stacked: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Layer-wise adaptive rate scaling.

    .. math::
      \lambda_\ell = \frac{\eta \lVert w_\ell \rVert}
      {\lVert g_\ell \rVert + \beta \lVert w_\ell \rVert + \epsilon}, \qquad
      v_\ell \leftarrow m v_\ell + \gamma \lambda_\ell (g_\ell + \beta w_\ell),
      \qquad w_\ell \leftarrow w_\ell - v_\ell

    Variants: ``"paper"`` adapts every array, biases and scales of norm layers among
    them.  ``"mlperf"`` leaves those two alone: they get plain momentum with the full
    rate γ and no decay.  ``"optax"`` is ``optax.lars``, whose denominator is
    ‖g + βw‖ + ε.

    Args:
      learning_rate: γ, a number or a schedule; the papers' are ``schedules.warmup``
        into a polynomial, in ``lbopt.presets``.  It is of the order of 10.
      weight_decay: β.
      momentum: m.
      trust_coefficient: η.
      variant: ``"paper"``, ``"mlperf"`` or ``"optax"``.
      eps: ε.  The rules of MLPerf want 0; its TensorFlow reference, given 0, runs with
        1e-7.
      nesterov: Nesterov's momentum.
      scaled_momentum: v ← m v + g + βw and w ← w − γλv: old velocity is multiplied by
        today's γλ.  The same while neither changes.
      clip: LARC: a layer's rate is min(γ, λ) instead of γλ.
      skip: a regular expression for paths of parameters, such as
        ``"(^|/)(bias|scale)$"``, which get plain momentum; None for the variant's own:
        none, or for ``"mlperf"`` that one.
      stacked: likewise for parameters whose first axis numbers copies of a layer, each
        with a λ of its own; ``optax.lars`` has no such thing.

    Returns:
      A transformation whose ``update`` takes ``params``.

    Raises:
      ValueError: for settings out of range, and, at ``init``, for an expression that
        matches no parameter.

    Examples:
      >>> import jax.numpy as jnp, lbopt, optax
      >>> tx = lbopt.lars(10.0, weight_decay=0.0)
      >>> params = {"kernel": jnp.array([3.0, 4.0])}
      >>> updates, _ = tx.update({"kernel": jnp.array([0.0, 2.0])}, tx.init(params),
      ...     params)
      >>> round(float(jnp.linalg.norm(updates["kernel"])), 4)  # γ η ‖w‖
      0.05

    Source: You, Gitman & Ginsburg 2017, Algorithm 1; MLPerf's reference for ResNet-50
    in TensorFlow 2; optax.  What the paper leaves open is taken from the authors' code
    (``scale_by_lars``).
    """
    check_settings(weight_decay, trust_coefficient, eps)
    beyond_optax = scaled_momentum or clip or stacked is not None
    _check_lars(learning_rate, variant, momentum, beyond_optax)
    if variant == "optax":
        adapted = True if skip is None else matching("skip", skip).inverted
        return optax.lars(
            learning_rate,
            weight_decay,
            weight_decay_mask=adapted,
            trust_coefficient=trust_coefficient,
            eps=eps,
            trust_ratio_mask=adapted,
            momentum=momentum,
            nesterov=nesterov,
        )
    if variant == "mlperf" and skip is None:
        skip = r"(^|/)(bias|scale)$"
    velocity = optax.trace(momentum, nesterov)
    adaptation = scale_by_lars(
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
        eps=eps,
        skip=skip,
        stacked=stacked,
        clip=learning_rate if clip else None,
        inner=velocity if scaled_momentum else None,
    )
    rate = optax.scale_by_learning_rate(learning_rate)
    if scaled_momentum:
        return optax.chain(adaptation, rate)
    return optax.chain(adaptation, rate, velocity)


def _check_lars(
    learning_rate: Any, variant: Any, momentum: Any, beyond_optax: bool
) -> None:
    if isinstance(learning_rate, (int, float)) and not learning_rate >= 0:
        raise ValueError(
            f"learning_rate={learning_rate} must not be negative; it is subtracted"
        )
    if variant not in ("paper", "mlperf", "optax"):
        raise ValueError(f"variant={variant!r} must be 'paper', 'mlperf' or 'optax'")
    if isinstance(momentum, (int, float)) and not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must lie in [0, 1); 0 for none")
    if variant == "optax" and beyond_optax:
        raise ValueError(
            "variant='optax' is optax.lars, which has no scaled_momentum, clip or "
            "stacked; use variant='paper' with them"
        )
