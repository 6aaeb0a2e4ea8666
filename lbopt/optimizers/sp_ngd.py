"""SP-NGD as a ready optimizer."""

from typing import Literal

import optax

from lbopt import checks
from lbopt._typing import Scalar, ScalarOrSchedule
from lbopt.curvature.registry import Layers
from lbopt.settings import Placement
from lbopt.transforms.kfac import scale_by_kfac
from lbopt.transforms.rescale import rescale_weights
from lbopt.transforms.velocity import scale_by_velocity


def sp_ngd(
    learning_rate: ScalarOrSchedule,
    layers: Layers,
    *,
    damping: ScalarOrSchedule = 2.5e-4,
    momentum: Scalar = 0.9,
    stale_threshold: Scalar | None = 0.1,
    norm_damping: Scalar = 1.0,
    factor_decay: Scalar = 0.0,
    rescale: Literal["always", "shrink_only"] | None = "always",
    velocity: Literal["paper", "code"] = "paper",
    block_size: int | None = None,
    placement: Placement = Placement(),
) -> optax.GradientTransformationExtraArgs:
    r"""Scalable and practical natural gradient descent.

    .. math::
      P_t = (\hat F_t + \lambda I)^{-1} \nabla L_t, \qquad
      w \leftarrow w_t - \eta_t P_t + \frac{m_0}{\eta_0} \eta_t (w_t - w_{t-1}),
      \qquad w_{t+1} = \sqrt{2 d_{\text{out}}}\, \frac{w}{\lVert w \rVert + \epsilon}

    the last for kernels alone, with the statistics of :math:`\hat F` renewed by
    clocks of their own (``curvature.refresh``).  Use it with the empirical Fisher, the
    default of ``value_grad_and_curvature`` and of ``training.make_train_step``.

    Args:
      learning_rate: η, a number or a schedule of the step, such as
        ``schedules.polynomial``.
      layers: the result of ``trace_layers``.
      damping: λ, a number or a schedule.
      momentum: m₀; it decays with the rate.
      stale_threshold: α of the adaptive refresh; None renews everything at every step.
      norm_damping: factor by which λ is multiplied for normalisation layers.
      factor_decay: decay of a running average of the statistics, which the paper does
        not have; 0 keeps the last alone.
      rescale: kernels get the norm of their initialisation after each step
        (``"always"``), only where they are longer (``"shrink_only"``), or not (None).
      velocity: the momentum's form, see ``scale_by_velocity``.
      block_size: the largest factor that is not cut into diagonal blocks.
      placement: the devices over which examples are spread, and where inverses live
        (``lbopt.Placement``).

    Returns:
      A transformation whose ``update`` takes ``params`` and ``curvature=``.

    Raises:
      ValueError: for settings out of range.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt, optax
      >>> model, x = nn.Sequential([nn.Dense(3)]), jnp.ones((8, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> layers = lbopt.trace_layers(loss_fn, params, x)
      >>> tx = lbopt.sp_ngd(0.01, layers)
      >>> state = tx.init(params)
      >>> loss, grads, curvature = lbopt.value_grad_and_curvature(loss_fn, layers)(
      ...     params, x, due=lbopt.refresh(state))
      >>> updates, _ = tx.update(grads, state, params, curvature=curvature)
      >>> kernel = optax.apply_updates(params, updates)["layers_0"]["kernel"]
      >>> round(float(jnp.sum(kernel**2)), 3)  # 2 × 3 output units
      6.0

    Source: Osawa et al. 2022, Eq. 3–24 and Algorithms 1 and 2.  Where the paper and the
    released code differ the paper is followed: momentum that decays with the rate, a
    velocity that holds the rescaling, rescaling at every step, damping of norm layers
    like that of others (the code: 16 λ).  ``lbopt.presets.sp_ngd`` lists the choices
    that the paper leaves open.
    """
    checks.one_of("velocity", velocity, ["paper", "code"])
    checks.one_of("rescale", rescale, ["always", "shrink_only", None])
    return optax.chain(
        scale_by_kfac(
            layers,
            damping=damping,
            norm_damping=norm_damping,
            factor_decay=factor_decay,
            stale_threshold=stale_threshold,
            block_size=block_size,
            placement=placement,
        ),
        # Eq. 23; it applies the rate itself.
        scale_by_velocity(learning_rate, momentum, variant=velocity),
        # Last, because Eq. 24 normalises w + u with the whole step u.
        optax.identity()
        if rescale is None
        else rescale_weights(layers, shrink_only=rescale == "shrink_only"),
    )
