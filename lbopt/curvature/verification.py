"""Whether what the taps capture is truly the layers' own.

Three checks on one real batch.  With every flag off, each statistic must be exactly
zero: otherwise the loss reads the probes, for example through a norm of each array of
the parameters.  Probes must arrive as they were put in.  And the sum of input ⊗ output
gradient must be the gradient that automatic differentiation finds for the layer's
arrays: otherwise something between the parameters and the layer changes them
(``nn.map_variables``, ``nn.WeightNorm``), a layer is tapped twice, or it is used in a
way that its tap does not see.  A penalty on the parameters is such a use, too, but a
harmless one: what it adds to the gradient does not depend on the batch, so two batches
are compared, the given one and its first half, doubled.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbopt._typing import Array, Params
from lbopt.curvature import block as blocks
from lbopt.curvature import capture

_WAY_OUT = "Leave this layer to another optimizer, by optax.partition."


def verify(
    loss: Callable[..., Any],
    params: Params,
    args: Sequence[Any],
    tapped: Mapping[str, capture.Tapped],
    batch_size: int | None,
) -> None:
    """Runs one batch and checks every tapped layer.

    Args:
      loss: the scalar loss.
      params: the parameters, arrays.
      args: the loss's other arguments.
      tapped: the layers by path.
      batch_size: examples in the batch.

    Raises:
      ValueError: naming the first layer whose statistics are not its own.
    """
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
        raise ValueError(
            "verify=True runs the loss, but params holds jax.ShapeDtypeStruct; pass "
            "arrays, or verify=False"
        )
    whole = list(tapped.values())
    sums = _differentiate(
        loss, params, args, whole, [_flags(layer, False) for layer in whole]
    )[1]
    for path, total in zip(tapped, sums, strict=True):
        if any(bool(jnp.any(x != 0)) for x in total):
            raise ValueError(
                f"layer {path!r}: its statistics are not zero when none is due, so "
                "loss_fn reads the probes that ride in params. Regularise with the "
                "optimizer's weight_decay, or by a sum of squares over the parameters, "
                "instead of a norm of each array."
            )
    if not _arrive_whole(loss, params, args, whole, set(range(len(whole)))):
        changed = [
            path
            for number, path in enumerate(tapped)
            if not _arrive_whole(loss, params, args, whole, {number})
        ]
        raise ValueError(
            f"layers {changed}: something between params and the layer changes its "
            f"parameters (nn.map_variables). {_WAY_OUT}"
        )
    twins = {path: _gradient_twin(layer, params) for path, layer in tapped.items()}
    batches = [args]
    if batch_size is not None and batch_size > 1:
        batches.append(_first_half_doubled(args, batch_size))
    runs = [_gradients(loss, params, batch, twins) for batch in batches]
    for path in tapped:
        _compare(path, [run[path] for run in runs])


def _arrive_whole(loss, params, args, tapped, numbers) -> bool:
    """Whether the probes of some layers, all ones, are ones where they are used."""
    probes = capture.make_probes(tapped, [None for _ in tapped])

    def interceptor(next_fun, args, kwargs, context):
        outputs = next_fun(*args, **kwargs)
        found = probes.find(context)
        if found is None or found[0] not in numbers:
            return outputs
        arrived = [jnp.all(found[2][name] == 1) for name in probes.names(found[0])]
        # A layer can be inside any transform, out of which its outputs lead.
        return jnp.where(jnp.all(jnp.stack(arrived)), outputs, jnp.nan)

    with nn.intercept_methods(interceptor):
        return bool(jnp.isfinite(loss(probes.insert(params, 1.0), *args)))


def _first_half_doubled(args: Sequence[Any], batch_size: int) -> Sequence[Any]:
    """Another batch of the same shapes, of valid examples."""

    def double(x: Any) -> Any:
        shape = getattr(x, "shape", ())
        if not shape or shape[0] != batch_size:
            return x
        return jnp.asarray(x)[jnp.arange(batch_size) // 2]

    return jax.tree.map(double, args)


def _gradients(loss, params, args, twins) -> dict[str, Any]:
    """Each layer's gradients by name, as captured and as autodiff finds them."""
    due = [True for _ in twins]
    grads, captured = _differentiate(loss, params, args, list(twins.values()), due)
    pairs = {}
    for (path, twin), own in zip(twins.items(), captured, strict=True):
        whole = capture.lookup(grads, twin.location)
        epsilon = float(jnp.max(own.epsilon))
        pairs[path] = {
            name: (
                own[i],
                capture.copies_first(whole[name], twin.axes),
                max(epsilon, float(jnp.finfo(whole[name].dtype).eps)),
            )
            for i, name in enumerate(twin.location.names)
        }
    return pairs


