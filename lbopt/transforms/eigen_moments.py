r"""Eigenvalues of the curvature, averaged from second moments between eigenbases.

.. math:: s \leftarrow (1 - w_k) s + w_k s_{\text{batch}}, \qquad
          w_k = \frac{1 - \beta}{1 - \beta^k}

after k statistics, in the bases in effect; when these change, s is transformed to the
new ones.  It is averaged over eigenvectors of equal eigenvalues, which are arbitrary
(``curvature.eigen_moments``).  Until the first statistic s holds the
eigenvalues :math:`d_A d_G^\top` of the Kronecker product.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool

from lbopt import collectives, linalg
from lbopt._typing import Array, Scalar
from lbopt.collectives import Axis
from lbopt.curvature import eigen_moments
from lbopt.curvature import refresh as clocks
from lbopt.curvature.registry import Layer
from lbopt.in_place import update_if
from lbopt.sharding import Owners
from lbopt.transforms import renewal, statistics
from lbopt.transforms.kfac_state import KfacState


class Moments(NamedTuple):
    """One layer's eigenvalues, the same on every device.

    Attributes:
      s: their running average, ``[*copies, *stack, in, out]``; 1 at the start.
      renewals: the number of statistics averaged.
      due: whether a statistic is due at the coming step.
    """

    s: Any
    renewals: Any
    due: Any


def init_moments(
    layers: Mapping[str, Layer], inverses: Mapping[str, Any]
) -> dict[str, Moments]:
    """Returns the moments, before the first bases, of the layers that have any.

    Args:
      layers: the layers by path.
      inverses: their bases before the first statistic.

    Returns:
      The moments by path.
    """
    return {
        path: Moments(
            eigen_moments.kronecker_eigenvalues(layer.block.factors, inverses[path]),
            jnp.zeros([], jnp.int32),
            jnp.zeros([], bool),  # not before the first bases
        )
        for path, layer in layers.items()
        if layer.block.moments is not None
    }


def average(
    layers: Mapping[str, Layer],
    state: KfacState,
    squares: Mapping[str, Array],
    factor_decay: Scalar,
    axis: Axis,
) -> tuple[KfacState, dict[str, Array]]:
    """Folds the second moments that are due, finite and not empty into their averages.

    Args:
      layers: the layers by path.
      state: the state, with the bases that they were evaluated in.
      squares: this device's second moments by path.
      factor_decay: β.
      axis: the devices.

    Returns:
      The state; moments that are not finite are counted in ``rejected``.  And by path
      which moments were due and all zeros, of no row: they stay due.
    """
    due = {path: moments.due for path, moments in state.moments.items()}
    if not due:
        return state, {}

    def renew(old: Any) -> Any:
        means = collectives.mean(dict(squares), axis)
        found = {path: renewed(path, one, means[path]) for path, one in old[0].items()}
        moments = {path: one for path, (one, _) in found.items()}
        return moments, {path: empty for path, (_, empty) in found.items()}

    def renewed(path: str, old: Moments, mean: Array) -> tuple[Moments, Array]:
        s, renewals, due = old
        empty = due & ~jnp.any(mean != 0)
        # Debiased, so that the first second moments replace d_A d_Gᵀ altogether.
        weight = statistics.weight(factor_decay, renewals)
        accepted = due & ~empty & linalg.all_finite(mean) & (weight > 0)
        kinds, bases = layers[path].block.factors, state.inverses[path]
        mean = eigen_moments.pooled(kinds, bases, mean)
        after = statistics.averaged(s, mean, weight, accepted)
        return Moments(after, renewals + accepted, due), empty

    # One condition for all layers, because one collective carries all means.
    start = (state.moments, {path: jnp.zeros([], bool) for path in due})
    after, empty = update_if(jnp.any(jnp.stack(list(due.values()))), renew, start)
    # A statistic that was due and not counted as a renewal was empty or not finite.
    refused = {
        path: due[path]
        & ~empty[path]
        & (after[path].renewals == state.moments[path].renewals)
        for path in due
    }
    counts = jnp.stack([jnp.asarray(refused.get(path, False)) for path in layers])
    return state._replace(moments=after, rejected=state.rejected + counts), empty


def carry(
    layers: Mapping[str, Layer],
    owners: Owners,
    before: KfacState,
    state: KfacState,
    accepted: Bool[Array, " units"],
) -> KfacState:
    """Transforms the moments of layers whose bases changed.

    Args:
      layers: the layers by path.
      owners: the owner of each unit.
      before: the state with the bases in which the moments were taken.
      state: the same with new bases.
      accepted: which units have a new basis.

    Returns:
      The state.
    """
    if not state.moments:
        return state
    known = renewal.all_inverted(layers, owners, before)
    complete = renewal.all_inverted(layers, owners, state)
    changed = renewal.any_by_layer(accepted, owners, layers)
    after = {}
    for number, (path, layer) in enumerate(layers.items()):
        if path not in state.moments:
            continue
        old, new = before.inverses[path], state.inverses[path]

        def first(_: Array, layer: Layer = layer, new: Any = new) -> Array:
            kinds = layer.block.factors
            s = eigen_moments.kronecker_eigenvalues(kinds, new)
            return eigen_moments.pooled(kinds, new, s)

        def rotate(
            s: Array, layer: Layer = layer, old: Any = old, new: Any = new
        ) -> Array:
            s = eigen_moments.carried(s, old, new)
            return eigen_moments.pooled(layer.block.factors, new, s)

        s = state.moments[path].s
        # The first complete bases: identities before them hold no moments to rotate.
        s = update_if(complete[number] & ~known[number], first, s)
        s = update_if(changed[number] & known[number], rotate, s)
        after[path] = state.moments[path]._replace(s=s)
    return state._replace(moments=after)


def scheduled(
    layers: Mapping[str, Layer],
    owners: Owners,
    state: KfacState,
    stats_period: Any,
    empty: Mapping[str, Array],
) -> KfacState:
    """Sets which moments are due at the coming step: none before the first bases."""
    if not state.moments:
        return state
    # A layer without any statistic yet is due at once, not at its next period.
    on_time = clocks.is_due(state.count + 1, stats_period)
    known = dict(zip(layers, renewal.all_inverted(layers, owners, state), strict=True))
    return state._replace(
        moments={
            path: one._replace(
                due=known[path] & (on_time | (one.renewals == 0) | empty[path])
            )
            for path, one in state.moments.items()
        }
    )
