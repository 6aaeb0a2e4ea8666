r"""Preconditioned nonlinear conjugate gradients on mini-batches, without line search.

.. math:: d_k = -P_k g_k + \beta_k d_{k-1}, \qquad
          w \leftarrow w + \eta_k b_k d_k
"""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lbopt import checks, collectives
from lbopt._typing import AxisName, Count, Params, Scalar, ScalarOrSchedule, Updates
from lbopt.collectives import Axis
from lbopt.norms import inner, precise
from lbopt.transforms import step_control as control
from lbopt.transforms.conjugate_beta import EPS, RULES, Products, Rule
from lbopt.transforms.diagonal_bfgs import scale_by_diagonal_bfgs
from lbopt.transforms.step_control import StepControl

Beta: TypeAlias = Literal[
    "fletcher_reeves",
    "polak_ribiere",
    "hestenes_stiefel",
    "dai_yuan",
    "hybrid",
    "hager_zhang",
]
Preconditioner: TypeAlias = Literal["bfgs"] | optax.GradientTransformation | None


class NlcgState(NamedTuple):
    """State of ``scale_by_nlcg``; ``()`` for entries that the settings do not need.

    Attributes:
      count: steps taken; the argument of schedules.
      direction: d, the last direction.
      gradient: the last gradient.
      residual: the last preconditioned gradient, Pg.
      preconditioner: the preconditioner's state.
      delta: gᵀPg of the last step.
      beta: β of the last step.
      control: the step control's state, with the multiplier b.
      rejected: the number of steps not taken because Pg was not finite.
    """

    count: Any
    direction: Any
    gradient: Any
    residual: Any
    preconditioner: Any
    delta: Any
    beta: Any
    control: Any
    rejected: Any


