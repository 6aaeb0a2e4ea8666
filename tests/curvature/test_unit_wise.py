"""The blocks of normalisation layers, from their definition in NumPy."""

import inspect

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
    collections: dict = {}
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
    grads, (f, natural), (full, full_natural) = results_of(loss_fn, params, x, c)
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

    expected = oracles.full_norm(x_hat, rows, names)
    np.testing.assert_allclose(
        full, expected, rtol=ROUNDING, atol=ROUNDING * expected.max()
    )
    damped = expected + 0.1 * np.eye(len(expected))
    solved = np.linalg.solve(damped, gradient.T.ravel()).reshape(-1, 6)
    # A float32 inverse of a matrix that 4 examples leave nearly singular.
    error = 10 * np.finfo(np.float32).eps * np.linalg.cond(damped)
    for i, name in enumerate(names):
        np.testing.assert_allclose(
            full_natural[name], solved[i], rtol=0, atol=error * np.abs(solved).max()
        )


def results_of(loss_fn, params, x, c):
    """Gradients, and with each kind of block the statistic and natural gradient."""
    found = []
    for norm_blocks in ("unit_wise", "full"):
        layers = lbopt.trace_layers(
            loss_fn, params, x, c, strict=True, verify=True, norm_blocks=norm_blocks
        )
        assert layers["norm"].block.kind == norm_blocks
        evaluate = lbopt.value_grad_and_curvature(loss_fn, layers)
        tx = lbopt.scale_by_kfac(layers, damping=0.1)

        def run(params, evaluate=evaluate, tx=tx):
            _, grads, curvature = evaluate(params, x, c)
            natural, _ = tx.update(grads, tx.init(params), curvature=curvature)
            return grads["norm"], (curvature["norm"].f, natural["norm"])

        found.append(quick_jit(run)(params))
    (grads, unit_wise_results), (_, full_results) = found
    return grads, unit_wise_results, full_results


@pytest.mark.parametrize("block_size", [None, 5])
def test_the_full_block_is_cut_like_any_other_factor(block_size):
    # Two copies of a lifted layer; the oracle inverts each diagonal block by itself.
    rng = np.random.default_rng(0)
    block = unit_wise.full_block(4, BOTH, True, jnp.float32)
    block = block.variant(False, block_size)
    rows = rng.normal(size=(2, 20, 8))
    f = np.einsum("cni,cnj->cij", rows, rows) / 20
    leaves = {n: rng.normal(size=(2, 4)) for n in BOTH}
    factors = block.pack(unit_wise.FullFactors(jnp.float32(f)))
    inverses = block.invert(factors, 0.3)
    natural = block.precondition(inverses, jax.tree.map(jnp.float32, leaves))
    size = 8 if block_size is None else 4
    expected = np.zeros((2, 8))
    column = np.concatenate([leaves[n] for n in BOTH], -1)
    for copy, first in np.ndindex(2, 8 // size):
        cut = slice(first * size, (first + 1) * size)
        damped = f[copy, cut, cut] + 0.3 * np.eye(size)
        expected[copy, cut] = np.linalg.solve(damped, column[copy, cut])
    actual = np.concatenate([natural[n] for n in BOTH], -1)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_an_unknown_kind_of_block_is_refused():
    model, x = nn.LayerNorm(), jnp.ones((4, 3))
    params = {"norm": model.init(jax.random.key(0), x)["params"]}

    def loss_fn(params, x):
        return model.apply({"params": params["norm"]}, x).mean()

    with pytest.raises(ValueError, match=r"norm_blocks='dense'.*'full', 'unit_wise'"):
        inspect.unwrap(lbopt.trace_layers)(loss_fn, params, x, norm_blocks="dense")


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
