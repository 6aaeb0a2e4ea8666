"""Every kind of Flax layer, with its options: what its block captures is the layer's.

Each layer stands alone in the loss ``mean_i ⟨y_i, c_i⟩`` with fixed random ``c``, so
that the gradient of one example's loss at the layer's outputs *is* ``c_i``.  The rows
that the kernel multiplies come from the untouched Flax layer itself, run on one-hot
kernels; the statistics are then summed row by row in NumPy.
"""

import functools
import math
import types
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lbopt
from tests import oracles
from tests.oracles import quick_jit
from tests.problems import Problem, assert_equal

# float64: sums of a few hundred products of unit numbers.
EXACT = 1e-10
BATCH = 3

KINDS = {"param_dtype": jnp.float64}


class Case(NamedTuple):
    """A layer, the shape of its input, and how it is called."""

    layer: Any
    shape: tuple[int, ...]
    kwargs: Any = types.MappingProxyType({})


def named(options):
    """Flax's names for the options of convolutions."""
    names = {"groups": "feature_group_count", "dilation": "kernel_dilation"}
    return {names.get(name, name): x for name, x in options.items()}


def conv(size, shape, features=4, **options):
    return Case(nn.Conv(features, size, **KINDS, **named(options)), (BATCH, *shape))


def transpose(size, shape, features=3, **options):
    layer = nn.ConvTranspose(features, size, **KINDS, **named(options))
    return Case(layer, (BATCH, *shape))


def dense(features, shape, **options):
    return Case(nn.DenseGeneral(features, **KINDS, **options), shape)


DENSE = {
    "dense": Case(nn.Dense(4, **KINDS), (BATCH, 5)),
    "dense, no bias": Case(nn.Dense(4, use_bias=False, **KINDS), (BATCH, 5)),
    "dense on tokens": Case(nn.Dense(4, **KINDS), (BATCH, 2, 3, 5)),
    "dense on one vector each": Case(nn.Dense(4, **KINDS), (BATCH, 1)),
    "general": dense(4, (BATCH, 2, 5)),
    "general, several features": dense((2, 3), (BATCH, 2, 5)),
    "general, two axes": dense(4, (BATCH, 2, 3, 5), axis=(-2, -1)),
    "general, axes out of order": dense((4, 2), (BATCH, 2, 3, 5), axis=(3, 1)),
    "general, axis in the middle": dense(4, (BATCH, 5, 2), axis=1, use_bias=False),
    "general, batch dimension": dense(4, (2, BATCH, 5), batch_dims=(0,)),
    "general, two batch dimensions": dense(
        (2, 3), (2, 3, BATCH, 4, 5), batch_dims=(0, 1)
    ),
    "general, batch dimension and two axes": dense(
        4, (2, BATCH, 3, 5), batch_dims=(0,), axis=(2, 3), use_bias=False
    ),
}

