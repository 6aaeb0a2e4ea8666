"""Tap rules for the layers of ``flax.linen``.

A rule is looked up by the function that runs, never by ``isinstance``: a subclass that
calls ``super().__call__`` is tapped once, inside, and ``nn.remat(nn.Dense)`` is the
same function in a new class.

Code that Flax cannot intercept (``nn.nowrap`` methods, dunder methods other than
``__call__``, fields, descriptors) cannot be tapped, and its parameters fall back to
diagonal blocks.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from lbopt import patches
from lbopt._typing import Array
from lbopt.curvature import (
    block,
    doubly_factored,
    embedding,
    kronecker,
    linear_maps,
    unit_wise,
)
from lbopt.curvature.tap_rules import Choice, Refusal, Rule, Rules, Seen


def find_rule(method: Callable[..., Any], own: Rules) -> Rule | None:
    """Finds the rule of the function behind a bound Flax method.

    Args:
      method: the bound method.
      own: the user's rules as returned by ``own_rules``; they take precedence.

    Returns:
      The rule, or None.
    """
    # Flax binds methods with functools.partial.
    function = getattr(method, "func", method)
    return own.get(function) or _RULES.get(function)


# ------------------------------------------------------------------ dense layers


def _dtype(seen: Seen, name: str = "kernel") -> Any:
    return block.statistics_dtype(seen.params[name].dtype)


def _inputs(seen: Seen) -> Array:
    """Returns the layer's input after the module's own cast."""
    # The layer's backward pass keeps the cast input anyway; the tap saves the same one.
    x, *_ = seen.module.promote_dtype(
        seen.arguments["inputs"],
        seen.params["kernel"],
        seen.params.get("bias"),
        dtype=seen.module.dtype,
    )
    return x


def _dense(seen: Seen, batched: bool, choice: Choice):
    shape, use_bias = seen.params["kernel"].shape, "bias" in seen.params
    if choice.feature_map is not None:
        return doubly_factored.doubly_factored_block(
            *choice.feature_map, shape[-1], use_bias, _dtype(seen)
        )
    linear = linear_maps.dense_linear(shape, use_bias, batched)
    return kronecker.kronecker_block(linear, choice.sharing, _dtype(seen))


def _dense_general(seen: Seen, batched: bool, choice: Choice):
    module, ndim = seen.module, seen.arguments["inputs"].ndim
    linear = linear_maps.dense_linear(
        seen.params["kernel"].shape,
        "bias" in seen.params,
        batched,
        # Flax sorts the axes, whatever order they are given in.
        axis=tuple(sorted(axis % ndim - ndim for axis in _as_tuple(module.axis, 1))),
        batch_dims=tuple(range(len(_as_tuple(module.batch_dims, 1)))),
    )
    return kronecker.kronecker_block(linear, choice.sharing, _dtype(seen))


def _embed(seen: Seen, batched: bool, choice: Choice):
    del batched, choice  # each word and each query is a row, whatever the axes mean
    vocabulary, features = seen.params["embedding"].shape
    return embedding.embed_block(vocabulary, features, _dtype(seen, "embedding"))


def _words(seen: Seen) -> Array:
    return seen.arguments["inputs"]


def _query(seen: Seen) -> Array:
    query, _ = seen.module.promote_dtype(
        seen.arguments["query"], seen.params["embedding"], dtype=seen.module.dtype
    )
    return query


# ------------------------------------------------------------------ convolutions


def _conv(seen: Seen, batched: bool, choice: Choice):
    module = seen.module
    if not module.shared_weights:  # nn.ConvLocal
        raise Refusal("the kernel is not shared by the locations")
    if module.mask is not None:
        raise Refusal("the kernel is masked")
    shape = seen.params["kernel"].shape
    size = shape[:-2]
    strides, input_dilation, kernel_dilation = (
        _as_tuple(value, len(size))
        for value in (module.strides, module.input_dilation, module.kernel_dilation)
    )
    window = patches.Window(
        size, strides, ((0, 0),) * len(size), input_dilation, kernel_dilation
    )
    mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}.get(str(module.padding))
    # Zero padding is part of the window, which skips it; other edges are real inputs.
    if mode is None:
        spatial = seen.arguments["inputs"].shape[-len(size) - 1 : -1]
        window = window._replace(padding=_padding(module.padding, spatial, window))

    def pad(x: Array) -> Array:
        x = _merge_batch(x, len(size))
        if mode is None:
            return x
        edges = [(s // 2, (s + 1) // 2) for s in window.span]
        return jnp.pad(x, [(0, 0), *edges, (0, 0)], mode=mode)

    if mode is None:
        try:
            patches.output_size(window, spatial)
        except ValueError as reason:
            # Marked before any step: there is no row to take a mean over.
            raise Refusal(str(reason)) from reason
    linear = linear_maps.conv_linear(
        window,
        pad,
        shape[-2],
        shape[-1],
        "bias" in seen.params,
        batched,
        groups=module.feature_group_count,
    )
    return kronecker.kronecker_block(linear, choice.sharing, _dtype(seen))


def _padding(
    padding: Any, spatial: tuple[int, ...], window: patches.Window
) -> tuple[tuple[int, int], ...]:
    """Returns a convolution's zero padding as pairs, one for each axis."""
    if padding == "CAUSAL":
        return ((window.span[0], 0),)
    if not isinstance(padding, str):
        return _explicit_padding(padding, len(spatial))
    # "SAME" depends on the input's size after dilation.
    dilated = [
        (s - 1) * d + 1 for s, d in zip(spatial, window.input_dilation, strict=True)
    ]
    kernel = [s + 1 for s in window.span]
    return tuple(lax.padtype_to_pads(dilated, kernel, window.strides, padding))


