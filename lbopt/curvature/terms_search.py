"""Finds the terms that a loss averages, by experiments on its head.

The loss's head (``loss_head``) is differentiated on small arrays in place of the
outputs.  Along an axis that it averages over, twice the positions halve the gradient at
each; an argument whose value takes a position's gradient away holds its weight.
"""

import functools
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
    Coupled,
    Experiment,
    Unproved,
    is_shape,
    make_experiment,
)
from lbopt.curvature.loss import infer_batch_size
from lbopt.curvature.loss_head import LIKELIHOOD, Head, Name, others_reach
from lbopt.curvature.terms import Terms, WeightsAt, path_text, without_ones
from lbopt.curvature.weights_search import (
    Base,
    check_batch,
    check_rows,
    find_weights,
    may_mark_padding,
)

_PRIMES = (2, 3, 5, 7, 11)


def terms_of(
    loss: Callable[..., Any],
    params: Any,
    args: Sequence[Any],
    head: Head,
    batch_size: int | None,
    loss_name: str,
) -> tuple[Terms, int | None]:
    """Finds the terms that a loss averages, or takes those that are stated.

    Args:
      loss: the scalar loss.
      params: the parameters, arrays or shapes.
      args: its other arguments, arrays or shapes.
      head: what an abstract trace saw of its outputs.
      batch_size: the number of terms, if ``trace_layers`` was given it.
      loss_name: the loss function's name, for messages.

    Returns:
      The terms, and the number of examples of the batch; None if it is unknown.

    Raises:
      ValueError: if the terms are neither found nor stated, if what is stated is not
        what is found, or if there are no examples.
    """
    stated = [name for name in head.outputs if name[0] == LIKELIHOOD]
    sizes = {
        head.outputs[name].shape[0]
        for name in stated or head.outputs
        if head.outputs[name].shape and name not in head.inner
    }
    examples = sizes.pop() if len(sizes) == 1 else infer_batch_size(args)
    if examples == 0:
        raise ValueError(
            f"the batch of loss_fn={loss_name} holds no examples; pass at least one"
        )
    if batch_size is not None and "terms" in head.stated:
        return _stated(batch_size, args, ""), examples
    if head.stated:
        text = f"{' and '.join(sorted(head.stated))} stated by likelihood"
        outputs = tuple(head.stated.get("weights", ()))
        terms = Terms(outputs, (), (), None, None, examples, text)
        if outputs:
            others = others_reach(head, loss, params, args)
            terms = terms._replace(weights="likelihood", others=others)
        return terms, examples
    try:
        terms = find(loss, params, args, head, examples)
    except Unproved as reason:
        if batch_size is not None:
            contradicted = isinstance(reason, Contradicted)
            why = f" ({reason})" if contradicted else ""
            return _stated(batch_size, args, why), examples
        ways = (
            "them by batch_size= (their number in the batch), or by "
            "lbopt.likelihood(outputs, ..., terms=) or (..., weights=) in the loss"
        )
        if isinstance(reason, Contradicted):
            ways = (
                "the weights of its terms by lbopt.likelihood(outputs, ..., weights=) "
                "in the loss; batch_size= alone, for a loss without weights, would "
                "leave padding in the statistics"
            )
        raise ValueError(
            f"cannot find the terms that loss_fn={loss_name} averages: {reason}. State "
            f"{ways}"
        ) from reason
    if batch_size is None:
        return terms, examples
    if not isinstance(terms.weights, WeightsAt):
        return _stated(batch_size, args, ""), examples
    shape = head.outputs[terms.outputs[0]].shape
    _require_sum(terms, args, shape, batch_size, loss_name)
    return terms, examples


