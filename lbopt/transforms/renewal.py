"""Which inverses are renewed at a step, with what damping, and what the state notes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from lbopt._typing import Array, Scalar
from lbopt.collectives import Axis
from lbopt.curvature import unit_wise
from lbopt.curvature.registry import Layer
from lbopt.sharding import Owners
from lbopt.transforms import inversion, kfac_state
from lbopt.transforms.kfac_state import KfacState, plain

# A block whose inverse was not finite tries again with this many times the damping.
_DAMPING_GROWTH = 10.0


def amounts(
    own: Mapping[str, Layer], state: KfacState, value: Any, norm_damping: Scalar
) -> Float[Array, " units"]:
    """What is added to the diagonal of each unit."""
    amounts = []
    for number, (path, layer) in enumerate(own.items()):
        block, traces = layer.block, state.traces[path]
        mine = value * state.boost[number]
        if block.kind in unit_wise.BLOCKS:
            mine = mine * norm_damping
        # A factor's parts share its mean eigenvalue.
        means = [
            jnp.sum(t.reshape(-1, f.parts), -1) / f.order
            for t, f in zip(traces, block.factors, strict=True)
        ]
        copies = block.dampings(
            type(traces)(*means), mine.astype(jax.tree.leaves(traces)[0].dtype)
        )
        amounts += [
            jnp.repeat(x, f.parts) for x, f in zip(copies, block.factors, strict=True)
        ]
    return jnp.concatenate(amounts)


def invert(
    own: Mapping[str, Layer],
    owners: Owners,
    state: KfacState,
    turn: Bool[Array, " units"],
    amounts: Float[Array, " units"],
    axis: Axis,
    delay: int | None = None,
) -> tuple[KfacState, inversion.Inverted]:
    """Renews the inverses that are due; with a delay, delivers those due before."""
    if delay:
        return _invert_later(own, owners, state, turn, amounts, axis, delay)
    due = can_be_inverted(own, owners, state)
    due &= turn | (state.refresh.inverse_step < 0)
    inverses, kept, inverted = inversion.invert(
        owners,
        _factor_rows(own, state, axis),
        inverse_leaves(own, state),
        kfac_state.local(state.kept),
        due,
        amounts,
        axis,
    )
    state = with_inverses(own, state, inverses, kept)
    return noted(own, owners, state, due, inverted.accepted, state.count), inverted


def _invert_later(
    own: Mapping[str, Layer],
    owners: Owners,
    state: KfacState,
    turn: Bool[Array, " units"],
    amounts: Float[Array, " units"],
    axis: Axis,
    delay: int,
) -> tuple[KfacState, inversion.Inverted]:
    """Begins the inversions that are due, and delivers inverses that are old enough."""
    pending, count = state.pending, state.count
    at_once = (state.refresh.inverse_step < 0) | (pending.step == kfac_state.AGAIN)
    due = (turn | at_once) & can_be_inverted(own, owners, state)
    first = due & at_once
    ready = (pending.step >= 0) & (count - pending.step >= delay)
    inverses, kept, desks, inverted = inversion.invert_later(
        owners,
        _factor_rows(own, state, axis),
        inverse_leaves(own, state),
        kfac_state.local(state.kept),
        kfac_state.local(pending.desks),
        due,
        ready,
        first,
        amounts,
        axis,
    )
    state = with_inverses(own, state, inverses, kept)
    made = jnp.where(first, count, pending.step)
    state = noted(own, owners, state, ready | first, inverted.accepted, made)
    step = jnp.where(ready, kfac_state.NONE, pending.step)
    step = jnp.where(due, jnp.where(first, kfac_state.NONE, count), step)
    desks = kfac_state.as_in(pending.desks, desks)
    return state._replace(pending=kfac_state.Pending(desks, step)), inverted


def can_be_inverted(
    own: Mapping[str, Layer], owners: Owners, state: KfacState
) -> Bool[Array, " units"]:
    """Which units are of layers all of whose statistics are known."""
    unknown = kfac_state.by_layer(state.refresh.renewals == 0, own)
    return (unknown == 0)[_layer_of(owners)]


def _factor_rows(
    own: Mapping[str, Layer], state: KfacState, axis: Axis
) -> list[Float[Array, "_ _"]]:
    factors = jax.tree.leaves(plain(state.factors))
    return [
        kfac_state.rows(x, f, axis)
        for x, f in zip(factors, kfac_state.kinds(own), strict=True)
    ]


def inverse_leaves(own: Mapping[str, Layer], state: KfacState) -> list[Any]:
    """The inverse of each statistic's factor; None where it stays with its owner."""
    return [
        x
        for path, layer in own.items()
        for x in state.inverses.get(path, [None] * len(layer.block.factors))
    ]


def with_inverses(
    own: Mapping[str, Layer], state: KfacState, inverses: Any, kept: Any
) -> KfacState:
    """The state with other inverses, of each statistic's factor, and other desks."""
    remaining = iter(inverses)
    by_path = {
        path: layer.block.inverses(*(next(remaining) for _ in layer.block.factors))
        for path, layer in own.items()
    }
    return state._replace(
        inverses={path: by_path[path] for path in state.inverses},
        kept=kfac_state.as_in(state.kept, kept),
    )


def noted(
    own: Mapping[str, Layer],
    owners: Owners,
    state: KfacState,
    tried: Bool[Array, " units"],
    accepted: Bool[Array, " units"],
    made: Int[Array, "*units"],
) -> KfacState:
    """The state with what became of the units that were tried, made at some step."""
    failed = any_by_layer(tried & ~accepted, owners, own)
    renewed = any_by_layer(accepted, owners, own)
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
    flags: Bool[Array, " units"], owners: Owners, own: Mapping[str, Layer]
) -> Bool[Array, " layers"]:
    """Whether the flag of any unit of a layer is set."""
    counts = flags.astype(jnp.int32)
    return jax.ops.segment_sum(counts, _layer_of(owners), len(own)) > 0


def all_inverted(
    own: Mapping[str, Layer], owners: Owners, state: KfacState
) -> Bool[Array, " layers"]:
    """Which layers have inverses of all their units."""
    return ~any_by_layer(state.refresh.inverse_step < 0, owners, own)
