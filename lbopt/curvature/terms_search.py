"""Finds the terms that a loss averages, by experiments on its head.

The loss's head (``loss_head``) is differentiated on small arrays in place of the
outputs.  Along an axis that it averages over, twice the positions halve the gradient at
each; an argument whose value takes a position's gradient away holds its weight.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lbopt._typing import Array
from lbopt.curvature.loss_head import LIKELIHOOD, Head, Name, replaced
from lbopt.curvature.terms import Terms, WeightsAt, path_text


class Unproved(Exception):  # noqa: N818  (no "Error": it is caught, or says its own)
    """The reason why the terms of a loss cannot be found."""


# The sizes of the axes in the experiments, and the class of every label: large enough
# for every special value of a label to differ from it.
_SMALL, _LABEL = 3, 2
_PRIMES = (2, 3, 5, 7, 11)
_PIECES = 4  # of each axis of a batch
_SPECIAL = (0, -1, -100, 1)
_TOLERANCE = 1e-3


class _Experiment(NamedTuple):
    """A loss's head, to be evaluated at sizes and values of choice.

    Attributes:
      loss: the scalar loss of parameters and arguments.
      head: what an abstract trace saw.
      params: the parameters, of which the head depends on penalties alone.
      leaves: the leaves of the arguments.
      tree: their structure.
      output: the name of the output.
      compiled: ``(output, all outputs, array leaves) -> `` the gradient by the output.
    """

    loss: Callable[..., Array]
    head: Head
    params: Any
    leaves: list[Any]
    tree: Any
    output: Name
    compiled: Callable[..., Array]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return self.head.outputs[self.output].shape

    def gradient(
        self,
        sizes: tuple[int, ...],
        changes: Mapping[int, Any] | None = None,
        alike: bool = False,
    ) -> np.ndarray:
        """Returns the gradient of the loss by its output.

        Args:
          sizes: the sizes of the output's axes.
          changes: leaves of the arguments by number.
          alike: whether the outputs are the same at all positions.

        Returns:
          An array of these sizes.
        """
        values = np.zeros if alike else _values
        outputs = {
            name: jnp.asarray(values(self._resized(shape, sizes), shape.dtype))
            for name, shape in self.head.outputs.items()
        }
        leaves = [
            self.filled(i, sizes) if changes is None or i not in changes else changes[i]
            for i in range(len(self.leaves))
        ]
        arrays = [x for x in leaves if hasattr(x, "shape")]
        found = self.compiled(outputs[self.output], outputs, arrays)
        return np.asarray(found, np.float64)

    def leaf(self, path: tuple[Any, ...]) -> Any:
        """Returns a leaf of the arguments by its path."""
        args = jax.tree.unflatten(self.tree, self.leaves)
        return dict(jax.tree_util.tree_leaves_with_path(args))[path]

    def path(self, number: int) -> tuple[Any, ...]:
        """Returns the path of a leaf of the arguments."""
        args = jax.tree.unflatten(self.tree, self.leaves)
        return jax.tree_util.tree_leaves_with_path(args)[number][0]

    def along(self, leaf: Any) -> int:
        """Returns the number of leading axes that a leaf shares with the output."""
        shape, own = self.shape, getattr(leaf, "shape", ())
        shared = 0
        while shared < min(len(shape), len(own)) and own[shared] == shape[shared]:
            shared += 1
        return shared

    def filled(self, number: int, sizes: tuple[int, ...]) -> Any:
        """Returns a leaf of the arguments at other sizes, of one value throughout."""
        leaf = self.leaves[number]
        shared = self.along(leaf)
        if not shared or not hasattr(leaf, "dtype"):
            return _concrete(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        whole = list(leaf.shape)
        whole[:shared] = sizes[:shared]
        # Tokens that are inputs and targets of the next position: one more of them.
        if self.shifted(leaf):
            whole[shared] = sizes[shared] + 1
        value = _LABEL if jnp.issubdtype(leaf.dtype, jnp.integer) else 1
        return jnp.full(whole, value, leaf.dtype)

    def shifted(self, leaf: Any) -> bool:
        """Whether a leaf has one position more than the output along its last axis."""
        shared, own, shape = self.along(leaf), leaf.shape, self.shape
        inner = 0 < shared == len(own) - 1 < len(shape) - 1
        return inner and own[-1] == shape[shared] + 1

    def _resized(self, leaf: Any, sizes: tuple[int, ...]) -> tuple[int, ...]:
        shared = self.along(leaf)
        return (*sizes[:shared], *leaf.shape[shared:])


def _experiment(
    loss: Callable[..., Array],
    head: Head,
    params: Any,
    leaves: list[Any],
    tree: Any,
    output: Name,
) -> _Experiment:
    """Makes an experiment, whose head is compiled once for each size."""

    def by_output(x: Array, outputs: dict[Name, Array], arrays: list[Any]) -> Array:
        # Shapes become zeros here, where XLA drops them, and take no memory.
        whole = jax.tree.map(_concrete, params)
        given = iter(arrays)
        merged = [next(given) if hasattr(leaf, "shape") else leaf for leaf in leaves]
        args = jax.tree.unflatten(tree, merged)
        run = replaced(head, outputs | {output: x}, loss)
        if not head.inner:
            return run(whole, *args)
        # A compiled function of the loss must not keep the replaced outputs.
        with jax.disable_jit():
            return run(whole, *args)

    compiled = jax.jit(jax.grad(by_output))
    return _Experiment(loss, head, params, leaves, tree, output, compiled)


def find(
    loss: Callable[..., Array],
    params: Any,
    args: Sequence[Any],
    head: Head,
    batch_size: int | None,
) -> Terms:
    """Finds the terms that a loss averages.

    Args:
      loss: the scalar loss.
      params: the parameters, arrays or shapes.
      args: its other arguments, arrays or shapes.
      head: what an abstract trace saw of its outputs.
      batch_size: the number of examples, if it can be read off the arguments.

    Returns:
      The terms.

    Raises:
      Unproved: with the reason, if the outputs have more axes than one example's and
        their terms cannot be found.
    """
    names = [n for n in head.outputs if n[0] == LIKELIHOOD] or list(head.outputs)
    names = [n for n in names if head.outputs[n].shape and n not in head.inner]
    if not names:
        return _assumed(head, batch_size)
    leaves, tree = jax.tree.flatten(tuple(args))
    found = []
    for name in names:
        experiment = _experiment(loss, head, params, leaves, tree, name)
        try:
            terms = _find_along(experiment)
        except Unproved:
            if len(head.outputs[name].shape) > 2 or len(names) > 1:
                raise
            return _assumed(head, batch_size)
        if terms is not None:
            found.append(terms)
    sizes = {terms.size for terms in found}
    if len(sizes) > 1:
        raise Unproved(
            "its outputs have different numbers of terms ("
            + "; ".join(terms.text for terms in found)
            + ")"
        )
    return found[0] if found else _assumed(head, batch_size)


def _assumed(head: Head, batch_size: int | None) -> Terms:
    """The batch size, where one example's outputs have no more than one axis."""
    axes = [
        len(x.shape) - _has_examples(x.shape, head.inner.get(name), batch_size)
        for name, x in head.outputs.items()
    ]
    if max(axes, default=0) > 1:
        raise Unproved(
            "its outputs have more axes than one example's, and what it does with them "
            "cannot be told"
        )
    n = "?" if batch_size is None else batch_size
    text = f"{n}, assumed: a mean over the leading axis of the batch"
    return Terms(None, (), (), None, batch_size, batch_size, text)


