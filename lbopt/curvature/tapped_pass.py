"""One forward pass of a loss with every layer tapped, and its backward passes."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp

from lbopt import checks
from lbopt._typing import Array, Params
from lbopt.curvature import block as blocks
from lbopt.curvature import capture, eigen_moments, loss, rows, signals
from lbopt.curvature import locations as places
from lbopt.curvature.layer_table import Layer, Layers
from lbopt.curvature.likelihood import Outputs, listen, single_outputs
from lbopt.curvature.loss_head import LIKELIHOOD, Name, Outermost
from lbopt.curvature.terms import WeightsAt

Fisher: TypeAlias = Literal["empirical", "sampled", "exact"]


class Evaluator(NamedTuple):
    """A loss with its layers and the Fisher matrix to be estimated.

    Attributes:
      loss_fn: ``loss_fn(params, *args, **kwargs) -> loss`` or ``(loss, aux)``.
      layers: the layers that ``trace_layers`` found in it.
      has_aux: whether it returns ``(loss, aux)``.
      fisher: the Fisher matrix.
      batch_size: the stated number of terms of a part; None if it is found.
    """

    loss_fn: Callable[..., Any]
    layers: Layers
    has_aux: bool
    fisher: Fisher
    batch_size: Any

    @property
    def weighted(self) -> bool:
        """Whether the terms of the loss have weights."""
        return self.layers.terms.weights is not None


def make_evaluator(
    loss_fn: Callable[..., Any],
    layers: Any,
    *,
    has_aux: bool,
    fisher: Any,
    batch_size: Any = None,
) -> Evaluator:
    """Checks the settings of an evaluation.

    Args:
      loss_fn: the loss.
      layers: its layers.
      has_aux: whether it returns ``(loss, aux)``.
      fisher: the Fisher matrix.
      batch_size: the number of terms that the loss averages; None if it is found.

    Returns:
      The settings.

    Raises:
      ValueError: for settings out of range.
    """
    checks.one_of("fisher", fisher, get_args(Fisher))
    if not isinstance(layers, Layers):
        raise ValueError(
            f"layers={type(layers).__name__} must be the table that lbopt.trace_layers "
            "returns"
        )
    if isinstance(batch_size, jax.Array):
        if layers.terms.weights is None:
            raise ValueError(
                "batch_size is an array, so rows of the batch have weights (padding), "
                "but layers knows of none; state them by lbopt.likelihood(..., "
                "weights=) in the loss and call trace_layers again"
            )
    elif batch_size is not None:
        checks.whole("batch_size", batch_size, "None: trace_layers finds it")
    loss_fn = loss.unjitted(loss_fn)
    return Evaluator(loss_fn, layers, has_aux, fisher, batch_size)


class Tapped(NamedTuple):
    """The result of a forward pass with every layer tapped.

    Attributes:
      value: the loss.
      aux: what it returns beside it.
      pull: ``(cotangent of the loss, those of the kept outputs, square)`` →
        gradient, sums by path, and the gradients by the weighted outputs.
      outputs: the arguments of ``likelihood``.
      kept: the outputs that signals are backpropagated from, if any are.
      roots: square roots of the terms' weights; None if they have none.
      terms: the number of terms, or the sum of their weights.
      positions: the number of positions at which there may be terms.
    """

    value: Array
    aux: Any
    pull: Callable[..., tuple[Params, dict[str, Any], Any]]
    outputs: Sequence[Outputs]
    kept: Any
    roots: Any
    terms: Any
    positions: Any


def tap(
    evaluator: Evaluator,
    wanted: Mapping[str, Any],
    bases: Mapping[str, tuple[Array, ...]],
    params: Params,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Tapped:
    """Evaluates the loss with taps; nothing is backpropagated yet."""
    layers, fisher, loss_fn = evaluator.layers, evaluator.fisher, evaluator.loss_fn
    known = layers.preconditioned
    used = {path: with_bases(layer, bases[path]) for path, layer in known.items()}
    taps = [layer for layer in used.values() if layer.has_tap]
    probes = capture.make_probes(
        [layer.tapped for layer in taps],
        [wanted[layer.path] for layer in taps],
        [bases[layer.path] for layer in taps],
        layers.accepted,
    )
    look = _preview(evaluator, params, args, kwargs) if evaluator.weighted else None
    names = layers.terms.outputs
    bumps: Any = {}
    # Roots of a mask are the mask: the loss's own signals serve.
    if look is not None and not look.is_mask and fisher == "empirical":
        bumps = jax.tree.map(jnp.zeros_like, look.outputs)
    outputs: list[Outputs] = []
    shapes: dict[Name, tuple[int, ...]] = {}

    def tapped_loss(
        p: Params, arrays: capture.ProbeArrays, bumps: Any
    ) -> tuple[tuple[Array, Any], Any]:
        whole = probes.insert(p, arrays)
        taps = probes.interceptor(whole, arrays)
        if look is not None:
            w = jnp.abs(look.weights)  # a term may have a negative factor
            taps = taps._replace(weights=rows.RowWeights(w, taps.arrivals))
        kept: Any = {}

        def at_output(name: Name, x: Array) -> Array:
            shapes[name] = x.shape
            if name in bumps:
                x = kept[name] = x + bumps[name]
            return x

        with (
            nn.intercept_methods(listen(outputs)),
            nn.intercept_methods(Outermost(_at(names, at_output))),
            nn.intercept_methods(taps),
        ):
            result = loss_fn(whole, *args, **kwargs)
        value, aux = loss.split_aux(result, evaluator.has_aux, loss_fn)
        if fisher != "empirical":
            kept = [o.value for o in outputs]
        # Returned beside the loss, the outputs get cotangents of their own: a second
        # pull back through the same forward pass.
        return (value, kept), aux

    # Under shard_map(check_vma=True) sums are the devices' own if gradients are.
    arrays = capture.vary_like(probes.arrays(), jax.tree.leaves(params)[0])
    (value, kept), pull_back, aux = jax.vjp(
        tapped_loss, params, arrays, bumps, has_aux=True
    )
    probes.require_all_reached()

    def pull(
        by_loss: Any, signals: Any, square: bool
    ) -> tuple[Params, dict[str, Any], Any]:
        if signals is None:
            signals = jax.tree.map(jnp.zeros_like, kept)
        signals = jax.tree.map(lambda s, x: s.astype(x.dtype), signals, kept)
        # Like the loss, so that it varies over the same mesh axes.
        by_loss = jnp.full_like(value, 1) * jnp.asarray(by_loss, value.dtype)
        grads, taken, by_outputs = pull_back((by_loss, signals))
        sums = dict(zip([t.path for t in taps], probes.sums(taken), strict=True))
        for path, layer in used.items():
            if not layer.has_tap:
                location = layer.tapped.location
                own = places.lookup(grads, location)[location.names[0]]
                sums[path] = layer.block.estimate(None, own, wanted[path])
                if not square:
                    dtype = layer.block.sums.f.dtype
                    sums[path] = sums[path]._replace(f=own.astype(dtype))
        return grads, sums, by_outputs

    # The shapes are known once the loss has been traced.
    shape = next((shapes[name] for name in names if name in shapes), None)
    positions = _positions(evaluator, shape, args, kwargs)
    terms = _count(evaluator, outputs, look, positions, shape)
    roots = None if look is None else jnp.sqrt(jnp.abs(look.weights))
    return Tapped(value, aux, pull, outputs, kept, roots, terms, positions)


class _Preview(NamedTuple):
    """What a weighted loss says of its terms, without taps.

    Attributes:
      outputs: the outputs along whose leading axes the weights lie.
      weights: the weights, of at least float32.
      is_mask: whether they are booleans.
      terms: the number that the loss divides by, if ``likelihood`` states one.
    """

    outputs: dict[Name, Array]
    weights: Array
    is_mask: bool
    terms: Any


def share(evaluator: Evaluator, params: Params, args: Sequence[Any]) -> Array:
    """Returns the share of a part of a batch, as in ``Totals``, of a weighted loss."""
    look = _preview(evaluator, params, args, {})
    shape = next(iter(look.outputs.values())).shape
    positions = _positions(evaluator, shape, args, {})
    terms = _count(evaluator, [], look, positions, shape)
    return jnp.asarray(terms / positions, jnp.float32)


def _preview(
    evaluator: Evaluator,
    params: Params,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> _Preview:
    """Evaluates the loss for its weights; XLA drops what they do not depend on."""
    terms = evaluator.layers.terms
    outputs: list[Outputs] = []
    seen: dict[Name, Array] = {}

    def note(name: Name, x: Array) -> Array:
        seen[name] = x
        return x

    with (
        nn.intercept_methods(listen(outputs)),
        nn.intercept_methods(Outermost(_at(terms.outputs, note))),
    ):
        evaluator.loss_fn(params, *args, **kwargs)
    if isinstance(terms.weights, WeightsAt):
        weights = terms.weights.read((*args, dict(kwargs)) if kwargs else args)
        stated = None
    else:
        own = [
            ((LIKELIHOOD, i), o) for i, o in enumerate(outputs) if o.weights is not None
        ]
        if len(own) != 1:
            raise ValueError(
                f"loss_fn={loss.name_of(evaluator.loss_fn)} states weights by "
                f"lbopt.likelihood {len(own)} times; state them once"
            )
        ((name, one),) = own
        weights, stated, seen = one.weights, one.terms, {name: one.value}
    if not seen:
        raise ValueError(
            f"loss_fn={loss.name_of(evaluator.loss_fn)} does not make the outputs that "
            "trace_layers saw; call it again with the loss of the training run"
        )
    w = jnp.asarray(weights)
    own_dtype = jnp.promote_types(w.dtype, jnp.float32)
    return _Preview(seen, w.astype(own_dtype), w.dtype == jnp.bool_, stated)


def _at(
    names: Collection[Name], treat: Callable[[Name, Array], Array]
) -> Callable[..., Any]:
    """Returns a treatment for ``Outermost`` that treats some outputs."""
    calls = itertools.count()

    def treat_all(order: int, args: tuple, call: Callable[[], Any]) -> Any:
        del args
        outputs = call()
        if order == LIKELIHOOD:
            name = (order, next(calls))
            return treat(name, outputs) if name in names else outputs
        leaves, tree = jax.tree.flatten(outputs)
        for i, x in enumerate(leaves):
            if (order, i) in names:
                leaves[i] = treat((order, i), x)
        return jax.tree.unflatten(tree, leaves)

    return treat_all


def _positions(
    evaluator: Evaluator,
    shape: tuple[int, ...] | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """The number of positions of the batch at which the loss may have terms."""
    terms = evaluator.layers.terms
    if evaluator.batch_size is not None and not evaluator.weighted:
        return evaluator.batch_size
    if shape is not None:
        return shape[0] if terms.weights == "likelihood" else terms.count(shape)
    examples = loss.infer_batch_size((*args, dict(kwargs)))
    if terms.size is not None and terms.examples not in (None, examples):
        # In proportion to the batch that the number was stated for.
        return terms.size * (examples or terms.examples) // terms.examples
    n = terms.size if terms.size is not None else examples
    if n is None:
        raise ValueError(
            "no argument of the loss looks like a batch (arrays that share a leading "
            "size); state it by batch_size= or by likelihood(..., terms=)"
        )
    return n


def _count(
    evaluator: Evaluator,
    outputs: Sequence[Outputs],
    look: _Preview | None,
    positions: int,
    shape: tuple[int, ...] | None,
) -> Any:
    """The number of terms that the loss averages, or the sum of their weights."""
    if look is not None:
        if evaluator.batch_size is not None:
            return evaluator.batch_size
        if look.terms is not None:
            return look.terms
        assert shape is not None
        return evaluator.layers.terms.divisor(shape, look.weights)
    stated = {o.terms for o in outputs if o.terms is not None}
    if evaluator.batch_size is not None:
        stated.add(int(evaluator.batch_size))
    if len(stated) > 1:
        raise ValueError(
            f"the loss's number of terms is stated as {sorted(stated)}; state it once, "
            "by batch_size= or by likelihood(..., terms=)"
        )
    return next(iter(stated), positions)


def sums_of_model(
    evaluator: Evaluator, tapped: Tapped, rng: Any, terms: Any, loss_scale: Any
) -> dict[str, Any]:
    """Backpropagates the signals of the predictive distribution."""
    exact = evaluator.fisher == "exact"
    one = single_outputs(
        tapped.outputs,
        loss.name_of(evaluator.loss_fn),
        f"fisher={evaluator.fisher!r}",
    )._replace(value=tapped.kept[0])

    zeros = [jnp.zeros_like(x) for x in tapped.kept[1:]]

    def pull(signal: Array) -> dict[str, Any]:
        # / n, because sums are those of a loss that averages n terms.
        signal = signal / terms
        if loss_scale is not None:
            signal = signal * loss_scale
        if tapped.roots is not None:
            signal = signal * blocks.spread(tapped.roots, signal.ndim)
        return tapped.pull(0, [signal, *zeros], square=exact)[1]

    if not exact:
        return pull(signals.sampled_signal(one, rng))
    # A block without a tap only sees its gradient summed over the batch, whose square
    # is right for one example at a time.
    known = evaluator.layers.preconditioned.values()
    one_by_one = not all(layer.has_tap for layer in known)
    return signals.summed_exactly(one, pull, one_by_one=one_by_one)


def wanted_of(
    used: dict[str, Layer], due: Any
) -> tuple[dict[str, Any], dict[str, tuple[Array, ...]]]:
    """Splits a mask into each layer's flags and eigenbases.

    Args:
      used: the layers by path.
      due: a mask, whose missing entries count as false; None for all statistics.

    Returns:
      Flags and bases by path; no bases for layers without corrected eigenvalues.

    Raises:
      ValueError: if the mask belongs to other layers.
    """
    strangers = sorted(set(due or ()) - set(used))
    if strangers:
        raise ValueError(
            f"due has entries {strangers} that are not in layers ({sorted(used)}); "
            "pass lbopt.refresh(opt_state) of an optimizer made with the same layers"
        )
    wanted, bases = {}, {}
    for path, layer in used.items():
        factors = layer.block.factor_shapes(())
        # An optimizer of some parameters (optax.masked, optax.partition) has the mask
        # of their layers only.
        absent = jax.tree.map(lambda _: due is None, factors)
        mask = absent if due is None else due.get(path, absent)
        kinds = [type(factors)]
        if layer.block.moments is not None:
            kinds.append(eigen_moments.CorrectedDue)
        if type(mask) not in kinds:
            raise ValueError(
                f"due[{path!r}] is a {type(mask).__name__}, not a "
                f"{type(factors).__name__} of flags; pass lbopt.refresh(opt_state) of "
                "an optimizer made with the same layers"
            )
        flags, bases[path] = eigen_moments.apart(mask)
        # A flag of known value is resolved here: outside of jit a conditional would be
        # compiled at every call.
        wanted[path] = jax.tree.map(
            lambda x: x if isinstance(x, jax.core.Tracer) else bool(x), flags
        )
    return wanted, bases


def with_bases(layer: Layer, bases: tuple[Array, ...]) -> Layer:
    """Adds second moments in the given bases, if any, to a layer's statistics."""
    if not bases:
        return layer
    tapped = layer.tapped
    block = eigen_moments.with_moments(tapped.block, len(tapped.copies), *bases)
    return layer._replace(tapped=tapped._replace(block=block))