PLANE = (5, 6, 4)
CONV = {
    "1-D same": conv((3,), (7, 2)),
    "1-D causal, dilated kernel": conv((3,), (7, 2), padding="CAUSAL", dilation=2),
    "1-D causal, strided": conv((2,), (7, 2), padding="CAUSAL", strides=2),
    "1-D circular, even kernel": conv((4,), (7, 2), padding="CIRCULAR"),
    "1-D reflect, depthwise": conv((4,), (7, 4), padding="REFLECT", groups=4),
    "same": conv((3, 3), PLANE),
    "same, no bias": conv((3, 3), PLANE, use_bias=False),
    "same, strided": conv((3, 2), PLANE, strides=(2, 1)),
    "same, strided, even kernel": conv((2, 4), PLANE, strides=(2, 3)),
    "same, dilated kernel": conv((3, 2), PLANE, dilation=(1, 2)),
    "same, dilated kernel, strided": conv((2, 3), PLANE, dilation=2, strides=2),
    "same, groups": conv((3, 3), PLANE, groups=2),
    "same, groups, strided, no bias": conv(
        (2, 3), PLANE, groups=2, strides=2, use_bias=False
    ),
    "same, depthwise": conv((3, 3), PLANE, groups=4),
    "same, depthwise, multiplier": conv((3, 3), PLANE, 8, groups=4),
    "valid": conv((3, 3), PLANE, padding="VALID"),
    "valid, strided": conv((3, 3), PLANE, padding="VALID", strides=2),
    "valid, dilated kernel, groups": conv(
        (2, 2), PLANE, padding="VALID", dilation=(3, 2), groups=2
    ),
    "valid, whole map": conv((5, 6), PLANE, padding="VALID"),
    "pointwise": conv((1, 1), PLANE),
    "pointwise, strided": conv((1, 1), PLANE, strides=2),
    "circular": conv((3, 3), PLANE, padding="CIRCULAR"),
    "circular, even kernel, strided": conv(
        (2, 4), PLANE, padding="CIRCULAR", strides=2
    ),
    "circular, dilated kernel, groups": conv(
        (3, 2), PLANE, padding="CIRCULAR", dilation=(2, 3), groups=2
    ),
    "reflect": conv((3, 3), PLANE, padding="REFLECT"),
    "reflect, even kernel, dilated": conv(
        (2, 4), PLANE, padding="REFLECT", dilation=(3, 1), strides=(1, 2)
    ),
    "explicit number": conv((3, 3), PLANE, padding=2),
    "explicit numbers, strided": conv((3, 3), PLANE, padding=(0, 2), strides=(2, 3)),
    "explicit pairs, groups": conv((2, 3), PLANE, padding=((2, 0), (0, 3)), groups=2),
    "explicit pairs, both dilations": conv(
        (3, 2),
        (4, 3, 2),
        padding=((2, 1), (0, 3)),
        dilation=(1, 2),
        input_dilation=(2, 3),
    ),
    "both dilations, strided, depthwise": conv(
        (2, 2),
        (4, 4, 4),
        padding=1,
        dilation=(2, 1),
        input_dilation=2,
        strides=(2, 1),
        groups=4,
    ),
    "negative padding": conv((3, 3), PLANE, padding=((-1, 1), (1, -1))),
    "3-D same": conv((2, 3, 2), (3, 4, 3, 2)),
    "3-D valid, strided, dilated, groups": conv(
        (2, 2, 2),
        (5, 4, 4, 2),
        padding="VALID",
        strides=(2, 1, 1),
        dilation=(1, 2, 1),
        groups=2,
    ),
    "two batch axes": conv((3, 3), (2, *PLANE)),
}

SMALL = (3, 4, 2)
TRANSPOSE = {
    f"{padding} {size}, strides {strides}, dilation {dilation}, flip {flip}": transpose(
        size,
        SMALL,
        padding=padding,
        strides=strides,
        kernel_dilation=dilation,
        transpose_kernel=flip,
        use_bias=bias,
    )
    for padding, size, strides, dilation, flip, bias in [
        ("SAME", (3, 3), None, None, False, True),
        ("SAME", (2, 3), (2, 3), None, False, True),
        ("SAME", (3, 2), (1, 2), (2, 1), True, True),
        ("SAME", (1, 2), (3, 3), None, True, False),  # strides beyond the kernel
        ("VALID", (3, 3), None, None, True, True),
        ("VALID", (2, 3), (2, 1), (1, 2), False, False),
        ("VALID", (2, 1), (3, 2), None, False, True),  # strides beyond the kernel
        ("CIRCULAR", (3, 3), (1, 1), None, False, True),
        ("CIRCULAR", (2, 4), (2, 3), None, False, True),
        ("CIRCULAR", (3, 2), (2, 2), (1, 2), True, True),
        ("CIRCULAR", (4, 3), (1, 2), (2, 1), True, False),
        (((1, 2), (2, 0)), (3, 3), (2, 1), None, False, True),
        (2, (3, 2), (2, 2), (1, 2), True, True),
    ]
} | {
    "1-D same": transpose((3,), (4, 2), strides=(2,)),
    "3-D valid": transpose((2, 2, 2), (2, 3, 2, 2), strides=(1, 2, 1), padding="VALID"),
    "no stated strides": transpose((2,), (4, 2), padding="CIRCULAR"),
    "two batch axes": transpose((2, 2), (2, *SMALL), strides=(2, 2)),
}


def norm(kind, shape, **options):
    kwargs = options.pop("kwargs", {})
    return Case(kind(**KINDS, **options), (BATCH, *shape), kwargs)


