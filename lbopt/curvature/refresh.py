"""When statistics and inverses are renewed, and what the state says of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lbopt._typing import Array, Count, OptState


class Refresh(NamedTuple):
    """The clocks of an optimizer's statistics and inverses.

    Statistics are numbered as the leaves of the factors, inverses as the layers.

    Attributes:
      due: whether a statistic is wanted at the coming step, ``[statistics]``.
      renewals: how often it was renewed, ``[statistics]``.
      statistic_step: the step at which it was last renewed, −1 before the first.
      inverse_step: the step at which a layer's inverses were last renewed, likewise.
    """

    due: Any
    renewals: Any
    statistic_step: Any
    inverse_step: Any


def init_refresh(statistics: int, layers: int) -> Refresh:
    """Clocks before the first step, at which everything is due."""
    return Refresh(
        due=jnp.ones(statistics, bool),
        renewals=jnp.zeros(statistics, jnp.int32),
        statistic_step=jnp.full(statistics, -1, jnp.int32),
        inverse_step=jnp.full(layers, -1, jnp.int32),
    )


def is_due(count: Array, period: Count | int) -> Array:
    """Whether something with this period is renewed at step ``count`` (from 0)."""
    return jnp.asarray(count % period == 0)


def refresh(opt_state: OptState) -> dict[str, Any]:
    """Which statistics the optimizer wants at the coming step.

    Args:
      opt_state: the state of any optax chain that holds a curvature transform.

    Returns:
      For each layer's path its statistics' type with a flag in the place of each
      array, to pass as ``due=`` to the function that ``value_grad_and_curvature``
      makes.

    Raises:
      ValueError: if no curvature transform is in the state.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Sequential([nn.Dense(3)]), jnp.ones((8, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> layers = lbopt.trace_layers(loss_fn, params, x)
      >>> state = lbopt.kfac(0.1, layers).init(params)
      >>> bool(lbopt.refresh(state)["layers_0"].a)
      True
    """
    masks: dict[str, Any] = {}

    def has_refresh(node: Any) -> bool:
        return isinstance(getattr(node, "refresh", None), Refresh)

    for node in jax.tree.leaves(opt_state, is_leaf=has_refresh):
        if has_refresh(node):
            tree = jax.tree.structure(node.factors)
            due = node.refresh.due
            masks.update(
                jax.tree.unflatten(tree, [due[i] for i in range(tree.num_leaves)])
            )
    if not masks:
        raise ValueError(
            f"opt_state={type(opt_state).__name__} holds no curvature transform; pass "
            "the state of a chain with lbopt.scale_by_kfac in it, or leave due= out"
        )
    return masks
