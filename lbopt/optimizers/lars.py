"""LARS as a ready optimizer."""

from typing import Literal

import optax

from lbopt import checks
from lbopt._typing import Scalar, ScalarOrSchedule
from lbopt.parameter_paths import matching
from lbopt.transforms.lars import check_settings, scale_by_lars

# Below what kernels of up to 2,500 inputs start with, so that it acts on no others.
_LEAST_RMS = 0.02


def lars(
    learning_rate: ScalarOrSchedule,
    *,
    weight_decay: Scalar = 5e-4,
    momentum: Scalar = 0.9,
    trust_coefficient: Scalar = 1e-3,
    variant: Literal["floored", "paper", "mlperf", "optax"] = "floored",
    nesterov: bool = False,
    clip: bool = False,
    skip: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Layer-wise adaptive rate scaling.

    .. math::
      \lambda_\ell = \frac{\eta \lVert w_\ell \rVert}
      {\lVert g_\ell \rVert + \beta \lVert w_\ell \rVert}, \qquad
      v_\ell \leftarrow m v_\ell + \gamma \lambda_\ell (g_\ell + \beta w_\ell),
      \qquad w_\ell \leftarrow w_\ell - v_\ell

    Variants: ``"paper"`` adapts every array, biases and scales of norm layers among
    them; an array of zeros takes the gradient itself, with the full rate γ, which
    throws a kernel that starts at zero.  ``"floored"``, the default, is the same for
    weights whose root mean square is above 0.02, and takes smaller ones for as large.
    ``"mlperf"`` leaves those two alone: they get plain momentum with the full
    rate γ and no decay.  ``"optax"`` is ``optax.lars``, whose denominator is
    ‖g + βw‖.

    Args:
      learning_rate: γ, a number or a schedule; the papers' are ``schedules.warmup``
        into a polynomial, in ``lbopt.presets``.  It is of the order of 10.
      weight_decay: β.
      momentum: m.
      trust_coefficient: η.
      variant: ``"floored"``, ``"paper"``, ``"mlperf"`` or ``"optax"``; only the first
        trains arrays that start at zero at such rates.
      nesterov: Nesterov's momentum.
      clip: LARC: a layer's rate is min(γ, λ) instead of γλ.
      skip: a regular expression for paths of parameters, such as
        ``"(^|/)(bias|scale)$"``, which get plain momentum; None for the variant's own,
        which is this example for ``"mlperf"`` and no parameter for the others.

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
    in TensorFlow 2, whose ε of 1e-7 the rules set to 0; optax.  Where the paper leaves
    a choice open, the authors' code decides (``scale_by_lars``).  The floor is ours.
    """
    check_settings(weight_decay, trust_coefficient)
    checks.not_negative(
        "learning_rate", learning_rate, "it is subtracted", schedule=True
    )
    checks.below_one("momentum", momentum, "0 for none")
    checks.one_of("variant", variant, ["floored", "paper", "mlperf", "optax"])
    if variant == "optax":
        if clip:
            raise ValueError(
                "clip=True must not be set with variant='optax', which is optax.lars "
                "and has no clip; use variant='paper'"
            )
        # optax masks what is adapted, the complement of ``skip``.
        adapted = True if skip is None else matching("skip", skip).inverted
        return optax.lars(
            learning_rate,
            weight_decay,
            weight_decay_mask=adapted,
            trust_coefficient=trust_coefficient,
            trust_ratio_mask=adapted,
            momentum=momentum,
            nesterov=nesterov,
        )
    if variant == "mlperf" and skip is None:
        skip = r"(^|/)(bias|scale)$"
    return optax.chain(
        scale_by_lars(
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            least_rms=_LEAST_RMS if variant == "floored" else 0.0,
            skip=skip,
            clip=learning_rate if clip else None,
        ),
        # Before the momentum, so that its velocity holds γλ of its own steps (Alg. 1).
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(momentum, nesterov),
    )