MASK = np.random.default_rng(0).integers(0, 2, (BATCH, 3, 2, 6)).astype(bool)
MASK[..., 0, :] = True  # no empty mean
TRAIN, RUNNING = {"use_running_average": False}, {"use_running_average": True}
NORM = {
    "batch": norm(nn.BatchNorm, (3, 2, 6), kwargs=TRAIN),
    "batch, of vectors": norm(nn.BatchNorm, (6,), kwargs=TRAIN),
    "batch, running": norm(nn.BatchNorm, (3, 2, 6), kwargs=RUNNING),
    "batch, running by field": norm(nn.BatchNorm, (3, 6), **RUNNING),
    "batch, axis 1": norm(nn.BatchNorm, (6, 3, 2), axis=1, kwargs=TRAIN),
    "batch, axis 1, running": norm(nn.BatchNorm, (6, 3, 2), axis=1, kwargs=RUNNING),
    "batch, two axes": norm(nn.BatchNorm, (3, 2, 6), axis=(1, -1), kwargs=TRAIN),
    "batch, scale only": norm(nn.BatchNorm, (3, 6), use_bias=False, kwargs=TRAIN),
    "batch, bias only": norm(nn.BatchNorm, (3, 6), use_scale=False, kwargs=RUNNING),
    "batch, masked": norm(nn.BatchNorm, (3, 2, 6), kwargs={**TRAIN, "mask": MASK}),
    "batch, slow variance": norm(
        nn.BatchNorm, (3, 6), use_fast_variance=False, kwargs=TRAIN
    ),
    "layer": norm(nn.LayerNorm, (3, 6)),
    "layer, of vectors": norm(nn.LayerNorm, (6,)),
    "layer, scale only": norm(nn.LayerNorm, (3, 6), use_bias=False),
    "layer, bias only": norm(nn.LayerNorm, (3, 6), use_scale=False),
    "layer, several axes": norm(
        nn.LayerNorm, (3, 2, 6), reduction_axes=(1, 2, 3), feature_axes=(1, -1)
    ),
    "layer, features elsewhere": norm(
        nn.LayerNorm, (3, 2, 6), reduction_axes=-1, feature_axes=1
    ),
    "layer, masked": norm(nn.LayerNorm, (3, 2, 6), kwargs={"mask": MASK}),
    "layer, slow variance": norm(nn.LayerNorm, (3, 6), use_fast_variance=False),
    "rms": norm(nn.RMSNorm, (3, 6)),
    "rms, masked": norm(nn.RMSNorm, (3, 2, 6), kwargs={"mask": MASK}),
    "group": norm(nn.GroupNorm, (3, 2, 6), num_groups=3),
    "group, by size": norm(nn.GroupNorm, (3, 6), num_groups=None, group_size=2),
    "group, masked": norm(nn.GroupNorm, (3, 2, 6), num_groups=2, kwargs={"mask": MASK}),
    "group, stated axes": norm(
        nn.GroupNorm, (3, 2, 6), num_groups=3, reduction_axes=(2, 3)
    ),
    "group, bias only": norm(nn.GroupNorm, (3, 6), num_groups=2, use_scale=False),
    "instance": norm(nn.InstanceNorm, (3, 2, 6)),
    "instance, features first": norm(nn.InstanceNorm, (6, 3, 2), feature_axes=1),
    "instance, masked": norm(nn.InstanceNorm, (3, 2, 6), kwargs={"mask": MASK}),
}


# ------------------------------------------------------------------ running a family


class Run(NamedTuple):
    """One layer evaluated: what it is made from, and what the library says."""

    case: Case
    x: np.ndarray
    c: np.ndarray
    variables: Any
    autodiff: Any
    curvature: Any
    gradient: Any


FAMILIES = {"dense": DENSE, "conv": CONV, "transpose": TRANSPOSE, "norm": NORM}
LINEAR = [(f, name) for f in ("dense", "conv", "transpose") for name in FAMILIES[f]]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def family(name, sharing):
    return evaluate(FAMILIES[name], sharing)


