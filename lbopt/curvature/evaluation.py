"""The evaluation of a loss with taps: sums that add up over parts of a batch.

A part is a micro-batch, or a device's share.  Each part divides its loss by its own
terms; multiplied by its share of all terms, losses, gradients and sums of parts add up
to those of the whole batch, however it was cut and however many of its rows are real.
Only ``finish`` divides.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from lbopt import collectives
from lbopt._typing import Array, Params
from lbopt.collectives import Axis
from lbopt.curvature import block as blocks
from lbopt.curvature import loss
from lbopt.curvature.layer_table import Layer, Layers
from lbopt.curvature.tapped_pass import (
    Evaluator,
    Fisher,
    make_evaluator,
    sums_of_model,
    tap,
    wanted_of,
    with_bases,
)
from lbopt.in_place import update_if

__all__ = [
    "Curvature",
    "Evaluator",
    "Fisher",
    "Totals",
    "divided",
    "evaluate",
    "finish",
    "make_evaluator",
    "require_one_share",
    "times_share",
]

Curvature: TypeAlias = dict[str, Any]
"""Each layer's statistics by path."""


def require_one_share(layers: Layers) -> None:
    """Raises ValueError if no one number is the share of a part of a batch."""
    if layers.terms.others:
        raise ValueError(
            "lbopt.likelihood(..., weights=) states the weights of one output, and "
            "others without them reach the loss, too, so parts of a batch (devices, "
            "micro-batches) have different shares of the two; evaluate the whole batch "
            "at once, or weight all outputs alike"
        )


class Totals(NamedTuple):
    """The evaluation of a part of a batch, in numbers that add up over parts.

    Attributes:
      value: the loss times ``share``.
      aux: what the loss returns beside it, as it is.
      grads: its gradient times ``share``; ``()`` if it was not evaluated.
      sums: the sums of each layer by path, of backward signals times ``share``; for
        arrays without a tap the gradient.
      share: the number of the part's terms, or the sum of their weights, relative to
        ``terms``: 1 for a part without weights.
      terms: the number of positions at which the part may have terms, divided by the
        square of the loss scale.
    """

    value: Any
    aux: Any
    grads: Any
    sums: Any
    share: Any
    terms: Any


def evaluate(
    evaluator: Evaluator,
    params: Params,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    rng: Any,
    due: Any,
    gradient: bool,
    additive: bool,
    loss_scale: Any = None,
) -> Totals:
    """Evaluates a loss with taps.

    Args:
      evaluator: the loss.
      params: the parameters.
      args: its positional arguments after the parameters.
      kwargs: its keyword arguments.
      rng: the key from which labels are drawn.
      due: a mask from ``refresh``; None for all statistics.
      gradient: whether the gradient is wanted.
      additive: whether the result is to be added to that of other parts; if not, its
        ``share`` is 1, and the loss and its gradient are the user's.
      loss_scale: a factor by which signals are multiplied as they are backpropagated
        in a narrow type; the result does not contain it.

    Returns:
      The totals.

    Raises:
      ValueError: if the mask belongs to other layers, or the loss to another trace.
    """
    fisher, layers = evaluator.fisher, evaluator.layers
    if fisher == "sampled" and rng is None:
        raise ValueError(
            "fisher='sampled' draws labels: pass rng=, a new key at every step"
        )
    if loss.is_empty((*args, dict(kwargs))):
        raise ValueError(
            f"the batch of loss_fn={loss.name_of(evaluator.loss_fn)} holds no "
            "examples; pass at least one"
        )
    wanted, bases = wanted_of(layers.preconditioned, due)
    tapped = tap(evaluator, wanted, bases, params, args, kwargs)
    terms, share = tapped.terms, 1
    if evaluator.weighted and additive:
        terms, share = tapped.positions, tapped.terms / tapped.positions
    scale = 1 if loss_scale is None else loss_scale
    # XLA drops unused results of two backward passes: the sums of the first, the
    # parameter gradient of the second.
    grads, sums, by_outputs = tapped.pull(share * scale, None, square=False)
    if fisher != "empirical":
        sums = sums_of_model(evaluator, tapped, rng, terms, loss_scale)
    elif tapped.kept:
        # w g to √w g, because the products of signals have the weight once.  Added to
        # the loss's own signals, which other outputs keep.
        more = {n: _added(g, tapped.roots) for n, g in by_outputs.items()}
        again = tapped.pull(share * scale, more, square=False)[1]
        # Arrays without a tap have the loss's own gradient, as without weights.
        sums = {p: x if layers[p].has_tap else sums[p] for p, x in again.items()}
    if loss_scale is not None:
        grads = jax.tree.map(lambda g: _divided(g, loss_scale), grads)
        terms = terms / jnp.square(jnp.asarray(loss_scale, jnp.float32))
    value = tapped.value
    if evaluator.weighted:
        sums = jax.tree.map(lambda x: jnp.where(tapped.terms > 0, x, 0), sums)
    if evaluator.weighted and additive:
        # A part of padding alone divides by zero.
        value, grads = jax.tree.map(
            lambda x: jnp.where(share > 0, x, 0), (value * share, grads)
        )
    share, terms = (jnp.asarray(x, jnp.float32) for x in (share, terms))
    return Totals(value, tapped.aux, grads if gradient else (), sums, share, terms)


