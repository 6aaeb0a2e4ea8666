r"""K-FAC as a gradient transformation.

.. math:: U_\ell = (A_\ell + \pi_\ell \sqrt{\lambda} I)^{-1}\, \nabla W_\ell\,
          (G_\ell + \tfrac{1}{\pi_\ell} \sqrt{\lambda} I)^{-1}

with the factors' running averages A and G.  The transformation is a pipeline of the
curvature blocks' functions: statistics → factors → inverses → natural gradient.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Int

from lbopt import linalg
from lbopt._typing import Array, Count, Params, Scalar, ScalarOrSchedule, Updates
from lbopt.curvature import capture
from lbopt.curvature import refresh as clocks
from lbopt.curvature.registry import Layer, Layers
from lbopt.in_place import update_if

# A block whose inverse was not finite tries again with this many times the damping.
_DAMPING_GROWTH = 10.0


class KfacState(NamedTuple):
    """State of ``scale_by_kfac``; layers by path, numbered in alphabetical order.

    Attributes:
      count: steps taken.
      factors: running averages of the statistics, packed; change with the statistics.
      refresh: the clocks of statistics and inverses.
      inverses: damped inverses, packed; change with the inverses.
      boost: what each layer's damping is multiplied by, 1 unless its inverse failed.
      rejected: how often a layer's statistic or inverse was not finite and was refused.
    """

    count: Any
    factors: Any
    refresh: Any
    inverses: Any
    boost: Any
    rejected: Any


def scale_by_kfac(
    layers: Layers,
    *,
    damping: ScalarOrSchedule = 1e-3,
    factor_decay: Scalar = 0.95,
    stats_period: Count | int = 1,
    inverse_period: Count | int = 1,
    exact_damping: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies gradients by the inverse of the layers' damped curvature.

    .. math:: A \leftarrow A + \frac{1 - \beta}{1 - \beta^k} (A_{\text{batch}} - A)

    is the running average after k statistics (debiased: the first is taken whole), and
    likewise for every other statistic; the natural gradient is as in the module's
    equation, with the trace-norm π of ``linalg.pi_damping``.

    Where a statistic is not finite the old average stays; where an inverse is not
    finite the old inverse stays and the layer's damping grows tenfold until one is.
    Both are counted in ``rejected``.

    Args:
      layers: what ``trace_layers`` found.
      damping: λ, in units of the curvature of the loss; a number or a schedule of the
        step.
      factor_decay: β, in [0, 1); 0 keeps the last statistic alone.
      stats_period: steps from one statistic to the next.
      inverse_period: steps from one inversion to the next.
      exact_damping: invert A ⊗ G + λI itself, in the factors' eigenbases, instead of
        splitting λ between the factors; dearer, and never a shorter step.

    Returns:
      A transformation whose ``update`` takes ``curvature=``, the statistics of
      ``value_grad_and_curvature``.

    Raises:
      ValueError: for settings out of range.

    Examples:
      >>> import lbopt, optax
      >>> def make(layers):
      ...     return optax.chain(lbopt.scale_by_kfac(layers), optax.scale(-0.1))

    Source: Martens & Grosse 2015, §2–6; Ba, Grosse & Martens 2017.  The papers leave
    open how numbers that are not finite are treated; refusing them is our choice.
    Until a layer's first statistic its gradient passes unchanged.
    """
    _check_settings(layers, damping, factor_decay, stats_period, inverse_period)

    known = layers.preconditioned
    if exact_damping:
        known = {path: _exactly_damped(layer) for path, layer in known.items()}

    def init_fn(params: Params) -> KfacState:
        own = _present(known, params)
        pairs = {path: x.block.init(x.tapped.copies) for path, x in own.items()}
        factors = {path: pair[0] for path, pair in pairs.items()}
        return KfacState(
            count=jnp.zeros([], jnp.int32),
            factors=factors,
            refresh=clocks.init_refresh(len(jax.tree.leaves(factors)), len(own)),
            inverses={path: pair[1] for path, pair in pairs.items()},
            boost=jnp.ones(len(own)),
            rejected=jnp.zeros(len(own), jnp.int32),
        )

    def update_fn(
        updates: Updates,
        state: Any,
        params: Params | None = None,
        *,
        curvature: Mapping[str, Any] | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, KfacState]:
        del params, extra_args
        # JAX sorts the keys of a dictionary, and the clocks are numbered by its leaves.
        own = {path: known[path] for path in sorted(state.factors)}
        statistics = _statistics(own, curvature, state.factors)
        state = _average(own, state, statistics, factor_decay)
        state = _invert(own, state, damping, inverse_period)
        natural = {
            path: _precondition(layer, state.inverses[path], updates)
            for path, layer in own.items()
        }
        count = jnp.asarray(optax.safe_increment(state.count))
        due = clocks.is_due(count, stats_period) | (state.refresh.renewals == 0)
        state = state._replace(count=count, refresh=state.refresh._replace(due=due))
        return _put(own, updates, natural), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _average(
    own: Mapping[str, Layer],
    state: KfacState,
    statistics: Mapping[str, Any],
    factor_decay: Any,
) -> KfacState:
    """Folds the statistics that are due and finite into the factors."""
    due, renewals = state.refresh.due, state.refresh.renewals
    weights = (1 - factor_decay) / (1 - factor_decay ** (renewals + 1.0))
    # The whole work stands inside one condition: a step without statistics does not
    # even read them.
    factors, finite = update_if(
        jnp.any(due),
        lambda old: _fold(own, old[0], dict(statistics), due, weights),
        (state.factors, jnp.ones_like(due)),
    )
    accepted = due & finite
    return state._replace(
        factors=factors,
        rejected=state.rejected + _by_layer(due & ~accepted, state.factors),
        refresh=state.refresh._replace(
            renewals=renewals + accepted,
            statistic_step=jnp.where(
                accepted, state.count, state.refresh.statistic_step
            ),
        ),
    )


