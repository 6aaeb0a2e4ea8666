"""Finds the argument that weights the terms of a loss, by experiments on its head."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lbopt.curvature.head_experiment import (
    SMALL,
    TOLERANCE,
    Contradicted,
    Experiment,
    is_shape,
    terms_in,
)
from lbopt.curvature.terms import Terms, WeightsAt, path_text

_SPECIAL = (0, -1, -100, 255, 1)  # values of a label that mark padding
_LARGEST = 2**25  # numbers that an experiment on a batch may have


def find_weights(
    experiment: Experiment, small: tuple[int, ...], base: np.ndarray
) -> WeightsAt | None:
    """Finds the argument that weights the terms of a loss."""
    found = []
    for number, leaf in enumerate(experiment.leaves):
        if not _may_weight(experiment, leaf):
            continue
        values = [0]
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            own = [] if is_shape(leaf) else [int(leaf.min()), int(leaf.max())]
            values = list(dict.fromkeys([*_SPECIAL, *own]))
        for value in values:
            weights = _tested(experiment, number, value, small, base)
            if weights is not None:
                found.append(weights)
                break
    # Their product would have to be known, and how they enter it.
    if len(found) > 1:
        paths = ", ".join(path_text(w.path) for w in found)
        raise Contradicted(f"several of its arguments weight its terms ({paths})")
    return found[0] if found else None


def _may_weight(experiment: Experiment, leaf: Any) -> bool:
    """Whether a leaf has one number for each position of the output."""
    if not getattr(leaf, "shape", ()) or not any(
        jnp.issubdtype(leaf.dtype, kind)
        for kind in (jnp.floating, jnp.integer, jnp.bool_)
    ):
        return False
    return experiment.along(leaf) == len(leaf.shape) or experiment.shifted(leaf)


def _tested(
    experiment: Experiment,
    number: int,
    value: int,
    small: tuple[int, ...],
    base: np.ndarray,
) -> WeightsAt | None:
    """Tests whether a value of a leaf takes the term at its position off the loss."""
    leaf = experiment.filled(number, small)
    at = (1,) * leaf.ndim
    before = terms_in(base)

    def changed(value: Any) -> np.ndarray | None:
        new = leaf.at[at].set(jnp.asarray(value, leaf.dtype))
        try:
            gradient = experiment.gradient(small, {number: new})
        except Exception:  # the user's code may refuse the value
            return None
        return gradient if np.all(np.isfinite(gradient)) else None

    gradient = changed(value)
    if gradient is None:
        return None
    # Exactly zero: a term that is only made smaller is no padding.
    after = terms_in(gradient)
    gone = before & ~after
    if not np.any(gone):
        return None
    name = path_text(experiment.path(number))
    unknown = Contradicted(f"{name} takes part in it in a way that cannot be told")
    shift = next((s for s in (0, 1) if _only(gone, before, at, s)), None)
    if shift is None:
        raise unknown
    missing = small[leaf.ndim - 1] - (leaf.shape[-1] - shift)
    left = (base != 0) & (after[..., None] if base.ndim > before.ndim else after)
    ratios = gradient[left] / base[left]
    shared = np.sum(before) / np.sum(after)
    divides = bool(np.allclose(ratios, shared, rtol=TOLERANCE))
    if not divides and not np.allclose(ratios, 1, rtol=TOLERANCE):
        raise unknown
    # A label out of range may have no loss; it is padding if the batch has any.
    integral = jnp.issubdtype(leaf.dtype, jnp.integer)
    own = experiment.leaves[number]
    if integral and not divides and (is_shape(own) or value not in np.asarray(own)):
        return None
    # A factor that may be negative, such as an advantage, belongs to the term itself.
    if (
        not is_shape(own)
        and leaf.dtype != jnp.bool_
        and not integral
        and jnp.any(own < 0)
    ):
        if divides:
            raise unknown
        return None
    # Twice the value is twice the weight, of numbers that are weights.
    doubled = None if leaf.dtype == jnp.bool_ else changed(2 * leaf[at])
    if doubled is not None and value == 0:
        total = np.sum(before) / (np.sum(before) + np.sum(gone)) if divides else 1
        row = (base != 0) & (gone[..., None] if base.ndim > gone.ndim else gone)
        if np.allclose(doubled[row] / base[row], 2 * total, rtol=TOLERANCE):
            return WeightsAt(experiment.path(number), None, shift, missing, divides)
    if leaf.dtype == jnp.bool_:
        return WeightsAt(experiment.path(number), None, shift, missing, divides)
    if not integral:
        raise unknown
    return WeightsAt(experiment.path(number), value, shift, missing, divides)


def _only(gone: np.ndarray, before: np.ndarray, at: tuple[int, ...], s: int) -> bool:
    """Whether the terms that are gone are those at a position, shifted by s."""
    expected = np.zeros_like(before)
    expected[(*at[:-1], at[-1] - s)[: before.ndim]] = True
    return bool(np.any(expected & before)) and np.array_equal(gone, expected & before)


def check_batch(experiment: Experiment, terms: Terms, small: tuple[int, ...]) -> None:
    """Compares the terms found with those of the batch at hand, axis by axis.

    Args:
      experiment: the loss's head.
      terms: the terms found.
      small: the sizes that they were found at.

    Raises:
      Contradicted: if rows of the batch have no part in the loss, or another weight
        than others, for no reason that was found.
    """
    if any(map(is_shape, experiment.leaves)):
        return
    labelled = any(
        _may_weight(experiment, x) and _integral(x) for x in experiment.leaves
    )
    for axis in range(max(len(small) - 1, 1)):
        # Whole along this axis: a loss may count the real positions from its start.
        sizes = tuple(
            experiment.shape[i] if i == axis else size for i, size in enumerate(small)
        )
        if math.prod(sizes) > _LARGEST:
            continue
        for changes in _slabs(experiment, len(small), axis):
            _check_slab(experiment, terms, sizes, changes, labelled)


def _check_slab(
    experiment: Experiment,
    terms: Terms,
    sizes: tuple[int, ...],
    changes: dict[int, Any],
    labelled: bool,
) -> None:
    """Compares the terms found with those of a part of the batch."""
    gradient = experiment.gradient(sizes, changes)
    real = terms_in(np.nan_to_num(gradient, nan=0))
    if isinstance(terms.weights, WeightsAt):
        # A term without a weight must have no gradient.
        leaves = [changes.get(i, x) for i, x in enumerate(experiment.leaves)]
        args = jax.tree.unflatten(experiment.tree, leaves)
        weights = np.asarray(terms.weights.read(args))
        spread = weights.reshape(weights.shape + (1,) * (real.ndim - weights.ndim))
        if np.any(real & ~np.broadcast_to(spread != 0, real.shape)):
            raise Contradicted("its weights were not understood")
        return
    expected = np.ones_like(real)
    for axis, offset in zip(terms.axes, terms.offsets, strict=True):
        if axis < real.ndim and offset:
            index = [slice(None)] * real.ndim
            index[axis] = slice(-offset, None)
            expected[tuple(index)] = False
    if np.any(expected & ~real):
        raise Contradicted("rows of this batch have no part in it, like padding")
    if labelled:
        _check_uniform(experiment.gradient(sizes, changes, alike=True)[real])


def _slabs(experiment: Experiment, rank: int, whole: int) -> Iterator[dict[int, Any]]:
    """Cuts the batch at hand into pieces that are whole along one axis."""
    shape = experiment.shape[: max(rank - 1, 1)]
    starts = [
        [0] if axis == whole else list(dict.fromkeys([0, max(size - SMALL, 0)]))
        for axis, size in enumerate(shape)
    ]
    for corner in itertools.product(*starts):
        pieces = {}
        for number, leaf in enumerate(experiment.leaves):
            along = min(experiment.along(leaf), len(shape))
            if not along:
                continue
            piece = leaf
            for axis in range(along + experiment.shifted(leaf)):
                if axis == whole:
                    continue
                size = SMALL + (axis == along)
                at = np.minimum(corner[axis] + np.arange(size), leaf.shape[axis] - 1)
                piece = jnp.take(piece, at, axis=axis)
            pieces[number] = piece
        yield pieces


def _check_uniform(gradient: np.ndarray) -> None:
    """Compares the weights of terms of different labels.

    Args:
      gradient: that at outputs which are the same for all positions.

    Raises:
      Contradicted: if they differ.
    """
    # If no class is treated apart, a label only permutes the gradient's entries.
    rows = np.sort(gradient.reshape(-1, gradient.shape[-1]), -1)
    sizes = np.max(np.abs(rows), -1, keepdims=True)
    if not np.all(sizes > 0):
        return
    same = np.allclose(rows / sizes, (rows / sizes)[:1], rtol=TOLERANCE)
    if same and not np.allclose(sizes, sizes[0], rtol=TOLERANCE):
        raise Contradicted("its terms have different weights, such as those of classes")


def _integral(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)