def evaluate(cases, sharing):
    """All layers at once, in one program: compiling takes longest."""
    rng = np.random.default_rng(0)
    params, collections, xs, cs = {}, {}, {}, {}

    def apply(name, params, x):
        case = cases[name]
        variables = {"params": params, **collections[name]}
        mutable = list(collections[name])
        return case.layer.apply(variables, x, mutable=mutable, **case.kwargs)[0]

    for name, case in cases.items():
        xs[name] = jnp.asarray(rng.normal(size=case.shape))
        shapes = jax.eval_shape(
            lambda x, case=case: case.layer.init(jax.random.key(0), x, **case.kwargs),
            xs[name],
        )
        # All positive, because one of them may be a variance.
        collections[name] = jax.tree.map(
            lambda s: jnp.asarray(rng.uniform(0.5, 2, size=s.shape), s.dtype), shapes
        )
        params[name] = collections[name].pop("params")
        outputs = jax.eval_shape(
            lambda p, x, name=name: apply(name, p, x), params[name], xs[name]
        )
        cs[name] = jnp.asarray(rng.normal(size=outputs.shape))

    def loss_fn(params, xs, cs):
        return sum(jnp.vdot(apply(n, params[n], xs[n]), cs[n]) for n in cases) / BATCH

    options = {"strict": True, "weight_sharing": sharing, "batch_size": BATCH}
    layers = lbopt.trace_layers(loss_fn, params, xs, cs, **options)
    f = lbopt.value_grad_and_curvature(loss_fn, layers, batch_size=BATCH)

    @quick_jit
    def run(params, xs, cs):
        _, grads, curvature = f(params, xs, cs)
        gradient = {
            name: layer.block.gradient(xs[name], cs[name] / BATCH)
            for name, layer in layers.items()
            if layer.block.kind == "kronecker"
        }
        return jax.grad(loss_fn)(params, xs, cs), grads, curvature, gradient

    plain, grads, curvature, gradient = jax.tree.map(np.asarray, run(params, xs, cs))
    assert_equal(grads, plain)
    return {
        name: Run(
            case,
            np.asarray(xs[name]),
            np.asarray(cs[name]),
            {"params": params[name], **collections[name]},
            plain[name],
            curvature[name],
            gradient.get(name),
        )
        for name, case in cases.items()
    }


# ------------------------------------------------------------------ explicit rows


class Rows(NamedTuple):
    """A layer as a matrix applied to rows.

    Attributes:
      a: ``[stack, n, S, in]``, a 1 appended where there is a bias.
      g: ``[stack, n, S, out]``.
      to_leaves: from ``[stack, in, out]`` to the layer's arrays.
    """

    a: np.ndarray
    g: np.ndarray
    to_leaves: Any


