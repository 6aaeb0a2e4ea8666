"""What an optimizer's curvature did in a step, as metrics of the step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lbopt
from lbopt.transforms.kfac_state import KfacState


def of(opt_state: Any) -> dict[str, jax.Array]:
    """Scalars that say what the last step did with its curvature.

    Pure, to be called on the state after a step, inside of the function that is
    compiled or in one of its own. A step that was skipped changes no optimizer state,
    so that these are then those of the step before.

    Args:
        opt_state: The optimizer's state: any optax chain.

    Returns:
        Nothing for an optimizer without curvature; else

        - `refreshed`: The share of statistics that were renewed.
        - `refreshed_bytes`: The same share, each statistic weighed by its bytes.
        - `inversions`: Units (factors, or their blocks and copies) that got a new
          inverse.
        - `inverse_age` and `inverse_age_max`: Steps since the statistics that a
          factor's inverse was made from, mean and largest; of a factor with several
          units that of the oldest.
        - `sent_bytes`: What each device put into collectives for statistics and
          inverses; gradients are not counted.
        - `boosted`: Layers whose damping is raised, because an inverse failed.
        - `rejected`: How often so far a statistic or an inverse was not finite.
    """
    states = [
        node
        for node in jax.tree.leaves(opt_state, is_leaf=_is_curvature)
        if _is_curvature(node)
    ]
    if not states:
        return {}
    renewed = jnp.concatenate([_renewed(state) for state in states])
    sizes = np.concatenate([_sizes(state) for state in states])
    ages = jnp.stack(jax.tree.leaves(lbopt.inverse_age(opt_state)))
    reports = [state.report for state in states]
    sent = [jnp.sum(r.statistic_bytes) + r.inverse_bytes for r in reports]
    return {
        "refreshed": jnp.mean(renewed, dtype=jnp.float32),
        "refreshed_bytes": jnp.dot(renewed, sizes / sizes.sum()),
        "inversions": _total([r.inversions for r in reports]),
        "inverse_age": jnp.mean(ages, dtype=jnp.float32),
        "inverse_age_max": jnp.max(ages),
        "sent_bytes": _total(sent),
        "boosted": _total([jnp.sum(state.boost > 1) for state in states]),
        "rejected": _total([jnp.sum(state.rejected) for state in states]),
    }


def _is_curvature(node: Any) -> bool:
    return isinstance(node, KfacState)


def _renewed(state: KfacState) -> jax.Array:
    """Which statistics the last step took."""
    taken = state.refresh.statistic_step
    return ((taken == state.count - 1) & (taken >= 0)).astype(jnp.float32)


def _sizes(state: KfacState) -> np.ndarray:
    """The bytes of each statistic, in the order of the clocks."""
    return np.asarray(
        [x.size * x.dtype.itemsize for x in jax.tree.leaves(state.factors)], np.float32
    )


def _total(parts: list[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack(parts))
