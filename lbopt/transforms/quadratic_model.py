r"""Step size, momentum and damping from a quadratic model of the loss.

.. math:: M(\delta) = h(\theta) + \nabla h^\top \delta
          + \tfrac12\, \delta^\top \big(F + (\lambda + \eta_w) I\big)\, \delta
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from lbopt import checks, collectives
from lbopt._typing import Array, AxisName, Count, Params, Scalar, Updates
from lbopt.collectives import Axis
from lbopt.norms import inner, precise, squared_norm

# Directions count as parallel if the squared sine between them, which is a difference
# of rounded numbers, is below so many ε.
_PARALLEL = 100
# Martens & Grosse 2015, §6.5: λ changes by ω for each step of the period.
_OMEGA = 19 / 20
# The floor is kfac-jax's.  Steps are zero in float32 long before the ceiling; a λ that
# overflows would never come back.
_SMALLEST, _LARGEST = 1e-8, 1e12


class QuadraticModelState(NamedTuple):
    """State of ``scale_by_quadratic_model``; ``()`` where there is no momentum.

    Attributes:
      count: steps taken.
      damping: λ of the coming step.
      last: δ₀, the last update.
      preconditioner: the preconditioner's state.
      lengths: α and μ of the last step, ``[2]``; without momentum α alone, ``[1]``.
      predicted: M(δ) − M(0) of the last step.
      ratio: ρ of the last decision on λ; 1 before the first, 0 if it was not finite.
      rejected: the number of steps not taken because a number was not finite.
    """

    count: Any
    damping: Any
    last: Any
    preconditioner: Any
    lengths: Any
    predicted: Any
    ratio: Any
    rejected: Any


def scale_by_quadratic_model(
    preconditioner: optax.GradientTransformation,
    *,
    damping: Scalar = 150.0,
    weight_decay: Scalar = 0.0,
    momentum: bool = True,
    damping_period: Count = 5,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Steps to the minimum of a quadratic model in two directions.

    The directions are the preconditioned gradient :math:`\Delta = -P \nabla h` and the
    last update δ₀.  With :math:`C = F + (\lambda + \eta_w) I` and the exact Fisher
    matrix F of the batch,

    .. math::
      \delta = \alpha \Delta + \mu \delta_0, \qquad
      \begin{pmatrix} \alpha \\ \mu \end{pmatrix} = -
      \begin{pmatrix} \Delta^\top C \Delta & \Delta^\top C \delta_0 \\
      \Delta^\top C \delta_0 & \delta_0^\top C \delta_0 \end{pmatrix}^{-1}
      \begin{pmatrix} \nabla h^\top \Delta \\ \nabla h^\top \delta_0 \end{pmatrix},
      \qquad M(\delta) - M(0) = \tfrac12 \nabla h^\top \delta

    where h includes the penalty :math:`\tfrac{\eta_w}{2} \lVert \theta \rVert^2`.  At
    the first step, and if the directions are parallel, only Δ is used.  On a fixed
    quadratic these are the steps of preconditioned conjugate gradients.

    Every T steps the model is compared with the loss, on the same batch (Levenberg,
    Marquardt):

    .. math::
      \rho = \frac{h(\theta + \delta) - h(\theta)}{M(\delta) - M(0)}, \qquad
      \lambda \leftarrow \begin{cases} \omega^T \lambda & \rho > \tfrac34 \\
      \omega^{-T} \lambda & \rho < \tfrac14 \\ \lambda & \text{otherwise} \end{cases}

    The step's length and sign are decided here: **no transformation that changes the
    step may follow**, neither ``optax.scale_by_learning_rate`` nor a decay nor a clip.

    If the loss, the gradient, C, α, μ, or the new loss at a decision is not finite, the
    parameters and δ₀ stay unchanged, and λ grows by ω⁻ᵀ.  The preconditioner gets zeros
    for a gradient that is not finite.

    Args:
      preconditioner: any transformation whose updates have the sign of the gradient,
        such as ``scale_by_kfac``.  It gets all extra arguments, and ``damping=``, which
        is λ + η_w.
      damping: the first λ, in units of the curvature of the loss.
      weight_decay: η_w; the penalty is added to the loss here and must not be in it.
      momentum: whether δ₀ is a direction; without it only α is optimised.
      damping_period: T, steps between the decisions on λ.
      axis_name: the mesh axis over whose devices the gradient, the losses and the
        products are averaged first, needed where the preconditioner has one; None where
        they are averages already.

    Returns:
      A transformation whose ``update`` takes ``value=``, the batch's loss;
      ``value_fn=``, a function of the parameters that returns this loss alone, with the
      same random numbers, and is called at the decisions on λ; and
      ``fisher_products=``, a function from a list of trees to the matrix of their
      products with F, such as
      ``lambda vectors: lbopt.fisher_products(loss_fn, params, vectors, batch)``.

    Raises:
      ValueError: for settings out of range, and, at ``update``, for a missing argument.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from lbopt.transforms.quadratic_model import scale_by_quadratic_model
      >>> f = jnp.array([1.0, 3.0, 10.0])
      >>> loss_fn = lambda w: jnp.sum(f * w**2) / 2
      >>> def products(vectors):
      ...     return jnp.array([[jnp.sum(u * f * v) for v in vectors] for u in vectors])
      >>> functions = {"value_fn": loss_fn, "fisher_products": products}
      >>> tx = scale_by_quadratic_model(optax.identity(), damping=1e-6)
      >>> w = jnp.array([1.0, -2.0, 0.5])
      >>> state = tx.init(w)
      >>> for _ in range(3):
      ...     loss, grads = jax.value_and_grad(loss_fn)(w)
      ...     updates, state = tx.update(grads, state, w, value=loss, **functions)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(loss_fn(w) < 1e-8)  # as many steps as there are parameters
      True

    Source: Martens & Grosse 2015, §6.4 (α), §6.5 (λ), §7 (μ), whose settings for deep
    autoencoders are the defaults here.  As there, λ is part of the M in ρ, which
    tensorflow/kfac takes out; and one λ serves C and the preconditioner, where the
    paper tunes a second one (§6.6).  The paper leaves open parallel directions and
    numbers that are not finite; a ρ that is not finite counts as a failure, as in
    kfac-jax.
    """
    _check(preconditioner, damping, weight_decay, damping_period)
    precondition = optax.with_extra_args_support(preconditioner)
    axis = Axis(axis_name, 1)

    def init_fn(params: Params) -> QuadraticModelState:
        return QuadraticModelState(
            count=jnp.zeros([], jnp.int32),
            damping=jnp.asarray(damping, float),
            last=precise(optax.tree.zeros_like(params)) if momentum else (),
            preconditioner=precondition.init(params),
            lengths=jnp.zeros([2 if momentum else 1]),
            predicted=jnp.zeros([]),
            ratio=jnp.ones([]),
            rejected=jnp.zeros([], jnp.int32),
        )

    def objective(updates: Updates, params: Params, value: Any) -> tuple[Any, Any, Any]:
        """Returns the gradient with the penalty, the loss, and if both are finite."""
        g, loss = collectives.mean((precise(updates), value), axis)
        g = jax.tree.map(lambda g, p: g + weight_decay * p, g, precise(params))
        finite = jnp.isfinite(loss) & jnp.isfinite(squared_norm(g))
        return jax.tree.map(lambda g: jnp.where(finite, g, 0), g), loss, finite

    def rise(value_fn: Any, params: Params, step: Updates, loss: Any) -> Array:
        """Returns h(θ + δ) − h(θ)."""
        after = collectives.mean(value_fn(optax.apply_updates(params, step)), axis)
        penalty = _half_square_change(precise(params), precise(step))
        return jnp.asarray(after, float) - loss + weight_decay * penalty

    def update_fn(
        updates: Updates,
        state: Any,
        params: Params | None = None,
        *,
        value: Scalar | None = None,
        value_fn: Callable[[Params], Any] | None = None,
        fisher_products: Callable[[Any], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, QuadraticModelState]:
        if (
            params is None
            or value is None
            or value_fn is None
            or fisher_products is None
        ):
            raise ValueError(_missing(params, value, value_fn, fisher_products))
        g, loss, finite = objective(updates, params, value)
        amount = state.damping + weight_decay
        extra_args |= {"value": loss, "damping": amount}
        z, inner = precondition.update(g, state.preconditioner, params, **extra_args)
        natural = jax.tree.map(jnp.negative, z)
        directions = [natural, state.last] if momentum else [natural]  # Δ and δ₀
        products = _checked(fisher_products(directions), len(directions))
        products = collectives.mean(products, axis)
        lengths, predicted, solved = _solved(g, directions, amount, products)
        step = _combination(lengths, directions)
        # The loss is evaluated after the step that is taken, in the parameters' dtype.
        rounded = jax.tree.map(lambda s, u: s.astype(u.dtype), step, updates)
        decides = (state.count + 1) % damping_period == 0
        change = jax.lax.cond(
            decides,  # at other steps the loss is not evaluated a second time
            lambda: rise(value_fn, params, rounded, loss).astype(predicted.dtype),
            lambda: jnp.zeros_like(predicted),
        )
        sound = finite & solved & jnp.isfinite(change)
        judged = decides | ~sound  # a step that is not taken raises λ at once
        ratio = _ratio(change, predicted, sound)
        adapted = _levenberg_marquardt(state.damping, ratio, _OMEGA**damping_period)
        nothing = optax.tree.zeros_like
        return _chosen(sound, rounded, nothing(updates)), QuadraticModelState(
            count=optax.safe_increment(state.count),
            damping=_chosen(judged, adapted, state.damping),
            last=_chosen(sound, step, state.last) if momentum else (),
            preconditioner=inner,
            lengths=_chosen(sound, lengths, nothing(state.lengths)),
            predicted=_chosen(sound, predicted, nothing(state.predicted)),
            ratio=_chosen(judged, ratio, state.ratio),
            rejected=state.rejected + ~sound,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _half_square_change(w: Updates, d: Updates) -> Any:
    """Returns ½‖w + d‖² − ½‖w‖²."""
    # Not as that difference, which would lose digits for a small d.
    return inner(w, d) + squared_norm(d) / 2


def _chosen(flag: Array, new: Any, old: Any) -> Any:
    """Returns the new tree if the flag is set, else the old one, in its dtypes."""
    return jax.tree.map(
        lambda new, old: jnp.where(flag, new, old).astype(old.dtype), new, old
    )


def _solved(
    g: Updates, directions: Sequence[Updates], damping: Array, products: Array
) -> tuple[Array, Array, Array]:
    """Returns α and μ, the change that the model predicts, and if all is finite."""
    c = products + damping * _with_each_other(directions)
    slopes = jnp.stack([inner(g, v) for v in directions])
    lengths = _minimum(c, slopes)
    predicted = jnp.vdot(slopes, lengths) / 2  # M(δ) − M(0) at the minimum
    return lengths, predicted, jnp.all(jnp.isfinite(c)) & jnp.isfinite(predicted)


def _with_each_other(vectors: Sequence[Updates]) -> Float[Array, "k k"]:
    """Returns the inner products of every pair."""
    rows = [[inner(u, v) for v in vectors] for u in vectors]
    return jnp.stack([jnp.stack(row) for row in rows])


def _combination(lengths: Float[Array, " k"], vectors: Sequence[Updates]) -> Updates:
    return jax.tree.map(
        lambda *parts: sum(a * x for a, x in zip(lengths, parts, strict=True)), *vectors
    )


def _minimum(c: Float[Array, "k k"], slopes: Float[Array, " k"]) -> Float[Array, " k"]:
    """Returns the multiples of one or two directions that minimise the model."""
    diagonal = jnp.diagonal(c)
    # Scaled to a C with ones on its diagonal, or zeros for a direction that is zero, so
    # that no product of small numbers underflows.
    positive = diagonal > 0
    unit = jnp.where(positive, 1 / jnp.sqrt(jnp.where(positive, diagonal, 1)), 0)
    slopes = unit * slopes
    if len(slopes) == 1:
        return -unit * slopes
    # Cramer's rule; the determinant is the squared sine of the angle in the norm of C.
    cosine = c[0, 1] * unit[0] * unit[1]
    squared_sine = (1 - cosine) * (1 + cosine)
    independent = squared_sine > _PARALLEL * jnp.finfo(c.dtype).eps
    both = (slopes - cosine * slopes[::-1]) / jnp.where(independent, squared_sine, 1)
    alone = slopes * jnp.array([1, 0])  # Δ without δ₀
    return -unit * jnp.where(independent, both, alone)


def _ratio(change: Array, predicted: Array, sound: Array) -> Array:
    """Returns the reduction ratio ρ; 0, a rejected step, if it is not finite."""
    ratio = change / jnp.where(predicted == 0, 1, predicted)
    return jnp.where(sound & (predicted != 0), ratio, 0)


def _levenberg_marquardt(damping: Array, ratio: Array, factor: Scalar) -> Array:
    """Returns λ after a decision: shrunk, kept or grown."""
    good, bad = ratio > 3 / 4, ratio < 1 / 4
    multiple = jnp.where(good, factor, jnp.where(bad, 1 / factor, 1))
    return jnp.clip(damping * multiple, _SMALLEST, _LARGEST)


def _checked(products: Any, k: int) -> Array:
    if jnp.shape(products) != (k, k):
        raise ValueError(
            f"fisher_products returned shape {list(jnp.shape(products))} for {k} trees;"
            f" return the matrix of their products, [{k}, {k}], as "
            "lbopt.fisher_products does"
        )
    return jnp.asarray(products)


def _missing(params: Any, value: Any, value_fn: Any, fisher_products: Any) -> str:
    wanted = {
        "params": params,
        "value=": value,
        "value_fn=": value_fn,
        "fisher_products=": fisher_products,
    }
    missing = ", ".join(name for name, given in wanted.items() if given is None)
    return (
        f"scale_by_quadratic_model.update needs {missing}; call tx.update(grads, state,"
        " params, value=loss, value_fn=lambda p: loss_fn(p, batch), "
        "fisher_products=lambda vectors: lbopt.fisher_products(loss_fn, params, "
        "vectors, batch))"
    )


def _check(
    preconditioner: Any, damping: Any, weight_decay: Any, damping_period: Any
) -> None:
    if not hasattr(preconditioner, "update"):
        raise ValueError(
            f"preconditioner={preconditioner!r} must be a transformation such as "
            "lbopt.scale_by_kfac(layers)"
        )
    checks.positive("damping", damping, "150 is a usual start")
    checks.not_negative("weight_decay", weight_decay, "0 for none")
    checks.whole("damping_period", damping_period, "5 is usual")