def _conv_transpose(seen: Seen, batched: bool, choice: Choice):
    module = seen.module
    if module.mask is not None:
        raise Refusal("the kernel is masked")
    shape = seen.params["kernel"].shape
    size = shape[:-2]
    rank = len(size)
    strides = _as_tuple(module.strides, rank)
    dilation = _as_tuple(module.kernel_dilation, rank)
    flip = module.transpose_kernel
    # A transposed convolution is a convolution with stride 1 of the dilated input.
    if module.padding == "CIRCULAR":
        padding, input_dilation = ((0, 0),) * rank, (1,) * rank
    else:
        spans = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
        padding = _transposed_padding(module.padding, spans, strides)
        input_dilation = strides
    window = patches.Window(size, (1,) * rank, padding, input_dilation, dilation)

    def pad(x: Array) -> Array:
        x = _merge_batch(x, rank)
        if module.padding != "CIRCULAR":
            return x
        return _wrap_transposed(x, window.span, strides, flip)

    in_features, out_features = shape[-2:] if not flip else shape[:-3:-1]
    linear = linear_maps.conv_linear(
        window,
        pad,
        in_features,
        out_features,
        "bias" in seen.params,
        batched,
        flip=flip,
    )
    return kronecker.kronecker_block(linear, choice.sharing, _dtype(seen))


def _transposed_padding(padding, spans, strides) -> tuple[tuple[int, int], ...]:
    """Returns the padding of the dilated input that ``lax.conv_transpose`` uses."""
    if not isinstance(padding, str):
        return _explicit_padding(padding, len(spans))
    pads = []
    for span, stride in zip(spans, strides, strict=True):
        if padding == "VALID":
            total, low = span + stride - 1 + max(span + 1 - stride, 0), span
        else:
            total = span + stride - 1
            low = span if stride > span else -(-total // 2)
        pads.append((low, total - low))
    return tuple(pads)


def _wrap_transposed(x: Array, spans, strides, flip: bool) -> Array:
    """Dilates the input and wraps its edges, so that convolving it is circular."""
    # Flax convolves with "VALID" padding and then wraps the outputs around the period,
    # input size × stride, at an offset that depends on the size; here the input is
    # wrapped instead, by the same offset.
    for i, (span, stride) in enumerate(zip(spans, strides, strict=True)):
        axis, size = i + 1, x.shape[i + 1]
        period = size * stride
        low, high = _transposed_padding("VALID", [span], [stride])[0]
        valid = (size - 1) * stride + 1 + low + high - span
        difference = -(valid - period) % (2 * period)
        offset = difference // 2 if flip else (difference + 1) // 2
        zero = jnp.zeros((), x.dtype)
        edges = [(0, 0, 0)] * x.ndim
        edges[axis] = (0, stride - 1, stride - 1)
        x = lax.pad(x, zero, edges)
        positions = (jnp.arange(period + span) - offset - low) % period
        x = jnp.take(x, positions, axis=axis)
    return x


def _explicit_padding(padding: Any, rank: int) -> tuple[tuple[int, int], ...]:
    pairs = [padding] * rank if isinstance(padding, int) else list(padding)
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in pairs)


def _merge_batch(x: Array, rank: int) -> Array:
    return x.reshape(-1, *x.shape[x.ndim - rank - 1 :])


def _as_tuple(value: Any, rank: int) -> tuple[int, ...]:
    if value is None:
        return (1,) * rank
    return (value,) * rank if isinstance(value, int) else tuple(value)


# ------------------------------------------------------------------ normalisation


def _norm(seen: Seen, batched: bool, choice: Choice):
    module, ndim = seen.module, seen.arguments["x"].ndim
    names = tuple(name for name in ("scale", "bias") if name in seen.params)
    axes = getattr(module, "feature_axes", getattr(module, "axis", -1))
    shape = seen.params[names[0]].shape
    make = unit_wise.BLOCKS[choice.norm_blocks]
    return make(
        math.prod(shape),
        names,
        batched,
        _dtype(seen, names[0]),
        feature_axes=tuple(sorted(a % ndim - ndim for a in _as_tuple(axes, 1))),
        shape=shape,
    )


