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
from jax.extend.core import get_opaque_trace_state

from lbopt._typing import Array, Params
from lbopt.curvature import block as blocks
from lbopt.curvature import capture, discovery, registry
from lbopt.curvature.registry import Layer, Layers
from lbopt.in_place import update_if

Fisher: TypeAlias = Literal["empirical", "sampled", "exact"]
Distribution: TypeAlias = Literal["categorical", "normal", "bernoulli"]
Curvature: TypeAlias = dict[str, Any]
"""The statistics of each layer by its path."""

_DISTRIBUTIONS = ("categorical", "normal", "bernoulli")


class _Likelihood(nn.Module):
    """Carries the model's outputs past the interceptor."""

    distribution: str
    terms: int | None

    def __call__(self, outputs: Array) -> Array:
        return outputs


def likelihood(
    outputs: Array, distribution: Distribution, *, terms: int | None = None
) -> Array:
    r"""States that the loss is a negative log-likelihood of ``outputs``.

    An identity, called by a loss on the model's outputs, outside any transform:

    * ``categorical``: logits of a softmax over the last axis,
    * ``bernoulli``: logits of independent sigmoids,
    * ``normal``: means of a Gaussian of unit variance; the loss is
      :math:`\tfrac12 \lVert f - y \rVert^2`.

    Needed for ``fisher="sampled"`` and ``"exact"`` only.

    Args:
      outputs: what the distribution is parametrised by, ``[batch, ...]``.
      distribution: its name.
      terms: how many terms the loss averages, if not the batch size (for example
        batch × tokens).

    Returns:
      ``outputs``.

    Raises:
      ValueError: for an unknown distribution.

    Examples:
      >>> import jax.numpy as jnp, lbopt
      >>> lbopt.likelihood(jnp.zeros((2, 3)), "categorical").shape
      (2, 3)
    """
    if distribution not in _DISTRIBUTIONS:
        raise ValueError(
            f"distribution={distribution!r} must be one of {_DISTRIBUTIONS}"
        )
    return _Likelihood(distribution, terms, parent=None)(outputs)


