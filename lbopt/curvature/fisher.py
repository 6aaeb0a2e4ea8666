r"""Loss, gradient and curvature statistics from one evaluation of the loss.

Three Fisher matrices differ in the signal that is backpropagated:

* ``empirical``: the loss's own.  One forward and one backward pass.
* ``sampled``: from labels sampled from the model's predictive distribution, one per
  example.  The same forward pass and a second backward pass, of which only the
  statistics are computed, not the parameter gradient.
* ``exact``: the expectation over the predictive distribution, one backward pass per
  output coordinate.  For small models, tests and notebooks.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbopt import checks
from lbopt._typing import Array, Params
from lbopt.curvature import block as blocks
from lbopt.curvature import capture, eigen_moments, registry
from lbopt.curvature.likelihood import (
    Outputs,
    count_terms,
    listen,
    single_outputs,
)
from lbopt.curvature.registry import Layer, Layers
from lbopt.in_place import update_if

Fisher: TypeAlias = Literal["empirical", "sampled", "exact"]
Curvature: TypeAlias = dict[str, Any]
"""Each layer's statistics by path."""


def value_grad_and_curvature(
    loss_fn: Callable[..., Any],
    layers: Layers,
    *,
    has_aux: bool = False,
    fisher: Fisher = "empirical",
    batch_size: int | None = None,
) -> Callable[..., tuple[Any, Params, Curvature]]:
    r"""Extends ``jax.value_and_grad`` by the layers' curvature statistics.

    For a layer with inputs a and backward signals δ of a mean over n terms,

    .. math:: A = \frac{1}{nS} \sum a a^\top, \qquad G = n \sum \delta \delta^\top

    Args:
      loss_fn: ``loss_fn(params, *args) -> loss`` or ``(loss, aux)``.
      layers: the layers that ``trace_layers`` found in ``loss_fn``.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      fisher: the Fisher matrix: ``"empirical"``, ``"sampled"`` or ``"exact"``.
      batch_size: n, the number of terms that the loss averages, if it is neither the
        leading size of the batch nor declared by ``likelihood``.

    Returns:
      ``f(params, *args, rng=None, due=None) -> (value, grads, curvature)``.  ``value``
      is the loss or ``(loss, aux)``; ``curvature`` maps each layer's path to its
      statistics.  ``rng`` is the key from which the sampled Fisher draws labels.
      ``due`` is a mask from ``refresh``: statistics that are not due, and those of
      layers missing from the mask, are zero and cost nothing.

    Raises:
      ValueError: for an unknown ``fisher``.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Sequential([nn.Dense(3)]), jnp.ones((8, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> layers = lbopt.trace_layers(loss_fn, params, x)
      >>> f = lbopt.value_grad_and_curvature(loss_fn, layers)
      >>> loss, grads, curvature = f(params, x)
      >>> curvature["layers_0"].a.shape  # 5 inputs and the bias
      (6, 6)
    """
    run = _tapped_pass(loss_fn, layers, has_aux, fisher, batch_size)

    def evaluate(
        params: Params, *args: Any, rng: Any = None, due: Any = None
    ) -> tuple[Any, Params, Curvature]:
        tapped = run(params, args, rng, due)
        # XLA drops unused results of two backward passes: the sums of the first, the
        # parameter gradient of the second.
        grads, sums = tapped.pull_loss()
        if fisher != "empirical":
            sums = tapped.pull_model()
        return tapped.value, grads, tapped.means(sums)

    return evaluate


def curvature_only(
    loss_fn: Callable[..., Any],
    layers: Layers,
    *,
    has_aux: bool = False,
    fisher: Fisher = "sampled",
    batch_size: int | None = None,
) -> Callable[..., Curvature]:
    r"""Computes the layers' curvature statistics without the gradient.

    .. math:: A = \frac{1}{nS} \sum a a^\top, \qquad G = n \sum \delta \delta^\top

    The batch need not be the gradient's.  One forward and one backward pass (one per
    output coordinate for ``"exact"``); under ``jit`` the only parameter gradients
    computed are those that diagonal blocks need.

    Args:
      loss_fn: ``loss_fn(params, *args) -> loss`` or ``(loss, aux)``.
      layers: the layers that ``trace_layers`` found in ``loss_fn``.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      fisher: the Fisher matrix: ``"empirical"``, ``"sampled"`` or ``"exact"``.
      batch_size: as for ``value_grad_and_curvature``.

    Returns:
      ``f(params, *args, rng=None, due=None) -> curvature``, with arguments and result
      as for ``value_grad_and_curvature``.

    Raises:
      ValueError: for an unknown ``fisher``.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Sequential([nn.Dense(3)]), jnp.ones((8, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     f = lbopt.likelihood(model.apply({"params": params}, x), "normal")
      ...     return jnp.sum(f**2) / (2 * len(x))
      >>> layers = lbopt.trace_layers(loss_fn, params, x)
      >>> f = lbopt.curvature_only(loss_fn, layers)
      >>> f(params, x[:1], rng=jax.random.key(1))["layers_0"].g.shape  # 1/8 of x
      (3, 3)

    Source: Martens & Grosse 2015 sample labels for a random eighth of the minibatch;
    Ba, Grosse & Martens 2017, §3, for independent minibatches on other machines.
    """
    run = _tapped_pass(loss_fn, layers, has_aux, fisher, batch_size)

    def evaluate(
        params: Params, *args: Any, rng: Any = None, due: Any = None
    ) -> Curvature:
        tapped = run(params, args, rng, due)
        sums = tapped.pull_loss()[1] if fisher == "empirical" else tapped.pull_model()
        return tapped.means(sums)

    return evaluate


