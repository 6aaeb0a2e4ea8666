"""Patches of convolution inputs, and their second moment.

A convolution is a dense layer shared by the output locations: with the input
patches ``p_{n,t}`` (one row per example n and output location t) and the kernel as
a matrix ``K[in, out]``, the output is ``p K``.  This module turns channels-last
inputs into these rows, ordered ``(kernel position, channel)`` like
``kernel.reshape(-1, out)``, and sums their outer products, without building the rows
if that is cheaper.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from lbopt._typing import Array

_HIGHEST = lax.Precision.HIGHEST


class Window(NamedTuple):
    """The geometry of a convolution: one entry per spatial dimension.

    Attributes:
      size: number of kernel positions.
      strides: step between output locations, in padded input positions.
      padding: ``(low, high)`` zeros added to the dilated input (negative: positions
        removed).
      input_dilation: 1 + number of zeros inserted between neighbouring inputs.
      kernel_dilation: distance between neighbouring kernel positions.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]

    @property
    def span(self) -> tuple[int, ...]:
        """Distance from a kernel's first tap to its last, in each dimension."""
        return tuple(
            d * (k - 1) for k, d in zip(self.size, self.kernel_dilation, strict=True)
        )


def output_size(window: Window, spatial: tuple[int, ...]) -> tuple[int, ...]:
    """Number of output locations per dimension, for an input of size ``spatial``."""
    padded = (
        (s - 1) * dilation + 1 + low + high
        for s, dilation, (low, high) in zip(
            spatial, window.input_dilation, window.padding, strict=True
        )
    )
    return tuple(
        (p - span - 1) // stride + 1
        for p, span, stride in zip(padded, window.span, window.strides, strict=True)
    )


def extract_patches(
    inputs: Float[Array, "batch *spatial channels"], window: Window
) -> Float[Array, "batch *locations features"]:
    r"""The patches under the kernel at every output location.

    .. math:: p_{n,t} = (x_{n,\, s t + d\delta - \text{low}})_{\delta}

    Args:
      inputs: layer inputs, channels last.
      window: the convolution's geometry.

    Returns:
      Patches ``[batch, *locations, features]``, features ordered
      ``(kernel position, channel)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lbopt.patches import Window, extract_patches
      >>> window = Window((2,), (1,), ((0, 0),), (1,), (1,))
      >>> extract_patches(jnp.arange(3.0).reshape(1, 3, 1), window)[0].tolist()
      [[0.0, 1.0], [1.0, 2.0]]
    """
    locations = output_size(window, inputs.shape[1:-1])
    padded = _pad(inputs, window)
    taps = []
    for position in itertools.product(*map(range, window.size)):
        start = [p * d for p, d in zip(position, window.kernel_dilation, strict=True)]
        stop = [
            b + (t - 1) * s + 1
            for b, t, s in zip(start, locations, window.strides, strict=True)
        ]
        taps.append(
            lax.slice(
                padded,
                (0, *start, 0),
                (padded.shape[0], *stop, padded.shape[-1]),
                (1, *window.strides, 1),
            )
        )
    return jnp.concatenate(taps, axis=-1)


def outer_sum(
    rows: Float[Array, "*rows features"], dtype: Any, stack: int = 0
) -> Float[Array, "*stack features features"]:
    r"""The sum of outer products :math:`\sum_r x_r x_r^\top`.

    Args:
      rows: vectors in the last axis.
      dtype: type in which the sum is accumulated and returned.
      stack: number of leading axes that are kept; the others are summed over.

    Returns:
      One matrix for each position of the kept axes.
    """
    kept = tuple(range(stack))
    summed = tuple(range(stack, rows.ndim - 1))
    rows = _no_wider(rows, dtype)
    return lax.dot_general(
        rows,
        rows,
        ((summed, summed), (kept, kept)),
        precision=_HIGHEST,
        preferred_element_type=dtype,
    )


def patch_moment(
    inputs: Float[Array, "batch *spatial channels"], window: Window, dtype: Any
) -> Float[Array, "features features"]:
    r"""The second moment :math:`\sum_{n,t} p_{n,t}\, p_{n,t}^\top` of all patches.

    With stride 1 the block of kernel positions (δ, δ′) depends on the displacement
    δ′−δ alone, except for locations where the kernel overlaps the edge.  A single
    convolution, the autocorrelations of the input at the distinct displacements,
    therefore gives every block; the patches at locations that the layer does not have
    are then subtracted.  For a 3×3 kernel this is 15 correlations and four thin
    products instead of 81 blocks.  If it does not save arithmetic (strides, dilated
    inputs, tiny maps), patches are built and multiplied.

    Args:
      inputs: layer inputs, channels last.
      window: the convolution's geometry.
      dtype: type in which the sums are accumulated and returned.

    Returns:
      ``[features, features]``, features ordered ``(kernel position, channel)``.
    """
    if _displacement_is_cheaper(window, inputs.shape[0], inputs.shape[1:-1]):
        return _moment_by_displacement(inputs, window, dtype)
    return outer_sum(extract_patches(inputs, window), dtype)


