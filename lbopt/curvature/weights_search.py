"""Finds the argument that weights the terms of a loss, by experiments on its head."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

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


class _Effect(NamedTuple):
    """What a value of a leaf does to the term at its position.

    Attributes:
      leaf: the leaf as it is.
      gone: the positions whose terms the value takes off the loss.
      shift: positions between the leaf's and those of the terms.
      divides: whether the other terms get what they had.
    """

    leaf: Any
    gone: np.ndarray
    shift: int
    divides: bool


def _tested(
    experiment: Experiment,
    number: int,
    value: int,
    small: tuple[int, ...],
    base: np.ndarray,
) -> WeightsAt | None:
    """Tests whether a leaf holds weights, or a value that marks padding."""
    effect = _effect(experiment, number, value, small, base)
    if effect is None:
        return None
    leaf, own = effect.leaf, experiment.leaves[number]
    found = WeightsAt(
        experiment.path(number),
        None,
        effect.shift,
        small[leaf.ndim - 1] - (leaf.shape[-1] - effect.shift),
        effect.divides,
    )
    if leaf.dtype == jnp.bool_:
        return found
    linear = value == 0 and _is_linear(experiment, number, effect, small, base)
    if _integral(leaf):
        # A label out of range may have no loss; it is padding if the batch has any.
        known = not is_shape(own) and value in np.asarray(own)
        if linear:
            return found
        return found._replace(sentinel=value) if effect.divides or known else None
    # A factor that may be negative, such as an advantage, belongs to the term itself.
    signed = not is_shape(own) and bool(jnp.any(own < 0))
    if signed and not effect.divides:
        return None
    if signed or not linear:
        raise _unknown(experiment, number)
    return found


def _effect(
    experiment: Experiment,
    number: int,
    value: int,
    small: tuple[int, ...],
    base: np.ndarray,
) -> _Effect | None:
    """Sets a leaf to a value at one position; None if no term goes by it."""
    leaf = experiment.filled(number, small)
    gradient = _changed(experiment, number, leaf, value, small)
    if gradient is None:
        return None
    # Exactly zero: a term that is only made smaller is no padding.
    before, after = terms_in(base), terms_in(gradient)
    gone = before & ~after
    if not np.any(gone):
        return None
    shift = next((s for s in (0, 1) if _only(gone, before, leaf.ndim, s)), None)
    left = (base != 0) & _along(after, base)
    ratios = gradient[left] / base[left]
    divides = bool(np.allclose(ratios, before.sum() / after.sum(), rtol=TOLERANCE))
    if shift is None or not (divides or np.allclose(ratios, 1, rtol=TOLERANCE)):
        raise _unknown(experiment, number)
    return _Effect(leaf, gone, shift, divides)


def _is_linear(
    experiment: Experiment,
    number: int,
    effect: _Effect,
    small: tuple[int, ...],
    base: np.ndarray,
) -> bool:
    """Tests whether twice the value is twice the weight."""
    twice = 2 * effect.leaf[(0,) * effect.leaf.ndim]
    gradient = _changed(experiment, number, effect.leaf, twice, small)
    if gradient is None:
        return False
    count, heavier = terms_in(base).sum(), effect.gone.sum()
    shared = count / (count + heavier) if effect.divides else 1
    terms = (base != 0) & _along(effect.gone, base)
    return np.allclose(gradient[terms] / base[terms], 2 * shared, rtol=TOLERANCE)


def _changed(
    experiment: Experiment, number: int, leaf: Any, value: Any, small: tuple[int, ...]
) -> np.ndarray | None:
    """The gradient with another value at position 1 of each of a leaf's axes."""
    new = leaf.at[(1,) * leaf.ndim].set(jnp.asarray(value, leaf.dtype))
    try:
        gradient = experiment.gradient(small, {number: new})
    except Exception:  # the user's code may refuse the value
        return None
    return gradient if np.all(np.isfinite(gradient)) else None


def _unknown(experiment: Experiment, number: int) -> Contradicted:
    name = path_text(experiment.path(number))
    return Contradicted(f"{name} takes part in it in a way that cannot be told")


def _along(terms: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Flags of terms, with an axis of features if the gradient has one."""
    return terms[..., None] if gradient.ndim > terms.ndim else terms


def _only(gone: np.ndarray, before: np.ndarray, ndim: int, shift: int) -> bool:
    """Whether the terms that are gone are those at position 1, less the shift."""
    expected = np.zeros_like(before)
    expected[(*(1,) * (ndim - 1), 1 - shift)[: before.ndim]] = True
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
    expected = np.ones_like(real)
    for axis, offset in zip(terms.axes, terms.offsets, strict=True):
        if axis < real.ndim and offset:
            index = [slice(None)] * real.ndim
            index[axis] = slice(-offset, None)
            expected[tuple(index)] = False
    weights = np.ones(real.shape)
    if isinstance(terms.weights, WeightsAt):
        leaves = [changes.get(i, x) for i, x in enumerate(experiment.leaves)]
        args = jax.tree.unflatten(experiment.tree, leaves)
        own = np.asarray(terms.weights.read(args), np.float64)
        weights *= own.reshape(own.shape + (1,) * (real.ndim - own.ndim))
    # Another mask may hide beside the weights that were found.
    if not np.array_equal(expected & (weights != 0), real):
        raise Contradicted("rows of this batch have no part in it, like padding")
    if labelled and np.any(real):
        alike = experiment.gradient(sizes, changes, alike=True)
        _check_uniform(alike[real] / _along(weights, alike)[real])


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
