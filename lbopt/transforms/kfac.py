r"""K-FAC as a gradient transformation.

.. math:: U_\ell = (A_\ell + \pi_\ell \sqrt{\lambda} I)^{-1}\, \nabla W_\ell\,
          (G_\ell + \tfrac{1}{\pi_\ell} \sqrt{\lambda} I)^{-1}

with the factors' running averages A and G.  The transformation is a pipeline of the
curvature blocks' functions: statistics → factors → inverses → natural gradient.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Int

from lbopt import sharding
from lbopt._typing import Array, Count, Params, Scalar, ScalarOrSchedule, Updates
from lbopt.collectives import Axis
from lbopt.curvature import capture, unit_wise
from lbopt.curvature import refresh as clocks
from lbopt.curvature.registry import Layer, Layers
from lbopt.sharding import Owners, Sharded
from lbopt.transforms import inversion, kfac_state, validation
from lbopt.transforms.kfac_state import KfacState, plain
from lbopt.transforms.placement import precondition_on_owners
from lbopt.transforms.statistics import Findings, Running, fold

# A block whose inverse was not finite tries again with this many times the damping.
_DAMPING_GROWTH = 10.0


def scale_by_kfac(
    layers: Layers,
    *,
    damping: ScalarOrSchedule = 1e-3,
    norm_damping: Scalar = 1.0,
    factor_decay: Scalar = 0.95,
    stats_period: Count | int = 1,
    inverse_period: Count | int = 1,
    stagger: bool = False,
    stale_threshold: Scalar | None = None,
    block_size: int | None = None,
    exact_damping: bool = False,
    axis_name: str | None = None,
    axis_size: Count | int = 1,
    placement: float | int | str = "comm",
    gather_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies gradients by the inverse of the layers' damped curvature.

    .. math:: A \leftarrow A + \frac{1 - \beta}{1 - \beta^k} (A_{\text{batch}} - A)

    is the running average after k statistics (debiased: the first is taken whole), and
    likewise for every other statistic; the natural gradient is as in the module's
    equation, with the trace-norm π of ``linalg.pi_damping``.

    Where a statistic is not finite the old average stays; where an inverse is not
    finite the old inverse stays and the layer's damping grows tenfold until one is.
    Both are counted in ``rejected``.

    With ``axis_name``, under ``jax.shard_map`` or ``jax.pmap`` over that axis, the
    gradients and statistics are those of each device's examples; the transformation
    averages them.  Factors are cut into equal shares over the devices, and each unit is
    inverted by one device (``lbopt.sharding``).

    Args:
      layers: what ``trace_layers`` found.
      damping: λ, in units of the curvature of the loss; a number or a schedule of the
        step.
      norm_damping: what λ is multiplied by for normalisation layers.
      factor_decay: β, in [0, 1); 0 keeps the last statistic alone.
      stats_period: steps from one statistic to the next.
      inverse_period: steps from one inversion to the next.
      stagger: spread the inversions of each device evenly over the steps of
        ``inverse_period`` instead of inverting everything at once; the first step
        inverts all.
      stale_threshold: α of SP-NGD's adaptive refresh (``curvature.refresh``), which
        takes the place of the periods: a statistic is renewed, and its factor inverted,
        when its own clock says so.  None for the periods.
      block_size: factors with more rows are cut into equal diagonal blocks with at most
        so many; None keeps them whole.
      exact_damping: invert A ⊗ G + λI itself, in the factors' eigenbases, instead of
        splitting λ between the factors; dearer, and never a shorter step.
      axis_name: the mesh axis over whose devices examples are spread; None for one
        device, or where ``jit`` alone places the work.
      axis_size: devices along it.
      placement: where inverses live and gradients are preconditioned.  ``"comm"``:
        every device gets all inverses, and gradients are all-reduced.  ``"memory"``:
        a layer's inverses stay with its owner; gradients are reduce-scattered, and
        the natural gradients gathered.  A number between: the share of the bytes of
        all inverses that every device gets, the smallest layers first.
      gather_dtype: type in which inverses travel (for example ``jnp.bfloat16``).

    Returns:
      A transformation whose ``update`` takes ``curvature=``, the statistics of
      ``value_grad_and_curvature``.

    Raises:
      ValueError: for settings out of range.

    Examples:
      >>> import lbopt, optax
      >>> def make(layers):
      ...     return optax.chain(lbopt.scale_by_kfac(layers), optax.scale(-0.1))

    Source: Martens & Grosse 2015, §2–6; Ba, Grosse & Martens 2017; the adaptive refresh
    and the distribution: Osawa et al. 2022, §4.3 and §5.  The papers leave open how
    numbers that are not finite are treated; refusing them is our choice.  Until a
    layer's first statistic its gradient passes unchanged.  SP-NGD reduces each
    statistic to one device; here each device keeps a share of every statistic, which
    moves the same bytes without padding them to the largest owner.  Where only one
    factor of a layer is renewed, only that one is inverted, with π from the latest
    traces of both.
    """
    validation.check_settings(
        layers, damping, factor_decay, stats_period, inverse_period, stale_threshold
    )
    validation.check_sizes(block_size, axis_name, axis_size, norm_damping)
    validation.check_placement(placement)
    axis = Axis(axis_name, 1 if axis_name is None else int(axis_size))
    known = sharding.configured(
        layers.preconditioned, exact_damping=exact_damping, block_size=block_size
    )
    adaptive = stale_threshold is not None

    def owners_of(own: Mapping[str, Layer]) -> Owners:
        gathered = None
        if axis_name is not None:
            gathered = sharding.gathered_layers(own, placement)
        turns: Any = inverse_period if stagger else 1
        units = sharding.units_of(own)
        return sharding.owners_of(units, axis.size, period=turns, gathered=gathered)

    def init_fn(params: Params) -> KfacState:
        own = validation.present_layers(known, params)
        return kfac_state.init_state(own, owners_of(own), axis, adaptive)

    def update_fn(
        updates: Updates,
        state: Any,
        params: Params | None = None,
        *,
        curvature: Mapping[str, Any] | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, KfacState]:
        del params, extra_args
        axis.require()
        # JAX sorts the keys of a dictionary, and the clocks are numbered by its leaves.
        own = {path: known[path] for path in sorted(plain(state.factors))}
        statistics = validation.checked_statistics(own, curvature)
        validation.check_shares(own, plain(state.factors), axis)
        owners = owners_of(own)
        due = state.refresh.due
        state, findings = _average(
            own, state, statistics, factor_decay, stale_threshold, axis
        )
        if adaptive:
            turn = findings.accepted[np.asarray([u.statistic for u in owners.units])]
        else:
            turn = clocks.is_due(state.count, inverse_period, np.asarray(owners.phase))
        value = damping(state.count) if callable(damping) else damping
        amounts = _amounts(own, state, value, norm_damping)
        state, inverted = _invert(own, owners, state, turn, amounts, axis, gather_dtype)
        updates, natural = _precondition(own, owners, state, updates, axis)
        state = state._replace(
            count=jnp.asarray(optax.safe_increment(state.count)),
            refresh=_clocks(state, findings, stats_period, adaptive),
            report=kfac_state.report(
                own, owners, due, inverted, not adaptive, axis, gather_dtype
            ),
        )
        return _put(own, updates, natural), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _average(
    own: Mapping[str, Layer],
    state: KfacState,
    statistics: Mapping[str, Any],
    factor_decay: Any,
    stale_threshold: Any,
    axis: Axis,
) -> tuple[KfacState, Findings]:
    """Folds the statistics that are due and finite into the factors."""
    due, renewals = state.refresh.due, state.refresh.renewals
    weights = (1 - factor_decay) / (1 - factor_decay ** (renewals + 1.0))
    kinds = _kinds(own)
    factors, tree = jax.tree.flatten(plain(state.factors))
    before = jax.tree.leaves(plain(state.before))
    running = [
        Running(_rows(x, f, axis), _rows(b, f, axis) if before else (), t)
        for x, b, t, f in zip(
            factors,
            before or factors,
            jax.tree.leaves(state.traces),
            kinds,
            strict=True,
        )
    ]

    def packer(path: str, number: int) -> Callable[[], Array]:
        block = own[path].block
        size = block.factors[number].size
        return lambda: block.pack(statistics[path])[number].reshape(-1, size)

    packed = [
        packer(path, i) for path in own for i in range(len(own[path].block.factors))
    ]
    running, findings = fold(
        kinds, running, packed, due, weights, stale_threshold, axis
    )

    def rebuilt(rows: list[Array]) -> Any:
        shaped = [r.reshape(x.shape) for r, x in zip(rows, factors, strict=True)]
        whole = jax.tree.unflatten(tree, shaped)
        return Sharded(whole) if isinstance(state.factors, Sharded) else whole

    state = state._replace(
        factors=rebuilt([r.factor for r in running]),
        before=rebuilt([r.before for r in running]) if before else (),
        traces=jax.tree.unflatten(tree, [r.traces for r in running]),
        rejected=state.rejected + _by_layer(due & ~findings.accepted, own),
        refresh=state.refresh._replace(
            renewals=renewals + findings.accepted,
            statistic_step=jnp.where(
                findings.accepted, state.count, state.refresh.statistic_step
            ),
        ),
    )
    return state, findings