def _fold(
    own: Mapping[str, Layer], old: Any, statistics: Any, due: Array, weights: Array
) -> tuple[Any, Array]:
    """The factors after the statistics, and which statistics were finite."""
    leaves, tree = jax.tree.flatten(old)
    packed = {path: own[path].block.pack(statistics[path]) for path in old}
    new = jax.tree.leaves(packed)
    finite = jnp.stack([linalg.all_finite(x) for x in new])
    accepted = due & finite
    folded = [
        jnp.where(accepted[i], o + (weights[i] * (n - o)).astype(o.dtype), o)
        for i, (o, n) in enumerate(zip(leaves, new, strict=True))
    ]
    return jax.tree.unflatten(tree, folded), finite


def _invert(
    own: Mapping[str, Layer],
    state: KfacState,
    damping: ScalarOrSchedule,
    inverse_period: Any,
) -> KfacState:
    """Renews the inverses if it is their turn."""
    value = damping(state.count) if callable(damping) else damping
    known = _by_layer(state.refresh.renewals == 0, state.factors) == 0
    missing = known & (state.refresh.inverse_step < 0)
    turn = clocks.is_due(state.count, inverse_period) | jnp.any(missing)

    def renew(old):
        inverses, _ = old
        new, finite = _invert_in_groups(own, state.factors, value * state.boost)
        accepted = finite & known
        # A conditional, not a selection alone: XLA would repeat the test of a whole
        # matrix for each of its entries.
        inverses = jax.lax.cond(
            jnp.all(accepted),
            lambda accepted, new, old: new,
            _accepted_or_old,
            accepted,
            new,
            inverses,
        )
        return inverses, accepted

    inverses, accepted = update_if(
        turn, renew, (state.inverses, jnp.zeros(state.boost.shape, bool))
    )
    failed = turn & known & ~accepted
    boost = jnp.where(accepted, 1.0, state.boost)
    return state._replace(
        inverses=inverses,
        boost=jnp.where(failed, boost * _DAMPING_GROWTH, boost),
        rejected=state.rejected + failed,
        refresh=state.refresh._replace(
            inverse_step=jnp.where(accepted, state.count, state.refresh.inverse_step)
        ),
    )


def _invert_in_groups(
    own: Mapping[str, Layer], factors: Mapping[str, Any], amounts: Array
) -> tuple[dict[str, Any], Array]:
    """Every layer's inverses for its amount of damping, and which are finite."""
    paths, inverses, finite, order = list(own), {}, [], []
    for group in _alike(own, factors):
        invert = own[paths[group[0]]].block.invert
        stacked = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(factors[paths[i]] for i in group)
        )
        # One after the other; see linalg.one_by_one for why they are not batched.
        new, sound = jax.lax.map(
            lambda one, invert=invert: _with_flag(invert(*one)),
            (stacked, amounts[np.asarray(group)].astype(_dtype(stacked))),
        )
        for k, i in enumerate(group):
            inverses[paths[i]] = jax.tree.map(lambda x, k=k: x[k], new)
        finite.append(sound)
        order += group
    return inverses, jnp.concatenate(finite)[np.argsort(order)]


def _with_flag(inverses: Any) -> tuple[Any, Array]:
    return inverses, linalg.all_finite(*jax.tree.leaves(inverses))


def _accepted_or_old(accepted: Array, new: Any, old: Any) -> dict[str, Any]:
    """The new inverses of the layers whose are accepted, the old ones of the others."""
    return {
        path: jax.tree.map(
            lambda n, o, i=i: jnp.where(accepted[i], n, o), new[path], old[path]
        )
        for i, path in enumerate(new)
    }


def _alike(own: Mapping[str, Layer], factors: Mapping[str, Any]) -> list[list[int]]:
    """The numbers of the layers, those together that one inversion loop serves."""
    groups: dict[Any, list[int]] = {}
    for number, (path, layer) in enumerate(own.items()):
        leaves, tree = jax.tree.flatten(factors[path])
        shapes = tuple((x.shape, x.dtype) for x in leaves)
        key = (layer.block.invert, tree, shapes)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _precondition(layer: Layer, inverses: Any, updates: Updates) -> dict[str, Array]:
    """The natural gradient of one layer's arrays, as they lie in the parameters."""
    location, axes = layer.tapped.location, layer.tapped.axes
    arrays = capture.lookup(updates, location)
    gradients = {
        name: capture.copies_first(arrays[name], axes) for name in location.names
    }
    wide = {name: g.astype(_dtype(inverses)) for name, g in gradients.items()}
    natural = layer.block.precondition(inverses, wide)
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


