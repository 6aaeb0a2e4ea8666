"""The inversions of a step: units that are due, their damping, and the new state."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from lbopt._typing import Array, Scalar, Whole
from lbopt.collectives import Axis
from lbopt.curvature import unit_wise
from lbopt.curvature.registry import Layer
from lbopt.sharding import Owners
from lbopt.transforms import inversion, kfac_state, scheduled_inversion
from lbopt.transforms.kfac_state import KfacState, plain

# The factor on a layer's damping after an inverse that was not finite.
_DAMPING_GROWTH = 10.0


def sound_damping(value: Any, last: Float[Array, ""]) -> tuple[Array, Array]:
    """Returns λ of this step, and whether it is one.

    Args:
      value: λ of a schedule or of the caller.
      last: the last sound λ, which stays in effect if this one is not positive and
        finite: with no damping at all, every inverse would fail.

    Returns:
      λ in the dtype of the last one, and a flag.
    """
    value = jnp.asarray(value).astype(last.dtype)
    sound = (value > 0) & jnp.isfinite(value)
    return jnp.where(sound, value, last), sound


def amounts(
    layers: Mapping[str, Layer], state: KfacState, value: Any, norm_damping: Scalar
) -> Float[Array, " units"]:
    """Returns the number added to the diagonal of each unit.

    Args:
      layers: the layers by path.
      state: the state with traces and boosts.
      value: λ.
      norm_damping: the factor on λ for normalisation layers.

    Returns:
      The numbers, ``[units]``: λ, or its part by π for the factors of a product.
    """
    amounts = []
    for number, (path, layer) in enumerate(layers.items()):  # in the order of units
        block, traces = layer.block, state.traces[path]
        mine = value * state.boost[number]
        if block.kind in unit_wise.BLOCKS:
            mine = mine * norm_damping
        # Diagonal blocks of one factor are damped alike, by its mean eigenvalue in π.
        means = [
            jnp.sum(t.reshape(-1, f.parts), -1) / f.order
            for t, f in zip(traces, block.factors, strict=True)
        ]
        copies = block.dampings(
            type(traces)(*means), mine.astype(jax.tree.leaves(traces)[0].dtype)
        )
        amounts += [
            # [copies] to [copies × parts], the units of the factor
            jnp.repeat(x, f.parts)
            for x, f in zip(copies, block.factors, strict=True)
        ]
    return jnp.concatenate(amounts)


def invert(
    layers: Mapping[str, Layer],
    owners: Owners,
    state: KfacState,
    scheduled: Bool[Array, " units"] | None,
    amounts: Float[Array, " units"],
    axis: Axis,
) -> tuple[KfacState, inversion.Inverted]:
    """Renews the inverses that are due; all at once if ``scheduled`` is None."""
    due, renew = can_be_inverted(layers, owners, state), scheduled_inversion.invert_all
    if scheduled is not None:
        # A unit without any inverse is due whatever the schedule.
        due &= scheduled | (state.refresh.inverse_step < 0)
        renew = inversion.invert
    inverses, kept, inverted = renew(
        owners,
        _factor_rows(layers, state, axis),
        inverse_leaves(layers, state),
        kfac_state.local(state.kept),
        due,
        amounts,
        axis,
    )
    state = with_inverses(layers, state, inverses, kept)
    return with_outcome(
        layers, owners, state, due, inverted.accepted, state.count
    ), inverted


def invert_later(
    layers: Mapping[str, Layer],
    owners: Owners,
    state: KfacState,
    scheduled: Bool[Array, " units"],
    amounts: Float[Array, " units"],
    axis: Axis,
    delay: Whole,
) -> tuple[KfacState, inversion.Inverted]:
    """Begins the inversions that are due, and delivers inverses that are old enough."""
    pending, count = state.pending, state.count
    at_once = (state.refresh.inverse_step < 0) | (pending.step == kfac_state.AGAIN)
    due = (scheduled | at_once) & can_be_inverted(layers, owners, state)
    first = due & at_once  # delivered in this step
    ready = (pending.step >= 0) & (count - pending.step >= delay)
    inverses, kept, buffers, inverted = inversion.invert_later(
        owners,
        _factor_rows(layers, state, axis),
        inverse_leaves(layers, state),
        kfac_state.local(state.kept),
        kfac_state.local(pending.desks),
        due,
        ready,
        first,
        amounts,
        axis,
    )
    state = with_inverses(layers, state, inverses, kept)
    made = jnp.where(first, count, pending.step)  # the step of the factors
    state = with_outcome(layers, owners, state, ready | first, inverted.accepted, made)
    # In this order: a unit may be delivered and begun anew in one step.
    step = jnp.where(ready, kfac_state.NONE, pending.step)
    step = jnp.where(due, jnp.where(first, kfac_state.NONE, count), step)
    buffers = kfac_state.as_in(pending.desks, buffers)
    return state._replace(pending=kfac_state.Pending(buffers, step)), inverted


def can_be_inverted(
    layers: Mapping[str, Layer], owners: Owners, state: KfacState
) -> Bool[Array, " units"]:
    """Returns which units belong to layers all of whose statistics are known."""
    # π needs the traces of both factors.
    unknown = kfac_state.by_layer(state.refresh.renewals == 0, layers)
    return (unknown == 0)[_layer_of(owners)]


def _factor_rows(
    layers: Mapping[str, Layer], state: KfacState, axis: Axis
) -> list[Float[Array, "_ _"]]:
    factors = jax.tree.leaves(plain(state.factors))
    return [
        kfac_state.rows(x, f, axis)
        for x, f in zip(factors, kfac_state.kinds(layers), strict=True)
    ]


def inverse_leaves(layers: Mapping[str, Layer], state: KfacState) -> list[Any]:
    """Returns each factor's inverse, or None if it stays with its owner."""
    return [
        x
        for path, layer in layers.items()
        for x in state.inverses.get(path, [None] * len(layer.block.factors))
    ]


