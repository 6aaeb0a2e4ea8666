"""Finds the argument that weights the terms of a loss, by experiments on its head."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lbopt.curvature.head_experiment import (
    TOLERANCE,
    Contradicted,
    Experiment,
    is_shape,
    terms_in,
)
from lbopt.curvature.terms import Terms, WeightsAt, path_text, without_ones

_SPECIAL = (0, -1, -100, 255, 1)  # values of a label that mark padding
_ANOTHER = -7  # no library's mark: it is padding where every negative label is
_LARGEST = 2**25  # numbers that an experiment on a batch may have


def may_mark_padding(leaf: Any) -> bool:
    """Whether a leaf of the arguments looks like a mask, or labels with padding."""
    if not getattr(leaf, "shape", ()):
        return False
    if leaf.dtype == jnp.bool_:
        return True
    negative = jnp.issubdtype(leaf.dtype, jnp.signedinteger) and not is_shape(leaf)
    return negative and bool(jnp.any(leaf < 0))


class Base(NamedTuple):
    """The loss's head at small sizes, to which experiments are compared.

    Attributes:
      experiment: the head.
      sizes: the sizes of the output's axes.
      gradient: the gradient by the output.
      events: whether the last axis of the output holds the coordinates of one event,
        over which the loss does not average.
    """

    experiment: Experiment
    sizes: tuple[int, ...]
    gradient: np.ndarray
    events: bool

    @property
    def terms(self) -> np.ndarray:
        """The positions that have a gradient."""
        return terms_in(self.gradient, self.events)


def find_weights(base: Base) -> WeightsAt | None:
    """Finds the argument that weights the terms of a loss.

    Args:
      base: the loss's head.

    Returns:
      The argument; None if there is none.

    Raises:
      Contradicted: if several do, or one in a way that cannot be told.
    """
    found = []
    for number, leaf in enumerate(base.experiment.leaves):
        if not _may_weight(base.experiment, leaf):
            continue
        for value in _values_of(base.experiment, leaf):
            weights = _tested(base, number, value)
            if weights is not None:
                found.append(weights)
                break
    # Their product would have to be known, and how they enter it.
    if len(found) > 1:
        paths = ", ".join(path_text(w.path) for w in found)
        raise Contradicted(f"several of its arguments weight its terms ({paths})")
    return found[0] if found else None


def _values_of(experiment: Experiment, leaf: Any) -> list[int | float]:
    """The values of a leaf that may mark padding, or be the weight of padding."""
    if leaf.dtype == jnp.bool_:
        return [int(not experiment.truth)]
    if not _integral(leaf):
        return [0, math.nan]
    own = [] if is_shape(leaf) else [int(leaf.min()), int(leaf.max())]
    least, most = np.iinfo(leaf.dtype).min, np.iinfo(leaf.dtype).max
    return [x for x in dict.fromkeys([*_SPECIAL, *own]) if least <= x <= most]


def _may_weight(experiment: Experiment, leaf: Any) -> bool:
    """Whether a leaf has one number for each position of the output."""
    if not getattr(leaf, "shape", ()) or not any(
        jnp.issubdtype(leaf.dtype, kind)
        for kind in (jnp.floating, jnp.integer, jnp.bool_)
    ):
        return False
    core = len(without_ones(leaf.shape))
    return experiment.along(leaf) >= core or experiment.shifted(leaf)


class _Effect(NamedTuple):
    """What a value of a leaf does to the term at its position.

    Attributes:
      leaf: the leaf as it is.
      core: its shape without last axes of size 1.
      gone: the positions whose terms the value takes off the loss.
      shift: positions between the leaf's and those of the terms.
      divides: whether the other terms get what they had.
    """

    leaf: Any
    core: tuple[int, ...]
    gone: np.ndarray
    shift: int
    divides: bool


def _tested(base: Base, number: int, value: int | float) -> WeightsAt | None:
    """Tests whether a leaf holds weights, or a value that marks padding."""
    effect = _effect(base, number, value)
    if effect is None:
        return None
    core, own = effect.core, base.experiment.leaves[number]
    found = WeightsAt(
        base.experiment.path(number),
        None,
        False,
        effect.shift,
        base.sizes[len(core) - 1] - (core[-1] - effect.shift),
        effect.divides,
    )
    if effect.leaf.dtype == jnp.bool_:
        return found if base.experiment.truth else found._replace(padding=1)
    linear = value == 0 and _is_linear(base, number, effect)
    if linear:
        signed = not is_shape(own) and bool(jnp.any(own < 0))
        if signed and effect.divides:
            raise _unknown(base, number)
        return found
    if not _integral(effect.leaf) and _scales(base, number):
        raise _unknown(base, number)
    # A label out of range may have no loss; it is padding if the batch has any.
    known = not is_shape(own) and value in np.asarray(own)
    if not (effect.divides or known or math.isnan(value)):
        return None
    another = _effect(base, number, _ANOTHER) if value < 0 else None
    if another is not None and np.array_equal(another.gone, effect.gone):
        return found._replace(padding=-1, below=True)
    return found._replace(padding=value)


def _effect(base: Base, number: int, value: int | float) -> _Effect | None:
    """Sets a leaf to a value at one position; None if no term goes by it."""
    leaf = base.experiment.filled(number, base.sizes)
    core = without_ones(leaf.shape)
    gradient = _changed(base, number, leaf, value)
    smaller = _changed(base, number, leaf, value, scale=0.1)
    if gradient is None or smaller is None:
        return None
    # Exactly zero: a term that is only made smaller is no padding.
    before, after = base.terms, terms_in(gradient, base.events)
    gone = before & ~after
    if not np.any(gone):
        if _is_mask(base.experiment.leaves[number]):
            _require_no_part(base, number, gradient)
        return None
    # A label may choose another branch, which is flat at some outputs.
    if np.any(gone & terms_in(smaller, base.events)):
        return None
    shift = next((s for s in (0, 1) if _only(gone, before, len(core), s)), None)
    left = (base.gradient != 0) & _along(after, base.gradient)
    ratios = gradient[left] / base.gradient[left]
    divides = bool(np.allclose(ratios, before.sum() / after.sum(), rtol=TOLERANCE))
    if shift is None or not (divides or np.allclose(ratios, 1, rtol=TOLERANCE)):
        raise _unknown(base, number)
    return _Effect(leaf, core, gone, shift, divides)


def _is_mask(leaf: Any) -> bool:
    """Whether a leaf holds nothing but zeros and ones."""
    if leaf.dtype == jnp.bool_:
        return True
    return not is_shape(leaf) and bool(jnp.all((leaf == 0) | (leaf == 1)))


def _require_no_part(base: Base, number: int, gradient: np.ndarray) -> None:
    """Raises Contradicted if a change of one example's mask has other effects."""
    others = np.arange(len(gradient)) != 1
    size = np.max(np.abs(base.gradient))
    # A label is nobody else's; the divisor of masked terms is everybody's.
    shared = not np.allclose(
        gradient[others], base.gradient[others], rtol=TOLERANCE, atol=TOLERANCE * size
    )
    lost, won = gradient == 0, base.gradient == 0
    # Coordinates of an event that are masked one by one, such as missing targets.
    partial = np.any(lost & ~won) and not np.any(won & ~lost)
    if shared or partial:
        raise _unknown(base, number)