class _Outputs(NamedTuple):
    """What a call of ``likelihood`` passed."""

    value: Array
    distribution: str
    terms: int | None


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
    if fisher not in ("empirical", "sampled", "exact"):
        raise ValueError(f"fisher={fisher!r} must be 'empirical', 'sampled' or 'exact'")
    if not isinstance(layers, Layers):
        raise ValueError(
            f"layers={type(layers).__name__} must be what lbopt.trace_layers returns"
        )
    loss_fn = registry.unjitted(loss_fn)
    used = layers.preconditioned

    def evaluate(
        params: Params, *args: Any, rng: Any = None, due: Any = None
    ) -> tuple[Any, Params, Curvature]:
        if fisher == "sampled" and rng is None:
            raise ValueError(
                "fisher='sampled' draws labels: pass rng=, a key that is new at every "
                "step"
            )
        taps = [layer for layer in used.values() if layer.has_tap]
        wanted = _wanted(used, due)
        probes = capture.make_probes(
            [layer.tapped for layer in taps], [wanted[layer.path] for layer in taps]
        )
        outputs: list[_Outputs] = []

        def tapped_loss(p: Params) -> tuple[tuple[Array, list[Array]], Any]:
            with (
                nn.intercept_methods(_listen(outputs)),
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
        n = _terms(outputs, batch_size, args)

        def collect(cotangents: tuple[Array, list[Array]]) -> tuple[Params, Any]:
            grads, sums = probes.remove(pull_back(cotangents)[0])
            by_path = {layer.path: s for layer, s in zip(taps, sums, strict=True)}
            return grads, {
                path: by_path[path]
                if layer.has_tap
                else _gradient_sums(layer, grads, wanted[path])
                for path, layer in used.items()
            }

        zero = [jnp.zeros_like(x) for x in kept]
        grads, sums = collect((jnp.ones_like(loss), zero))
        if fisher != "empirical":
            one = _single(outputs, loss_fn, fisher)._replace(value=kept[0])
            none = jnp.zeros_like(loss)
            pull = lambda signal: collect((none, [signal / n]))[1]  # noqa: E731
            sums = (
                pull(_sampled_signal(one, rng))
                if fisher == "sampled"
                # Without a tap a block sees its gradient summed over the batch.
                else _summed_exactly(one, pull, one_by_one=len(taps) < len(used))
            )
        curvature = {
            path: _mean(used[path].block, s, n, wanted[path])
            for path, s in sums.items()
        }
        return ((loss, aux) if has_aux else loss), grads, curvature

    return evaluate


def _listen(outputs: list[_Outputs]) -> Callable[..., Any]:
    """An interceptor that notes what ``likelihood`` is called on."""
    trace = get_opaque_trace_state(convention="flax")

    def interceptor(next_fun, args, kwargs, context):
        if isinstance(context.module, _Likelihood):
            module = context.module
            if get_opaque_trace_state(convention="flax") != trace:
                raise ValueError(
                    f"lbopt.likelihood(outputs, {module.distribution!r}) is called "
                    "inside a jit, vmap, scan or checkpoint inside the loss; call it "
                    "outside, once, on the outputs of the whole batch"
                )
            outputs.append(_Outputs(args[0], module.distribution, module.terms))
        return next_fun(*args, **kwargs)

    return interceptor


def _wanted(used: dict[str, Layer], due: Any) -> dict[str, Any]:
    """The flags of each layer; all true without a mask, false where it has no entry."""
    strangers = sorted(set(due or ()) - set(used))
    if strangers:
        raise ValueError(
            f"due has entries {strangers} that layers has not (it has {sorted(used)}); "
            "pass lbopt.refresh(opt_state) of an optimizer made with the same layers"
        )
    wanted = {}
    for path, layer in used.items():
        factors = layer.block.factor_shapes(())
        # An optimizer that sees a part of the parameters (optax.masked,
        # optax.partition) wants the statistics of that part alone.
        absent = jax.tree.map(lambda _: due is None, factors)
        wanted[path] = absent if due is None else due.get(path, absent)
        if type(wanted[path]) is not type(factors):
            raise ValueError(
                f"due[{path!r}] is a {type(wanted[path]).__name__}, not a "
                f"{type(factors).__name__} of flags; pass lbopt.refresh(opt_state) of "
                "an optimizer made with the same layers"
            )
    return wanted


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


def _terms(
    outputs: Sequence[_Outputs], batch_size: int | None, args: Sequence[Any]
) -> int:
    """How many terms the loss averages."""
    stated = {o.terms for o in outputs if o.terms is not None}
    if batch_size is not None:
        stated.add(batch_size)
    if len(stated) > 1:
        raise ValueError(
            f"the loss's number of terms is stated as {sorted(stated)}; state it once, "
            "by batch_size= or by likelihood(..., terms=)"
        )
    n = next(iter(stated), None) or discovery.infer_batch_size(args)
    if n is None:
        raise ValueError(
            "no argument of the loss looks like a batch (arrays that share a leading "
            "size); pass batch_size= to value_grad_and_curvature"
        )
    return n


def _single(
    outputs: Sequence[_Outputs], loss_fn: Callable[..., Any], fisher: Fisher
) -> _Outputs:
    if len(outputs) != 1:
        name = registry.name_of(loss_fn)
        raise ValueError(
            f"fisher={fisher!r} needs lbopt.likelihood(outputs, ...) called once, but "
            f"loss_fn={name} calls it {len(outputs)} times; call it on the model's "
            "outputs, outside any jit, vmap, scan or checkpoint inside the loss"
        )
    return outputs[0]


def _sampled_signal(outputs: _Outputs, rng: Array) -> Array:
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
    outputs: _Outputs, pull: Callable[[Array], Any], one_by_one: bool
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
