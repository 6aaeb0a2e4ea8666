"""The 2×2 blocks of normalisation layers, from their definition in NumPy."""

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import lbopt
from lbopt.curvature import unit_wise
from tests import oracles
from tests.oracles import quick_jit

BOTH = ("scale", "bias")
# float32 against float64: sums of at most a hundred products.
ROUNDING = 1e-5
SHAPE, GROUPS = (4, 3, 5, 6), 2


def x_hat_of(kind, x, epsilon, running):
    if kind is nn.BatchNorm:
        if running is None:
            return oracles.normalised(x, (0, 1, 2), epsilon)
        return (x - running["mean"]) / np.sqrt(running["var"] + epsilon)
    if kind is nn.GroupNorm:
        grouped = x.reshape(*SHAPE[:-1], GROUPS, -1)
        return oracles.normalised(grouped, (1, 2, 4), epsilon).reshape(x.shape)
    axes = (1, 2) if kind is nn.InstanceNorm else (3,)
    return oracles.normalised(x, axes, epsilon, centred=kind is not nn.RMSNorm)


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        (nn.BatchNorm, {"use_running_average": False}, BOTH),
        (nn.BatchNorm, {"use_running_average": True}, BOTH),
        (nn.LayerNorm, {}, BOTH),
        (nn.LayerNorm, {"use_bias": False}, ("scale",)),
        (nn.RMSNorm, {}, ("scale",)),
        (nn.GroupNorm, {"num_groups": GROUPS}, BOTH),
        (nn.InstanceNorm, {"use_scale": False}, ("bias",)),
    ],
)
def test_statistics_and_natural_gradient_follow_the_definition(kind, options, names):
    rng = np.random.default_rng(0)
    x, c = rng.normal(size=(2, *SHAPE)) + 0.5
    layer = kind(epsilon=1e-3, **options)
    running = None
    params = {n: jnp.asarray(rng.normal(size=6), jnp.float32) for n in names}
    collections = {}
    if kind is nn.BatchNorm:
        stats = {"mean": rng.normal(size=6), "var": rng.uniform(0.5, 2, size=6)}
        running = stats if options["use_running_average"] else None
        collections = {"batch_stats": jax.tree.map(jnp.float32, stats)}

    def loss_fn(params, x, c):
        variables = {"params": params["norm"], **collections}
        y, _ = layer.apply(variables, x, mutable=["batch_stats"])
        return jnp.vdot(y, c) / len(x)

    x, c = jnp.asarray(x, jnp.float32), jnp.asarray(c, jnp.float32)
    params = {"norm": params}
    layers = lbopt.trace_layers(loss_fn, params, x, c, strict=True, verify=True)
    evaluate = lbopt.value_grad_and_curvature(loss_fn, layers)
    tx = lbopt.scale_by_kfac(layers, damping=0.1)

    @quick_jit
    def run(params):
        _, grads, curvature = evaluate(params, x, c)
        natural, _ = tx.update(grads, tx.init(params), curvature=curvature)
        return curvature["norm"].f, grads["norm"], natural["norm"]

    f, grads, natural = run(params)
    x_hat = x_hat_of(kind, np.asarray(x, np.float64), 1e-3, running)
    x_hat, rows = (np.asarray(v, np.float64).reshape(4, -1, 6) for v in (x_hat, c))
    expected = oracles.unit_wise(x_hat, rows, names)
    np.testing.assert_allclose(
        f, expected, rtol=ROUNDING, atol=ROUNDING * expected.max()
    )
    gradient = np.stack([np.asarray(grads[n], np.float64) for n in names], -1)
    damped = expected + 0.1 * np.eye(len(names))
    solved = np.linalg.solve(damped, gradient[..., None])[..., 0]
    for i, name in enumerate(names):
        np.testing.assert_allclose(
            natural[name], solved[:, i], rtol=1e-4, atol=1e-4 * np.abs(solved).max()
        )


def invert(full, damping):
    block = unit_wise.unit_wise_block(full.shape[0], BOTH, True, jnp.float32)
    factors = block.pack(unit_wise.UnitWiseFactors(jnp.asarray(full, jnp.float32)))
    return np.asarray(unit_wise._unpack(block.invert(factors, damping).f_inv))


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    st.integers(0, 2**32 - 1), st.floats(-3, 3), st.sampled_from([1e-4, 1e-2, 1.0])
)
def test_closed_form_is_the_inverse(seed, log_scale, damping):
    x = np.random.default_rng(seed).normal(size=(5, 3, 2)) * 10**log_scale
    full = np.einsum("cni,cnj->cij", x, x)
    expected = np.linalg.inv(full.astype(np.float32) + damping * np.eye(2))
    condition = np.linalg.cond(full + damping * np.eye(2)).max()
    error = np.abs(invert(full, damping) - expected).max() / np.abs(expected).max()
    assert error < 10 * np.finfo(np.float32).eps * condition


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_nearly_singular_blocks_keep_positive_inverses(scale):
    # One example: F = v vᵀ has rank 1, and its determinant in float32 is all rounding.
    v = np.random.default_rng(0).normal(size=(200, 2)) * scale
    inverse = invert(np.einsum("ci,cj->cij", v, v), 1e-4)
    assert np.isfinite(inverse).all()
    along = np.einsum("ci,cij,cj->c", v, inverse.astype(np.float64), v)
    across = np.linalg.eigvalsh(inverse)[:, 1]
    # v is an eigenvector of the largest eigenvalue; what is orthogonal to it is damped
    # by λ alone.
    assert (across > 0).all()
    assert (across <= 1e4 * (1 + 1e-3)).all()
    assert np.isfinite(along).all()


def test_a_layer_that_is_not_batched_is_one_example():
    rng = np.random.default_rng(0)
    x_hat, c = rng.normal(size=(2, 4, 6))
    block = unit_wise.unit_wise_block(6, BOTH, False, jnp.float32)
    residual = unit_wise.NormResidual(
        jnp.float32(x_hat), jnp.zeros((1, 1)), jnp.ones((1, 1))
    )
    sums = block.estimate(residual, jnp.float32(c), unit_wise.UnitWiseFactors(True))
    expected = oracles.unit_wise(x_hat[None], c[None])
    actual = block.statistics(block.mean(sums, 1)).f
    np.testing.assert_allclose(actual, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("names", [BOTH, ("scale",)])
def test_first_inverses_are_the_identity(names):
    block = unit_wise.unit_wise_block(6, names, True, jnp.float32)
    factors, inverses = block.init((2,))
    assert not factors.f.any()
    leaves = {n: jnp.full((2, 6), 3.0 + i) for i, n in enumerate(names)}
    natural = block.precondition(inverses, leaves)
    jax.tree.map(np.testing.assert_array_equal, natural, leaves)
