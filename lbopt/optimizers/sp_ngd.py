"""SP-NGD as a ready optimizer."""

from typing import Literal

import optax

from lbopt import checks
from lbopt._typing import Scalar, ScalarOrSchedule
from lbopt.curvature.registry import Layers
from lbopt.schedules import first_damping
from lbopt.settings import Placement
from lbopt.transforms.kfac import scale_by_kfac
from lbopt.transforms.norm_constraint import clip_by_kl
from lbopt.transforms.rescale import rescale_weights
from lbopt.transforms.velocity import scale_by_velocity


def sp_ngd(
    learning_rate: ScalarOrSchedule,
    layers: Layers,
    *,
    damping: ScalarOrSchedule = first_damping,
    momentum: Scalar = 0.7,
    kl_clip: ScalarOrSchedule | None = 0.01,
    stale_threshold: Scalar | None = 0.1,
    norm_damping: Scalar = 1.0,
    factor_decay: Scalar = 0.0,
    rescale: Literal["always", "shrink_only"] | None = "shrink_only",
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

    The defaults are a first setting, with a rate of 0.1.  On five small networks, 200
    steps each, no batch's loss was more than 1.01 times that of the first
    (``experiments/first_settings.py``).  The paper's are in ``lbopt.presets``: they are
    for networks of He's initialisation with a norm layer after each kernel, and
    lengthen a kernel that starts at zero (a head, the last of a residual branch,
    adaLN-zero) to √(2 d_out) in its first step.

    Args:
      learning_rate: η, a number or a schedule of the step, such as
        ``schedules.polynomial``; 0.1 for a first try.
      layers: the result of ``trace_layers``.
      damping: λ, a number or a schedule; ``schedules.first_damping`` falls from 0.1 to
        3e-3, which suits a loss that is a mean of cross entropies.  The paper's is
        1e-4 to 2.5e-4.
      momentum: m₀; it decays with the rate.  The paper's is 0.93 to 0.997.
      kl_clip: bound c on the squared length of a step in the curvature, twice the KL
        divergence, before momentum; see ``clip_by_kl``.  None for no bound, as in the
        paper.  It is in units of the loss; see ``kfac``.
      stale_threshold: α of the adaptive refresh; None renews everything at every step.
      norm_damping: factor by which λ is multiplied for normalisation layers.
      factor_decay: decay of a running average of the statistics, which the paper does
        not have; 0 keeps the last alone.
      rescale: kernels get the norm of He's initialisation, √(2 d_out), only where they
        are longer (``"shrink_only"``, the released code), after every step
        (``"always"``, the paper), or not (None).  Only the first leaves room for
        kernels that start at zero to grow.
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
      >>> tx = lbopt.sp_ngd(0.01, layers, rescale="always")
      >>> state = tx.init(params)
      >>> loss, grads, curvature = lbopt.value_grad_and_curvature(loss_fn, layers)(
      ...     params, x, due=lbopt.refresh(state))
      >>> updates, _ = tx.update(grads, state, params, curvature=curvature)
      >>> kernel = optax.apply_updates(params, updates)["layers_0"]["kernel"]
      >>> round(float(jnp.sum(kernel**2)), 3)  # 2 × 3 output units
      6.0

    Source: Osawa et al. 2022, Eq. 3–24 and Algorithms 1 and 2.  Where the paper and the
    released code differ the paper is followed, but for the rescaling: momentum that
    decays with the rate, a velocity that holds the rescaling, damping of norm layers
    like that of others (the code: 16 λ).  ``lbopt.presets.sp_ngd`` lists the choices
    that the paper leaves open.  The bound and the high damping of the first steps are
    ours (``experiments/first_settings.py``).
    """
    checks.one_of("velocity", velocity, ["paper", "code"])
    checks.one_of("rescale", rescale, ["always", "shrink_only", None])
    precondition = scale_by_kfac(
        layers,
        damping=damping,
        norm_damping=norm_damping,
        factor_decay=factor_decay,
        stale_threshold=stale_threshold,
        block_size=block_size,
        placement=placement,
    )
    if kl_clip is not None:
        checks.positive("kl_clip", kl_clip, "None for no bound", schedule=True)
        # Inside, because the bound is on P, not on the velocity.
        precondition = clip_by_kl(
            precondition, kl_clip, learning_rate, axis_name=placement.axis_name
        )
    return optax.chain(
        precondition,
        # Eq. 23; it applies the rate itself.
        scale_by_velocity(learning_rate, momentum, velocity=velocity),
        # Last, because Eq. 24 normalises w + u with the whole step u.
        optax.identity()
        if rescale is None
        else rescale_weights(layers, shrink_only=rescale == "shrink_only"),
    )