def explicit_rows(run):
    layer, own = run.case.layer, run.variables["params"]
    kernel = own["kernel"]
    groups = getattr(layer, "feature_group_count", 1)
    flip = getattr(layer, "transpose_kernel", False)
    n_stack = len(np.atleast_1d(getattr(layer, "batch_dims", ())))
    stack = kernel.shape[:n_stack]
    if isinstance(layer, (nn.Conv, nn.ConvTranspose)):
        spatial = tuple(range(kernel.ndim - 2))
        into = (*kernel.shape[:-2], kernel.shape[-1 if flip else -2])
        out = (kernel.shape[-2 if flip else -1] // groups,)
    else:
        spatial, n_out = (), len(np.atleast_1d(layer.features))
        into, out = kernel.shape[n_stack:-n_out], kernel.shape[-n_out:]
    d_in, d_out = math.prod(into), math.prod(out)

    def to_kernel(matrix):
        """``[stack × groups, in, out]`` as the layer's kernel."""
        features = (matrix.shape[-1],) if matrix.shape[-1] != d_out else out
        if groups > 1:
            joined = np.concatenate(list(matrix), -1).reshape(*into, -1)
        else:
            joined = matrix.reshape(*stack, *into, *features)
        # A mirrored kernel: its matrix counts the positions backwards.
        return np.flip(np.swapaxes(joined, -1, -2), spatial) if flip else joined

    # Every output feature of this twin copies one entry of the rows.
    copies = max(math.prod(stack), 1) * groups
    one_hot = to_kernel(np.broadcast_to(np.eye(d_in), (copies, d_in, d_in)))
    twin = layer.clone(features=d_in * groups, use_bias=False)
    a = np.asarray(twin.apply({"params": {"kernel": jnp.asarray(one_hot)}}, run.x))
    a, g = (
        rows_by_stack(x, n_stack, groups, d) for x, d in ((a, d_in), (run.c, d_out))
    )
    if "bias" in own:
        a = oracles.with_ones(a)

    def to_leaves(matrix):
        leaves = {"kernel": to_kernel(matrix[:, :d_in])}
        if "bias" in own:
            leaves["bias"] = matrix[:, -1].reshape(own["bias"].shape)
        return leaves

    return Rows(a, g, to_leaves)


def rows_by_stack(x, n_stack, groups, features):
    """``[*stack, n, ..., groups × d]`` to ``[stack × groups, n, S, d]``."""
    copies = math.prod(x.shape[:n_stack])
    x = x.reshape(copies, BATCH, -1, groups, features)
    return np.moveaxis(x, 3, 1).reshape(copies * groups, BATCH, -1, features)


def assert_close(actual, expected, tolerance=EXACT):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max()
    assert error <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(("kind", "name"), LINEAR)
def test_inputs_times_output_grads_are_the_gradient(kind, name):
    run = family(kind, "expand")[name]
    rows = explicit_rows(run)
    gradient = rows.to_leaves(np.einsum("knsi,knso->kio", rows.a, rows.g) / BATCH)
    assert set(gradient) == set(run.autodiff)
    for leaf, expected in run.autodiff.items():
        assert_close(gradient[leaf], expected)  # the rows of this test are right
        assert_close(run.gradient[leaf], expected)  # and so are the block's


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(("kind", "name"), LINEAR)
def test_factors_are_built_row_by_row(kind, name, sharing):
    run = family(kind, sharing)[name]
    rows = explicit_rows(run)
    pairs = [
        oracles.second_moments(a, g, sharing)
        for a, g in zip(rows.a, rows.g, strict=True)
    ]
    a, g = (np.stack(side) for side in zip(*pairs, strict=True))
    assert_close(run.curvature.a.reshape(a.shape), a)
    assert_close(run.curvature.g.reshape(g.shape), g)


# ------------------------------------------------------------------ normalisation


@pytest.mark.parametrize("name", NORM)
def test_norm_layers_are_built_example_by_example(name):
    run = family("norm", "expand")[name]
    layer, own = run.case.layer, run.variables["params"]
    names = tuple(n for n in ("scale", "bias") if n in own)
    # With scale 1 and bias 0 the layer's output is the normalised input.
    plain = {"scale": 1.0, "bias": 0.0}
    variables = dict(run.variables)
    variables["params"] = {n: jnp.full_like(p, plain[n]) for n, p in own.items()}
    mutable = [c for c in variables if c != "params"]
    x_hat, _ = layer.apply(variables, run.x, mutable=mutable, **run.case.kwargs)
    axes = getattr(layer, "feature_axes", getattr(layer, "axis", -1))
    axes = tuple(sorted(int(a) % run.x.ndim for a in np.atleast_1d(axes)))
    x_hat, c = (channels_last(np.asarray(x), axes) for x in (x_hat, run.c))
    f = oracles.unit_wise(x_hat, c, names)
    # Flax keeps running statistics in float32 whatever the parameters' type.
    tolerance = 1e-6 if "running" in name or name == "batch, bias only" else EXACT
    assert_close(run.curvature.f, f, tolerance)
    totals = {"scale": (c * x_hat).sum((0, 1)) / BATCH, "bias": c.sum((0, 1)) / BATCH}
    for leaf, gradient in run.autodiff.items():
        assert_close(totals[leaf].reshape(gradient.shape), gradient, tolerance)


def channels_last(x, feature_axes):
    """``[n, S, channels]``."""
    rest = [i for i in range(1, x.ndim) if i not in feature_axes]
    x = np.transpose(x, (0, *rest, *feature_axes))
    channels = math.prod(x.shape[1 + len(rest) :])
    return x.reshape(len(x), -1, channels)


# ------------------------------------------------------------------ attention


def test_attention_projections_are_built_example_by_example():
    rng = np.random.default_rng(0)
    layer = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, **KINDS)
    x = jnp.asarray(rng.normal(size=(BATCH, 4, 5)))
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes)

    def loss_fn(params, x):
        y = layer.apply({"params": params}, x)
        return jnp.mean(jnp.sum(jnp.cosh(y), (1, 2)))

    problem = Problem(loss_fn, params, (x,))
    layers = problem.trace(strict=True, verify=True)
    curvature = problem.captured(layers)
    calls = oracles.layer_calls(loss_fn, params, x)
    assert set(layers) == {"query", "key", "value", "out"} == set(calls)
    for path, ((inputs, output_grads),) in calls.items():
        d_in = 6 if path == "out" else 5  # heads are contracted together
        rows = oracles.with_ones(inputs.reshape(BATCH, -1, d_in))
        g = output_grads.reshape(BATCH, rows.shape[1], -1)
        for found, expected in zip(
            curvature[path], oracles.second_moments(rows, g), strict=True
        ):
            assert_close(found, expected)