def _invert(
    own: Mapping[str, Layer],
    owners: Owners,
    state: KfacState,
    turn: Bool[Array, " units"],
    amounts: Float[Array, " units"],
    axis: Axis,
    gather_dtype: Any,
) -> tuple[KfacState, inversion.Inverted]:
    """Renews the inverses whose turn it is."""
    layer_of = np.asarray([unit.layer for unit in owners.units])
    known = (_by_layer(state.refresh.renewals == 0, own) == 0)[layer_of]
    due = known & (turn | (state.refresh.inverse_step < 0))
    factors = jax.tree.leaves(plain(state.factors))
    nothing = [None] * len(factors)
    inverses, kept, inverted = inversion.invert(
        owners,
        [_rows(x, f, axis) for x, f in zip(factors, _kinds(own), strict=True)],
        [
            x
            for path, layer in own.items()
            for x in state.inverses.get(path, nothing[: len(layer.block.factors)])
        ],
        kfac_state.local(state.kept),
        due,
        amounts,
        axis,
        gather_dtype,
    )
    remaining = iter(inverses)
    by_path = {
        path: layer.block.inverses(*(next(remaining) for _ in layer.block.factors))
        for path, layer in own.items()
    }
    by_path = {path: by_path[path] for path in state.inverses}
    failed = _any_by_layer(due & ~inverted.accepted, layer_of, own)
    renewed = _any_by_layer(inverted.accepted, layer_of, own)
    boost = jnp.where(renewed, 1.0, state.boost)
    state = state._replace(
        inverses=by_path,
        kept=kfac_state.as_in(state.kept, kept),
        boost=jnp.where(failed, state.boost * _DAMPING_GROWTH, boost),
        rejected=state.rejected + failed,
        refresh=state.refresh._replace(
            inverse_step=jnp.where(
                inverted.accepted, state.count, state.refresh.inverse_step
            )
        ),
    )
    return state, inverted