def _exactly_damped(layer: Layer) -> Layer:
    block = layer.block.exact or layer.block
    return layer._replace(tapped=layer.tapped._replace(block=block))


def _present(layers: Mapping[str, Layer], params: Params) -> dict[str, Layer]:
    """The layers whose parameters are here and not masked away."""
    own = {}
    for path, layer in layers.items():
        location = layer.tapped.location
        try:
            arrays = capture.lookup(params, location)
            if isinstance(arrays, optax.MaskedNode):
                continue
            leaves = [arrays[name] for name in location.names]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"params has no {path!r}, which layers has; make layers and the "
                "optimizer's state from the same parameters"
            ) from error
        present = [not isinstance(x, optax.MaskedNode) for x in leaves]
        if any(present) and not all(present):
            raise ValueError(
                f"layer {path!r} is masked in part ({list(location.names)}: "
                f"{present}); its arrays share one curvature block, so mask all of "
                "them or none"
            )
        if not all(present):
            continue
        for name, leaf in zip(location.names, leaves, strict=True):
            if tuple(leaf.shape) != tuple(layer.shapes[name]):
                raise ValueError(
                    f"params[{path!r}][{name!r}] has shape {list(leaf.shape)} where "
                    f"layers has {list(layer.shapes[name])}; call trace_layers again "
                    "with these parameters"
                )
        own[path] = layer
    if not own:
        raise ValueError(
            f"params holds none of the layers {sorted(layers)}, all are masked; leave "
            "scale_by_kfac out, or mask fewer parameters"
        )
    return own


def _statistics(
    own: Mapping[str, Layer],
    curvature: Mapping[str, Any] | None,
    factors: Mapping[str, Any],
) -> dict[str, Any]:
    """The curvature that ``update`` was given, checked at the door."""
    if curvature is None:
        raise ValueError(
            "scale_by_kfac.update needs curvature=, the third result of "
            "lbopt.value_grad_and_curvature(loss_fn, layers); pass it through "
            "tx.update(grads, state, params, curvature=curvature)"
        )
    checked = {}
    for path, layer in own.items():
        if path not in curvature:
            raise ValueError(
                f"curvature has no {path!r} (it has {sorted(curvature)}); make it with "
                "the same layers as the optimizer"
            )
        statistics = curvature[path]
        if type(statistics) is not type(factors[path]):
            raise ValueError(
                f"curvature[{path!r}] is a {type(statistics).__name__}, not a "
                f"{type(factors[path]).__name__}; make it with the same layers as the "
                "optimizer"
            )
        packed = jax.eval_shape(layer.block.pack, statistics)
        for name, old, new in zip(
            statistics._fields, factors[path], packed, strict=True
        ):
            if old.shape != new.shape:
                raise ValueError(
                    f"curvature[{path!r}].{name} has shape "
                    f"{list(getattr(statistics, name).shape)}, which does not fit the "
                    f"state (packed {list(old.shape)}); make it with the same layers "
                    "as the optimizer"
                )
        checked[path] = statistics
    return checked


def _by_layer(
    flags: Bool[Array, " statistics"], factors: Mapping[str, Any]
) -> Int[Array, " layers"]:
    """Sums flags of statistics for each layer."""
    owner = [i for i, tree in enumerate(factors.values()) for _ in tree]
    return jax.ops.segment_sum(
        flags.astype(jnp.int32), jnp.asarray(owner), len(factors)
    )


def _dtype(tree: Any) -> Any:
    return jax.tree.leaves(tree)[0].dtype


def _check_settings(
    layers: Any, damping: Any, factor_decay: Any, stats_period: Any, inverse_period: Any
) -> None:
    if not isinstance(layers, Layers):
        raise ValueError(
            f"layers={type(layers).__name__} must be what lbopt.trace_layers returns"
        )
    if not layers.preconditioned:
        raise ValueError("layers holds no layer that the loss depends on")
    if isinstance(damping, (int, float)) and not damping > 0:
        raise ValueError(f"damping={damping} must be positive; 1e-3 is a usual start")
    if isinstance(factor_decay, (int, float)) and not 0 <= factor_decay < 1:
        raise ValueError(
            f"factor_decay={factor_decay} must lie in [0, 1); 0 keeps the last "
            "statistic alone"
        )
    for name, period in (
        ("stats_period", stats_period),
        ("inverse_period", inverse_period),
    ):
        # optax.inject_hyperparams hands numbers over as arrays.
        if not isinstance(period, jax.Array) and (
            not isinstance(period, int) or period < 1
        ):
            raise ValueError(f"{name}={period!r} must be a whole number of steps, ≥ 1")