def _has_examples(
    shape: tuple[int, ...], lanes: Sequence[int] | None, batch_size: int | None
) -> bool:
    """Whether the first axis of an output numbers examples."""
    if lanes is None or not shape or not batch_size:  # no transform
        return lanes is None
    if lanes:  # a vmap over examples, or over parts of the batch
        return math.prod(lanes) * shape[0] == batch_size
    # A loop over parts of the batch, or a compiled function of all of it.
    return shape[0] > 0 and batch_size % shape[0] == 0


def _find_along(experiment: _Experiment) -> Terms | None:
    """Finds the terms along the axes of one output; None if it reaches no loss."""
    shape = experiment.shape
    last = len(shape) - 1
    small = (*(_SMALL for _ in shape[:-1]), shape[-1])
    if last == 0:
        small = (_SMALL,)
    try:
        base = experiment.gradient(small)
    except Exception as error:  # of any kind: it is the user's code that fails
        raise Unproved(
            f"it fails on a batch of another size ({type(error).__name__}: {error})"
        ) from error
    if not np.all(np.isfinite(base)):
        raise Unproved("its gradient by the outputs is not finite")
    if not np.any(base):
        return None
    axes, offsets = _averaged(experiment, small, base)
    weights = _find_weights(experiment, small, base)
    if weights is not None:
        along = len(np.shape(experiment.leaf(weights.path)))
        if set(range(along)) - set(axes):
            raise Unproved(
                f"{path_text(weights.path)} weights positions that it does not average"
            )
    terms = Terms(
        experiment.output, tuple(axes), tuple(offsets), weights, None, shape[0], ""
    )
    _check_batch(experiment, terms, small, base)
    return terms._replace(size=terms.count(shape), text=_text(terms, experiment))


