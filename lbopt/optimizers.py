"""Ready optimizers: chains of transformations with defaults, no arithmetic."""

from collections.abc import Callable
from typing import Any, Literal

import optax

from lbopt._typing import Count, Scalar, ScalarOrSchedule
from lbopt.curvature.registry import Layers
from lbopt.parameter_paths import matching
from lbopt.transforms.kfac import scale_by_kfac
from lbopt.transforms.lars import check_settings, scale_by_lars
from lbopt.transforms.nlcg import Beta, Preconditioner, scale_by_nlcg
from lbopt.transforms.norm_constraint import clip_by_kl
from lbopt.transforms.rescale import rescale_weights
from lbopt.transforms.step_control import StepControl
from lbopt.transforms.velocity import scale_by_velocity


def kfac(
    learning_rate: ScalarOrSchedule,
    layers: Layers,
    *,
    momentum: Scalar | None = 0.9,
    damping: ScalarOrSchedule = 1e-3,
    weight_decay: Scalar = 0.0,
    weight_decay_mask: Any = None,
    kl_clip: ScalarOrSchedule | None = None,
    factor_decay: Scalar = 0.95,
    stats_period: Count | int = 1,
    inverse_period: Count | int | None = 1,
    inverse_delay: int | None = None,
    stagger: bool = False,
    block_size: int | None = None,
    eigenvalues: Literal["kronecker", "corrected"] = "kronecker",
    axis_name: str | None = None,
    axis_size: Count | int = 1,
    placement: float | int | str = "comm",
    gather_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient descent with Kronecker-factored curvature.

    .. math::
      g = \nabla h + \beta w, \qquad \Delta = (\hat F + (\lambda + \beta) I)^{-1} g,
      \qquad v \leftarrow \mu v + \Delta, \qquad w \leftarrow w - \eta v

    with h the loss, β the weight decay, λ the damping, μ the momentum and η the rate.
    The weight decay is part of the objective: it is added to the gradient before the
    curvature is inverted, and its curvature βI to the damping of every layer.

    Args:
      learning_rate: η, a number or a schedule of the step.
      layers: what ``trace_layers`` found.
      momentum: μ on the natural gradient; None for no momentum.
      damping: λ, a number or a schedule.
      weight_decay: β.
      weight_decay_mask: which parameters decay, as for
        ``optax.add_decayed_weights``.
      kl_clip: bound c on the squared length of a step in the curvature, twice the KL
        divergence; see ``clip_by_kl``.  None for no bound.
      factor_decay: decay of the factors' running average.
      stats_period: steps from one statistic to the next.
      inverse_period: steps from one inversion to the next; None for inversion in the
        background.
      inverse_delay: steps until an inverse has effect; None for at once.
      stagger: spread the inversions over the steps of their period.
      block_size: the largest factor that is not cut into diagonal blocks.
      eigenvalues: ``"corrected"`` for EKFAC, which keeps second moments of gradients in
        the factors' eigenbases, and needs curvature that was evaluated with
        ``due=lbopt.refresh(opt_state)``.
      axis_name: the mesh axis of the devices; this and the rest as for
        ``scale_by_kfac``.
      axis_size: devices along it.
      placement: where inverses live.
      gather_dtype: type in which they travel.

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
      >>> tx = lbopt.kfac(0.1, layers)
      >>> loss, grads, curvature = lbopt.value_grad_and_curvature(loss_fn, layers)(
      ...     params, x)
      >>> updates, _ = tx.update(grads, tx.init(params), params, curvature=curvature)
      >>> bool(loss_fn(optax.apply_updates(params, updates), x) < loss)
      True

    Source: Martens & Grosse 2015; the fixed momentum and the clip are those of Ba,
    Grosse & Martens 2017.  The tables of the latter could not be had; the defaults are
    those of the authors' later code where it has one.
    """
    if isinstance(weight_decay, (int, float)) and weight_decay < 0:
        raise ValueError(f"weight_decay={weight_decay} must not be negative")
    if isinstance(momentum, (int, float)) and not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must lie in [0, 1), or be None")
    if isinstance(damping, (int, float)) and not damping > 0:
        raise ValueError(f"damping={damping} must be positive; 1e-3 is a usual start")
    precondition = scale_by_kfac(
        layers,
        damping=_add(damping, weight_decay),
        factor_decay=factor_decay,
        stats_period=stats_period,
        inverse_period=inverse_period,
        inverse_delay=inverse_delay,
        stagger=stagger,
        block_size=block_size,
        eigenvalues=eigenvalues,
        axis_name=axis_name,
        axis_size=axis_size,
        placement=placement,
        gather_dtype=gather_dtype,
    )
    if kl_clip is not None:
        precondition = clip_by_kl(
            precondition, kl_clip, learning_rate, axis_name=axis_name
        )
    return optax.chain(
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        precondition,
        optax.identity() if momentum is None else optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


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
    axis_name: str | None = None,
    axis_size: Count | int = 1,
    placement: float | int | str = "comm",
    gather_dtype: Any = None,
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
      layers: what ``trace_layers`` found.
      damping: λ, a number or a schedule.
      momentum: m₀; it decays with the rate.
      stale_threshold: α of the adaptive refresh; None renews everything at every step.
      norm_damping: what λ is multiplied by for normalisation layers.
      factor_decay: decay of a running average of the statistics, which the paper does
        not have; 0 keeps the last alone.
      rescale: kernels get the norm of their initialisation after each step
        (``"always"``), only where they are longer (``"shrink_only"``), or not (None).
      velocity: the momentum's form, see ``scale_by_velocity``.
      block_size: the largest factor that is not cut into diagonal blocks.
      axis_name: the mesh axis of the devices; this and the rest as for
        ``scale_by_kfac``.
      axis_size: devices along it.
      placement: where inverses live.
      gather_dtype: type in which they travel.

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
    like that of others (the code: 16 λ).  What the paper leaves open is listed in
    ``lbopt.presets.sp_ngd``.
    """
    if rescale not in ("always", "shrink_only", None):
        raise ValueError(f"rescale={rescale!r} must be 'always', 'shrink_only' or None")
    return optax.chain(
        scale_by_kfac(
            layers,
            damping=damping,
            norm_damping=norm_damping,
            factor_decay=factor_decay,
            stale_threshold=stale_threshold,
            block_size=block_size,
            axis_name=axis_name,
            axis_size=axis_size,
            placement=placement,
            gather_dtype=gather_dtype,
        ),
        scale_by_velocity(learning_rate, momentum, variant=velocity),
        optax.identity()
        if rescale is None
        else rescale_weights(layers, shrink_only=rescale == "shrink_only"),
    )


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


def nlcg(
    learning_rate: ScalarOrSchedule,
    *,
    beta: Beta | Scalar = "fletcher_reeves",
    preconditioner: Preconditioner = "bfgs",
    step_control: StepControl | None = "step",
    control_period: Count | int = 5,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditioned nonlinear conjugate gradients for large batches.

    .. math:: d_k = -P_k g_k + \beta_k d_{k-1}, \qquad
              w \leftarrow w + \eta_k b_k d_k

    with the settings of the authors' release; ``scale_by_nlcg`` has the equations, and
    more options (restarts, a descent guard, the bound on β).

    **No transformation that changes the step may follow**: the learning rate is applied
    here.  Weight decay belongs into the loss, clipping before.

    Args:
      learning_rate: η, a number or a schedule of the step, such as
        ``schedules.warmup`` into ``schedules.staircase``.
      beta: the rule for β, or a number.
      preconditioner: ``"bfgs"``, None, or any transformation that preconditions, such
        as ``lbopt.scale_by_kfac(layers)``.
      step_control: ``"step"``, ``"online"`` or None.
      control_period: steps between the decisions of ``"step"``.
      axis_name: the mesh axis over whose devices gradients and loss are averaged first.

    Returns:
      A transformation whose ``update`` takes ``value=``, the batch's loss, unless
      ``step_control`` is None.

    Raises:
      ValueError: for settings out of range, and, at ``update``, for a missing loss.

    Examples:
      >>> import jax, jax.numpy as jnp, lbopt, optax
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> tx, w = lbopt.nlcg(0.1), jnp.array([1.0, -2.0])
      >>> loss, grads = jax.value_and_grad(loss_fn)(w)
      >>> updates, _ = tx.update(grads, tx.init(w), w, value=loss)
      >>> float(loss_fn(optax.apply_updates(w, updates))) < float(loss)
      True

    Source: Adya, Palakkode & Tuzel 2018, the authors' released code; the body of the
    paper could not be had.
    """
    return scale_by_nlcg(
        learning_rate,
        beta=beta,
        preconditioner=preconditioner,
        step_control=step_control,
        control_period=control_period,
        axis_name=axis_name,
    )


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


def _add(value: ScalarOrSchedule, constant: Scalar) -> ScalarOrSchedule:
    if not callable(value):
        return value + constant
    schedule: Callable[[Any], Any] = value
    return lambda count: schedule(count) + constant