def patch_sum(
    inputs: Float[Array, "batch *spatial channels"], window: Window
) -> Float[Array, "batch features"]:
    r"""The sum :math:`\sum_t p_{n,t}` of each example's patches, without building them.

    Args:
      inputs: layer inputs, channels last.
      window: the convolution's geometry.

    Returns:
      ``[batch, features]``.
    """
    # Locations and kernel positions exchange roles: a window of the size of the output
    # map slides over the kernel positions.
    sums = lax.reduce_window(
        _pad(inputs, window),
        jnp.zeros((), inputs.dtype),
        lax.add,
        window_dimensions=(1, *output_size(window, inputs.shape[1:-1]), 1),
        window_strides=(1, *window.kernel_dilation, 1),
        padding="VALID",
        window_dilation=(1, *window.strides, 1),
    )
    kept = tuple(slice(k) for k in window.size)  # strides leave some positions unused
    return sums[:, *kept].reshape(inputs.shape[0], -1)


def _pad(
    inputs: Float[Array, "batch *spatial channels"], window: Window
) -> Float[Array, "batch *padded channels"]:
    """The inputs, dilated and padded with zeros."""
    edges = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(
            window.padding, window.input_dilation, strict=True
        )
    ]
    zero = jnp.zeros((), inputs.dtype)
    return lax.pad(inputs, zero, [(0, 0, 0), *edges, (0, 0, 0)])


# Assembling one element of the moment from displacements takes as long as about this
# many multiplications of a matrix product (measured on 2 CPU cores).
_ASSEMBLY = 256


def _displacement_is_cheaper(
    window: Window, batch: int, spatial: tuple[int, ...]
) -> bool:
    """Whether displacements need less work than patches, per pair of channels."""
    if any(s != 1 for s in (*window.strides, *window.input_dilation)):
        return False
    kernel = math.prod(window.size)
    displacements = window.size[0] * math.prod(2 * k - 1 for k in window.size[1:])
    by_displacement = displacements * math.prod(spatial)
    for strip in _surplus_strips(window, spatial):
        taps = len(strip.taps) * kernel // window.size[strip.axis]
        by_displacement += math.prod(strip.locations) * taps**2
    by_patches = math.prod(output_size(window, spatial)) * kernel**2
    return batch * by_displacement + _ASSEMBLY * kernel**2 < batch * by_patches


class _Strip(NamedTuple):
    """Locations outside the layer's map whose patches still overlap the input.

    All of them have the coordinate ``position`` along ``axis``, at which the kernel
    positions ``taps`` are inside the input; along the other axes they cover
    ``padding``.
    """

    axis: int
    position: int
    taps: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    locations: tuple[int, ...]


def _surplus_strips(window: Window, spatial: tuple[int, ...]) -> list[_Strip]:
    """All locations that overlap the input and are not the layer's, each once."""
    # Before the strip's axis the other axes cover the layer's own locations, after it
    # all that overlap the input; otherwise corners would be counted twice.
    strips = []
    full = tuple((span, span) for span in window.span)
    for axis, (size, (low, high)) in enumerate(
        zip(spatial, window.padding, strict=True)
    ):
        span, dilation = window.span[axis], window.kernel_dilation[axis]
        inside = range(-low, size + high - span)  # first tap's coordinate
        padding = (*window.padding[:axis], *full[axis + 1 :])
        others = [i for i in range(len(spatial)) if i != axis]
        locations = tuple(
            spatial[i] + sum(padding[j]) - window.span[i] for j, i in enumerate(others)
        )
        for position in range(-span, size):
            taps = tuple(
                k
                for k in range(window.size[axis])
                if 0 <= position + k * dilation < size
            )
            if position not in inside and taps:
                strips.append(_Strip(axis, position, taps, padding, locations))
    return strips


