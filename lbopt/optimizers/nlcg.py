"""NLCG as a ready optimizer."""

import optax

from lbopt._typing import AxisName, Count, Scalar, ScalarOrSchedule
from lbopt.transforms.nlcg import Beta, Preconditioner, scale_by_nlcg
from lbopt.transforms.step_control import StepControl


def nlcg(
    learning_rate: ScalarOrSchedule,
    *,
    beta: Beta | Scalar = "fletcher_reeves",
    preconditioner: Preconditioner = "bfgs",
    step_control: StepControl | None = "step",
    control_period: Count = 5,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditioned nonlinear conjugate gradients for large batches.

    .. math:: d_k = -P_k g_k + \beta_k d_{k-1}, \qquad
              w \leftarrow w + \eta_k b_k d_k

    with the settings of the authors' release; ``scale_by_nlcg`` has the equations.

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
    paper was not available.
    """
    return scale_by_nlcg(
        learning_rate,
        beta=beta,
        preconditioner=preconditioner,
        step_control=step_control,
        control_period=control_period,
        axis_name=axis_name,
    )