def finish(
    evaluator: Evaluator,
    totals: Totals,
    due: Any,
    *,
    axis: Axis,
    parts: int = 1,
    devices: int = 0,
) -> Curvature:
    """Divides the sums of all parts of a batch.

    Args:
      evaluator: the loss.
      totals: the mean of the parts' totals on this device.
      due: the mask that they were evaluated with.
      axis: the devices among which the batch is divided; the statistics are such that
        their mean over devices is that of the whole batch.
      parts: the number of the parts on each device.
      devices: the number of devices that have any, the others having zeros; 0 for all.

    Returns:
      The statistics by path.
    """
    wanted, bases = wanted_of(evaluator.layers.preconditioned, due)
    shared = devices > 0 or evaluator.weighted
    active = devices or axis.size

    def over_devices(x: Any) -> Any:
        return collectives.mean(x, axis) if shared else x

    # Of a batch of padding alone the share is 0, and so are all sums.
    share = over_devices(totals.share)
    n = jnp.where(share > 0, totals.terms / jnp.where(share > 0, share, 1), 0)
    linear = evaluator.fisher != "exact"

    def statistics(path: str, layer: Layer) -> Any:
        block = with_bases(layer, bases[path]).block
        sums = totals.sums[path]
        if layer.has_tap:
            counts = {f: over_devices(getattr(sums, f)) for f in _row_counts(sums)}
            sums = sums._replace(**counts)
            whole = Axis(None, 1) if block.linear else axis
            return block.statistics(_mean(block, sums, n, wanted[path], whole))
        if linear:
            # Added up over the whole batch before it is squared.
            total, due = sums.f, wanted[path].f

            def square(total: Array) -> Array:
                whole = collectives.mean(total, axis) * (axis.size / active)
                return jnp.square(whole) * (parts * active)

            sums = sums._replace(f=blocks.when(due, square, total))
        return block.statistics(_mean(block, sums, n, wanted[path], Axis(None, 1)))

    return {
        path: statistics(path, layer)
        for path, layer in evaluator.layers.preconditioned.items()
    }


def divided(evaluator: Evaluator, totals: Totals, axis: Axis) -> Totals:
    """Divides loss, aux and gradient by the share of the parts, if they have shares.

    Args:
      evaluator: the loss.
      totals: the mean of the parts' totals on this device.
      axis: the devices among which the batch is divided.

    Returns:
      The totals; the means over devices of loss and gradient are those of the whole
      batch.
    """
    if not evaluator.weighted:
        return totals
    share = collectives.mean(totals.share, axis)
    value, aux, grads = jax.tree.map(
        lambda x: (x / share).astype(x.dtype), (totals.value, totals.aux, totals.grads)
    )
    return totals._replace(value=value, aux=aux, grads=grads)


def times_share(evaluator: Evaluator, tree: Any, share: Array) -> Any:
    """Multiplies means over a part by its share; of a part without terms, to zero."""
    if not evaluator.weighted:
        return tree
    return jax.tree.map(lambda x: jnp.where(share > 0, x * share, 0), tree)


def _row_counts(sums: Any) -> list[str]:
    """The fields of sums that count rows."""
    return [name for name in sums._fields if name.endswith("rows")]


def _mean(block: blocks.CurvatureBlock, sums: Any, n: Any, due: Any, axis: Axis) -> Any:
    """Divides a layer's sums, and means over an axis; reads nothing if none is due."""

    def means(sums: Any) -> Any:
        return collectives.mean(block.mean(sums, n), axis)

    flags = jax.tree.leaves(due)
    if all(isinstance(flag, bool) for flag in flags):
        return means(sums) if any(flags) else sums
    # In place: a plain cond would copy all statistics at steps that refresh none.
    return update_if(jnp.any(jnp.asarray(flags)), means, sums)


def _added(signal: Array, roots: Array) -> Array:
    """Returns √w g − w g of a signal w g."""
    size = math.prod(roots.shape)
    if signal.shape[: roots.ndim] != roots.shape:
        if not signal.shape or signal.shape[0] != size:
            return jnp.zeros_like(signal)  # no terms of these weights
        roots = roots.reshape(size)  # examples and positions in one axis
    roots = blocks.spread(roots, signal.ndim)
    return jnp.where(roots > 0, signal / jnp.where(roots > 0, roots, 1) - signal, 0)


def _divided(x: Array, scale: Any) -> Array:
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) / scale).astype(x.dtype)
