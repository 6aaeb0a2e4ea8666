"""Finds the terms that a loss averages, by experiments on its head.

The loss's head (``loss_head``) is differentiated on small arrays in place of the
outputs.  Along an axis that it averages over, twice the positions halve the gradient at
each; an argument whose value takes a position's gradient away holds its weight.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lbopt._typing import Array
from lbopt.curvature.head_experiment import (
    SMALL,
    TOLERANCE,
    Contradicted,
    Experiment,
    Unproved,
    make_experiment,
)
from lbopt.curvature.loss_head import LIKELIHOOD, Head
from lbopt.curvature.terms import Terms, WeightsAt, path_text
from lbopt.curvature.weights_search import check_batch, find_weights

_PRIMES = (2, 3, 5, 7, 11)


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
      Contradicted: with the reason, if the loss is seen to be no plain mean.
      Unproved: with the reason, if the outputs have more axes than one example's and
        their terms cannot be found.
    """
    names = [n for n in head.outputs if n[0] == LIKELIHOOD] or list(head.outputs)
    names = [n for n in names if head.outputs[n].shape and n not in head.inner]
    if not names:
        return _assumed(head, batch_size)
    leaves, tree = jax.tree.flatten(tuple(args))
    # NumPy's float64 becomes what JAX makes of it in the loss.
    leaves = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in leaves]
    found = []
    for name in names:
        experiment = make_experiment(loss, head, params, leaves, tree, name)
        try:
            terms = _find_along(experiment)
        except Contradicted:
            raise
        except Unproved as reason:
            if len(head.outputs[name].shape) > 2 or len(names) > 1:
                raise
            return _assumed(head, batch_size, str(reason))
        if terms is not None:
            found.append(terms)
    # One number serves all layers, whose gradients come from all outputs together.
    sizes = {terms.size for terms in found}
    if len(sizes) > 1:
        raise Unproved(
            "its outputs have different numbers of terms ("
            + "; ".join(terms.text for terms in found)
            + ")"
        )
    return found[0] if found else _assumed(head, batch_size)


def _assumed(head: Head, batch_size: int | None, reason: str = "") -> Terms:
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
    if reason:
        text += f" ({reason})"
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


def _find_along(experiment: Experiment) -> Terms | None:
    """Finds the terms along the axes of one output; None if it reaches no loss."""
    shape = experiment.shape
    last = len(shape) - 1
    small = (*(SMALL for _ in shape[:-1]), shape[-1])
    if last == 0:
        small = (SMALL,)
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
    try:
        axes, offsets = _averaged(experiment, small, base)
    except Unproved:
        # Rows without a part in the loss may be why.
        nothing = Terms(experiment.output, (), (), None, None, None, "")
        check_batch(experiment, nothing, small)
        raise
    weights = find_weights(experiment, small, base)
    if weights is not None:
        along = len(np.shape(experiment.leaf(weights.path)))
        if set(range(along)) - set(axes):
            raise Unproved(
                f"{path_text(weights.path)} weights positions that it does not average"
            )
    terms = Terms(
        experiment.output, tuple(axes), tuple(offsets), weights, None, shape[0], ""
    )
    check_batch(experiment, terms, small)
    return terms._replace(size=terms.count(shape), text=_text(terms, experiment))


def _averaged(
    experiment: Experiment, small: tuple[int, ...], base: np.ndarray
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
    large = (*(SMALL * p for p in _PRIMES[:leading]), *small[leading:])
    axes, offsets = _explained(experiment, small, base, large, range(leading))
    if 0 not in axes:
        raise Unproved("it adds up the examples instead of averaging them")
    last = len(small) - 1
    # The gradient of a softmax has no component along the sum of the logits.
    sums = np.abs(np.sum(base, -1))
    if last == 0 or np.all(sums < TOLERANCE * np.max(np.abs(base))):
        return axes, offsets
    try:
        large = (*small[:last], 2 * small[last])
        more = _explained(experiment, small, base, large, [last])
    except Exception:  # the coordinates of one event, such as the logits of classes
        return axes, offsets
    return axes + more[0], offsets + more[1]


def _explained(
    experiment: Experiment,
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
    if not np.allclose(ratios, ratios.flat[0], rtol=TOLERANCE):
        raise unknown
    counts = [[_count_along(g, axis) for axis in axes] for g in (base, more)]
    offsets = [
        (small[axis] - few, large[axis] - many)
        for axis, few, many in zip(axes, *counts, strict=True)
    ]
    # As many positions left out of three as of six: an end, not a mask.
    if any(one != other for one, other in offsets):
        raise unknown
    found = [
        subset
        for size in range(len(axes) + 1)
        for subset in itertools.combinations(range(len(axes)), size)
        if np.isclose(
            ratios.flat[0],
            math.prod(counts[0][i] / counts[1][i] for i in subset),
            rtol=TOLERANCE,
        )
    ]
    if len(found) != 1:
        raise unknown
    return [axes[i] for i in found[0]], [offsets[i][0] for i in found[0]]


def _count_along(gradient: np.ndarray, axis: int) -> int:
    """The number of positions along an axis that have a gradient anywhere."""
    others = tuple(i for i in range(gradient.ndim) if i != axis)
    return int(np.sum(np.any(gradient != 0, others)))


def _text(terms: Terms, experiment: Experiment) -> str:
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