def _is_linear(base: Base, number: int, effect: _Effect) -> bool:
    """Tests whether twice the value is twice the weight."""
    twice = 2 * effect.leaf[(0,) * effect.leaf.ndim]
    gradient = _changed(base, number, effect.leaf, twice)
    if gradient is None:
        return False
    count, heavier = base.terms.sum(), effect.gone.sum()
    shared = count / (count + heavier) if effect.divides else 1
    terms = (base.gradient != 0) & _along(effect.gone, base.gradient)
    ratios = gradient[terms] / base.gradient[terms]
    return np.allclose(ratios, 2 * shared, rtol=TOLERANCE)


def _scales(base: Base, number: int) -> bool:
    """Whether other numbers in a leaf multiply the gradient, which no label does."""
    whole = 2 * base.experiment.filled(number, base.sizes)
    gradient = base.experiment.gradient(base.sizes, {number: whole})
    ratios = gradient[base.gradient != 0] / base.gradient[base.gradient != 0]
    return np.allclose(ratios, ratios[0], rtol=TOLERANCE)


def _changed(
    base: Base, number: int, leaf: Any, value: Any, scale: float = 1.0
) -> np.ndarray | None:
    """The gradient with another value at position 1 of each of a leaf's axes."""
    at = (1,) * len(without_ones(leaf.shape))
    new = leaf.at[at].set(jnp.asarray(value, leaf.dtype))
    try:
        gradient = base.experiment.gradient(base.sizes, {number: new}, scale=scale)
    except Exception:  # the user's code may refuse the value
        return None
    return gradient if np.all(np.isfinite(gradient)) else None


def _unknown(base: Base, number: int) -> Contradicted:
    name = path_text(base.experiment.path(number))
    return Contradicted(f"{name} takes part in it in a way that cannot be told")


