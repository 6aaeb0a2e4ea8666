"""Checks of captured statistics against autodiff, on one real batch.

1. With no statistic due, every sum must be exactly zero.  If not, the loss reads the
   probes, for example through a norm of each array of the parameters.
2. Probes must reach the layer unchanged.  If not, something between the parameters and
   the layer changes them (``nn.map_variables``).
3. Σ input ⊗ output gradient must be the gradient of the layer's arrays.  If not, the
   arrays are reparametrised (``nn.WeightNorm``), the layer is tapped twice, or part of
   its use bypasses the tap.  A penalty on the parameters bypasses it too, harmlessly:
   its gradient is independent of the batch, and cancels between two batches, the given
   one and its first half repeated.
"""

import collections
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbopt._typing import Array, Params
from lbopt.curvature import block as blocks
from lbopt.curvature import capture, derivatives
from lbopt.curvature import locations as places
from lbopt.curvature.loss import eval_shape

_WAY_OUT = "leave this layer to another optimizer, by optax.partition"


class Run(NamedTuple):
    """A loss, and what it is called with.

    Attributes:
      loss: the scalar loss.
      params: the parameters.
      args: its other arguments.
      accepted: trees mapped from the parameters that count as the parameters.
    """

    loss: Callable[..., Any]
    params: Params
    args: Sequence[Any]
    accepted: capture.Accepted

    def probes(
        self, tapped: Sequence[capture.Tapped], due: Sequence[Any]
    ) -> capture.Probes:
        """Makes probes for one trace."""
        return capture.make_probes(tapped, due, accepted=self.accepted)

    def tapped_loss(
        self, probes: capture.Probes, params: Params, arrays: capture.ProbeArrays
    ) -> Array:
        """Evaluates the loss with taps."""
        whole = probes.insert(params, arrays)
        with nn.intercept_methods(probes.interceptor(whole, arrays)):
            return self.loss(whole, *self.args)

    def differentiate(
        self, tapped: Sequence[capture.Tapped], due: Sequence[Any]
    ) -> tuple[Params, list[Any]]:
        """Returns the gradient and each layer's sums."""
        probes = self.probes(tapped, due)
        grads, taken = jax.grad(
            functools.partial(self.tapped_loss, probes), argnums=(0, 1)
        )(self.params, probes.arrays())
        probes.require_all_reached()
        return grads, probes.sums(taken)


def verify(
    run: Run, tapped: Mapping[str, capture.Tapped], batch_size: int | None
) -> None:
    """Runs one batch and checks every tapped layer.

    Args:
      run: the loss; its parameters are arrays.
      tapped: the layers by path.
      batch_size: number of examples in the batch, if known.

    Raises:
      ValueError: if a layer's statistics are wrong, naming the first such layer.
    """
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(run.params)):
        raise ValueError(
            "verify=True runs the loss, but params holds jax.ShapeDtypeStruct; pass "
            "arrays, or verify=False"
        )
    whole = list(tapped.values())
    sums = run.differentiate(whole, [_flags(layer, False) for layer in whole])[1]
    for path, total in zip(tapped, sums, strict=True):
        if any(bool(jnp.any(x != 0)) for x in total):
            raise ValueError(
                f"layer {path!r}: its statistics are not zero when none is due, so "
                "loss_fn reads the probes inside params; regularise with the "
                "optimizer's weight_decay, or by a sum of squares over the parameters, "
                "instead of a norm of each array"
            )
    # All layers in one run; one by one only to name the culprits.
    if not _arrive_whole(run, whole, set(range(len(whole)))):
        changed = [
            path
            for number, path in enumerate(tapped)
            if not _arrive_whole(run, whole, {number})
        ]
        raise ValueError(
            f"layers {changed}: something between params and the layer changes its "
            f"parameters (nn.map_variables); {_WAY_OUT}"
        )
    twins = {path: _gradient_twin(layer, run.params) for path, layer in tapped.items()}
    batches = [run.args]
    # One example, or a batch of unknown size, has no second batch to compare with.
    if batch_size is not None and batch_size > 1:
        batches.append(_first_half_doubled(run.args, batch_size))
    runs = [_gradients(run._replace(args=batch), twins) for batch in batches]
    for path in tapped:
        _compare(path, [run[path] for run in runs])