def scale_by_nlcg(
    learning_rate: ScalarOrSchedule,
    *,
    beta: Beta | Scalar = "fletcher_reeves",
    preconditioner: Preconditioner = "bfgs",
    step_control: StepControl | None = "step",
    control_period: Count = 5,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Steps along conjugate directions of all parameters together.

    .. math::
      z_k = P_k g_k, \qquad \delta_k = g_k^\top z_k, \qquad
      \beta_k = \mathrm{clip}\Big(\frac{\delta_k}{\delta_{k-1} + \epsilon}, 0, 1\Big),
      \qquad d_k = -z_k + \beta_k d_{k-1}

      u_k = (1 - \rho_k)\, \eta_k b_k d_k - \rho_k\, \eta_k b_{k-1} d_{k-1}

    with Fletcher and Reeves's β (others: ``conjugate_beta``), and b and ρ from the step
    control: b multiplies the rate, and ρ, the share of the last step that is undone, is
    positive only after the loss has risen.  The inner products are over the whole
    parameter vector.  No gradient and no loss is evaluated besides those passed in.

    The learning rate is applied here, with its sign: **no transformation that changes
    the step may follow**, neither ``optax.scale_by_learning_rate`` nor a decay nor a
    clip.  The preconditioner and the undone step assume that exactly these updates are
    added to the parameters, which cannot be checked.  Put weight decay into the loss,
    and clip before this transformation.

    Args:
      learning_rate: η, a number or a schedule of the step.
      beta: the rule for β, or a number: with ``preconditioner=None`` and
        ``step_control=None`` a number is the momentum of ``optax.sgd``.
      preconditioner: ``"bfgs"``, a diagonal estimate of the Hessian
        (``diagonal_bfgs``); None; or any transformation whose updates have the sign of
        the gradient, such as ``scale_by_kfac``.  It gets all extra arguments.
      step_control: ``"step"``, ``"online"`` (``transforms.step_control``) or None.
      control_period: steps between the decisions of ``"step"``.
      axis_name: the mesh axis over whose devices gradients and loss are averaged
        first, needed where the preconditioner has one; None where they are averages
        already (``training.make_train_step`` averages for all other chains).

    Returns:
      A transformation whose ``update`` takes ``value=``, the batch's loss, which must
      be positive, unless ``step_control`` is None.  No step is taken where Pg is not
      finite.

    Raises:
      ValueError: for settings out of range, and, at ``update``, for a missing loss.

    Examples:
      >>> import jax, jax.numpy as jnp, lbopt, optax
      >>> loss_fn = lambda w: jnp.sum(jnp.array([1.0, 3.0, 10.0]) * w**2) / 2
      >>> tx = lbopt.scale_by_nlcg(0.05)
      >>> w = jnp.array([1.0, -2.0, 0.5])
      >>> state = tx.init(w)
      >>> for _ in range(20):
      ...     loss, grads = jax.value_and_grad(loss_fn)(w)
      ...     updates, state = tx.update(grads, state, w, value=loss)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(loss_fn(w) < 0.3)
      True

    Source: Adya, Palakkode & Tuzel 2018; the body of the paper was not available, and
    the algorithm is that of the authors' released code.  Its step control reads
    variables while they are written; the order of operations is ours.  There the
    displacement that the preconditioner gets is η_k b_{k−1} d_{k−1}, with the rate of
    the current step, and here too.  Not in the code, and off by default: rules other
    than Fletcher-Reeves and Polak-Ribière, and other preconditioners.  State: the
    gradient, the direction and the preconditioner's h, 3n numbers, or 4n for
    Polak-Ribière.
    """
    _check(learning_rate, beta, preconditioner, step_control, control_period)
    # A number is a rule that needs no inner product.
    rule = RULES[beta] if isinstance(beta, str) else Rule(lambda _p: jnp.asarray(beta))
    precondition = _preconditioner(preconditioner)
    keeps_gradient = preconditioner == "bfgs" or rule.keeps_gradient

    def init_fn(params: Params) -> NlcgState:
        zeros = precise(optax.tree.zeros_like(params))
        return NlcgState(
            count=jnp.zeros([], jnp.int32),
            direction=zeros,
            gradient=jax.tree.map(jnp.copy, zeros) if keeps_gradient else (),
            residual=jax.tree.map(jnp.copy, zeros) if rule.keeps_residual else (),
            preconditioner=precondition.init(params),
            delta=jnp.zeros([]),
            beta=jnp.zeros([]),
            control=control.init() if step_control else (),
            rejected=jnp.zeros([], jnp.int32),
        )

    def update_fn(
        updates: Updates,
        state: Any,
        params: Params | None = None,
        *,
        value: Scalar | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, NlcgState]:
        if step_control and value is None:
            raise ValueError(
                "scale_by_nlcg.update needs value=, the loss of the batch, for "
                f"step_control={step_control!r}; call tx.update(grads, state, params, "
                "value=loss), or pass step_control=None"
            )
        g, loss = collectives.mean((precise(updates), value), Axis(axis_name, 1))
        eta = learning_rate(state.count) if callable(learning_rate) else learning_rate
        b = state.control.multiplier if step_control else 1.0
        d = state.direction
        y: Any = ()
        if keeps_gradient:
            y = jax.tree.map(jnp.subtract, g, state.gradient)
            # With the rate of this step, as in the released code.
            t = jax.tree.map(lambda d: eta * b * d, d)
            extra_args |= {"change": y, "displacement": t}
        # Other preconditioners ignore change and displacement.
        z, inner = precondition.update(
            g, state.preconditioner, params, value=loss, **extra_args
        )
        p = _products(state, rule, g, y, z)
        # β < 0 restarts, as in Polak-Ribière+; β ≤ 1 keeps d from growing without end.
        beta_k = jnp.clip(rule.beta(p), 0, 1)
        beta_k = jnp.where((state.count == 0) | ~jnp.isfinite(beta_k), 0, beta_k)
        controlled, undone = (), 0.0
        if step_control:
            controlled, undone = control.update(
                step_control, control_period, state.control, loss, state.count
            )
        ahead, back = _factors(controlled, eta, b, undone)
        sound = jnp.isfinite(p.gz)  # not finite if any entry of Pg is not

        def accepted(new: Any, old: Any) -> Any:
            return jax.tree.map(
                lambda new, old: jnp.where(sound, new, old).astype(old.dtype), new, old
            )

        direction = jax.tree.map(lambda z, d: beta_k * d - z, z, d)
        steps = jax.tree.map(lambda new, old: ahead * new - back * old, direction, d)
        return accepted(steps, optax.tree.zeros_like(updates)), NlcgState(
            count=optax.safe_increment(state.count),
            direction=accepted(direction, d),
            gradient=g if keeps_gradient else (),
            residual=accepted(z, state.residual) if rule.keeps_residual else (),
            preconditioner=inner,
            delta=accepted(p.gz, state.delta),
            beta=accepted(beta_k, state.beta),
            control=controlled,
            rejected=state.rejected + ~sound,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _factors(controlled: Any, eta: Any, b: Any, undone: Any) -> tuple[Any, Any]:
    """Returns the factors on d and, for the part that is undone, on the last d."""
    if controlled == ():
        return eta, 0.0
    ahead = eta * controlled.multiplier
    undone = jnp.where(ahead > EPS, undone, 0)  # a rate of about zero undoes nothing
    return (1 - undone) * ahead, undone * eta * b


def _products(
    state: NlcgState,
    rule: Rule,
    g: Updates,
    y: Any,
    z: Updates,
) -> Products:
    """Returns the inner products that the rule needs."""
    dot, d = inner, state.direction
    both = rule.keeps_gradient and rule.keeps_residual  # Hager-Zhang
    p = Products(gz=dot(g, z), gz_before=state.delta)
    if rule.keeps_residual:
        p = p._replace(gz_cross=dot(g, state.residual))
    if rule.keeps_gradient:
        p = p._replace(yz=dot(y, z), dy=dot(d, y))
    if both:
        dz = jax.tree.map(jnp.subtract, z, state.residual)
        p = p._replace(yy=dot(y, dz), dg=dot(d, g))
    return p


def _preconditioner(
    preconditioner: Preconditioner,
) -> optax.GradientTransformationExtraArgs:
    if preconditioner is None:
        return optax.with_extra_args_support(optax.identity())
    if isinstance(preconditioner, str):
        return scale_by_diagonal_bfgs()
    return optax.with_extra_args_support(preconditioner)


def _check(
    learning_rate: Any,
    beta: Any,
    preconditioner: Any,
    step_control: Any,
    control_period: Any,
) -> None:
    checks.not_negative(
        "learning_rate",
        learning_rate,
        "the direction points downhill already",
        schedule=True,
    )
    if isinstance(beta, str):
        checks.one_of("beta", beta, sorted(RULES))
    else:
        checks.share("beta", beta, "it is a momentum; or name a rule", zero=True)
    known = preconditioner in ("bfgs", None) or hasattr(preconditioner, "update")
    if not known:
        raise ValueError(
            f"preconditioner={preconditioner!r} must be 'bfgs', None, or a "
            "transformation; lbopt.scale_by_kfac(layers) is one"
        )
    checks.one_of("step_control", step_control, ["step", "online", None])
    checks.whole("control_period", control_period, "5 is the authors'")