def _differentiate(loss, params, args, tapped, due):
    probes = capture.make_probes(tapped, due)

    def tapped_loss(p):
        with nn.intercept_methods(probes.interceptor):
            return loss(p, *args)

    grads = jax.grad(tapped_loss)(probes.insert(params))
    probes.require_all_reached()
    return probes.remove(grads)


def _flags(layer: capture.Tapped, value: bool) -> Any:
    """One flag for each statistic of a layer."""
    factors = jax.eval_shape(lambda: layer.block.init(()))[0]
    return jax.tree.map(lambda _: value, factors)


def _gradient_twin(layer: capture.Tapped, params: Params) -> capture.Tapped:
    """The layer with a block whose sums are its own gradient.

    Args:
      layer: the layer.
      params: the parameters.

    Returns:
      The twin; its last sum is the rounding unit of the layer's outputs, once a use.
    """
    arrays = capture.lookup(params, layer.location)
    names = layer.location.names
    # Not the arrays' own names: transforms like nn.WeightNorm choose arrays by name.
    fields = [f"gradient{i}" for i in range(len(names))]
    kind = collections.namedtuple("Gradient", (*fields, "epsilon"))
    sums = kind(
        *(
            jax.ShapeDtypeStruct(
                tuple(
                    size
                    for axis, size in enumerate(arrays[name].shape)
                    if axis not in layer.axes
                ),
                blocks.statistics_dtype(arrays[name].dtype),
            )
            for name in names
        ),
        jax.ShapeDtypeStruct((1, 1), jnp.float32),
    )

    def estimate(residual: Any, output_grads: Array, due: Any) -> Any:
        del due
        gradient = layer.block.gradient(residual, output_grads)
        epsilon = jnp.finfo(output_grads.dtype).eps
        return kind(
            *(gradient[n].astype(s.dtype) for n, s in zip(names, sums, strict=False)),
            jnp.full_like(output_grads, epsilon, shape=(1, 1), dtype=jnp.float32),
        )

    return layer._replace(block=layer.block._replace(sums=sums, estimate=estimate))


def _compare(path: str, runs: Sequence[Mapping[str, tuple[Any, Any, float]]]) -> None:
    """Refuses a layer whose unseen gradient is not the same for every batch.

    Args:
      path: the layer's name.
      runs: for one or two batches, the captured gradient, the true one and the
        rounding unit, by name.

    Raises:
      ValueError: naming the layer.
    """
    # A gradient that cancels to zero (a bias before a normalisation layer) is rounding
    # alone, so errors are measured against the layer's largest entry.
    arrays = [x for run in runs for pair in run.values() for x in pair[:2]]
    scale = max(float(jnp.max(jnp.abs(x))) for x in arrays)
    for name in runs[0]:
        unseen = [run[name][1] - run[name][0] for run in runs]
        difference = unseen[0] - unseen[1] if len(unseen) == 2 else unseen[0]
        error = float(jnp.max(jnp.abs(difference)))
        # Half of the digits: sums of rounding errors stay below, mistakes do not.
        if not error <= max(run[name][2] for run in runs) ** 0.5 * scale:
            raise ValueError(
                f"layer {path!r}: the sum of input times output gradient differs from "
                f"the gradient of {name!r} by {error:.3g} (largest entry {scale:.3g}). "
                "Something between params and the layer changes its parameters "
                "(nn.map_variables, nn.WeightNorm, nn.SpectralNorm), or part of its "
                f"use is not seen. {_WAY_OUT}"
            )