def _amounts(
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
        copies = block.dampings(type(traces)(*means), mine.astype(_dtype(traces)))
        amounts += [
            jnp.repeat(x, f.parts) for x, f in zip(copies, block.factors, strict=True)
        ]
    return jnp.concatenate(amounts)


def _clocks(
    state: KfacState, findings: Findings, stats_period: Any, adaptive: bool
) -> clocks.Refresh:
    """The clocks after this step, with what is due at the next."""
    refresh, coming = state.refresh, state.count + 1
    never = refresh.renewals == 0
    if not adaptive:
        return refresh._replace(due=clocks.is_due(coming, stats_period) | never)
    accepted, last = findings.accepted, refresh.interval
    interval = clocks.next_interval(
        findings.similar, findings.similar_before, last, refresh.previous_interval
    )
    interval = jnp.where(accepted, interval, last)
    return refresh._replace(
        interval=interval,
        previous_interval=jnp.where(accepted, last, refresh.previous_interval),
        # A statistic that was refused stays due.
        due=(coming >= refresh.statistic_step + interval) | never,
    )


def _precondition(
    own: Mapping[str, Layer],
    owners: Owners,
    state: KfacState,
    updates: Updates,
    axis: Axis,
) -> tuple[Updates, dict[str, dict[str, Array]]]:
    """The mean gradients of what has no curvature here, and the natural gradients."""
    kept = {path: layer for path, layer in own.items() if path not in state.inverses}
    gradients = {path: _gradients(layer, updates) for path, layer in kept.items()}
    updates = sharding.mean_of_others(updates, kept.values(), axis)
    natural = {
        path: layer.block.precondition(state.inverses[path], _gradients(layer, updates))
        for path, layer in own.items()
        if path in state.inverses
    }
    if kept:
        natural |= precondition_on_owners(
            own, owners, kfac_state.local(state.kept), gradients, axis
        )
    return updates, {
        path: _as_they_lie(layer, natural[path], updates) for path, layer in own.items()
    }


def _gradients(layer: Layer, updates: Updates) -> dict[str, Array]:
    """One layer's gradients, copies first, in the type of its curvature."""
    location, axes = layer.tapped.location, layer.tapped.axes
    arrays = capture.lookup(updates, location)
    dtype = layer.block.sums[0].dtype
    return {
        name: capture.copies_first(arrays[name], axes).astype(dtype)
        for name in location.names
    }


def _as_they_lie(
    layer: Layer, natural: Mapping[str, Array], updates: Updates
) -> dict[str, Array]:
    """One layer's arrays as they lie in the parameters."""
    location, axes = layer.tapped.location, layer.tapped.axes
    arrays = capture.lookup(updates, location)
    return {
        name: capture.copies_back(natural[name], axes).astype(arrays[name].dtype)
        for name in location.names
    }


def _put(
    own: Mapping[str, Layer], updates: Updates, natural: Mapping[str, dict[str, Array]]
) -> Updates:
    """The updates with each layer's arrays replaced by its natural gradient."""
    replaced: dict[tuple[Any, ...], dict[str, Array]] = {}
    for path, layer in own.items():
        replaced.setdefault(layer.tapped.location.keys, {}).update(natural[path])
    return capture.insert(updates, replaced)


def _kinds(own: Mapping[str, Layer]) -> list[Any]:
    """The kind of each statistic's factor."""
    return [f for layer in own.values() for f in layer.block.factors]


def _rows(x: Array, factor: Any, axis: Axis) -> Array:
    """This device's part of a factor, a row for each copy."""
    return x.reshape(-1, axis.share(factor.size))


def _by_layer(
    flags: Bool[Array, " statistics"], own: Mapping[str, Layer]
) -> Int[Array, " layers"]:
    """Sums flags of statistics for each layer."""
    layer_of = [i for i, x in enumerate(own.values()) for _ in x.block.factors]
    counts = flags.astype(jnp.int32)
    return jax.ops.segment_sum(counts, np.asarray(layer_of), len(own))


def _any_by_layer(
    flags: Bool[Array, " units"], layer_of: np.ndarray, own: Mapping[str, Layer]
) -> Bool[Array, " layers"]:
    counts = flags.astype(jnp.int32)
    return jax.ops.segment_sum(counts, layer_of, len(own)) > 0


def _dtype(tree: Any) -> Any:
    return jax.tree.leaves(tree)[0].dtype
