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
from jaxtyping import Float

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
    locations = tuple(
        (p - span - 1) // stride + 1
        for p, span, stride in zip(padded, window.span, window.strides, strict=True)
    )
    if min(locations, default=1) < 1:
        raise ValueError(
            f"a convolution with a kernel of size {list(window.size)} (dilation "
            f"{list(window.kernel_dilation)}, padding {list(window.padding)}) has no "
            f"output locations on an input of size {list(spatial)}, and so no "
            "statistics; give it larger inputs, or more padding"
        )
    return locations


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
    δ′−δ alone, except for inputs near an edge, which the layer does not read at every
    kernel position.  A single convolution, the correlations of the other inputs (the
    core of the map) with those around them, therefore gives the main part of every
    block; to it are added the products of the patches that read the inputs near an
    edge.  Nothing is subtracted, so that a bright edge leaves the rest its digits.  For
    a 3×3 kernel this is 15 correlations and eight thin products instead of 81 blocks.
    If it does not save arithmetic (strides, dilated inputs, tiny maps), patches are
    built and multiplied.

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
    if any(first >= stop for first, stop in _cores(window, spatial)):
        return False  # a map so small that every position is near an edge
    kernel = math.prod(window.size)
    cores = [stop - first for first, stop in _cores(window, spatial)]
    by_displacement = math.prod(_reach(window)) * math.prod(spatial)
    for strip in _strips(window, spatial):
        before, after = slice(strip.axis), slice(strip.axis + 1, None)
        rows = cores[before] + [*output_size(window, spatial)[after]]
        taps = math.prod(window.size[after])
        left = len(strip.left) * taps
        right = len(strip.right) * taps * math.prod(_reach(window)[before])
        by_displacement += math.prod(rows) * left * right
    by_patches = math.prod(output_size(window, spatial)) * kernel**2
    return batch * by_displacement + _ASSEMBLY * kernel**2 < batch * by_patches


def _reach(window: Window) -> list[int]:
    """Number of displacements in each dimension, half of them in the first."""
    return [k if axis == 0 else 2 * k - 1 for axis, k in enumerate(window.size)]


def _cores(window: Window, spatial: tuple[int, ...]) -> list[tuple[int, int]]:
    """The inputs of each dimension that the layer reads at every kernel position."""
    cores = []
    for size, span, (low, high) in zip(
        spatial, window.span, window.padding, strict=True
    ):
        # At position δ the locations −low ≤ t < size + high − span read t + δ.
        cores.append((max(span - low, 0), min(size + high - span, size)))
    return cores


class _Strip(NamedTuple):
    """The locations of one coordinate, whose patches read inputs outside the core.

    Attributes:
      axis: the dimension of the coordinate.
      position: the coordinate of the patch's first tap.
      left: the neighbouring kernel positions that read inputs outside the core.
      right: all kernel positions that read inputs.
    """

    axis: int
    position: int
    left: tuple[int, ...]
    right: tuple[int, ...]


def _strips(window: Window, spatial: tuple[int, ...]) -> list[_Strip]:
    """The locations near an edge, once for each edge."""
    strips = []
    for axis, (size, (low, high)) in enumerate(
        zip(spatial, window.padding, strict=True)
    ):
        span, dilation = window.span[axis], window.kernel_dilation[axis]
        first, stop = _cores(window, spatial)[axis]
        for position in range(-low, size + high - span):
            read = {k: position + k * dilation for k in range(window.size[axis])}
            right = tuple(k for k, u in read.items() if 0 <= u < size)
            for outside in (range(first), range(stop, size)):
                left = tuple(k for k in right if read[k] in outside)
                # The first dimension needs products with later kernel positions alone.
                later = tuple(k for k in right if axis or k >= left[0]) if left else ()
                if left:
                    strips.append(_Strip(axis, position, left, later))
    return strips


def _moment_by_displacement(
    inputs: Float[Array, "batch *spatial channels"], window: Window, dtype: Any
) -> Float[Array, "features features"]:
    """``patch_moment`` for stride 1, of a map with inputs away from all edges."""
    spatial, channels = inputs.shape[1:-1], inputs.shape[-1]
    rank = len(window.size)
    inputs = _no_wider(inputs, dtype)
    # [*displacements, c, c'], whose dimensions become pairs of kernel positions from
    # the last to the first: [*displacements, *positions, c, *positions', c'].
    sums = _correlations(inputs, window, dtype)
    for axis in reversed(range(rank)):
        sums = _in_pairs(sums, window, axis)
        for strip in _strips(window, spatial):
            if strip.axis == axis:
                sums = sums + _products(inputs, window, strip, dtype)
    features = math.prod(window.size) * channels
    # Of the first dimension only the blocks δ ≤ δ′ are right; the others are mirrored.
    first = jnp.arange(features) // (features // window.size[0])
    sums = sums.reshape(features, features)
    return jnp.where(first[:, None] <= first[None], sums, sums.T)