def with_inverses(
    layers: Mapping[str, Layer], state: KfacState, inverses: Any, kept: Any
) -> KfacState:
    """Returns the state with new inverses of each factor and new owners' buffers."""
    remaining = iter(inverses)
    by_path = {
        path: layer.block.inverses(*(next(remaining) for _ in layer.block.factors))
        for path, layer in layers.items()
    }
    return state._replace(
        inverses={path: by_path[path] for path in state.inverses},
        kept=kfac_state.as_in(state.kept, kept),
    )


def with_outcome(
    layers: Mapping[str, Layer],
    owners: Owners,
    state: KfacState,
    tried: Bool[Array, " units"],
    accepted: Bool[Array, " units"],
    made: Int[Array, "*units"],
) -> KfacState:
    """Returns the state after an attempt to renew inverses.

    Args:
      layers: the layers by path.
      owners: the owner of each unit.
      state: the state.
      tried: the units whose new inverses were delivered.
      accepted: those of them that are finite.
      made: the step whose factors they are of, for each unit or for all.

    Returns:
      The state with boosts, rejections and the steps of the inverses.
    """
    failed = any_by_layer(tried & ~accepted, owners, layers)
    renewed = any_by_layer(accepted, owners, layers)
    # A layer of which some units failed and others did not is boosted.
    boost = jnp.where(renewed, 1.0, state.boost)
    step = jnp.where(accepted, made, state.refresh.inverse_step)
    return state._replace(
        boost=jnp.where(failed, state.boost * _DAMPING_GROWTH, boost),
        rejected=state.rejected + failed,
        refresh=state.refresh._replace(inverse_step=step),
    )


def _layer_of(owners: Owners) -> np.ndarray:
    return np.asarray([unit.layer for unit in owners.units])


def any_by_layer(
    flags: Bool[Array, " units"], owners: Owners, layers: Mapping[str, Layer]
) -> Bool[Array, " layers"]:
    """Returns for each layer whether the flag of any of its units is set."""
    mine = np.arange(len(layers))[:, None] == _layer_of(owners)[None]
    return jnp.any(mine & flags[None], 1)


def all_inverted(
    layers: Mapping[str, Layer], owners: Owners, state: KfacState
) -> Bool[Array, " layers"]:
    """Returns which layers have inverses of all their units."""
    return ~any_by_layer(state.refresh.inverse_step < 0, owners, layers)