def _stated(batch_size: int, args: Sequence[Any], why: str) -> Terms:
    """The terms of a stated number, in proportion to the batch of the arguments."""
    try:
        own = infer_batch_size(args)
    except ValueError:  # several; evaluations have to state theirs
        own = None
    text = f"{batch_size}, stated by batch_size={why}"
    return Terms((), (), (), None, batch_size, own, text)


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
      batch_size: the number of examples, if it can be read off.

    Returns:
      The terms.

    Raises:
      Contradicted: with the reason, if the loss is seen to be no plain mean.
      Unproved: with the reason, if the outputs have more axes than one example's and
        their terms cannot be found.
    """
    names = [n for n in head.outputs if n[0] == LIKELIHOOD] or list(head.outputs)
    names = [n for n in names if head.outputs[n].shape and n not in head.inner]
    leaves, tree = jax.tree.flatten(tuple(args))
    # NumPy's float64 becomes what JAX makes of it in the loss.
    leaves = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in leaves]
    assumed = functools.partial(_assumed, head, names, batch_size, tuple(args))
    if not names:
        return assumed("its outputs stay inside a transform, such as jit or scan")
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
            check_rows(experiment)
            return assumed(str(reason))
        if terms is not None:
            found.append(terms)
    # One number serves all layers, whose gradients come from all outputs together.
    texts = "; ".join(terms.text for terms in found)
    if len({terms.weights for terms in found}) > 1:
        raise Contradicted(f"its outputs have terms of different weights ({texts})")
    if len({terms.size for terms in found}) > 1:
        raise Unproved(f"its outputs have different numbers of terms ({texts})")
    if not found:
        return assumed("no gradient reaches its outputs in an experiment")
    text = found[0].text
    if len(found) > 1:
        text = text.replace("of the outputs", f"of each of {len(found)} outputs")
    return found[0]._replace(outputs=tuple(t.outputs[0] for t in found), text=text)


def _require_sum(
    terms: Terms,
    args: Sequence[Any],
    shape: tuple[int, ...],
    stated: int,
    loss_name: str,
) -> None:
    """Compares a stated number of terms with weights that were found.

    Args:
      terms: the terms, with weights among the arguments.
      args: the loss's arguments, arrays or shapes.
      shape: the shape of the first output.
      stated: the number.
      loss_name: the loss function's name, for the message.

    Raises:
      ValueError: if it is not what the loss divides by.
    """
    assert isinstance(terms.weights, WeightsAt)
    leaf = dict(jax.tree_util.tree_leaves_with_path(tuple(args)))[terms.weights.path]
    if is_shape(leaf):
        return
    n = float(terms.divisor(shape, terms.weights.read(args)))
    if not np.isclose(n, stated, rtol=TOLERANCE):
        raise ValueError(
            f"batch_size={stated}, but loss_fn={loss_name} divides by {n:g}, for its "
            f"terms are weighted by {path_text(terms.weights.path)}; leave batch_size= "
            "out, or state both by lbopt.likelihood(outputs, ..., weights=, terms=)"
        )


def _assumed(
    head: Head,
    names: Sequence[Name],
    batch_size: int | None,
    args: Sequence[Any],
    reason: str,
) -> Terms:
    """The batch size, where one example's outputs have no more than one axis."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if may_mark_padding(leaf):
            raise Contradicted(
                f"{reason}, so whether {path_text(path)} marks padding cannot be told"
            )
    axes = [
        len(x.shape) - _has_examples(x.shape, head.inner.get(name), batch_size)
        for name, x in head.outputs.items()
    ]
    if max(axes, default=0) > 1:
        raise Unproved(
            "its outputs have more axes than one example's, and what it does with them "
            "cannot be told"
        )
    # The shape of an output inside a transform is that of one lane or step.
    own = tuple(n for n in names if n not in head.inner)
    sizes = {head.outputs[name].shape[0] for name in own}
    if len(sizes) == 1:
        text = f"{sizes.pop()}, assumed: a mean over the leading axis of the outputs"
        return Terms(own, (0,), (0,), None, batch_size, None, f"{text} ({reason})")
    n = "?" if batch_size is None else batch_size
    text = f"{n}, assumed: a mean over the leading axis of the batch ({reason})"
    return Terms((), (), (), None, batch_size, batch_size, text)


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
    experiment, gradient = _base(experiment, small)
    if not np.any(gradient):
        _require_unreached(experiment, small)
        return None
    try:
        axes, offsets = _averaged(experiment, small, gradient)
    except Unproved:
        # Rows without a part in the loss may be why.
        nothing = Terms((experiment.output,), (), (), None, None, None, "")
        check_batch(Base(experiment, small, gradient, last > 0), nothing)
        raise
    base = Base(experiment, small, gradient, last not in axes)
    weights = find_weights(base)
    if weights is not None:
        leaf = experiment.leaf(weights.path)
        if set(range(len(without_ones(np.shape(leaf))))) - set(axes):
            raise Contradicted(
                f"{path_text(weights.path)} weights positions that it does not average"
            )
    terms = Terms(
        (experiment.output,), tuple(axes), tuple(offsets), weights, None, shape[0], ""
    )
    check_batch(base, terms)
    return terms._replace(size=terms.count(shape), text=_text(terms, experiment))