def _along(terms: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Flags of terms, with an axis of features if the gradient has one."""
    return terms[..., None] if gradient.ndim > terms.ndim else terms


def _only(gone: np.ndarray, before: np.ndarray, ndim: int, shift: int) -> bool:
    """Whether the terms that are gone are those at position 1, less the shift."""
    expected = np.zeros_like(before)
    expected[(*(1,) * (ndim - 1), 1 - shift)[: before.ndim]] = True
    return bool(np.any(expected & before)) and np.array_equal(gone, expected & before)


def check_batch(base: Base, terms: Terms) -> None:
    """Compares the terms found with those of the batch at hand, axis by axis.

    Args:
      base: the loss's head.
      terms: the terms found.

    Raises:
      Contradicted: if rows of the batch have no part in the loss, or another weight
        than others, for no reason that was found.
    """
    experiment, small = base.experiment, base.sizes
    if any(map(is_shape, experiment.leaves)):
        return
    leading = len(small) - base.events
    for axis in range(leading):
        # Whole along this axis: a loss may count the real positions from its start.
        sizes = tuple(
            experiment.shape[i] if i == axis else size for i, size in enumerate(small)
        )
        if math.prod(sizes) > _LARGEST:
            continue
        for changes in _slabs(experiment, sizes[:leading], axis):
            _check_slab(base, terms, sizes, changes)


def check_rows(experiment: Experiment) -> None:
    """Tests whether every row of the batch at hand has a part in the loss.

    Args:
      experiment: the loss's head, which may fail at any other size.

    Raises:
      Contradicted: if a row has none.
    """
    few = math.prod(experiment.shape) <= _LARGEST
    if any(map(is_shape, experiment.leaves)) or not few:
        return
    whole = dict(enumerate(experiment.leaves))
    gradient = np.nan_to_num(experiment.gradient(experiment.shape, whole), nan=0)
    real = terms_in(gradient, gradient.ndim > 1)
    if np.any(real) and not np.all(real):
        raise Contradicted("rows of this batch have no part in it, like padding")


def _check_slab(
    base: Base, terms: Terms, sizes: tuple[int, ...], changes: dict[int, Any]
) -> None:
    """Compares the terms found with those of a part of the batch."""
    experiment = base.experiment
    gradient = experiment.gradient(sizes, changes)
    real = terms_in(np.nan_to_num(gradient, nan=0), base.events)
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
    if base.events and np.any(real):
        labels = list(_labels(experiment, changes, real))
        if labels:
            rows = [
                experiment.gradient(sizes, changes, alike=value)[real]
                / weights[real][:, None]
                for value in (0.0, 0.5, -0.5)
            ]
            for own in labels:
                _check_classes(own, *rows)


def _slabs(
    experiment: Experiment, sizes: tuple[int, ...], whole: int
) -> Iterator[dict[int, Any]]:
    """Cuts the batch at hand into pieces that are whole along one axis."""
    shape = experiment.shape[: len(sizes)]
    starts = [
        list(dict.fromkeys([0, max(size - few, 0)]))
        for size, few in zip(shape, sizes, strict=True)
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
                size = sizes[axis] if axis < along else sizes[along] + 1
                at = np.minimum(corner[axis] + np.arange(size), leaf.shape[axis] - 1)
                piece = jnp.take(piece, at, axis=axis)
            pieces[number] = piece
        yield pieces


def _labels(
    experiment: Experiment, changes: dict[int, Any], real: np.ndarray
) -> Iterator[np.ndarray]:
    """The numbers that may be classes of the terms of a part of the batch."""
    for number, leaf in enumerate(experiment.leaves):
        piece = changes.get(number)
        if piece is None or experiment.shifted(leaf):
            continue
        along = len(experiment.shape) - 1
        if leaf.shape == experiment.shape and _is_mask(leaf) and leaf.shape[-1] > 1:
            yield np.argmax(np.asarray(piece), -1)[real]  # one-hot
        core = without_ones(leaf.shape)
        if len(core) != along or core != experiment.shape[:along]:
            continue
        if _integral(leaf) or _is_mask(leaf):
            yield np.asarray(piece).reshape(piece.shape[:along])[real]


def _check_classes(
    labels: np.ndarray, middle: np.ndarray, above: np.ndarray, below: np.ndarray
) -> None:
    """Compares the weights of terms of different classes.

    Args:
      labels: the classes, ``[terms]``.
      middle: the gradients ``[terms, outputs]`` where all outputs are 0.
      above: those where they have a value above.
      below: those where they have its negative.

    Raises:
      Contradicted: if they differ.
    """
    # If no class is treated apart, a label only permutes the gradient's entries, or, of
    # one logit, exchanges the signs.
    moved = above
    if middle.shape[-1] == 1:
        moved = np.where((labels == labels[0])[:, None], above, below)
    sizes = []
    for rows in (middle, moved):
        rows = np.sort(rows, -1)
        size = np.max(np.abs(rows), -1, keepdims=True)
        if not np.all(size > 0):
            return
        alike = np.abs(rows / size) if rows.shape[-1] == 1 else rows / size
        if not np.allclose(alike, alike[:1], rtol=TOLERANCE, atol=TOLERANCE):
            return
        sizes.append(size[:, 0] / size[0, 0])
    # Of squared errors and their like the ratio of two terms depends on the outputs.
    if not np.allclose(*sizes, rtol=TOLERANCE):
        return
    within = [np.ptp(sizes[0][labels == c]) < TOLERANCE for c in np.unique(labels)]
    if all(within) and not np.allclose(sizes[0], 1, rtol=TOLERANCE):
        raise Contradicted("its terms have different weights, such as those of classes")


def _integral(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)
