"""Kernels held at the norm of their initialisation."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from lbopt._typing import Array, Params, Updates
from lbopt.curvature import locations
from lbopt.curvature.registry import Layer, Layers
from lbopt.transforms.validation import check_layers, is_placeholder

_KERNEL = "kernel"
# The authors' code divides by ‖w + u‖ + 1e-9; the paper has no ε.
_EPS = 1e-9


class _Kernel(NamedTuple):
    """A kernel to rescale.

    Attributes:
      layer: its layer.
      norm: √(2 d_out), the norm of each copy.
      axes: the axes of the array that belong to one copy.
    """

    layer: Layer
    norm: float
    axes: tuple[int, ...]


def rescale_weights(
    layers: Layers, *, shrink_only: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Gives every kernel the norm √(2 d_out) after the step.

    .. math:: w \leftarrow \sqrt{2 d_{\text{out}}}\,
              \frac{w + u}{\lVert w + u \rVert + \epsilon}

    for the kernels of dense layers and convolutions, with the Frobenius norm of the
    whole array and the number of output units or channels of all groups together.  It
    is the root-mean-square norm of a kernel in He's normal initialisation (fan-in).
    Each copy of a layer under ``nn.scan`` or ``nn.vmap`` is a kernel of its own.
    Biases, norm layers, embeddings, and layers that the loss does not use stay
    unchanged.  A kernel that starts at zero (a head, the last of a residual branch) is
    lengthened to that norm by its first step: ``shrink_only`` lets it grow instead.

    It must be the last transformation of a chain, because u is the whole step.

    Args:
      layers: the result of ``trace_layers``.
      shrink_only: whether to rescale only kernels with a larger norm, as the authors'
        released code does.

    Returns:
      A transformation whose ``update`` takes ``params``.  The norm is exact up to the
      rounding of the updates' dtype.

    Raises:
      ValueError: if no layer has such a kernel.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt, optax
      >>> from lbopt.transforms.rescale import rescale_weights
      >>> model, x = nn.Sequential([nn.Dense(8)]), jnp.ones((2, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> layers = lbopt.trace_layers(loss_fn, params, x)
      >>> tx = optax.chain(optax.sgd(0.1), rescale_weights(layers))
      >>> grads = jax.grad(loss_fn)(params, x)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> norm = jnp.linalg.norm(params["layers_0"]["kernel"])
      >>> round(float(norm), 5)  # the root of 2 × 8
      4.0

    Source: Osawa et al. 2022 (SP-NGD), Eq. 24.  The paper leaves open what a grouped
    convolution and a kernel of zeros get: the groups are rescaled as one array here, as
    they are initialised; zeros stay zeros.
    """
    check_layers(layers)
    kernels = _kernels(layers)
    if not kernels:
        raise ValueError(
            f"layers={sorted(layers)} holds no kernel of a dense layer or convolution; "
            "leave rescale_weights out, of lbopt.sp_ngd by rescale=None"
        )

    def init_fn(params: Params) -> optax.EmptyState:
        if not is_placeholder(params):
            _present(kernels, params)
        return optax.EmptyState()

    def update_fn(
        updates: Updates,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, optax.EmptyState]:
        del extra_args
        if params is None:
            raise ValueError(
                "rescale_weights.update needs params, which it rescales; call "
                "tx.update(grads, state, params)"
            )
        replaced: dict[tuple[Any, ...], dict[str, Array]] = {}
        for path, w in _present(kernels, params).items():
            location = kernels[path].layer.tapped.location
            u = locations.lookup(updates, location)[_KERNEL]
            u = _rescaled(kernels[path], w, u, shrink_only)
            replaced[location.keys] = {_KERNEL: u}
        return locations.insert(updates, replaced), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rescaled(kernel: _Kernel, w: Array, u: Array, shrink_only: bool) -> Array:
    """Returns the update after which the kernel has its norm."""
    dtype = jnp.promote_types(jnp.result_type(w, u), jnp.float32)
    # In float32 at least: the update is a difference of two nearly equal arrays.
    w, end = w.astype(dtype), w.astype(dtype) + u.astype(dtype)
    square = jnp.sum(jnp.square(end), axis=kernel.axes, keepdims=True)
    norm = jnp.sqrt(square)
    new = (end * (kernel.norm / (norm + _EPS)) - w).astype(u.dtype)
    # Each copy of a layer separately, by broadcasting.
    return jnp.where(norm > kernel.norm, new, u) if shrink_only else new


def _kernels(layers: Layers) -> dict[str, _Kernel]:
    """Returns the kernels of dense layers and convolutions by their layers' paths."""
    found = {}
    for path, layer in layers.preconditioned.items():
        # Embeddings and norm layers have other blocks; scales are not called kernels.
        linear = layer.block.kind in ("kronecker", "doubly_factored")
        if not linear or _KERNEL not in layer.shapes:
            continue
        # G is [*groups, out, out], with the outputs of one group.
        *groups, outputs, _ = layer.block.sums.g.shape
        copies = layer.tapped.axes
        axes = [i for i in range(len(layer.shapes[_KERNEL])) if i not in copies]
        norm = math.sqrt(2 * math.prod(groups) * outputs)
        found[path] = _Kernel(layer, norm, tuple(axes))
    return found


def _present(kernels: Mapping[str, _Kernel], params: Params) -> dict[str, Any]:
    """Returns the kernels among the parameters that are not masked."""
    present = {}
    for path, kernel in kernels.items():
        try:
            arrays = locations.lookup(params, kernel.layer.tapped.location)
            masked = isinstance(arrays, optax.MaskedNode)
            w = arrays if masked else arrays[_KERNEL]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"params has no kernel at {path!r}, which layers has; make layers from "
                "the parameters that are trained"
            ) from error
        if isinstance(w, optax.MaskedNode):
            continue
        if tuple(w.shape) != tuple(kernel.layer.shapes[_KERNEL]):
            raise ValueError(
                f"params[{path!r}]['kernel'] has shape {list(w.shape)} where layers "
                f"has {list(kernel.layer.shapes[_KERNEL])}; call trace_layers again "
                "with these parameters"
            )
        present[path] = w
    return present