# ------------------------------------------------------------------ several uses


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dense(4, **KINDS), (5,)),
        (nn.Conv(4, (3, 2), strides=(1, 2), **KINDS), (5, 4, 2)),
        (nn.Conv(4, (2, 2), feature_group_count=2, **KINDS), (3, 4, 2)),
    ],
    ids=["dense", "conv", "groups"],
)
def test_a_layer_used_several_times_is_expand_over_its_uses(layer, shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, 3, *shape)))
    model = nn.Sequential([layer])
    params = model.init(jax.random.key(0), x)["params"]

    def at_once(params, x):
        y = model.apply({"params": params}, x)
        return jnp.sum(jnp.cosh(y)) / BATCH

    def one_by_one(params, x):
        return sum(at_once(params, x[:, use]) for use in range(3))

    # A sum over examples, divided by a number of its own.
    problems = [Problem(f, params, (x,)) for f in (one_by_one, at_once)]
    found = [p.captured(p.trace(batch_size=BATCH)) for p in problems]
    for own, expected in zip(*(f["layers_0"] for f in found), strict=True):
        assert_close(own, expected)


# ------------------------------------------------------------------ types


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "statistics"),
    [
        (None, jnp.float64, jnp.float64),
        (None, jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (None, jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32, jnp.float32),
        (jnp.float64, jnp.float32, jnp.float32),
    ],
)
def test_statistics_accumulate_in_float32_or_the_parameters_type(
    dtype, param_dtype, statistics
):
    # Numbers that bfloat16 holds exactly, so that every product is exact in float32,
    # and sums of 1,024 positive ones: a bfloat16 accumulator would stop at about 256.
    kinds = {"dtype": dtype, "param_dtype": param_dtype}
    compute = dtype or param_dtype
    x, c = np.random.default_rng(0).integers(1, 8, (2, 4, 16, 16, 3)) / 8
    built = {
        "dense": nn.Dense(3, **kinds),
        "conv": nn.Conv(3, (1, 3), padding="CIRCULAR", **kinds),
        "layer_norm": nn.LayerNorm(**kinds),
    }
    data = jnp.asarray(x, compute), jnp.asarray(c, compute)
    params = {
        name: jax.tree.map(
            lambda s: jnp.ones(s.shape, s.dtype),
            jax.eval_shape(layer.init, jax.random.key(0), data[0])["params"],
        )
        for name, layer in built.items()
    }
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}

    def loss_fn(params, x, c):
        total = 0.0
        for name, layer in built.items():
            y = layer.apply({"params": params[name]}, x)
            assert y.dtype == compute
            total += jnp.vdot(y.astype(statistics), c.astype(statistics))
        return total / len(x)

    layers = lbopt.trace_layers(loss_fn, params, *data, strict=True, verify=True)
    tx = lbopt.scale_by_kfac(layers, damping=0.1)
    evaluate = lbopt.value_grad_and_curvature(loss_fn, layers)

    @quick_jit
    def run(params):
        _, grads, curvature = evaluate(params, *data)
        return grads, curvature, *tx.update(grads, tx.init(params), curvature=curvature)

    grads, curvature, natural, state = run(params)
    kept = jax.tree.leaves((curvature, state.factors, state.inverses))
    assert {leaf.dtype for leaf in kept} == {jnp.dtype(statistics)}
    outside = jax.tree.leaves((grads, natural))
    assert {leaf.dtype for leaf in outside} == {jnp.dtype(param_dtype)}
    c_rows = c.reshape(4, 256, 3)
    circular = np.stack([np.roll(x, 1 - k, axis=2) for k in range(3)], -2)
    double = statistics == jnp.float64
    for name, own in {"dense": x, "conv": circular}.items():
        ones = oracles.with_ones(own.reshape(4, 256, -1))
        a, g = oracles.second_moments(ones, c_rows)
        assert_close(curvature[name].a, a, 1e-12 if double else 1e-6)
        assert_close(curvature[name].g, g, 1e-12 if double else 1e-6)
    # Flax's own mean and variance, in float32 at least, from the same exact numbers.
    x_hat = oracles.normalised(x, (3,), 1e-6).reshape(4, 256, 3)
    f = oracles.unit_wise(x_hat, c_rows)
    assert_close(curvature["layer_norm"].f, f, 1e-10 if double else 1e-4)