def _reduced(reduce: Callable[[Any, Array], tuple[tuple[int, ...], int]]):
    """Returns the ``residual`` of a layer normalised over the axes from ``reduce``."""

    def residual(seen: Seen) -> unit_wise.NormResidual:
        module, x = seen.module, seen.arguments["x"]
        axes, groups = reduce(module, x)
        axes = tuple(sorted(axis % x.ndim for axis in axes))
        values = jnp.asarray(x, block.statistics_dtype(x.dtype))
        mask = seen.arguments.get("mask")
        if groups:
            # [..., groups, channels of a group], reduced over the last axis as well.
            split = (*x.shape[:-1], groups, x.shape[-1] // groups)
            values = values.reshape(split)
            mask = None if mask is None else jnp.broadcast_to(mask, x.shape)
            mask = None if mask is None else mask.reshape(split)
            axes = (*(a for a in axes if a != x.ndim - 1), x.ndim)
        centred = not isinstance(module, nn.RMSNorm)
        mean, var = _moments(module, values, axes, mask, centred)
        if groups:
            mean, var = (
                jnp.repeat(m[..., 0], x.shape[-1] // groups, -1) for m in (mean, var)
            )
        return unit_wise.NormResidual(x, mean, lax.rsqrt(var + module.epsilon))

    return residual


def _moments(module: Any, x: Array, axes, mask, centred: bool) -> tuple[Array, Array]:
    """Computes mean and variance."""

    # By Flax's own formula, operation by operation: XLA then merges them with the
    # layer's, and nothing is computed twice.
    def mean_of(y: Array) -> Array:
        y = jnp.mean(y, axes, keepdims=True, where=mask)
        if module.axis_name is None:
            return y
        return lax.pmean(
            y, module.axis_name, axis_index_groups=module.axis_index_groups
        )

    if not centred:
        square = mean_of(lax.square(x))
        return jnp.zeros_like(square), square
    mean = mean_of(x)
    if not module.use_fast_variance:
        return mean, mean_of(lax.square(x - mean))
    return mean, jnp.maximum(0.0, mean_of(lax.square(x)) - lax.square(mean))


def _batch_norm_residual(seen: Seen) -> unit_wise.NormResidual:
    module, x = seen.module, seen.arguments["x"]
    running = nn.merge_param(
        "use_running_average",
        module.use_running_average,
        seen.arguments["use_running_average"],
    )
    if not running:
        return _over_batch(seen)
    # x̂ is never recovered as (y − β) / γ, which fails for γ near 0.
    features = {axis % x.ndim for axis in _as_tuple(module.axis, 1)}
    shape = [size if i in features else 1 for i, size in enumerate(x.shape)]
    mean = module.get_variable("batch_stats", "mean").reshape(shape)
    var = module.get_variable("batch_stats", "var").reshape(shape)
    return unit_wise.NormResidual(x, mean, lax.rsqrt(var + module.epsilon))


def _batch_axes(module, x):
    features = {axis % x.ndim for axis in _as_tuple(module.axis, 1)}
    return tuple(i for i in range(x.ndim) if i not in features), 0


def _layer_axes(module, _x):
    return _as_tuple(module.reduction_axes, 1), 0


def _group_axes(module, x):
    groups = module.num_groups or x.shape[-1] // module.group_size
    axes = module.reduction_axes
    return (tuple(range(1, x.ndim)) if axes is None else tuple(axes)), groups


def _instance_axes(module, x):
    features = {axis % x.ndim for axis in _as_tuple(module.feature_axes, 1)}
    return tuple(i for i in range(1, x.ndim) if i not in features), 0


_over_batch = _reduced(_batch_axes)
_EMBED = ("embedding",)
_NORM = ("scale", "bias")

_RULES: dict[Any, Rule] = {
    inspect.unwrap(method): rule
    for method, rule in (
        (nn.Dense.__call__, Rule(_dense, _inputs)),
        (nn.DenseGeneral.__call__, Rule(_dense_general, _inputs)),
        (nn.Conv.__call__, Rule(_conv, _inputs)),
        (nn.ConvTranspose.__call__, Rule(_conv_transpose, _inputs)),
        (nn.Embed.__call__, Rule(_embed, _words, _EMBED)),
        (nn.Embed.attend, Rule(_embed, _query, _EMBED)),
        (nn.BatchNorm.__call__, Rule(_norm, _batch_norm_residual, _NORM)),
        (nn.LayerNorm.__call__, Rule(_norm, _reduced(_layer_axes), _NORM)),
        (nn.RMSNorm.__call__, Rule(_norm, _reduced(_layer_axes), _NORM)),
        (nn.GroupNorm.__call__, Rule(_norm, _reduced(_group_axes), _NORM)),
        (nn.InstanceNorm.__call__, Rule(_norm, _reduced(_instance_axes), _NORM)),
    )
}
