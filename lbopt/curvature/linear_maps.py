"""Dense layers and convolutions as matrices applied to rows.

The parameters of a layer are a matrix ``W [in, out]``: the kernel, with any bias as its
last row.  Each builder describes one kind of layer as a :class:`SharedLinear`, in the
weight-sharing format ``[*stack, batch, shared, features]``.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lbopt import patches
from lbopt._typing import Array
from lbopt.curvature import block


class SharedLinear(NamedTuple):
    """A layer as a matrix applied to rows.

    Attributes:
      in_features: rows of the kernel matrix, without the bias.
      out_features: columns of the kernel matrix.
      stack: sizes of the axes that number independent matrices (groups).
      use_bias: whether the bias is the last row of the matrix.
      input_rows: ``inputs -> [*stack, batch, shared, in]``.
      input_moment: ``(inputs, homogeneous, dtype) -> (Σ a aᵀ, number of rows)``.
      row_weights: ``(inputs, weights) -> [*stack, batch, shared, 1]``, the weights of
        the positions along the input's leading axes as weights of its rows.
      input_mean: ``(inputs, dtype) -> [*stack, batch, in]``, the mean over locations.
      output_rows: ``output_grads -> [*stack, batch, shared, out]``.
      kernel_shape: shape of the kernel in Flax, without lifted axes.
      bias_shape: shape of the bias in Flax, without lifted axes.
      kernel_matrix: ``kernel -> [*stack, in, out]``, without lifted axes.
      matrix_kernel: the inverse of ``kernel_matrix``.
    """

    in_features: int
    out_features: int
    stack: tuple[int, ...]
    use_bias: bool
    input_rows: Callable[[Array], Array]
    input_moment: Callable[[Array, bool, Any], tuple[Array, int]]
    row_weights: Callable[[Array, Array], Array]
    input_mean: Callable[[Array, Any], Array]
    output_rows: Callable[[Array], Array]
    kernel_shape: tuple[int, ...]
    bias_shape: tuple[int, ...]
    kernel_matrix: Callable[[Array], Array]
    matrix_kernel: Callable[[Array], Array]


def moment_of(rows: Array, homogeneous: bool, dtype: Any) -> Array:
    """Returns Σ a aᵀ over ``[*stack, batch, shared, features]``.

    Args:
      rows: the rows a.
      homogeneous: whether to append a 1 to each row.
      dtype: dtype of the accumulated sum.

    Returns:
      ``[*stack, d, d]``, or ``[*stack, d + 1, d + 1]`` with the 1.
    """
    stack = rows.ndim - 3
    total = patches.outer_sum(rows, dtype, stack=stack)
    if not homogeneous:
        return total
    # Three sums instead of one over copied rows with a column of ones.
    count = math.prod(rows.shape[stack:-1])
    edge = jnp.sum(rows, axis=(-3, -2), dtype=dtype)
    return _append_ones(total, edge, count)


def weighted_moment(
    rows: Float[Array, "*stack batch shared d"],
    weights: Float[Array, "*stack batch shared one"],
    homogeneous: bool,
    dtype: Any,
) -> tuple[Array, Array]:
    """Returns Σ w a aᵀ over rows a with weights w, and Σ w.

    Args:
      rows: the rows a.
      weights: the weights w.
      homogeneous: whether to append a 1 to each row.
      dtype: dtype of the accumulated sums.

    Returns:
      ``[*stack, d, d]``, or ``[*stack, d + 1, d + 1]`` with the 1; and a number, the
      same for all of the stack.
    """
    stack = rows.ndim - 3
    roots = jnp.sqrt(weights.astype(dtype))
    # A row of weight 0 may hold anything, NaN too.
    scaled = jnp.where(weights > 0, rows.astype(dtype) * roots, 0)
    total = patches.outer_sum(scaled, dtype, stack=stack)
    count = jnp.sum(weights, axis=(-3, -2, -1), dtype=dtype)
    if homogeneous:
        edge = jnp.sum(scaled * roots, axis=(-3, -2), dtype=dtype)
        total = _append_ones(total, edge, count[..., None])
    return total, count[(0,) * stack]


def weighted_mean(
    rows: Float[Array, "*stack batch shared d"],
    weights: Float[Array, "*stack batch shared one"],
    dtype: Any,
) -> tuple[Array, Array]:
    """Returns each example's weighted mean over locations, and its largest weight.

    Args:
      rows: the rows.
      weights: their weights.
      dtype: dtype of the means.

    Returns:
      ``[*stack, batch, 1, d]``, and the examples' weights ``[*stack, batch, 1, 1]``.
    """
    weights = weights.astype(dtype)
    scaled = jnp.where(weights > 0, rows.astype(dtype) * weights, 0)
    total = jnp.sum(weights, axis=-2, keepdims=True)
    mean = jnp.sum(scaled, axis=-2, keepdims=True) / jnp.where(total > 0, total, 1)
    return mean, jnp.max(weights, axis=-2, keepdims=True)


def _append_ones(
    total: Float[Array, "*stack d d"], edge: Float[Array, "*stack d"], count: Any
) -> Float[Array, "*stack e e"]:
    """Returns Σ [a; 1] [a; 1]ᵀ, given Σ a aᵀ, Σ a and the number of rows."""
    corner = jnp.broadcast_to(count, edge[..., :1].shape).astype(edge.dtype)
    top = jnp.concatenate([total, edge[..., None]], -1)
    bottom = jnp.concatenate([edge, corner], -1)[..., None, :]
    return jnp.concatenate([top, bottom], -2)


def join_bias(leaves: block.Leaves, linear: SharedLinear) -> Array:
    """Joins kernel and bias as ``[*copies, *stack, in (+ 1), out]``."""
    kernel = leaves["kernel"]
    copies = kernel.shape[: kernel.ndim - len(linear.kernel_shape)]
    matrix = _over_copies(linear.kernel_matrix, kernel, len(copies))
    if not linear.use_bias:
        return matrix
    bias = leaves["bias"].reshape(*copies, *linear.stack, 1, linear.out_features)
    return jnp.concatenate([matrix, bias], -2)


def split_bias(matrix: Array, linear: SharedLinear) -> dict[str, Array]:
    """Splits ``[*copies, *stack, in (+ 1), out]`` into kernel and bias."""
    copies = matrix.ndim - len(linear.stack) - 2
    kernel = _over_copies(
        linear.matrix_kernel, matrix[..., : linear.in_features, :], copies
    )
    if not linear.use_bias:
        return {"kernel": kernel}
    bias = matrix[..., -1, :]
    return {
        "kernel": kernel,
        "bias": bias.reshape(*bias.shape[:copies], *linear.bias_shape),
    }


def _over_copies(function: Callable[[Array], Array], x: Array, copies: int) -> Array:
    # The map reshapes to fixed sizes, so lifted axes are mapped over one by one.
    for _ in range(copies):
        function = jax.vmap(function)
    return function(x)


# ------------------------------------------------------------------ dense layers


def dense_linear(
    kernel_shape: tuple[int, ...],
    use_bias: bool,
    batched: bool,
    *,
    axis: tuple[int, ...] = (-1,),
    batch_dims: tuple[int, ...] = (),
) -> SharedLinear:
    """Describes ``Dense`` or ``DenseGeneral`` as a shared linear map.

    Args:
      kernel_shape: the kernel's shape in Flax: batch dimensions, contracted
        dimensions, output features.
      use_bias: whether the layer has a bias.
      batched: whether the first remaining axis numbers examples; if False, each call
        sees one example (under a per-example ``vmap``).
      axis: the contracted input axes.
      batch_dims: leading input axes along which every position has its own kernel.

    Returns:
      The layer as a shared linear map.
    """
    n_stack, n_in = len(batch_dims), len(axis)
    stack, features = kernel_shape[:n_stack], kernel_shape[n_stack + n_in :]
    d_in = math.prod(kernel_shape[n_stack : n_stack + n_in])
    d_out = math.prod(features)

    def to_rows(x: Array) -> Array:
        contracted = [i % x.ndim for i in axis]
        first = [i % x.ndim for i in batch_dims]
        rest = [i for i in range(x.ndim) if i not in (*contracted, *first)]
        # As in Flax's kernel: batch dimensions first, contracted ones last.
        x = jnp.transpose(x, (*first, *rest, *contracted))
        return _batch_and_shared(x, n_stack, n_in, batched)

    def moment(x: Array, homogeneous: bool, dtype: Any) -> tuple[Array, int]:
        rows = to_rows(x)
        return moment_of(rows, homogeneous, dtype), math.prod(rows.shape[-3:-1])

    def row_weights(x: Array, weights: Array) -> Array:
        each = jnp.broadcast_to(block.spread(weights, x.ndim), x.shape)
        return to_rows(each)[..., :1]

    return SharedLinear(
        in_features=d_in,
        out_features=d_out,
        stack=stack,
        use_bias=use_bias,
        input_rows=to_rows,
        input_moment=moment,
        row_weights=row_weights,
        input_mean=lambda x, dtype: jnp.mean(to_rows(x), axis=-2, dtype=dtype),
        output_rows=lambda g: _batch_and_shared(g, n_stack, len(features), batched),
        kernel_shape=kernel_shape,
        bias_shape=(*stack, *features),
        kernel_matrix=lambda kernel: kernel.reshape(*stack, d_in, d_out),
        matrix_kernel=lambda matrix: matrix.reshape(kernel_shape),
    )


def _batch_and_shared(x: Array, stack: int, trailing: int, batched: bool) -> Array:
    """Reshapes ``[*stack, *rest, *features]`` to the weight-sharing format."""
    rest = x.shape[stack : x.ndim - trailing]
    # An input without a free axis is one example, as in a call on one vector.
    batch = rest[0] if batched and rest else 1
    features = math.prod(x.shape[x.ndim - trailing :])
    return x.reshape(*x.shape[:stack], batch, -1, features)


# ------------------------------------------------------------------ convolutions


def conv_linear(
    window: patches.Window,
    pad: Callable[[Array], Array],
    in_features: int,
    out_features: int,
    use_bias: bool,
    batched: bool,
    *,
    groups: int = 1,
    flip: bool = False,
) -> SharedLinear:
    """Describes a convolution as a linear map shared by its output locations.

    Args:
      window: the geometry after ``pad``.
      pad: merges the batch axes and pads circular or reflected edges, as Flax does
        before it convolves; returns ``[batch, *spatial, channels]``.
      in_features: input channels of one group.
      out_features: output channels of all groups.
      use_bias: whether the layer has a bias.
      batched: whether the first axis before the map numbers examples; if False, each
        call sees one example.
      groups: feature groups; each is an independent matrix.
      flip: whether the kernel is stored mirrored, with its feature axes exchanged
        (``ConvTranspose(transpose_kernel=True)``).

    Returns:
      The layer as a shared linear map.
    """
    taps, per_group = math.prod(window.size), out_features // groups
    stack = (groups,) if groups > 1 else ()  # one group: matrices without a stack axis
    rank = len(window.size)
    features = (out_features, in_features) if flip else (in_features, out_features)
    kernel_matrix, matrix_kernel = _conv_kernel_maps(
        window.size, in_features, out_features, groups, flip
    )

    def examples(x: Array) -> int:  # in an input or output of the layer
        return x.shape[0] if batched and x.ndim > rank + 1 else 1

    def by_group(x: Array, batch: int) -> Array:
        if not stack:
            return x.reshape(batch, -1, taps * in_features)
        # Patches list the channels of all groups together at each tap.
        x = x.reshape(batch, -1, taps, groups, in_features)
        return jnp.moveaxis(x, 3, 0).reshape(groups, batch, -1, taps * in_features)

    def moment(x: Array, homogeneous: bool, dtype: Any) -> tuple[Array, int]:
        x = pad(x)
        locations = math.prod(patches.output_size(window, x.shape[1:-1]))
        rows = x.shape[0] * locations
        if stack:
            grouped = by_group(patches.extract_patches(x, window), x.shape[0])
            return moment_of(grouped, homogeneous, dtype), rows
        total = patches.patch_moment(x, window, dtype)
        if homogeneous:
            # Patches are linear in x: sum over the batch first, extract once.
            over_batch = jnp.sum(x, axis=0, keepdims=True, dtype=dtype)
            edge = patches.patch_sum(over_batch, window)[0]
            total = _append_ones(total, edge, rows)
        return total, rows

    def input_rows(x: Array) -> Array:
        return by_group(patches.extract_patches(pad(x), window), examples(x))

    def row_weights(x: Array, weights: Array) -> Array:
        *_, batch, locations, _ = jax.eval_shape(input_rows, x).shape
        each = weights.reshape(batch, -1)
        leading = x.ndim - rank - 1  # axes before the map
        if weights.ndim <= leading:
            each = jnp.repeat(each, locations // each.shape[1], axis=1)
        elif each.shape[1] != locations:  # neither the outputs' nor the examples'
            each = jnp.max(each, axis=1, keepdims=True)
        return jnp.broadcast_to(each[..., None], (*stack, batch, locations, 1))

    def mean_rows(x: Array, dtype: Any) -> Array:
        padded = pad(x).astype(dtype)  # before the sum over locations, not after
        locations = math.prod(patches.output_size(window, padded.shape[1:-1]))
        means = patches.patch_sum(padded, window) / locations
        return jnp.mean(by_group(means, examples(x)), axis=-2)

    def output_rows(g: Array) -> Array:
        if not stack:
            return g.reshape(examples(g), -1, out_features)
        return jnp.moveaxis(g.reshape(examples(g), -1, groups, per_group), 2, 0)

    return SharedLinear(
        in_features=taps * in_features,
        out_features=per_group,
        stack=stack,
        use_bias=use_bias,
        input_rows=input_rows,
        input_moment=moment,
        row_weights=row_weights,
        input_mean=mean_rows,
        output_rows=output_rows,
        kernel_shape=(*window.size, *features),
        bias_shape=(out_features,),
        kernel_matrix=kernel_matrix,
        matrix_kernel=matrix_kernel,
    )


def _conv_kernel_maps(
    size: tuple[int, ...], in_features: int, out_features: int, groups: int, flip: bool
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Returns the maps between a convolution's kernel and its matrices."""
    spatial = tuple(range(len(size)))
    rows, per_group = math.prod(size) * in_features, out_features // groups

    def kernel_matrix(kernel: Array) -> Array:
        if flip:
            kernel = jnp.swapaxes(jnp.flip(kernel, spatial), -1, -2)
        if groups == 1:
            return kernel.reshape(rows, out_features)
        # Flax's output channels run through the groups, one after another.
        return jnp.moveaxis(kernel.reshape(rows, groups, per_group), 1, 0)

    def matrix_kernel(matrix: Array) -> Array:
        if groups > 1:
            matrix = jnp.moveaxis(matrix, 0, 1)
        kernel = matrix.reshape(*size, in_features, out_features)
        return jnp.flip(jnp.swapaxes(kernel, -1, -2), spatial) if flip else kernel

    return kernel_matrix, matrix_kernel