def _correlations(
    inputs: Float[Array, "batch *spatial channels"], window: Window, dtype: Any
) -> Float[Array, "*displacements channels channels"]:
    r"""Sums :math:`C(\Delta) = \sum_{n,u} x_{n,u}\, x_{n,u+\Delta}^\top` over the core.

    Args:
      inputs: layer inputs, channels last.
      window: the convolution's geometry, with stride 1.
      dtype: type in which the sums are accumulated and returned.

    Returns:
      One matrix for each displacement in ``[-(k−1), k−1]`` kernel positions of every
      dimension but the first, which has ``[0, k−1]``.
    """
    rank = len(window.size)
    letters = "HWD"[:rank]
    # Zeros outside of the core, because XLA's CPU compiler has a convolution with the
    # whole map twice as fast as one with a part of it.
    core = inputs
    for axis, (first, stop) in enumerate(_cores(window, inputs.shape[1:-1]), start=1):
        position = lax.broadcasted_iota(jnp.int32, inputs.shape, axis)
        core = jnp.where((position >= first) & (position < stop), core, 0)
    # Examples are contracted like channels, and channels take the place of examples.
    # The axes are moved explicitly because, inside a conditional, XLA's CPU compiler
    # uses its fast convolution for this layout only.
    channels_first = jnp.moveaxis(inputs, (-1, 0), (0, -1))  # [c', *spatial, batch]
    batch_inside = jnp.moveaxis(core, 0, rank)  # [*spatial, batch, c]
    found = lax.conv_general_dilated(
        channels_first,
        batch_inside,
        window_strides=window.kernel_dilation,
        padding=[(0, window.span[0]), *((span, span) for span in window.span[1:])],
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        precision=_HIGHEST,
        preferred_element_type=dtype,
    )  # [c', *displacements, c]
    return jnp.moveaxis(found, 0, -1)


def _in_pairs(sums: Array, window: Window, axis: int) -> Array:
    """Replaces the last dimension of displacements by pairs of kernel positions."""
    # [*displacements, *later, c, *later', c'], where ``axis`` is the last displacement,
    # becomes [*displacements, δ, *later, c, δ', *later', c'].
    k, later = window.size[axis], len(window.size) - axis - 1
    zero = 0 if axis == 0 else k - 1  # the place of displacement 0
    rows = []
    for position in range(k):
        # Displacements from −position to k − 1 − position; those before the first are
        # not there, and not read.
        first = zero - position
        part = lax.slice_in_dim(sums, max(first, 0), first + k, axis=axis)
        edges = [(0, 0)] * part.ndim
        edges[axis] = (max(-first, 0), 0)
        rows.append(jnp.pad(part, edges))
    pairs = jnp.stack(rows, axis)  # δ, then δ' at axis + 1
    return jnp.moveaxis(pairs, axis + 1, axis + later + 2)


def _products(
    inputs: Float[Array, "batch *spatial channels"],
    window: Window,
    strip: _Strip,
    dtype: Any,
) -> Array:
    """The products of a strip's patches, in the form of ``_in_pairs``."""
    spatial, rank, axis = inputs.shape[1:-1], len(window.size), strip.axis
    cores, locations = _cores(window, spatial), output_size(window, spatial)
    left: list[tuple[int, int, int]] = []  # of each dimension: first, rows, taps
    right: list[tuple[int, int, int]] = []
    for i, k in enumerate(window.size):
        if i < axis:
            first, stop = cores[i]
            back = 0 if i == 0 else window.span[i]
            left.append((first, stop - first, 1))
            right.append((first - back, stop - first, _reach(window)[i]))
        elif i == axis:
            dilation = window.kernel_dilation[i]
            for ends, taps in ((left, strip.left), (right, strip.right)):
                ends.append((strip.position + taps[0] * dilation, 1, len(taps)))
        else:
            for ends in (left, right):
                ends.append((-window.padding[i][0], locations[i], k))
    rows, columns = (_rows_at(inputs, window, ends) for ends in (left, right))
    product = lax.dot_general(
        rows,
        columns,
        (((0,), (0,)), ((), ())),
        precision=_HIGHEST,
        preferred_element_type=dtype,
    )
    taps, other_taps = ([ends[2] for ends in each] for each in (left, right))
    channels = inputs.shape[-1]
    shape = *taps[axis:], channels, *other_taps, channels
    product = product.reshape(shape)
    # Earlier displacements, which only the second patch has, come first.
    own = rank - axis + 1
    product = jnp.moveaxis(product, range(own, own + axis), range(axis))
    edges = [(0, 0)] * product.ndim
    k = window.size[axis]
    for place, taken in ((axis, strip.left), (axis + own, strip.right)):
        edges[place] = (taken[0], k - 1 - taken[-1])
    # Padded and added in one fused pass over the sums; a scatter would be a loop.
    return jnp.pad(product, edges)


def _rows_at(
    inputs: Float[Array, "batch *spatial channels"],
    window: Window,
    ends: list[tuple[int, int, int]],  # as in _products
) -> Float[Array, "rows features"]:
    """Patches of some locations and taps, a row for each example and location."""
    padding = []
    for (first, count, taps), size, dilation in zip(
        ends, inputs.shape[1:-1], window.kernel_dilation, strict=True
    ):
        last = first + count - 1 + (taps - 1) * dilation
        padding.append((-first, last + 1 - size))
    own = window._replace(size=tuple(x[2] for x in ends), padding=tuple(padding))
    found = extract_patches(inputs, own)
    return found.reshape(-1, found.shape[-1])


def _no_wider(x: Array, dtype: Any) -> Array:
    """Casts to the type of the sum if the input's type is wider."""
    # XLA rejects products that accumulate in a narrower type than their operands'.
    return x if jnp.promote_types(x.dtype, dtype) == dtype else x.astype(dtype)
