"""Products with the exact Fisher matrix against the dense matrix."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt.curvature.fisher_products import fisher_products
from tests import oracles
from tests.curvature.test_capture import Lifted
from tests.oracles import quick_jit
from tests.problems import (
    BATCH,
    CLASSES,
    Mlp,
    Problem,
    assert_equal,
    classify,
    inputs,
)

EXACT = 1e-10
DISTRIBUTIONS = ["categorical", "bernoulli", "normal"]


@pytest.fixture
def _float64():
    with jax.enable_x64(True):
        yield


class Conv(nn.Module):
    """A convolution, a pool and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(3, (2, 2), name="conv")(x))
        return nn.Dense(CLASSES, name="head")(jnp.mean(x, (1, 2)))


def problem_of(model, distribution, x, terms=None):
    """A loss in float64; its labels play no part in the Fisher matrix."""
    x = jnp.asarray(x, float)
    params = model.init(jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda p: p.astype(float) + 0.1, params)

    def loss_fn(params, x):
        f = model.apply({"params": params}, x)
        f = lbopt.likelihood(f, distribution, terms=terms)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(f, jnp.ones_like(f)))

    return Problem(loss_fn, params, (x,)), lambda p, x: model.apply({"params": p}, x)


def random_like(params, k, seed=0):
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        for _ in range(k)
    ]


def flat(tree):
    return np.concatenate([np.asarray(x, float).ravel() for x in jax.tree.leaves(tree)])


def dense_fisher(outputs_of, params, x, distribution):
    """``[parameters, parameters]``, a mean over the events of all examples."""
    outputs = np.asarray(outputs_of(params, x))
    rows, events = outputs.size // outputs.shape[-1], outputs.shape[-1]
    jac = oracles.jacobians(outputs_of, params, x)
    jac = np.concatenate(
        [x.reshape(rows, events, -1) for x in jax.tree.leaves(jac)], -1
    )
    return oracles.exact_fisher(jac, outputs.reshape(rows, events), distribution)


def products_of(problem, vectors, **options):
    def products(params, vectors, *args):
        return fisher_products(problem.loss_fn, params, vectors, *args, **options)

    return quick_jit(products)(problem.params, vectors, *problem.args)


def assert_is_dense(products, fisher, vectors):
    v = np.stack([flat(x) for x in vectors])
    assert oracles.error(products, v @ fisher @ v.T) < EXACT


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("model", "shape"), [(Mlp(), (BATCH, 4)), (Conv(), (BATCH, 2, 4, 2))]
)
def test_is_the_dense_fisher(model, shape, distribution):
    x = jax.random.normal(jax.random.key(0), shape)
    problem, outputs_of = problem_of(model, distribution, x)
    vectors = random_like(problem.params, 3)
    products = products_of(problem, vectors)
    fisher = dense_fisher(outputs_of, problem.params, *problem.args, distribution)
    assert_is_dense(products, fisher, vectors)
    np.testing.assert_array_equal(products, products.T)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_loss_that_averages_tokens_states_its_terms(distribution):
    tokens = 3
    x = inputs(batch=BATCH * tokens).reshape(BATCH, tokens, -1)
    stated, outputs_of = problem_of(Mlp(), distribution, x, 24)
    silent, _ = problem_of(Mlp(), distribution, x)
    vectors = random_like(stated.params, 2)
    products = products_of(stated, vectors)
    fisher = dense_fisher(outputs_of, stated.params, *stated.args, distribution)
    assert_is_dense(products, fisher, vectors)
    with pytest.raises(ValueError, match="more axes than one example's"):
        products_of(silent, vectors)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("lift", ["remat", "jit", "scan", "scan_remat", "vmap_mapped"])
def test_lifted_transforms(lift):
    problem, outputs_of = problem_of(Lifted(lift), "categorical", inputs())
    vectors = random_like(problem.params, 2)
    products = products_of(problem, vectors)
    fisher = dense_fisher(outputs_of, problem.params, *problem.args, "categorical")
    assert_is_dense(products, fisher, vectors)


def test_there_is_no_backward_pass():
    # 2 products forward; the tangent of a layer is that of its kernel, and after the
    # first layer that of its input; 1 for the means over classes, 1 for the matrix.  A
    # backward pass has 3 more.
    problem = classify(Mlp())

    def dots(k):
        vectors = random_like(problem.params, k)
        f = lambda p, v: fisher_products(problem.loss_fn, p, v, *problem.args)
        text = jax.jit(f).lower(problem.params, vectors).as_text()
        return text.count("stablehlo.dot_general")

    assert dots(1) == dots(3) == 2 + (1 + 2) + 1 + 1


def test_half_precision_is_summed_in_float32():
    full = classify(Mlp())
    vectors = random_like(full.params, 2)
    expected = products_of(full, vectors)
    half = classify(Mlp(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), full.params)
    products = products_of(half._replace(params=params), vectors)
    assert products.dtype == jnp.float32
    np.testing.assert_allclose(products, expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("distribution", ["categorical", "bernoulli"])
def test_outputs_that_are_certain_leave_no_curvature(distribution):
    def loss_fn(w, x):
        f = lbopt.likelihood(x @ w, distribution)
        return jnp.mean(f)

    w = jnp.array([[200.0, -200.0, 300.0]])
    products = fisher_products(loss_fn, w, [jnp.ones((1, 3)), w], jnp.ones((4, 1)))
    np.testing.assert_allclose(products, 0, atol=1e-30)


def test_auxiliary_results_and_compiled_losses_change_nothing():
    problem = classify(Mlp())
    vectors = random_like(problem.params, 2)

    @jax.jit
    def with_aux(params, x, y):
        return problem.loss_fn(params, x, y), {"x": jnp.sum(x)}

    found = products_of(problem._replace(loss_fn=with_aux), vectors, has_aux=True)
    assert_equal(found, products_of(problem, vectors))


# --------------------------------------------------------------------------- messages


@pytest.mark.parametrize("calls", [0, 2])
def test_likelihood_is_called_once(calls):
    def loss_fn(w, x):
        f = x @ w
        for _ in range(calls):
            f = lbopt.likelihood(f, "normal")
        return jnp.sum(f)

    with pytest.raises(ValueError, match=f"loss_fn=loss_fn calls it {calls} times"):
        fisher_products(loss_fn, jnp.ones((2, 1)), [jnp.ones((2, 1))], jnp.ones((4, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: [], r"vectors is empty; pass at least one tree shaped like params"),
        (
            lambda v: [v, {"first": v["first"]}],
            r"vectors\[1\]\['last'\]\['kernel'\] has shape None, but params.* has "
            r"\(5, 3\); pass trees shaped like params",
        ),
        (
            lambda v: [v | {"last": {"kernel": jnp.ones((3, 5))}}],
            r"vectors\[0\]\['last'\]\['kernel'\] has shape \(3, 5\), but params",
        ),
        (
            lambda v: [v | {"head": jnp.ones(3)}],
            r"vectors\[0\]\['head'\] has shape \(3,\), but params\['head'\] has None",
        ),
    ],
)
def test_vectors_are_shaped_like_the_parameters(change, message):
    problem = classify(Mlp())
    with pytest.raises(ValueError, match=message):
        fisher_products(
            problem.loss_fn, problem.params, change(problem.params), *problem.args
        )