class _TappedPass(NamedTuple):
    """The result of a forward pass with every layer tapped.

    Attributes:
      value: the loss or ``(loss, aux)``.
      pull_loss: backpropagates the loss; returns its gradient and the sums by path.
      pull_model: backpropagates the predictive distribution; returns the sums by path.
      means: divides the sums; returns the statistics by path.
    """

    value: Any
    pull_loss: Callable[[], tuple[Params, dict[str, Any]]]
    pull_model: Callable[[], dict[str, Any]]
    means: Callable[[dict[str, Any]], Curvature]


def _tapped_pass(
    loss_fn: Callable[..., Any],
    layers: Any,
    has_aux: bool,
    fisher: Any,
    batch_size: int | None,
) -> Callable[..., _TappedPass]:
    """Returns ``run(params, args, rng, due)``, a forward pass with taps."""
    checks.one_of("fisher", fisher, get_args(Fisher))
    if batch_size is not None:
        checks.whole("batch_size", batch_size, "None reads it off the batch")
    if not isinstance(layers, Layers):
        raise ValueError(
            f"layers={type(layers).__name__} must be the table that lbopt.trace_layers "
            "returns"
        )
    loss_fn = registry.unjitted(loss_fn)
    known = layers.preconditioned

    def run(params: Params, args: Sequence[Any], rng: Any, due: Any) -> _TappedPass:
        if fisher == "sampled" and rng is None:
            raise ValueError(
                "fisher='sampled' draws labels: pass rng=, a new key at every step"
            )
        wanted, bases = _wanted(known, due)
        used = {path: _with_bases(layer, bases[path]) for path, layer in known.items()}
        taps = [layer for layer in used.values() if layer.has_tap]
        probes = capture.make_probes(
            [layer.tapped for layer in taps],
            [wanted[layer.path] for layer in taps],
            [bases[layer.path] for layer in taps],
        )
        outputs: list[Outputs] = []

        def tapped_loss(p: Params) -> tuple[tuple[Array, list[Array]], Any]:
            with (
                nn.intercept_methods(listen(outputs)),
                nn.intercept_methods(probes.interceptor),
            ):
                result = loss_fn(p, *args)
            loss, aux = registry.split_aux(result, has_aux, loss_fn)
            # Returned beside the loss, the outputs get cotangents of their own: a
            # second pull back through the same forward pass.
            kept = [] if fisher == "empirical" else [o.value for o in outputs]
            return (loss, kept), aux

        (loss, kept), pull_back, aux = jax.vjp(
            tapped_loss, probes.insert(params), has_aux=True
        )
        probes.require_all_reached()
        n = count_terms(outputs, batch_size, args)

        def collect(cotangents: tuple[Array, list[Array]]) -> tuple[Params, Any]:
            grads, sums = probes.remove(pull_back(cotangents)[0])
            by_path = {layer.path: s for layer, s in zip(taps, sums, strict=True)}
            return grads, {
                path: by_path[path]
                if layer.has_tap
                else _gradient_sums(layer, grads, wanted[path])
                for path, layer in used.items()
            }

        def pull_loss() -> tuple[Params, dict[str, Any]]:
            return collect((jnp.ones_like(loss), [jnp.zeros_like(x) for x in kept]))

        def pull_model() -> dict[str, Any]:
            one = single_outputs(
                outputs, registry.name_of(loss_fn), f"fisher={fisher!r}"
            )._replace(value=kept[0])

            def pull(signal: Array) -> dict[str, Any]:
                # / n, because sums are those of a loss that averages n terms.
                return collect((jnp.zeros_like(loss), [signal / n]))[1]

            if fisher == "sampled":
                return pull(_sampled_signal(one, rng))
            # A block without a tap only sees its gradient summed over the batch, whose
            # square is right for one example at a time.
            return _summed_exactly(one, pull, one_by_one=len(taps) < len(used))

        def means(sums: dict[str, Any]) -> Curvature:
            return {p: _mean(used[p].block, s, n, wanted[p]) for p, s in sums.items()}

        value = (loss, aux) if has_aux else loss
        return _TappedPass(value, pull_loss, pull_model, means)

    return run


