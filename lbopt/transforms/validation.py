"""What the curvature transform is given, checked before anything is compiled."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import optax

from lbopt._typing import Array, Params
from lbopt.collectives import Axis
from lbopt.curvature import capture
from lbopt.curvature.eigen_moments import CorrectedStatistics
from lbopt.curvature.registry import Layer, Layers


def present_layers(layers: Mapping[str, Layer], params: Params) -> dict[str, Layer]:
    """The layers whose parameters are here and not masked away.

    Args:
      layers: layers by path.
      params: the parameters, some of them perhaps ``optax.MaskedNode``.

    Returns:
      The layers by path.

    Raises:
      ValueError: if the parameters are not those of the layers.
    """
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


def checked_statistics(
    own: Mapping[str, Layer],
    curvature: Mapping[str, Any] | None,
    moments: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Array]]:
    """The curvature that ``update`` was given.

    Args:
      own: the optimizer's layers by path.
      curvature: statistics by path.
      moments: the second moments of those whose eigenvalues are corrected.

    Returns:
      The statistics of these layers' factors; and the new second moments.

    Raises:
      ValueError: if there are none, or they are those of another model.
    """
    if curvature is None:
        raise ValueError(
            "scale_by_kfac.update needs curvature=, the third result of "
            "lbopt.value_grad_and_curvature(loss_fn, layers); pass it through "
            "tx.update(grads, state, params, curvature=curvature)"
        )
    checked, squares = {}, {}
    for path, layer in own.items():
        if path not in curvature:
            raise ValueError(
                f"curvature has no {path!r} (it has {sorted(curvature)}); make it with "
                "the same layers as the optimizer"
            )
        statistics, factors = curvature[path], layer.factor_shapes()
        if path in moments:
            _check_moments(path, statistics, moments[path].s)
            squares[path] = statistics.s
            statistics = type(factors)(statistics.a, statistics.g)
        if type(statistics) is not type(factors):
            raise ValueError(
                f"curvature[{path!r}] is a {type(statistics).__name__}, not a "
                f"{type(factors).__name__}; make it with the same layers as the "
                "optimizer"
            )
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
    factor_decay: Any,
    stats_period: Any,
    inverse_period: Any,
    stale_threshold: Any,
) -> None:
    """Refuses settings out of range; see ``scale_by_kfac`` for what they are.

    Raises:
      ValueError: naming the setting, its value and what it may be.
    """
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
        outside = name == "inverse_period" and period is None
        if not (outside or isinstance(period, jax.Array)) and (
            not isinstance(period, int) or period < 1
        ):
            raise ValueError(f"{name}={period!r} must be a whole number of steps, ≥ 1")
    if stale_threshold is None:
        return
    if isinstance(stale_threshold, (int, float)) and not stale_threshold >= 0:
        raise ValueError(
            f"stale_threshold={stale_threshold} must not be negative; SP-NGD uses 0.1, "
            "and None renews at fixed periods"
        )
    for name, value, needed in (
        ("factor_decay", factor_decay, 0),
        ("stats_period", stats_period, 1),
        ("inverse_period", inverse_period, 1),
    ):
        # optax.inject_hyperparams hands numbers over as arrays, in a jit unknown ones.
        if not isinstance(value, jax.core.Tracer) and value != needed:
            raise ValueError(
                f"stale_threshold={stale_threshold} compares single statistics and "
                f"sets the times itself: it needs {name}={needed}, not {value}; pass "
                "stale_threshold=None to use averages and periods"
            )


def check_delay(
    inverse_delay: Any, inverse_period: Any, stale_threshold: Any, stagger: Any
) -> None:
    """Refuses a delay of inverses by which they would never have effect.

    Raises:
      ValueError: naming it and what it may be.
    """
    if inverse_period is None and (inverse_delay or stagger):
        raise ValueError(
            f"inverse_period=None leaves inversion to lbopt.BackgroundInversion: "
            f"inverse_delay={inverse_delay} and stagger={stagger} have no meaning; "
            "leave them out, or give a period"
        )
    if inverse_delay is None:
        return
    if not isinstance(inverse_delay, int) or inverse_delay < 0:
        raise ValueError(
            f"inverse_delay={inverse_delay!r} must be a whole number of steps, ≥ 0; "
            "name it in static_args= of optax.inject_hyperparams"
        )
    longest: Any = 1 if stale_threshold is not None else inverse_period
    # optax.inject_hyperparams hands periods over as arrays, in a jit unknown ones.
    if not isinstance(longest, jax.core.Tracer) and inverse_delay > longest:
        raise ValueError(
            f"inverse_delay={inverse_delay} is longer than the {longest} steps after "
            "which an inverse may be begun anew; lengthen inverse_period, or shorten "
            "the delay"
        )


def check_shares(own: Mapping[str, Layer], factors: Any, axis: Axis) -> None:
    """Refuses a state that was made for another number of devices.

    Raises:
      ValueError: naming both numbers of a factor's share.
    """
    for path, layer in own.items():
        shapes = layer.factor_shapes()
        for x, whole, f in zip(factors[path], shapes, layer.block.factors, strict=True):
            expected = whole.size // f.size * axis.share(f.size)
            if x.size != expected:
                raise ValueError(
                    f"the optimizer's state was made for another number of devices "
                    f"than axis_size={axis.size}: a device has {x.size} numbers of a "
                    f"factor of {path!r}, not {expected}; convert it with "
                    "lbopt.reshard"
                )


def check_placement(placement: Any) -> None:
    """Refuses a placement that is none.

    Raises:
      ValueError: naming it and what it may be.
    """
    known = (
        placement in ("comm", "memory")
        if isinstance(placement, str)
        else type(placement) in (int, float) and 0 <= placement <= 1
    )
    if not known:
        raise ValueError(
            f"placement={placement!r} must be 'comm', 'memory', or a share in [0, 1] "
            "of the inverses' bytes that every device gets"
        )


def check_eigenvalues(
    eigenvalues: Any, placement: Any, inverse_period: Any, stale_threshold: Any
) -> None:
    """Refuses corrected eigenvalues where their bases would not be at hand.

    Raises:
      ValueError: naming the setting, its value and what it may be.
    """
    if eigenvalues not in ("kronecker", "corrected"):
        raise ValueError(
            f"eigenvalues={eigenvalues!r} must be 'kronecker' or 'corrected'"
        )
    if eigenvalues == "kronecker":
        return
    for name, value, sound, why in (
        (
            "placement",
            placement,
            placement == "comm",
            "every device evaluates second moments in all bases; use 'comm'",
        ),
        (
            "inverse_period",
            inverse_period,
            inverse_period is not None,
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
                f"eigenvalues='corrected' does not go with {name}={value!r}: {why}"
            )


def check_sizes(
    block_size: Any, axis_name: Any, axis_size: Any, norm_damping: Any
) -> None:
    """Refuses sizes out of range; see ``scale_by_kfac`` for what they are.

    Raises:
      ValueError: naming the setting, its value and what it may be.
    """
    if block_size is not None and (not isinstance(block_size, int) or block_size < 1):
        raise ValueError(
            f"block_size={block_size!r} must be a number of rows, ≥ 1, or None for "
            "whole factors"
        )
    # optax.inject_hyperparams makes an array of the number that is not needed.
    unused = axis_name is None and isinstance(axis_size, jax.Array)
    if not unused and (not isinstance(axis_size, int) or axis_size < 1):
        raise ValueError(
            f"axis_size={axis_size!r} must be a number of devices, ≥ 1; name it in "
            "static_args= of optax.inject_hyperparams"
        )
    if not unused and axis_name is None and axis_size != 1:
        raise ValueError(
            f"axis_size={axis_size} needs axis_name, the mesh axis of the devices"
        )
    if isinstance(norm_damping, (int, float)) and not norm_damping > 0:
        raise ValueError(f"norm_damping={norm_damping} must be positive")
