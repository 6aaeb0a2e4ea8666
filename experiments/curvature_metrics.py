"""Metrics of a step about the curvature of the optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lbopt
from lbopt.transforms.kfac_state import KfacState


def of(opt_state: Any) -> dict[str, jax.Array]:
    """Returns scalars on what the last step did with its curvature.

    A pure function of the state after a step; it may be compiled with the step. A step
    that was skipped leaves the optimizer state as it was, so the scalars are then those
    of the step before.

    Args:
      opt_state: the state of any optax chain.

    Returns:
      Nothing for an optimizer without curvature; otherwise

      - ``refreshed``: the share of statistics that were renewed.
      - ``refreshed_bytes``: the same share, each statistic weighted by its bytes.
      - ``inversions``: units (factors, or their blocks and copies) with a new inverse.
      - ``inverse_age`` and ``inverse_age_max``: steps since the statistics from which
        the inverse of a factor was computed, mean and largest; for a factor of several
        units, of the oldest.
      - ``sent_bytes``: bytes that each device passed to collectives for statistics and
        inverses; gradients are not counted.
      - ``boosted``: layers with raised damping, because an inversion failed.
      - ``rejected``: how many statistics and inverses so far were not finite.
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
    """Returns 1 for each statistic that the last step renewed, 0 for the others."""
    taken = state.refresh.statistic_step
    return ((taken == state.count - 1) & (taken >= 0)).astype(jnp.float32)


def _sizes(state: KfacState) -> np.ndarray:
    """Returns the bytes of each statistic, in the order of ``statistic_step``."""
    return np.asarray(
        [x.size * x.dtype.itemsize for x in jax.tree.leaves(state.factors)], np.float32
    )


def _total(parts: list[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack(parts))