def _wanted(
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
        wanted[path], bases[path] = eigen_moments.apart(mask)
    return wanted, bases


def _with_bases(layer: Layer, bases: tuple[Array, ...]) -> Layer:
    """Adds second moments in the given bases, if any, to a layer's statistics."""
    if not bases:
        return layer
    tapped = layer.tapped
    block = eigen_moments.with_moments(tapped.block, len(tapped.copies), *bases)
    return layer._replace(tapped=tapped._replace(block=block))


def _gradient_sums(layer: Layer, grads: Params, due: Any) -> Any:
    """Returns the sums of a block without a tap, from its parameter's gradient."""
    location = layer.tapped.location
    gradient = capture.lookup(grads, location)[location.names[0]]
    return layer.block.estimate(None, gradient, due)


def _mean(block: blocks.CurvatureBlock, sums: Any, n: int, due: Any) -> Any:
    """Divides a layer's sums; if no statistic is due, they are not even read."""
    flags = jax.tree.leaves(due)
    if all(isinstance(flag, bool) for flag in flags):
        means = block.mean(sums, n) if any(flags) else sums
    else:
        # In place: a plain cond would copy all statistics at steps that refresh none.
        some = jnp.any(jnp.asarray(flags))
        means = update_if(some, lambda sums: block.mean(sums, n), sums)
    return block.statistics(means)


def _sampled_signal(outputs: Outputs, rng: Array) -> Array:
    """Returns the gradient of −log p(y | outputs) for y drawn from the model."""
    f = jax.lax.stop_gradient(outputs.value)
    if outputs.distribution == "categorical":
        labels = jax.random.categorical(rng, f)
        return jax.nn.softmax(f) - jax.nn.one_hot(labels, f.shape[-1], dtype=f.dtype)
    if outputs.distribution == "bernoulli":
        p = jax.nn.sigmoid(f)
        return p - jax.random.bernoulli(rng, p).astype(f.dtype)
    return jax.random.normal(rng, f.shape, f.dtype)  # f − y with y ~ N(f, I)


def _summed_exactly(
    outputs: Outputs, pull: Callable[[Array], Any], one_by_one: bool
) -> Any:
    r"""Computes the sums of the exact Fisher, one backward pass per output coordinate.

    The signal of coordinate c of an event is a column of a root of the distribution's
    Fisher matrix: :math:`\sqrt{p_c}(p - e_c)` for a categorical,
    :math:`\sqrt{p(1-p)}` for a Bernoulli, 1 for a normal.

    Args:
      outputs: the arguments of ``likelihood``.
      pull: maps a signal at the outputs to the layers' sums.
      one_by_one: whether to run a backward pass for each example separately.

    Returns:
      The sums over all coordinates.
    """
    f = jax.lax.stop_gradient(outputs.value)
    examples = f.shape[0] if one_by_one else 1
    event = f.reshape(f.shape[0], -1).shape[1]
    p = jax.nn.softmax(f)

    def signal(number: Array) -> Array:
        example, c = number // event, number % event
        hot = jax.nn.one_hot(c, event, dtype=f.dtype).reshape(f.shape[1:])
        hot = jnp.broadcast_to(hot, f.shape)
        if one_by_one:
            chosen = jax.nn.one_hot(example, examples, dtype=f.dtype)
            hot *= jnp.expand_dims(chosen, range(1, f.ndim))
        if outputs.distribution == "categorical":
            # One example may have several events (tokens): 1 at the coordinate's own.
            group = jnp.sum(hot, axis=-1, keepdims=True)
            root = jnp.sqrt(jnp.sum(p * hot, axis=-1, keepdims=True))
            return root * (p * group - hot)
        if outputs.distribution == "bernoulli":
            q = jax.nn.sigmoid(f)
            return jnp.sqrt(q * (1 - q)) * hot
        return hot

    def add(total: Any, number: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, pull(signal(number))), None

    # The scan's carry has the shapes of one result, so the first pass is outside.
    first = pull(signal(jnp.asarray(0)))
    total, _ = jax.lax.scan(add, first, jnp.arange(1, examples * event))
    return total
