"""Checks of the curvature transform's settings and arrays, before compilation."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax.sharding import AxisType

from lbopt import checks
from lbopt._typing import Array, Params, Updates
from lbopt.collectives import Axis
from lbopt.curvature import locations
from lbopt.curvature.eigen_moments import CorrectedStatistics
from lbopt.curvature.refresh import Due
from lbopt.curvature.registry import Layer, Layers
from lbopt.settings import Periods, Placement
from lbopt.sharding import Sharded

MULTI_STEPS = (
    "optax.MultiSteps around a curvature transform would combine the mean gradient of "
    "all micro-batches with the statistics of the last; use "
    "lbopt.training.make_train_step(accumulate=...), which takes the means of both, or "
    "average gradients and curvature yourself and call update once"
)
"""The refusal of ``optax.MultiSteps``."""


def present_layers(layers: Mapping[str, Layer], params: Params) -> dict[str, Layer]:
    """Returns the layers whose parameters are present and not masked.

    Args:
      layers: layers by path.
      params: the parameters, some perhaps ``optax.MaskedNode``.

    Returns:
      The layers by path.

    Raises:
      ValueError: if the parameters do not fit the layers, or all are masked.
    """
    present = {}
    for path, layer in layers.items():
        location = layer.tapped.location
        try:
            arrays = locations.lookup(params, location)
            if isinstance(arrays, optax.MaskedNode):  # the whole module is masked
                continue
            leaves = [arrays[name] for name in location.names]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"params has no {path!r}, which layers has; make layers and the "
                "optimizer's state from the same parameters"
            ) from error
        unmasked = [not isinstance(x, optax.MaskedNode) for x in leaves]
        if any(unmasked) and not all(unmasked):
            raise ValueError(
                f"layer {path!r} is masked in part ({list(location.names)}: "
                f"{unmasked}); its arrays share one curvature block, so mask all of "
                "them or none"
            )
        if not all(unmasked):
            continue
        for name, leaf in zip(location.names, leaves, strict=True):
            if tuple(leaf.shape) != tuple(layer.shapes[name]):
                raise ValueError(
                    f"params[{path!r}][{name!r}] has shape {list(leaf.shape)} where "
                    f"layers has {list(layer.shapes[name])}; call trace_layers again "
                    "with these parameters"
                )
        present[path] = layer
    if not present:
        raise ValueError(
            f"params holds none of the layers {sorted(layers)}, all are masked; leave "
            "scale_by_kfac out, or mask fewer parameters"
        )
    return present


def check_gradients(layers: Mapping[str, Layer], updates: Updates) -> None:
    """Raises ValueError unless gradients have the shapes of the layers' arrays.

    Args:
      layers: the optimizer's layers by path.
      updates: the gradients.

    Raises:
      ValueError: naming the array and both shapes.
    """
    for path, layer in layers.items():
        location = layer.tapped.location
        try:
            arrays = locations.lookup(updates, location)
            shapes = {name: jnp.shape(arrays[name]) for name in location.names}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"updates must hold the arrays {list(location.names)} of layer "
                f"{path!r}; pass gradients with the structure of the parameters"
            ) from error
        for name, shape in shapes.items():
            if shape != tuple(layer.shapes[name]):
                raise ValueError(
                    f"updates[{path!r}][{name!r}] has shape {list(shape)} where layers "
                    f"has {list(layer.shapes[name])}; pass the gradient of these "
                    "parameters"
                )


def check_like(params: Params, updates: Updates) -> None:
    """Raises ValueError unless gradients have the structure and shapes of parameters.

    Raises:
      ValueError: naming the first array that differs.
    """
    wanted, given = (
        {
            jax.tree_util.keystr(path): list(jnp.shape(x))
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (params, updates)
    )
    for path in sorted(wanted.keys() | given.keys()):
        if wanted.get(path) != given.get(path):
            raise ValueError(
                f"updates{path} has shape {given.get(path)} where params has "
                f"{wanted.get(path)} (None: no array); pass the gradient of these "
                "parameters"
            )


def is_placeholder(params: Any) -> bool:
    """Whether ``params`` stands for parameters of any structure, without arrays."""
    # optax.tree_map_params calls init with such a node, whose type is private.
    none = isinstance(params, Mapping | optax.MaskedNode) or params is None
    return not none and not jax.tree.leaves(params)


def require_same_on_devices(tree: Any) -> None:
    """Raises ValueError for arrays that are each device's own.

    Args:
      tree: gradients and statistics, under ``shard_map`` without ``placement``.

    Raises:
      ValueError: naming the array; with ``check_vma=False`` JAX does not know them.
    """
    kinds = jax.sharding.get_abstract_mesh().axis_types
    if AxisType.Manual not in kinds or AxisType.Explicit in kinds:
        return
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jax.typeof(x) != jax.typeof(jnp.zeros(x.shape, x.dtype)):
            raise ValueError(
                f"the array at {jax.tree_util.keystr(path)} of gradients and curvature "
                "is each device's own under jax.shard_map; average it with "
                "jax.lax.pmean, or make the optimizer with placement= and map with "
                "check_vma=False"
            )


def require_no_multi_steps() -> None:
    """Raises ValueError if ``optax.MultiSteps`` calls the update.

    Raises:
      ValueError: naming ``accumulate=``.
    """
    # It passes a transformation no word of its own; only its call tells.
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), optax.MultiSteps):
            raise ValueError(MULTI_STEPS)
        frame = frame.f_back


def checked_statistics(
    layers: Mapping[str, Layer],
    curvature: Mapping[str, Any] | None,
    moments: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Returns the statistics passed to ``update``, once they fit the layers.

    Args:
      layers: the optimizer's layers by path.
      curvature: statistics by path.
      moments: the second moments of layers with corrected eigenvalues.

    Returns:
      The statistics of the layers' factors, and their second moments.

    Raises:
      ValueError: if statistics are missing or belong to another model.
    """
    if curvature is None:
        raise ValueError(
            "scale_by_kfac.update needs curvature=, the third result of "
            "lbopt.value_grad_and_curvature(loss_fn, layers); pass it through "
            "tx.update(grads, state, params, curvature=curvature).  Flax's "
            "TrainState.apply_gradients and some wrappers (optax.lookahead, "
            "optax.contrib.sam) pass no such argument on: see "
            "docs/how_to/from_your_optax_loop.md"
        )
    if not isinstance(curvature, Mapping):
        raise ValueError(
            f"curvature={type(curvature).__name__} must be the statistics by path, the "
            "third result of lbopt.value_grad_and_curvature(loss_fn, layers)"
        )
    checked, squares = {}, {}
    for path, layer in layers.items():
        if path not in curvature:
            raise ValueError(
                f"curvature has no {path!r} (it has {sorted(curvature)}); make it with "
                "the same layers as the optimizer"
            )
        statistics, factors = curvature[path], layer.factor_shapes()
        if path in moments:
            _check_moments(path, statistics, moments[path].s)
            squares[path] = statistics.s
            # Without s, they are the factors' statistics as for other layers.
            statistics = type(factors)(statistics.a, statistics.g)
        # By type, so that exchanged blocks with equal shapes are noticed too.
        if type(statistics) is not type(factors):
            raise ValueError(
                f"curvature[{path!r}] is a {type(statistics).__name__}, not a "
                f"{type(factors).__name__}; make it with the same layers as the "
                "optimizer"
            )
        # Shapes alone, so that no statistic that is not due is packed.
        packed = jax.eval_shape(layer.block.pack, statistics)
        for name, old, new in zip(factors._fields, factors, packed, strict=True):
            if old.shape != new.shape:
                raise ValueError(
                    f"curvature[{path!r}].{name} has shape "
                    f"{list(getattr(statistics, name).shape)}, which does not fit the "
                    f"state (packed {list(old.shape)}); make it with the same layers "
                    "as the optimizer"
                )
        checked[path] = statistics
    return checked, squares