def _base(
    experiment: Experiment, small: tuple[int, ...]
) -> tuple[Experiment, np.ndarray]:
    """Returns the gradient at small sizes, with booleans that leave terms in it."""
    try:
        gradient = experiment.gradient(small)
        if not (np.all(np.isfinite(gradient)) and np.any(gradient)):
            # A boolean may mark padding, not what is real.
            other = experiment._replace(truth=False)
            inverse = other.gradient(small)
            if np.all(np.isfinite(inverse)) and np.any(inverse):
                return other, inverse
    except Exception as error:  # of any kind: it is the user's code that fails
        raise _failed(error) from error
    if not np.all(np.isfinite(gradient)):
        raise Unproved("its gradient by the outputs is not finite")
    return experiment, gradient


def _require_unreached(experiment: Experiment, small: tuple[int, ...]) -> None:
    """Raises Contradicted if an output reaches the loss for some arguments only."""
    for label in (0, 1):
        other = experiment._replace(number=0.5, label=label)
        try:
            gradient = other.gradient(small, scale=0.1)
        except Exception:  # the user's code may refuse the values
            continue
        if np.any(np.nan_to_num(gradient)):
            raise Contradicted("an argument chooses which of its outputs count")


def _failed(error: Exception) -> Unproved:
    return Unproved(
        f"it fails on outputs of another size ({type(error).__name__}: {error})"
    )


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
    softmax = np.all(sums < TOLERANCE * np.max(np.abs(base)))
    if last == 0 or small[last] == 1 or softmax:
        return axes, offsets
    # A position that uses one of its coordinates, such as the value of an action.
    if np.all(np.sum(base != 0, -1) <= 1):
        return axes, offsets
    try:
        large = (*small[:last], 2 * small[last])
        more = _explained(experiment, small, base, large, [last])
    except Coupled:  # the coordinates of one event, as of a norm or a softmax
        return axes, offsets
    except Unproved as reason:
        changed = ~np.isclose(base, experiment.gradient(small, raised=0.5))
        if np.all(np.any(changed, tuple(range(last)))):
            return axes, offsets  # each depends on the first
        raise Unproved(
            "whether it averages over the last axis of its outputs cannot be told, for "
            f"with more coordinates {reason}"
        ) from reason
    return axes + more[0], offsets + more[1]


def _explained(
    experiment: Experiment,
    small: tuple[int, ...],
    base: np.ndarray,
    large: tuple[int, ...],
    axes: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Finds the averaged axes that explain the gradients at two sizes."""
    try:
        more = experiment.gradient(large)
    except Exception as error:  # of any kind: it is the user's code that fails
        raise _failed(error) from error
    first = more[tuple(slice(size) for size in small)]
    real = base != 0
    ratios = first[real] / base[real]
    unknown = Unproved(
        f"it neither averages nor adds up the positions along axes {list(axes)} of its "
        "outputs"
    )
    if not np.allclose(ratios, ratios.flat[0], rtol=TOLERANCE):
        raise Coupled(*unknown.args)
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
        if terms.weights.padding is not None:
            sign = ">" if terms.weights.below else "!="
            text += f" {sign} {terms.weights.padding}"
    return text
