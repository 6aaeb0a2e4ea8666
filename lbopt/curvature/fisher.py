r"""Loss, gradient and curvature statistics from one evaluation of the loss.

The Fisher matrix is chosen by what is pulled back through the model:

* ``empirical``: the loss itself.  One forward and one backward pass.
* ``sampled``: labels drawn from the model's own predictive distribution, once per
  example.  The same forward pass, and a second backward pass whose statistics are kept
  and whose parameter gradient is not.
* ``exact``: the expectation over the predictive distribution, one backward pass for
  each output coordinate.  For small models, tests and notebooks.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

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
"""The statistics of each layer by its path."""


def value_grad_and_curvature(
    loss_fn: Callable[..., Any],
    layers: Layers,
    *,
    has_aux: bool = False,
    fisher: Fisher = "empirical",
    batch_size: int | None = None,
) -> Callable[..., tuple[Any, Params, Curvature]]:
    r"""Like ``jax.value_and_grad``, with the layers' curvature statistics as well.

    The gradient is that of the loss; for a layer with inputs a and backward signals δ
    of the mean over n terms,

    .. math:: A = \frac{1}{nS} \sum a a^\top, \qquad G = n \sum \delta \delta^\top

    Args:
      loss_fn: ``loss_fn(params, *args) -> loss`` or ``(loss, aux)``.
      layers: what ``trace_layers`` found in it.
      has_aux: whether it returns ``(loss, aux)``.
      fisher: which Fisher matrix.
      batch_size: the number n of terms that the loss averages, where it is neither the
        leading size of the batch nor stated through ``likelihood``.

    Returns:
      ``f(params, *args, rng=None, due=None) -> (value, grads, curvature)``.  ``value``
      is the loss or ``(loss, aux)``; ``curvature`` maps each layer's path to its
      statistics.  ``rng`` draws the labels of the sampled Fisher.  ``due`` is a mask
      from ``refresh``: statistics that are not due, or of layers that it does not name,
      are zero and cost nothing.

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
    r"""The layers' curvature statistics alone, for examples of their own.

    .. math:: A = \frac{1}{nS} \sum a a^\top, \qquad G = n \sum \delta \delta^\top

    over a batch that need not be the gradient's: a forward and a backward pass (one for
    each output coordinate of ``"exact"``) that under ``jit`` makes no gradients but
    those that a diagonal block is made from.

    Args:
      loss_fn: ``loss_fn(params, *args) -> loss`` or ``(loss, aux)``.
      layers: what ``trace_layers`` found in it.
      has_aux: whether it returns ``(loss, aux)``.
      fisher: which Fisher matrix.
      batch_size: as for ``value_grad_and_curvature``.

    Returns:
      ``f(params, *args, rng=None, due=None) -> curvature``, likewise.

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

    Source: sampled labels, on a random eighth of the minibatch: Martens & Grosse 2015;
    on independent minibatches of other machines: Ba, Grosse & Martens 2017, §3.
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
    """One forward pass with every layer tapped, and what may be pulled back through it.

    Attributes:
      value: the loss or ``(loss, aux)``.
      pull_loss: gives the loss's gradient and the layers' sums by path.
      pull_model: gives the sums of the model's own predictive distribution.
      means: from sums to statistics.
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
    """``run(params, args, rng, due)``, which runs the loss with taps."""
    if fisher not in ("empirical", "sampled", "exact"):
        raise ValueError(f"fisher={fisher!r} must be 'empirical', 'sampled' or 'exact'")
    if not isinstance(layers, Layers):
        raise ValueError(
            f"layers={type(layers).__name__} must be what lbopt.trace_layers returns"
        )
    loss_fn = registry.unjitted(loss_fn)
    known = layers.preconditioned

    def run(params: Params, args: Sequence[Any], rng: Any, due: Any) -> _TappedPass:
        if fisher == "sampled" and rng is None:
            raise ValueError(
                "fisher='sampled' draws labels: pass rng=, a key that is new at every "
                "step"
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
            none = jnp.zeros_like(loss)
            pull = lambda signal: collect((none, [signal / n]))[1]  # noqa: E731
            if fisher == "sampled":
                return pull(_sampled_signal(one, rng))
            # Without a tap a block sees its gradient summed over the batch.
            return _summed_exactly(one, pull, one_by_one=len(taps) < len(used))

        def means(sums: dict[str, Any]) -> Curvature:
            return {p: _mean(used[p].block, s, n, wanted[p]) for p, s in sums.items()}

        value = (loss, aux) if has_aux else loss
        return _TappedPass(value, pull_loss, pull_model, means)

    return run


def _wanted(
    used: dict[str, Layer], due: Any
) -> tuple[dict[str, Any], dict[str, tuple[Array, ...]]]:
    """The flags of each layer, and the bases that come with them, if any.

    Args:
      used: the layers by path.
      due: a mask; without one all flags are true, and where it has no entry false.

    Returns:
      Flags and bases by path.

    Raises:
      ValueError: for the mask of an optimizer of other layers.
    """
    strangers = sorted(set(due or ()) - set(used))
    if strangers:
        raise ValueError(
            f"due has entries {strangers} that layers has not (it has {sorted(used)}); "
            "pass lbopt.refresh(opt_state) of an optimizer made with the same layers"
        )
    wanted, bases = {}, {}
    for path, layer in used.items():
        factors = layer.block.factor_shapes(())
        # An optimizer that sees a part of the parameters (optax.masked,
        # optax.partition) wants the statistics of that part alone.
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
    """The layer with second moments in these bases among its statistics, if any."""
    if not bases:
        return layer
    tapped = layer.tapped
    block = eigen_moments.with_moments(tapped.block, len(tapped.copies), *bases)
    return layer._replace(tapped=tapped._replace(block=block))


def _gradient_sums(layer: Layer, grads: Params, due: Any) -> Any:
    """The sums of a block that needs no tap, from its parameter's own gradient."""
    location = layer.tapped.location
    gradient = capture.lookup(grads, location)[location.names[0]]
    return layer.block.estimate(None, gradient, due)


def _mean(block: blocks.CurvatureBlock, sums: Any, n: int, due: Any) -> Any:
    """The statistics of a layer; where none is due its sums are not even read."""
    flags = jax.tree.leaves(due)
    if all(isinstance(flag, bool) for flag in flags):
        means = block.mean(sums, n) if any(flags) else sums
    else:
        some = jnp.any(jnp.asarray(flags))
        means = update_if(some, lambda sums: block.mean(sums, n), sums)
    return block.statistics(means)


def _sampled_signal(outputs: Outputs, rng: Array) -> Array:
    """The gradient of −log p(y | outputs) with y drawn from the model."""
    f = jax.lax.stop_gradient(outputs.value)
    if outputs.distribution == "categorical":
        labels = jax.random.categorical(rng, f)
        return jax.nn.softmax(f) - jax.nn.one_hot(labels, f.shape[-1], dtype=f.dtype)
    if outputs.distribution == "bernoulli":
        p = jax.nn.sigmoid(f)
        return p - jax.random.bernoulli(rng, p).astype(f.dtype)
    return jax.random.normal(rng, f.shape, f.dtype)


def _summed_exactly(
    outputs: Outputs, pull: Callable[[Array], Any], one_by_one: bool
) -> Any:
    r"""The sums of the expected Fisher, one backward pass an output coordinate.

    For one coordinate c of one event the signal is a column of a root of the
    distribution's Fisher: :math:`\sqrt{p_c}(p - e_c)` for a categorical,
    :math:`\sqrt{p(1-p)}` for a Bernoulli, 1 for a normal.

    Args:
      outputs: the likelihood's argument.
      pull: from a signal at the outputs to the layers' sums.
      one_by_one: whether each example has a backward pass of its own.

    Returns:
      The sums of all coordinates added up.
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
            group = jnp.sum(hot, axis=-1, keepdims=True)  # 1 at the coordinate's event
            root = jnp.sqrt(jnp.sum(p * hot, axis=-1, keepdims=True))
            return root * (p * group - hot)
        if outputs.distribution == "bernoulli":
            q = jax.nn.sigmoid(f)
            return jnp.sqrt(q * (1 - q)) * hot
        return hot

    def add(total: Any, number: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, pull(signal(number))), None

    first = pull(signal(jnp.asarray(0)))
    total, _ = jax.lax.scan(add, first, jnp.arange(1, examples * event))
    return total