def _check_moments(path: str, statistics: Any, s: Any) -> None:
    if not isinstance(statistics, CorrectedStatistics):
        raise ValueError(
            f"curvature[{path!r}] is a {type(statistics).__name__} without the second "
            "moments that eigenvalues='corrected' needs; evaluate it with "
            "due=lbopt.refresh(opt_state), which has the bases for them"
        )
    if statistics.s.shape != s.shape:
        raise ValueError(
            f"curvature[{path!r}].s has shape {list(statistics.s.shape)}, and the "
            f"state's {list(s.shape)}; evaluate it with due=lbopt.refresh(opt_state) "
            "of this optimizer"
        )


def check_settings(
    layers: Any,
    damping: Any,
    norm_damping: Any,
    factor_decay: Any,
    periods: Any,
    placement: Any,
    block_size: Any,
) -> None:
    """Raises ValueError for settings of ``scale_by_kfac`` that are out of range.

    Raises:
      ValueError: naming the setting, its value and the way out.
    """
    check_layers(layers)  # first, because the next line reads an attribute
    if not layers.preconditioned:
        raise ValueError(
            f"layers={sorted(layers)} must hold a layer that the loss depends on; "
            "call trace_layers with the loss that is trained"
        )
    checks.positive("damping", damping, "1e-3 is a usual start", schedule=True)
    checks.positive("norm_damping", norm_damping, "1 damps them like other layers")
    checks.below_one("factor_decay", factor_decay, "0 keeps the last statistic alone")
    if not isinstance(periods, Periods):
        raise ValueError(
            f"periods={periods!r} must be an lbopt.Periods; write "
            "lbopt.Periods(statistics=1, inverses=10)"
        )
    if not isinstance(placement, Placement):
        raise ValueError(
            f"placement={placement!r} must be an lbopt.Placement; write "
            'lbopt.Placement("data", 8, inverses="comm")'
        )
    if block_size is not None:
        checks.whole("block_size", block_size, "None keeps factors whole", static=True)