def _moment_by_displacement(
    inputs: Float[Array, "batch *spatial channels"], window: Window, dtype: Any
) -> Float[Array, "features features"]:
    """``patch_moment`` for stride 1: all overlapping locations minus the surplus."""
    spatial, channels = inputs.shape[1:-1], inputs.shape[-1]
    size, rank = window.size, len(window.size)
    correlations = _correlations(inputs, window, dtype)
    blocks = correlations[_block_displacement(size)]  # [kernel, kernel, c, c]
    moment = jnp.moveaxis(blocks, 1, 2).reshape(*size, channels, *size, channels)
    for strip in _surplus_strips(window, spatial):
        rows = _strip_patches(inputs, window, strip)
        first, taps = strip.taps[0], len(strip.taps)
        kernel = tuple(taps if i == strip.axis else k for i, k in enumerate(size))
        surplus = outer_sum(rows, dtype).reshape(*kernel, channels, *kernel, channels)
        # Padded to the full size and subtracted in one fused pass over the moment; a
        # scatter would be a loop.
        edges = [(0, 0, 0)] * (2 * rank + 2)
        edges[strip.axis] = edges[rank + 1 + strip.axis] = (
            first,
            size[strip.axis] - first - taps,
            0,
        )
        moment = moment - lax.pad(surplus, jnp.zeros((), surplus.dtype), edges)
    features = math.prod(size) * channels
    return moment.reshape(features, features)


def _correlations(
    inputs: Float[Array, "batch *spatial channels"], window: Window, dtype: Any
) -> Float[Array, "displacements channels channels"]:
    r"""Autocorrelations :math:`C(\Delta) = \sum_{n,u} x_{n,u}\, x_{n,u+\Delta}^\top`.

    Args:
      inputs: layer inputs, channels last.
      window: the convolution's geometry, with stride 1.
      dtype: type in which the sums are accumulated and returned.

    Returns:
      One matrix for each displacement in ``[-(k−1), k−1]`` kernel positions of every
      dimension, in lexicographic order.
    """
    # Displacements with a negative first coordinate are transposes of the others.
    inputs = _no_wider(inputs, dtype)
    rank = len(window.size)
    letters = "HWD"[:rank]
    # Examples are contracted like channels, and channels take the place of examples.
    # The axes are moved explicitly because, inside a conditional, XLA's CPU compiler
    # uses its fast convolution for this layout only.
    channels_first = jnp.moveaxis(inputs, (-1, 0), (0, -1))  # [c, *spatial, batch]
    batch_inside = jnp.moveaxis(inputs, 0, rank)  # [*spatial, batch, c]
    half = lax.conv_general_dilated(
        channels_first,
        batch_inside,
        window_strides=window.kernel_dilation,
        padding=[(0, window.span[0]), *((span, span) for span in window.span[1:])],
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        precision=_HIGHEST,
        preferred_element_type=dtype,
    )
    half = jnp.moveaxis(half, (0, -1), (-1, -2))  # [*displacements, c, c']
    others = math.prod(half.shape[1:-2])
    half = half.reshape(window.size[0], others, *half.shape[-2:])
    mirrored = jnp.swapaxes(half[:0:-1, ::-1], -1, -2)
    return jnp.concatenate([mirrored, half]).reshape(-1, *half.shape[-2:])


def _no_wider(x: Array, dtype: Any) -> Array:
    """Casts to the type of the sum if the input's type is wider."""
    # XLA rejects products that accumulate in a narrower type than their operands'.
    return x if jnp.promote_types(x.dtype, dtype) == dtype else x.astype(dtype)


def _block_displacement(size: tuple[int, ...]) -> Int[Array, "kernel kernel"]:
    """Index in ``_correlations`` of the displacement of every block (δ, δ′)."""
    index = jnp.zeros([1] * (2 * len(size)), jnp.int32)
    for axis, k in enumerate(size):
        shape = [1] * (2 * len(size))
        shape[axis] = shape[len(size) + axis] = k
        delta = jnp.arange(k)[None, :] - jnp.arange(k)[:, None] + k - 1
        index = index * (2 * k - 1) + delta.reshape(shape)
    kernel = math.prod(size)
    return index.reshape(kernel, kernel)


def _strip_patches(
    inputs: Float[Array, "batch *spatial channels"], window: Window, strip: _Strip
) -> Float[Array, "batch *locations features"]:
    """Patches at a strip's locations, without taps that read nothing but padding."""
    axis, rank = strip.axis, len(window.size)
    dilation = window.kernel_dilation[axis]
    first = strip.position + strip.taps[0] * dilation
    lines = lax.slice_in_dim(
        inputs,
        first,
        first + (len(strip.taps) - 1) * dilation + 1,
        dilation,
        axis=1 + axis,
    )

    # The strip's axis becomes a kernel axis with one location, which reads all of it.
    def replaced(per_axis: tuple[int, ...], value: int) -> tuple[int, ...]:
        return tuple(value if i == axis else per_axis[i] for i in range(rank))

    padding = iter(strip.padding)
    return extract_patches(
        lines,
        Window(
            size=replaced(window.size, len(strip.taps)),
            strides=(1,) * rank,
            padding=tuple((0, 0) if i == axis else next(padding) for i in range(rank)),
            input_dilation=(1,) * rank,
            kernel_dilation=replaced(window.kernel_dilation, 1),
        ),
    )