def _averaged(
    experiment: _Experiment, small: tuple[int, ...], base: np.ndarray
) -> tuple[list[int], list[int]]:
    """Finds the axes of its output that a loss averages over.

    Args:
      experiment: the loss's head.
      small: sizes of the output's axes.
      base: the gradient at these sizes.

    Returns:
      The axes, and for each the number of positions that are left out.

    Raises:
      Unproved: if a leading axis is neither averaged nor added up, or examples are
        added up.
    """
    leading = max(len(small) - 1, 1)
    # Sizes whose ratios tell which of the axes are averaged, in one experiment.
    large = (*(_SMALL * p for p in _PRIMES[:leading]), *small[leading:])
    axes, offsets = _explained(experiment, small, base, large, range(leading))
    if 0 not in axes:
        raise Unproved("it adds up the examples instead of averaging them")
    last = len(small) - 1
    # The gradient of a softmax has no component along the sum of the logits.
    sums = np.abs(np.sum(base, -1))
    if last == 0 or np.all(sums < _TOLERANCE * np.max(np.abs(base))):
        return axes, offsets
    try:
        large = (*small[:last], 2 * small[last])
        more = _explained(experiment, small, base, large, [last])
    except Exception:  # the coordinates of one event, such as the logits of classes
        return axes, offsets
    return axes + more[0], offsets + more[1]