def check_layers(layers: Any) -> None:
    """Raises ValueError unless ``layers`` is the result of ``trace_layers``."""
    if not isinstance(layers, Layers):
        raise ValueError(
            f"layers={type(layers).__name__} must be the result of lbopt.trace_layers; "
            "call it with the loss, the parameters and a batch"
        )


def check_stale_threshold(
    stale_threshold: Any, factor_decay: Any, periods: Periods
) -> None:
    """Raises ValueError for an adaptive refresh with averages or periods.

    Raises:
      ValueError: naming the setting, its value and the way out.
    """
    if stale_threshold is None:
        return
    checks.not_negative(
        "stale_threshold", stale_threshold, "SP-NGD uses 0.1; None renews at periods"
    )
    for name, value, needed in (
        ("factor_decay", factor_decay, 0),
        ("periods.statistics", periods.statistics, 1),
        ("periods.inverses", periods.inverses, 1),
    ):
        # The values of numbers that optax.inject_hyperparams traces are unknown here.
        if not isinstance(value, jax.core.Tracer) and value != needed:
            raise ValueError(
                f"{name}={value} must be {needed} with stale_threshold="
                f"{stale_threshold}, which compares single statistics and sets the "
                "times itself; pass stale_threshold=None for averages and periods"
            )


def check_due(due: Any, by_flags: bool) -> None:
    """Raises ValueError unless ``due`` says what a step renews.

    Raises:
      ValueError: for another type, and for flags given to an optimizer that decides by
        those in its state.
    """
    if not isinstance(due, Due) or not all(
        flag is None or (jnp.shape(flag) == () and jnp.result_type(flag) == jnp.bool_)
        for flag in due
    ):
        raise ValueError(
            f"due={due!r} must be an lbopt.Due of flags; pass periods.due(step), as a "
            "static argument of a function that is jitted, or leave it out"
        )
    if by_flags and not all(flag is None for flag in due):
        raise ValueError(
            f"due={due} must be left out with stale_threshold= and with "
            "eigenvalues='corrected': flags in the state say what these renew"
        )


def check_shares(layers: Mapping[str, Layer], factors: Any, axis: Axis) -> None:
    """Raises ValueError for a state of another number of devices, or not in shares.

    Raises:
      ValueError: naming a factor and the way out.
    """
    split = isinstance(factors, Sharded)
    arrays = factors.shards if split else factors
    for path, layer in layers.items():
        shapes = layer.factor_shapes()  # of the packed factors, all copies
        for x, whole, f in zip(arrays[path], shapes, layer.block.factors, strict=True):
            parts = whole.size // f.size  # copies × diagonal blocks
            expected = parts * axis.share(f.size)
            if x.size == expected:
                continue
            if split and x.size == axis.size * expected:
                raise ValueError(
                    f"the state's factor of {path!r} arrives whole on each device of "
                    f"axis {axis.name!r}, although it is in {axis.size} shares; pass "
                    f"lbopt.sharding.specs(opt_state, {axis.name!r}) as the state's "
                    "in_specs and out_specs of jax.shard_map"
                )
            raise ValueError(
                f"axis_size={axis.size} must be that of the optimizer's state, whose "
                f"factor of {path!r} has {x.size} numbers on a device, not {expected}; "
                "convert the state with lbopt.reshard"
            )


def check_eigenvalues(
    eigenvalues: Any, placement: Placement, periods: Periods, stale_threshold: Any
) -> None:
    """Raises ValueError for settings that corrected eigenvalues exclude.

    Raises:
      ValueError: naming the setting, its value and the way out.
    """
    # The bases must be on every device, renewed in the step, at fixed periods.
    checks.one_of("eigenvalues", eigenvalues, ["kronecker", "corrected"])
    if eigenvalues == "kronecker":
        return
    for name, value, sound, why in (
        (
            "placement.inverses",
            placement.inverses,
            placement.inverses == "comm",
            "every device evaluates second moments in all bases; use 'comm'",
        ),
        (
            "periods.inverses",
            periods.inverses,
            periods.inverses is not None,
            "BackgroundInversion would change bases and leave the second moments "
            "behind; give a period",
        ),
        (
            "stale_threshold",
            stale_threshold,
            stale_threshold is None,
            "second moments are renewed at fixed periods; leave it None",
        ),
    ):
        if not sound:
            raise ValueError(
                f"{name}={value!r} must not be set with eigenvalues='corrected': {why}"
            )