def require_same_loss(run: Run, tapped: Mapping[str, capture.Tapped]) -> None:
    """Compares a loss with itself as lbopt evaluates it.

    The two are the same unless probes lie in the tree that the loss is called with.  A
    gradient that reaches a probe past its layer is found abstractly; other dependence
    on the tree by one evaluation, of arrays.

    Args:
      run: the loss.
      tapped: the layers by path.

    Raises:
      ValueError: if they differ.
    """
    carried = [layer for layer in tapped.values() if layer.route == "params"]
    if not carried:
        return
    probes = run.probes(carried, [None for _ in carried])
    arrays = probes.arrays()
    read: set[int] = set()

    def noted(params: Params, arrays: capture.ProbeArrays, args: Any) -> Array:
        watched = [
            {
                n: derivatives.on_cotangent(x, lambda _, i=i: read.add(i))
                for n, x in own.items()
            }
            for i, own in enumerate(arrays)
        ]
        return run.loss(probes.insert(params, watched), *args)

    eval_shape(jax.grad(noted, argnums=1), run.params, arrays, run.args)
    differs = bool(read)
    leaves = jax.tree.leaves((run.params, run.args))
    if not differs and not any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        whole = list(tapped.values())
        probes = run.probes(whole, [_flags(layer, True) for layer in whole])
        plain = run.loss(run.params, *run.args)
        pair = plain, run.tapped_loss(probes, run.params, probes.arrays())
        # The same operations in the same order, but for rounding of a compiled part.
        differs = not bool(jnp.allclose(*pair, rtol=1e-3, atol=1e-5, equal_nan=True))
    if differs:
        raise ValueError(
            "loss_fn reads arrays that lbopt adds to params for the layers "
            f"{[layer.location.path for layer in carried]}, whose parameters a "
            "transform of JAX's own takes along (jax.jit, jax.checkpoint, jax.vmap, "
            "jax.lax.scan); use lbopt.plain(params) where the loss does anything but "
            "call the model with params (norms, penalties, gradients by them)"
        )


def _arrive_whole(
    run: Run, tapped: Sequence[capture.Tapped], numbers: Collection[int]
) -> bool:
    """Tests whether probes of ones still are ones inside the given layers."""
    probes = run.probes(tapped, [None for _ in tapped])
    arrays = probes.arrays(1.0)
    whole = probes.insert(run.params, arrays)
    taps = probes.interceptor(whole, arrays)

    def interceptor(next_fun, args, kwargs, context):
        found = taps.find(context)
        outputs = next_fun(*args, **kwargs)
        if found is None or found[0] not in numbers:
            return outputs
        arrived = [jnp.all(found[2][name] == 1) for name in probes.names(found[0])]
        # The layer may be inside any transform; only its outputs lead out of it.
        return jnp.where(jnp.all(jnp.stack(arrived)), outputs, jnp.nan)

    with nn.intercept_methods(interceptor):
        return bool(jnp.isfinite(run.loss(whole, *run.args)))


def _first_half_doubled(args: Sequence[Any], batch_size: int) -> Sequence[Any]:
    """Returns a different batch of the same shapes: the first half, each twice."""

    def double(x: Any) -> Any:
        shape = getattr(x, "shape", ())
        if not shape or shape[0] != batch_size:
            return x
        return jnp.asarray(x)[jnp.arange(batch_size) // 2]

    return jax.tree.map(double, args)


def _gradients(run: Run, twins: Mapping[str, capture.Tapped]) -> dict[str, Any]:
    """Returns each layer's gradients by name: captured, autodiff's, rounding unit."""
    due = [True for _ in twins]  # a twin has no flags
    grads, captured = run.differentiate(list(twins.values()), due)
    pairs = {}
    for (path, twin), own in zip(twins.items(), captured, strict=True):
        whole = places.lookup(grads, twin.location)
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


def _flags(layer: capture.Tapped, value: bool) -> Any:
    """Returns one flag for each statistic of a layer."""
    factors = jax.eval_shape(lambda: layer.block.init(()))[0]
    return jax.tree.map(lambda _: value, factors)


def _gradient_twin(layer: capture.Tapped, params: Params) -> capture.Tapped:
    """Returns the layer with a block whose sums are its own gradient.

    Args:
      layer: the layer.
      params: the parameters.

    Returns:
      The twin; its last sum is the rounding unit of the layer's outputs, per call.
    """
    arrays = places.lookup(params, layer.location)
    names = layer.location.names
    # Probes named like the arrays would be normalised by nn.WeightNorm, too, which
    # chooses arrays by name.
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
    """Compares captured gradients with autodiff's.

    Args:
      path: the layer's path.
      runs: for one or two batches, by name: captured gradient, autodiff's, rounding
        unit.

    Raises:
      ValueError: if their difference depends on the batch.
    """
    # A gradient that is zero but for rounding (a bias before a normalisation layer) has
    # no scale of its own, so errors are relative to the layer's largest entry.
    arrays = [x for run in runs for pair in run.values() for x in pair[:2]]
    scale = max(float(jnp.max(jnp.abs(x))) for x in arrays)
    for name in runs[0]:
        unseen = [run[name][1] - run[name][0] for run in runs]
        # The same for every batch: the gradient of a penalty, which is no fault.
        difference = unseen[0] - unseen[1] if len(unseen) == 2 else unseen[0]
        error = float(jnp.max(jnp.abs(difference)))
        # Half of the digits: accumulated rounding stays below this, mistakes do not.
        # Written so that NaN fails, too.
        if not error <= max(run[name][2] for run in runs) ** 0.5 * scale:
            raise ValueError(
                f"layer {path!r}: the sum of input times output gradient differs from "
                f"the gradient of {name!r} by {error:.3g} (largest entry {scale:.3g}), "
                "so something between params and the layer changes its parameters "
                "(nn.map_variables, nn.WeightNorm, nn.SpectralNorm), or part of its "
                f"use bypasses the layer; {_WAY_OUT}"
            )