def _explained(
    experiment: _Experiment,
    small: tuple[int, ...],
    base: np.ndarray,
    large: tuple[int, ...],
    axes: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Finds the averaged axes that explain the gradients at two sizes."""
    more = experiment.gradient(large)
    first = more[tuple(slice(size) for size in small)]
    real = base != 0
    ratios = first[real] / base[real]
    unknown = Unproved(
        f"it neither averages nor adds up the positions along axes {list(axes)} of its "
        "outputs"
    )
    if not np.allclose(ratios, ratios.flat[0], rtol=_TOLERANCE):
        raise unknown
    counts = [[_count_along(g, axis) for axis in axes] for g in (base, more)]
    offsets = [
        (small[axis] - few, large[axis] - many)
        for axis, few, many in zip(axes, *counts, strict=True)
    ]
    if any(one != other for one, other in offsets):
        raise unknown
    found = [
        subset
        for size in range(len(axes) + 1)
        for subset in itertools.combinations(range(len(axes)), size)
        if np.isclose(
            ratios.flat[0],
            math.prod(counts[0][i] / counts[1][i] for i in subset),
            rtol=_TOLERANCE,
        )
    ]
    if len(found) != 1:
        raise unknown
    return [axes[i] for i in found[0]], [offsets[i][0] for i in found[0]]


def _count_along(gradient: np.ndarray, axis: int) -> int:
    """The number of positions along an axis that have a gradient anywhere."""
    others = tuple(i for i in range(gradient.ndim) if i != axis)
    return int(np.sum(np.any(gradient != 0, others)))


def _find_weights(
    experiment: _Experiment, small: tuple[int, ...], base: np.ndarray
) -> WeightsAt | None:
    """Finds the argument that weights the terms of a loss."""
    found = []
    for number, leaf in enumerate(experiment.leaves):
        if not _may_weight(experiment, leaf):
            continue
        values = [0]
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            own = [] if _is_shape(leaf) else [int(np.asarray(leaf).flat[-1])]
            values = list(dict.fromkeys([*_SPECIAL, *own]))
        for value in values:
            weights = _tested(experiment, number, value, small, base)
            if weights is not None:
                found.append(weights)
                break
    if len(found) > 1:
        paths = ", ".join(path_text(w.path) for w in found)
        raise Unproved(f"several of its arguments weight its terms ({paths})")
    return found[0] if found else None


def _may_weight(experiment: _Experiment, leaf: Any) -> bool:
    """Whether a leaf has one number for each position of the output."""
    if not getattr(leaf, "shape", ()) or not any(
        jnp.issubdtype(leaf.dtype, kind)
        for kind in (jnp.floating, jnp.integer, jnp.bool_)
    ):
        return False
    return experiment.along(leaf) == len(leaf.shape) or experiment.shifted(leaf)


def _tested(
    experiment: _Experiment,
    number: int,
    value: int,
    small: tuple[int, ...],
    base: np.ndarray,
) -> WeightsAt | None:
    """Tests whether a value of a leaf takes the term at its position off the loss."""
    leaf = experiment.filled(number, small)
    at = (1,) * leaf.ndim
    before = _terms_in(base)

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
    after = _terms_in(gradient)
    gone = before & ~after
    if not np.any(gone):
        return None
    name = path_text(experiment.path(number))
    unknown = Unproved(f"{name} takes part in it in a way that cannot be told")
    shift = next((s for s in (0, 1) if _only(gone, before, at, s)), None)
    if shift is None:
        raise unknown
    missing = small[leaf.ndim - 1] - (leaf.shape[-1] - shift)
    left = (base != 0) & (after[..., None] if base.ndim > before.ndim else after)
    ratios = gradient[left] / base[left]
    shared = np.sum(before) / np.sum(after)
    divides = bool(np.allclose(ratios, shared, rtol=_TOLERANCE))
    if not divides and not np.allclose(ratios, 1, rtol=_TOLERANCE):
        raise unknown
    # A label out of range may have no loss; it is padding if the batch has any.
    integral = jnp.issubdtype(leaf.dtype, jnp.integer)
    own = experiment.leaves[number]
    if integral and not divides and (_is_shape(own) or value not in np.asarray(own)):
        return None
    # Twice the value is twice the weight, of numbers that are weights.
    doubled = None if leaf.dtype == jnp.bool_ else changed(2 * leaf[at])
    if doubled is not None and value == 0:
        total = np.sum(before) / (np.sum(before) + np.sum(gone)) if divides else 1
        row = (base != 0) & (gone[..., None] if base.ndim > gone.ndim else gone)
        if np.allclose(doubled[row] / base[row], 2 * total, rtol=_TOLERANCE):
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


def _terms_in(gradient: np.ndarray) -> np.ndarray:
    """Which positions have a gradient, without the axis of features if there is one."""
    return np.any(gradient != 0, -1) if gradient.ndim > 1 else gradient != 0


def _check_batch(
    experiment: _Experiment, terms: Terms, small: tuple[int, ...], base: np.ndarray
) -> None:
    """Compares the terms found with those of the batch at hand.

    Raises:
      Unproved: if rows of it have no part in the loss, or another weight than others,
        for no reason that was found.
    """
    if any(map(_is_shape, experiment.leaves)):
        return
    labelled = any(
        _may_weight(experiment, x) and _integral(x) for x in experiment.leaves
    )
    for changes in _windows(experiment, len(small)):
        gradient = experiment.gradient(small, changes)
        if not isinstance(terms.weights, WeightsAt):
            whole = np.nan_to_num(gradient, nan=0)
            if np.any(_terms_in(base) & ~_terms_in(whole)):
                raise Unproved("rows of this batch have no part in it, like padding")
            if labelled:
                _check_uniform(experiment.gradient(small, changes, alike=True))
            continue
        leaves = [changes.get(i, x) for i, x in enumerate(experiment.leaves)]
        args = jax.tree.unflatten(experiment.tree, leaves)
        weights = np.asarray(terms.weights.read(args))
        real = _terms_in(np.nan_to_num(gradient, nan=0))
        spread = weights.reshape(weights.shape + (1,) * (real.ndim - weights.ndim))
        if np.any(real & ~np.broadcast_to(spread != 0, real.shape)):
            raise Unproved("its weights were not understood")


def _windows(experiment: _Experiment, rank: int) -> Iterator[dict[int, Any]]:
    """Cuts the batch at hand into small pieces, some of each axis."""
    shape = experiment.shape[: max(rank - 1, 1)]
    starts = [
        [i * max(size - _SMALL, 0) // (_PIECES - 1) for i in range(_PIECES)]
        for size in shape
    ]
    for corner in itertools.product(*map(dict.fromkeys, starts)):
        pieces = {}
        for number, leaf in enumerate(experiment.leaves):
            along = min(experiment.along(leaf), len(shape))
            if not along:
                continue
            piece = leaf
            for axis in range(along + experiment.shifted(leaf)):
                size = _SMALL + (axis == along)
                at = np.minimum(corner[axis] + np.arange(size), leaf.shape[axis] - 1)
                piece = jnp.take(piece, at, axis=axis)
            pieces[number] = piece
        yield pieces


def _check_uniform(gradient: np.ndarray) -> None:
    """Compares the weights of terms of different labels.

    Args:
      gradient: that at outputs which are the same for all positions.

    Raises:
      Unproved: if they differ.
    """
    # If no class is treated apart, a label only permutes the gradient's entries.
    rows = np.sort(gradient.reshape(-1, gradient.shape[-1]), -1)
    sizes = np.max(np.abs(rows), -1, keepdims=True)
    if not np.all(sizes > 0):
        return
    same = np.allclose(rows / sizes, (rows / sizes)[:1], rtol=_TOLERANCE)
    if same and not np.allclose(sizes, sizes[0], rtol=_TOLERANCE):
        raise Unproved("its terms have different weights, such as those of classes")


def _integral(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)


def _others(x: np.ndarray, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(x.ndim) if i != axis)


def _text(terms: Terms, experiment: _Experiment) -> str:
    shape, (order, _) = experiment.shape, experiment.output
    sizes = [shape[a] - o for a, o in zip(terms.axes, terms.offsets, strict=True)]
    numbers = f"{' × '.join(map(str, sizes))}, mean over "
    axes = f"{'axes' if len(sizes) > 1 else 'axis'} {', '.join(map(str, terms.axes))}"
    outputs = "likelihood's outputs" if order == LIKELIHOOD else "the outputs"
    text = f"{numbers}{axes} of {outputs}"
    if isinstance(terms.weights, WeightsAt):
        text += f", weighted by {path_text(terms.weights.path)}"
        if terms.weights.sentinel is not None:
            text += f" != {terms.weights.sentinel}"
    return text


def _is_shape(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _concrete(x: Any) -> Any:
    if not _is_shape(x):
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), x.shape)
    return jnp.ones(x.shape, x.dtype)


def _values(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Numbers of no regularity, such that a larger array continues a smaller one."""
    index = np.indices(shape, np.float64)
    steps = [np.sqrt(p) for p in (2.0, 3.0, 5.0, 7.0, 11.0, 13.0)]
    total = sum(step * i for step, i in zip(steps, index, strict=False))
    return np.asarray(np.sin(37 * np.asarray(total) + 1), np.float32).astype(dtype)
