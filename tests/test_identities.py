"""Identities that K-FAC satisfies exactly, in float64: Martens & Grosse 2015, Grosse &
Martens 2016, Ba et al. 2017, Eschenhagen et al. 2023.

Tests and cases are numbered as in the notes that list the identities.  Factors are
compared with dense Fisher matrices, built from Jacobians (``oracles``).
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import lbopt
from lbopt import linalg
from lbopt.curvature import doubly_factored, eigen_moments, kronecker, linear_maps
from lbopt.curvature.fisher_products import fisher_products
from lbopt.transforms.quadratic_model import scale_by_quadratic_model
from tests import oracles
from tests.oracles import quick_jit
from tests.problems import assert_close

EXACT = 1e-8  # relative; float64 sums of a few hundred terms leave about 1e-14
# "λ = 0": each factor gets 1e-15, no more than its own rounding.
NO_DAMPING = 1e-30
INEXACT = 1e-2  # an approximation that is off shows at least this relative error


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


class Linear(nn.Module):
    """Dense layers with a function between them."""

    widths: tuple[int, ...]
    between: tuple = ()

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, param_dtype=jnp.float64, name=f"dense{i}")(x)
            if i < len(self.widths) - 1 and self.between:
                x = self.between[i](x)
        return x


def conv(features, size=(3, 3), **options):
    return nn.Conv(features, size, param_dtype=jnp.float64, **options)


def dense(features):
    return nn.Dense(features, param_dtype=jnp.float64)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def likelihood_terms(f, y, distribution):
    """−log p(y | f) of each example, up to a constant."""
    if distribution == "normal":
        return 0.5 * jnp.sum((f - y) ** 2, axis=tuple(range(1, f.ndim)))
    if distribution == "bernoulli":
        terms = optax.sigmoid_binary_cross_entropy(f, y)
        return jnp.sum(terms, axis=tuple(range(1, f.ndim)))
    return optax.softmax_cross_entropy_with_integer_labels(f, y)


class Problem:
    """A model, its parameters, a batch, and the distribution of its outputs."""

    doubly_factored = None

    def __init__(self, model, x, distribution="normal", seed=1):
        self.model, self.x, self.distribution = model, x, distribution
        rng = np.random.default_rng(seed)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        # Biases are not zero either, so that nothing is exact by chance.
        self.params = jax.tree.map(
            lambda s: jnp.asarray(rng.normal(size=s.shape) / s.size**0.25),
            variables["params"],
        )
        shape = jax.eval_shape(self.outputs, self.params, x).shape
        draw = {
            "normal": lambda: rng.normal(size=shape),
            "bernoulli": lambda: rng.integers(0, 2, size=shape).astype(float),
            "categorical": lambda: rng.integers(0, shape[-1], size=shape[:-1]),
        }
        self.y = jnp.asarray(draw[distribution]())
        self._layers = {}

    def outputs(self, params, x):
        return self.model.apply({"params": params}, x)

    def losses(self, params, x, y):
        return likelihood_terms(self.outputs(params, x), y, self.distribution)

    def loss(self, params, x, y):
        f = lbopt.likelihood(self.outputs(params, x), self.distribution)
        return jnp.mean(likelihood_terms(f, y, self.distribution))

    def layers(self, sharing="expand"):
        """Traced once: what is read of the arrays is their shapes."""
        if sharing not in self._layers:
            self._layers[sharing] = lbopt.trace_layers(
                *(self.loss, self.params, self.x, self.y),
                strict=True,
                weight_sharing=sharing,
                doubly_factored=self.doubly_factored,
            )
        return self._layers[sharing]

    def evaluate(self, fisher="exact", sharing="expand"):
        return lbopt.value_grad_and_curvature(
            self.loss, self.layers(sharing), fisher=fisher
        )

    def curvature(self, fisher="exact", sharing="expand"):
        evaluate = quick_jit(self.evaluate(fisher, sharing))
        return evaluate(self.params, self.x, self.y)[2]

    def errors(self, curvature, fishers=None):
        """How far the product of each layer's factors is from its Fisher matrix."""
        fishers = fishers or {path: self.fisher(path) for path in self.params}
        return {p: error(product(curvature[p]), f) for p, f in fishers.items()}

    @functools.cached_property
    def predictions(self):
        return np.asarray(quick_jit(self.outputs)(self.params, self.x))

    @functools.cached_property
    def jacobians(self):
        return oracles.jacobians(self.outputs, self.params, self.x)

    def jacobian(self, path):
        return oracles.layer_jacobian(self.jacobians, self.predictions, path)

    def fisher(self, path, other=None):
        right = None if other is None else self.jacobian(other)
        return oracles.exact_fisher(
            self.jacobian(path), self.predictions, self.distribution, right
        )

    def empirical_fishers(self):
        losses = jax.eval_shape(self.losses, self.params, self.x, self.y)
        own = functools.partial(self.losses, y=self.y)
        jac = oracles.jacobians(own, self.params, self.x)
        layers = {path: oracles.layer_jacobian(jac, losses, path) for path in jac}
        return {path: oracles.empirical_fisher(j) for path, j in layers.items()}


def product(statistics):
    return np.kron(statistics.a, statistics.g)


def error(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def spd(seed, size, rank=None):
    x = np.random.default_rng(seed).normal(size=(rank or 2 * size, size))
    return x.T @ x / len(x)


def inverses_of(a, g, damping):
    """The block of a dense layer without bias, and the inverses that it makes."""
    linear = linear_maps.dense_linear((len(a), len(g)), False, True)
    block = kronecker.kronecker_block(linear, "expand", jnp.float64)
    packed = (linalg.pack(jnp.asarray(m)) for m in (a, g))
    return block, quick_jit(block.invert)(kronecker.KroneckerFactors(*packed), damping)


def natural_of(a, g, damping, v):
    block, inverses = inverses_of(a, g, damping)
    return quick_jit(block.precondition)(inverses, {"kernel": jnp.asarray(v)})["kernel"]


# ------------------------------------------------------------------ 1: algebra


@pytest.mark.parametrize("damping", [NO_DAMPING, 1e-3, 10.0])
def test_01_kronecker_inverse_is_the_dense_solve(damping):
    a, g, v = spd(0, 5), spd(1, 4), np.asarray(normal(2, 5, 4))
    natural = natural_of(a, g, damping, v)
    assert error(natural, oracles.natural_gradient(a, g, damping, v)) < EXACT
    damped_a, damped_g = oracles.damped_factors(a, g, damping)
    by_sides = np.linalg.inv(damped_a) @ v @ np.linalg.inv(damped_g)
    assert error(natural, by_sides) < EXACT


def test_01_eigen_damped_form_is_the_dense_solve():
    a, g, v, damping = spd(0, 5), spd(1, 4), np.asarray(normal(2, 5, 4)), 0.3
    (d_a, q_a), (d_g, q_g) = (
        linalg.eigendecompose(linalg.pack(jnp.asarray(m))) for m in (a, g)
    )
    natural = q_a @ ((q_a.T @ v @ q_g) / (np.outer(d_a, d_g) + damping)) @ q_g.T
    full = np.kron(a, g) + damping * np.eye(20)
    assert error(np.ravel(natural), np.linalg.solve(full, v.ravel())) < EXACT


# ------------------------------------------------------------------ 2 to 6: exactness


SOFTMAX, BERNOULLI = ({"distribution": d} for d in ("categorical", "bernoulli"))
EMPIRICAL, REDUCE = {"fisher": "empirical"}, {"sharing": "reduce"}
ALL, NONE = "dense0 dense1 dense2 layers_0 layers_1 layers_2", ""


def pooled(pool, *parts):
    spatial = (1, 2) if isinstance(parts[0], nn.Conv) else 1
    return nn.Sequential((*parts, lambda x: pool(x, axis=spatial)))


def cases():
    """Names, models, inputs, settings, and the layers whose factors are exact."""
    linear, flat, image = Linear((4, 5, 3)), (7, 6), (3, 4, 4, 2)
    yield "02 deep linear", linear, flat, {}, ALL
    model = Linear((4, 5, 3), (nn.tanh, nn.relu))
    yield "03 last layer under squared loss", model, flat, {}, "dense2"
    model = Linear((4, 5, 3), (nn.tanh, nn.gelu))
    for loss, copies in itertools.product((SOFTMAX, BERNOULLI), (1, 4)):
        yield "04 one datum, any loss", model, (1, 6), loss | {"copies": copies}, ALL
    same = SOFTMAX | EMPIRICAL | {"copies": 3, "y": [2, 2, 2]}
    yield "04 one datum, empirical", model, (1, 6), same, ALL
    model = Linear((4, 5, 3), (nn.tanh, nn.tanh))
    yield "05 control: tanh and softmax", model, flat, SOFTMAX, NONE
    yield "05 control: empirical", linear, flat, EMPIRICAL, NONE
    for padding in ("SAME", "VALID", "CIRCULAR", ((2, 0), (1, 3))):
        model = nn.Sequential((conv(3, padding=padding),))
        yield f"10 squared loss on the map, {padding}", model, (3, 5, 4, 2), {}, ALL
    model = nn.Sequential((conv(3), conv(4, (1, 1)), conv(2, (1, 1))))
    yield "10 under linear pointwise convolutions", model, image, {}, ALL
    model = nn.Sequential((conv(3), conv(2)))
    yield "10 control: under a linear 3×3 convolution", model, image, {}, "layers_1"
    shared = Linear((4, 3)), (5, 6, 2)  # at 6 positions
    yield "11 shared deep linear", *shared, {}, ALL
    yield "11 control: shared deep linear, reduce", *shared, REDUCE, NONE
    for pool in (jnp.mean, jnp.sum):
        model = pooled(pool, conv(3))
        yield "11 before a global pool", model, (3, 4, 5, 2), REDUCE, ALL
        yield "11 control: expand before a pool", model, (3, 4, 5, 2), {}, NONE
        model = pooled(pool, dense(4), dense(3))
        yield "11 shared deep linear that pools", model, (5, 6, 2), REDUCE, ALL


@pytest.mark.parametrize(
    ("model", "shape", "settings", "exact"),
    [pytest.param(*c, id=n) for n, *c in cases()],
)
def test_product_of_the_factors_is_the_fisher(model, shape, settings, exact):
    settings = {"copies": 1, "distribution": "normal", "y": None} | settings
    x = jnp.concatenate([normal(0, *shape)] * settings.pop("copies"))
    problem = Problem(model, x, settings.pop("distribution"))
    if (y := settings.pop("y")) is not None:
        problem.y = jnp.asarray(y)
    empirical = problem.empirical_fishers() if "fisher" in settings else None
    for path, off in problem.errors(problem.curvature(**settings), empirical).items():
        assert off < EXACT if path in exact else off > INEXACT


def test_02_deep_linear_net_has_the_gauss_newton_matrix():
    problem = Problem(Linear((4, 5, 3)), normal(0, 7, 6))
    gauss_newton = {
        path: oracles.gauss_newton(
            problem.jacobian(path),
            problem.predictions,
            problem.y,
            lambda f, y: 0.5 * jnp.sum((f - y) ** 2),
        )
        for path in problem.params
    }
    assert max(problem.errors(problem.curvature(), gauss_newton).values()) < EXACT


def test_02_deep_linear_net_is_exact_between_layers():
    # The library keeps diagonal blocks alone; the cross moments are built here from the
    # oracle's own inputs and output gradients, one backward pass per output.
    problem = Problem(Linear((4, 3)), normal(0, 7, 6))
    a, g = 0.0, 0.0
    for c in range(3):
        calls = oracles.layer_calls(
            lambda p, x, c=c: jnp.sum(problem.outputs(p, x)[..., c]),
            problem.params,
            problem.x,
        )
        (x0, g0), (x1, g1) = (calls[f"dense{i}"][0] for i in (0, 1))
        a = oracles.with_ones(x0).T @ oracles.with_ones(x1) / len(x0)
        g = g + g0.T @ g1 / len(x0)
    assert error(np.kron(a, g), problem.fisher("dense0", "dense1")) < EXACT


def test_02_sampled_targets_converge_like_one_over_root_samples():
    problem = Problem(Linear((4, 3)), normal(0, 3, 6))
    evaluate = problem.evaluate("sampled")
    keys = jax.random.split(jax.random.key(5), 4096)
    draw = quick_jit(
        jax.vmap(lambda k: evaluate(problem.params, problem.x, problem.y, rng=k)[2])
    )
    g = np.asarray(draw(keys)["dense0"].g)
    exact = np.asarray(problem.curvature()["dense0"].g)

    def rms(samples):
        means = g.reshape(-1, samples, *exact.shape).mean(1)
        return np.sqrt(np.mean(np.sum((means - exact) ** 2, (1, 2))))

    # 64 groups of 64 samples: their own rms is known to 1/√128 ≈ 9 %; allow 4 of these.
    assert rms(64) == pytest.approx(rms(1) / 8, rel=0.35)
    assert rms(4096) < 4 * rms(1) / 64
    assert rms(1) > 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize("distribution", ["categorical", "bernoulli", "normal"])
def test_06_loss_fisher_is_the_loss_hessian(distribution):
    f = normal(0, 1, 4)
    y = jnp.array([2]) if distribution == "categorical" else normal(1, 1, 4)
    loss = lambda f: likelihood_terms(f, y, distribution)[0]
    hessian = quick_jit(jax.hessian(loss))(f)
    expected = np.asarray(hessian).reshape(4, 4)
    assert error(oracles.output_fisher(f, distribution)[0], expected) < EXACT
    # The library's own, through an identity layer: G of the logits themselves.
    problem = Problem(nn.Sequential((dense(4),)), normal(2, 5, 3), distribution)
    mean = oracles.output_fisher(problem.predictions, distribution).mean(0)
    assert error(problem.curvature()["layers_0"].g, mean) < EXACT


def test_06_output_gradients_have_mean_zero_under_the_model():
    x = normal(0, 5, 6)
    problem = Problem(Linear((4, 3), (nn.tanh,)), x, "categorical")
    p = jax.nn.softmax(problem.predictions)

    def weighted(params):
        """For each class the losses of that label, weighted by its probability."""
        labels = jnp.tile(jnp.arange(3), (5, 1))
        f = problem.outputs(params, x)[:, None].repeat(3, 1)
        return jnp.sum(p * likelihood_terms(f, labels, "categorical"), 0)

    grads = quick_jit(jax.jacrev(weighted))(problem.params)
    for g in jax.tree.leaves(grads):
        # E[a gᵀ] is the kernel's gradient and E[g] the bias's.
        assert jnp.linalg.norm(g[0]) > 1e-3  # each class alone has one
        assert jnp.linalg.norm(g.sum(0)) < EXACT * jnp.linalg.norm(g[0])


def test_06_exact_factors_are_the_expectation_over_labels():
    problem = Problem(Linear((4, 3), (nn.tanh,)), normal(0, 1, 6), "categorical")
    evaluate = quick_jit(problem.evaluate("empirical"))
    p = jax.nn.softmax(problem.predictions)[0]
    for path, exact in problem.curvature().items():
        g = sum(
            p[c] * evaluate(problem.params, problem.x, jnp.array([c]))[2][path].g
            for c in range(3)
        )
        assert error(exact.g, g) < EXACT


# ------------------------------------------------------------------ 7, 8: dense steps


def natural_step(problem, damping):
    """Gradient, statistics and natural gradient of the first step."""
    tx = lbopt.scale_by_kfac(problem.layers(), damping=damping)
    evaluate = problem.evaluate()

    @quick_jit
    def step(params):
        _, grads, curvature = evaluate(params, problem.x, problem.y)
        natural, _ = tx.update(grads, tx.init(params), curvature=curvature)
        return grads, curvature, natural

    return step(problem.params)


def test_07_one_step_solves_least_squares():
    problem = Problem(nn.Sequential((dense(3),)), normal(0, 20, 6))
    _, _, natural = natural_step(problem, NO_DAMPING)
    after = jax.tree.map(jnp.subtract, problem.params, natural)["layers_0"]
    inputs = oracles.with_ones(np.asarray(problem.x))
    solution = np.linalg.lstsq(inputs, np.asarray(problem.y))[0]
    assert error(np.vstack([after["kernel"], after["bias"]]), solution) < EXACT


def test_08_homogeneous_coordinate_centres_the_inputs():
    problem = Problem(nn.Sequential((dense(3),)), normal(0, 20, 6) + 2, "bernoulli")
    grads, curvature, natural = natural_step(problem, NO_DAMPING)
    x = np.asarray(problem.x)
    mean, covariance = x.mean(0), np.cov(x.T, bias=True)
    own = grads["layers_0"]
    centred = own["kernel"] - np.outer(mean, own["bias"])
    expected = np.linalg.solve(covariance, centred) @ np.linalg.inv(
        curvature["layers_0"].g
    )
    assert error(natural["layers_0"]["kernel"], expected) < EXACT


# ------------------------------------------------------------------ 9 to 12: KFC


@pytest.mark.parametrize("image", [(5, 6), (3, 4)])
def test_09_constant_image_gives_the_beta_table(image):
    t1, t2 = image
    problem = Problem(
        nn.Sequential((conv(2, padding="SAME"),)), jnp.ones((2, t1, t2, 1))
    )
    omega = problem.curvature("empirical")["layers_0"].a * t1 * t2
    deltas = list(itertools.product((-1, 0, 1), repeat=2))

    def beta(delta, other):
        axes = zip(image, delta, other, strict=True)
        return np.prod([t - max(d, e, 0) + min(d, e, 0) for t, d, e in axes])

    expected = np.zeros((10, 10))
    for (i, d), (j, e) in itertools.product(enumerate(deltas), enumerate(deltas)):
        expected[i, j] = beta(d, e)
    for i, d in enumerate(deltas):
        expected[i, 9] = expected[9, i] = (t1 - abs(d[0])) * (t2 - abs(d[1]))
    expected[9, 9] = t1 * t2
    assert error(omega, expected) < EXACT


def test_10_convolution_covering_the_map_is_dense():
    x = normal(0, 5, 3, 4, 2)
    over_map = Problem(
        nn.Sequential((conv(4, (3, 4), padding="VALID"), nn.tanh, conv(3, (1, 1)))),
        x,
        "bernoulli",
    )
    flat = Problem(
        nn.Sequential((dense(4), nn.tanh, dense(3))), x.reshape(5, 24), "bernoulli"
    )
    flat.params = jax.tree.map(
        lambda p, q: p.reshape(q.shape), over_map.params, flat.params
    )
    curvature, expected = over_map.curvature(), flat.curvature()
    for path in flat.params:
        assert error(curvature[path].a, expected[path].a) < EXACT
        assert error(curvature[path].g, expected[path].g) < EXACT


def test_12_mean_and_sum_over_locations_damp_alike():
    problem = Problem(nn.Sequential((conv(3),)), normal(0, 3, 4, 5, 2))
    statistics = problem.curvature("empirical")["layers_0"]
    locations, damping, v = 20, 0.05, np.asarray(normal(1, 19, 3))
    omega = np.asarray(statistics.a) * locations
    gamma = np.asarray(statistics.g) / locations
    paper = oracles.natural_gradient(omega, gamma, damping, v)
    # kfac-jax's form: |T| · damp(Ω / |T|, Γ, λ / |T|).
    scaled = oracles.natural_gradient(omega / locations, gamma, damping / locations, v)
    assert error(scaled / locations, paper) < EXACT
    layer = problem.layers()["layers_0"]
    leaves = {"kernel": v[:-1].reshape(3, 3, 2, 3), "bias": v[-1]}

    @quick_jit
    def naturally(statistics, leaves):
        inverses = layer.block.invert(layer.block.pack(statistics), damping)
        return layer.block.precondition(inverses, leaves)

    natural = naturally(statistics, leaves)
    rows = np.vstack([natural["kernel"].reshape(18, 3), natural["bias"]])
    assert error(rows, paper) < EXACT


# ------------------------------------------------------------------ 13: three factors

MAP = (4, 3)  # locations, channels


def on_map(maps):
    """A dense layer that reads a flattened map, under squared loss."""
    flattened, shape = jnp.asarray(maps).reshape(len(maps), -1), maps.shape[1:]
    problem = Problem(nn.Sequential((dense(2),)), flattened)
    problem.doubly_factored = {"layers_0": shape}
    return problem


def rectified(seed, *shape):
    """Maps as a rectifier makes them; a few are zero in some places."""
    return np.maximum(np.random.default_rng(seed).normal(size=shape) + 0.5, 0)


def unit_rows(seed, n, size):
    x = np.random.default_rng(seed).normal(size=(n, size))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def product_design(sizes=None):
    """Maps κ ψᵀ of every pair of 3 unit vectors κ and 5 ψ, scaled if asked to."""
    kappa, psi = unit_rows(0, 3, MAP[0]), unit_rows(1, 5, MAP[1])
    maps = np.einsum("it,jc->ijtc", kappa, psi).reshape(15, *MAP)
    return maps if sizes is None else maps * sizes[:, None, None]


def three_products(statistics):
    return np.kron(np.kron(statistics.k, statistics.c), statistics.g)


@pytest.mark.parametrize(
    ("maps", "exact"),
    [
        (product_design(), True),
        (product_design() + 0.5 * product_design()[::-1], False),
        (product_design(np.linspace(0.5, 2, 15)), False),
        (product_design()[:9], False),
    ],
    ids=["product design", "rank two", "sizes vary", "not a product"],
)
def test_13_product_designs_of_unit_maps_of_rank_one_alone_are_exact(maps, exact):
    problem = on_map(maps)
    statistics, fisher = problem.curvature()["layers_0"], problem.fisher("layers_0")
    off = error(three_products(statistics), fisher[:-2, :-2])
    assert off < EXACT if exact else off > INEXACT
    assert error(statistics.bias, fisher[-2:, -2:]) < EXACT


def three_factors(damping):
    """Random statistics, and the inverses that the block makes of them."""
    k, c, g = spd(0, MAP[0], 3), spd(1, MAP[1], 2), 7 * spd(2, 5, 4)
    block = doubly_factored.doubly_factored_block(*MAP, 5, True, jnp.float64)
    statistics = doubly_factored.BiasedDoublyFactors(*map(jnp.asarray, (k, c, g, g)))
    inverses = quick_jit(lambda s: block.invert(block.pack(s), damping))(statistics)
    return block, (k, c, g), inverses


@pytest.mark.parametrize("damping", [1e-3, 10.0])
def test_13_three_mode_inverse_is_the_dense_solve(damping):
    block, factors, inverses = three_factors(damping)
    kernel, bias = np.asarray(normal(3, 12, 5)), np.asarray(normal(4, 5))
    leaves = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    natural = quick_jit(block.precondition)(inverses, leaves)
    nu = [np.trace(m) / len(m) for m in factors]
    k, c, g = (
        m + v * (damping / np.prod(nu)) ** (1 / 3) * np.eye(len(m))
        for m, v in zip(factors, nu, strict=True)
    )
    expected = np.linalg.solve(np.kron(np.kron(k, c), g), kernel.ravel())
    assert error(np.ravel(natural["kernel"]), expected) < EXACT
    # The bias has one factor, which takes the whole damping.
    alone = np.linalg.solve(factors[2] + damping * np.eye(5), bias)
    assert error(natural["bias"], alone) < EXACT


@pytest.mark.parametrize("shape", [(9, 20), (20, 9)])
@pytest.mark.parametrize("sign", [1, -1])
def test_13_power_iteration_is_the_singular_value_decomposition(shape, sign):
    maps = sign * rectified(0, 6, *shape)
    kappa, psi = doubly_factored.rank_one(jnp.asarray(maps))
    for i, a in enumerate(maps):
        u, s, vt = np.linalg.svd(a)
        for half, vector in ((kappa[i], u[:, 0]), (psi[i], vt[0])):
            # The same for either sign of the pair.
            moment = s[0] * np.outer(vector, vector)
            assert error(np.outer(half, half), moment) < EXACT


def test_13_trace_is_never_overstated():
    maps = rectified(0, 7, *MAP)
    statistics = on_map(maps).curvature()["layers_0"]
    trace = np.trace(statistics.k) * np.trace(statistics.c)
    sigma = np.linalg.svd(maps, compute_uv=False)[:, 0]
    assert error(trace, np.mean(sigma) ** 2) < EXACT
    assert trace < np.mean(sigma**2) < np.mean(np.sum(maps**2, (1, 2)))


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("shape", [(5, 1), (1, 5)])
def test_13_a_map_of_vectors_is_the_ordinary_factor_where_sizes_are_equal(shape, equal):
    rows = unit_rows(0, 7, 5) * (3.0 if equal else np.linspace(0.5, 2, 7)[:, None])
    statistics = on_map(rows.reshape(7, *shape)).curvature()["layers_0"]
    sizes = np.linalg.norm(rows, axis=-1)
    vectors, number = (statistics.k, statistics.c)[:: 1 if shape[1] == 1 else -1]
    # E[a aᵀ / |a|] and E|a|
    assert error(vectors, np.einsum("n,ni,nj->ij", 1 / sizes, rows, rows) / 7) < EXACT
    assert error(number, np.full((1, 1), sizes.mean())) < EXACT
    ordinary = rows.T @ rows / 7
    apart = error(np.kron(statistics.k, statistics.c), ordinary)
    assert apart < EXACT if equal else apart > INEXACT


# ------------------------------------------------------------------ 14, 15: π and KL


@pytest.mark.parametrize("n", [2, 3, 5])
def test_14_amounts_multiply_to_the_damping(n):
    nu = jnp.exp(normal(3, n))
    amounts = linalg.pi_damping(0.3, *nu)
    assert error(np.prod(amounts), np.array(0.3)) < EXACT
    # π_i = (ν_i^{n−1} / Π_{j≠i} ν_j)^{1/n}; for n = 2 Martens & Grosse's π and 1 / π.
    for i, amount in enumerate(amounts):
        others = np.prod(np.delete(nu, i))
        expected = (nu[i] ** (n - 1) / others) ** (1 / n) * 0.3 ** (1 / n)
        assert error(amount, expected) < EXACT


def test_14_damped_inverse_ignores_how_a_scale_is_split_and_follows_the_loss():
    a, g, v, damping, c = spd(0, 5), spd(1, 4), normal(2, 5, 4), 0.3, 37.0
    expected = natural_of(a, g, damping, v)
    assert error(natural_of(c * a, g / c, damping, v), expected) < EXACT
    # The loss times c: curvature and gradient too, so λ → cλ gives the same step.
    assert error(c * natural_of(a, c * g, c * damping, v), expected) < EXACT


@pytest.mark.parametrize("factors", [2, 3])
def test_14_factored_damping_dominates_exact_damping(factors):
    damping = 0.3
    if factors == 2:
        exact = spd(0, 5, 3), spd(1, 4, 2)
        inverses = inverses_of(*exact, damping)[1]
    else:
        _, exact, (*inverses, _) = three_factors(damping)
    factored = functools.reduce(np.kron, map(np.linalg.inv, inverses))
    exact = functools.reduce(np.kron, exact)
    values = np.linalg.eigvalsh(factored - exact - damping * np.eye(len(exact)))
    assert values[0] > -EXACT * np.linalg.norm(exact)
    assert values[-1] > INEXACT


def test_14_large_damping_gives_the_gradient():
    problem = Problem(Linear((4, 3), (nn.tanh,)), normal(0, 7, 6), "categorical")
    damping = 1e22  # the difference falls like 1/√λ
    grads, _, natural = natural_step(problem, damping)
    for path, own in grads.items():
        for name, gradient in own.items():
            assert error(damping * natural[path][name], gradient) < EXACT


@functools.cache
def classifier():
    """A small net with softmax, and its first natural step at damping 0.01."""
    problem = Problem(Linear((4, 3), (nn.tanh,)), normal(0, 7, 6), "categorical")
    return problem, *natural_step(problem, 1e-2)


def flat(layer):
    return np.vstack([layer["kernel"], layer["bias"]]).ravel()


def squared_length(curvature, step, damping):
    """Δᵀ(F̂ + λ)Δ."""
    blocks = {
        path: np.kron(*oracles.damped_factors(s.a, s.g, damping))
        for path, s in curvature.items()
    }
    return sum(flat(step[path]) @ f @ flat(step[path]) for path, f in blocks.items())


@pytest.mark.parametrize(("c", "clipped"), [(1e-4, True), (1e4, False)])
def test_15_clipped_step_has_the_stated_length(c, clipped):
    problem, grads, curvature, natural = classifier()
    damping, eta = 1e-2, 0.3
    # Δᵀ(F̂ + damping)Δ = Δᵀ∇h
    length = squared_length(curvature, natural, damping)
    inner = sum(flat(natural[p]) @ flat(grads[p]) for p in grads)
    assert abs(length - inner) < EXACT * inner
    tx = optax.chain(
        lbopt.clip_by_kl(
            lbopt.scale_by_kfac(problem.layers(), damping=damping), c, eta
        ),
        optax.scale_by_learning_rate(eta),
    )
    update = quick_jit(lambda g, c: tx.update(g, tx.init(problem.params), curvature=c))
    step, _ = update(grads, curvature)
    applied = squared_length(curvature, step, damping)
    if clipped:
        assert abs(applied - c) < EXACT * c
    else:
        assert error(flat(step["dense0"]), -eta * flat(natural["dense0"])) < EXACT


def test_15_kl_divergence_is_half_the_squared_length_for_small_steps():
    problem, _, _, natural = classifier()
    eta, paths = 1e-4, list(problem.params)
    full = np.block([[problem.fisher(p, q) for q in paths] for p in paths])
    step = eta * np.concatenate([flat(natural[p]) for p in paths])
    after = jax.tree.map(lambda p, d: p - eta * d, problem.params, natural)
    log_p, log_q = (
        jax.nn.log_softmax(f)
        for f in (problem.predictions, problem.outputs(after, problem.x))
    )
    kl = jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))
    # The third-order term is O(η) relative.
    assert float(kl) == pytest.approx(0.5 * step @ full @ step, rel=20 * eta)


# ------------------------------------------------------------------ 16: invariance


class Affine:
    """``x ↦ x M + c`` on the last axis, hashable for use in a module."""

    def __init__(self, m, c):
        self.m, self.c = m, c

    def __call__(self, x):
        return x @ self.m + self.c.reshape(*[1] * (x.ndim - 1), -1)

    def inverse(self):
        m = np.linalg.inv(self.m)
        return Affine(m, -self.c @ m)


def identity_map(size):
    return Affine(np.eye(size), np.zeros(size))


def random_map(seed, size, shift=True):
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return Affine(rotation * np.linspace(0.5, 2.0, size), rng.normal(size=size) * shift)


def chain(*functions):
    def call(x):
        for f in functions:
            x = f(x)
        return x

    return call


def reparametrised(layer, before, after):
    """The layer L* with ``L(x) = after(L*(before⁻¹(x)))``: kernel ``[..., in, out]``.

    L sees ``before(x*)`` where L* sees x*, and ``after`` is applied to L*'s output.
    """
    undo = after.inverse()
    kernel, bias = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
    taps = tuple(range(kernel.ndim - 2))
    bias = before.c @ kernel.sum(taps) + bias - after.c
    kernel = np.einsum("ij,...jk,kl->...il", before.m, kernel, undo.m)
    return {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias @ undo.m)}


def trained(problem, transform, steps=3, eta=0.3):
    """The outputs after a few steps of the exact Fisher's natural gradient."""
    evaluate = problem.evaluate()

    @quick_jit
    def train(params):
        def step(carry, _):
            params, state = carry
            _, grads, curvature = evaluate(params, problem.x, problem.y)
            natural, state = transform.update(grads, state, params, curvature=curvature)
            params = jax.tree.map(lambda p, u: p - eta * u, params, natural)
            return (params, state), None

        carry = params, transform.init(params)
        (params, _), _ = jax.lax.scan(step, carry, length=steps)
        return problem.outputs(params, problem.x)

    return train(problem.params)


def pair(net, x, between, into, pre, post, distribution="normal"):
    """Two nets that are one function: inputs, pre-activations and activities of the
    second go through affine maps.  Its outputs do not, because the loss reads them."""
    first = Problem(net(between[0]), x, distribution)
    second = Problem(net(between[1]), into(x), distribution)
    low, high = sorted(first.params)
    end = identity_map(first.params[high]["bias"].size)
    second.params = {
        low: reparametrised(first.params[low], into.inverse(), pre),
        high: reparametrised(first.params[high], post.inverse(), end),
    }
    second.y = first.y
    return first, second


def mlp(between):
    return Linear((4, 2), (between,))


def mlp_pair():
    into, pre, post = (random_map(i, n) for i, n in enumerate((3, 4, 4)))
    between = nn.tanh, chain(pre, nn.tanh, post)
    return pair(mlp, normal(0, 24, 3), between, into, pre, post, "bernoulli")


def sigmoid_and_tanh():
    # sigmoid(s) = (tanh(s / 2) + 1) / 2: pre-activation s/2, activity 2σ − 1.
    pre = Affine(np.eye(4) / 2, np.zeros(4)).inverse()
    post = Affine(np.eye(4) / 2, np.full(4, 0.5)).inverse()
    maps = identity_map(3), pre, post
    return pair(mlp, normal(0, 24, 3), (nn.sigmoid, nn.tanh), *maps, "bernoulli")


def cnn_pair(padding, shift):
    def net(between):
        first, second = (conv(n, (2, 2), padding=padding) for n in (3, 2))
        return nn.Sequential((first, between, second))

    into, pre, post = (random_map(i, n, shift) for i, n in ((1, 2), (2, 3), (3, 3)))
    between = nn.tanh, chain(pre, nn.tanh, post)
    return pair(net, normal(0, 6, 5, 4, 2), between, into, pre, post)


SGD = None  # instead of a damping


@pytest.mark.parametrize(
    ("make", "damping", "least", "most"),
    [
        (mlp_pair, NO_DAMPING, 0, EXACT),
        (mlp_pair, 1e-2, 1e-3, np.inf),
        (mlp_pair, SGD, INEXACT, np.inf),
        (sigmoid_and_tanh, NO_DAMPING, 0, EXACT),
        (sigmoid_and_tanh, SGD, INEXACT, np.inf),
        (functools.partial(cnn_pair, "VALID", True), NO_DAMPING, 0, EXACT),
        (functools.partial(cnn_pair, "SAME", False), NO_DAMPING, 0, EXACT),
    ],
)
def test_16_invariance_to_affine_maps_holds_without_damping(make, damping, least, most):
    first, second = make()
    start = first.predictions
    assert error(second.predictions, start) < EXACT
    ends = []
    for problem in (first, second):
        tx = optax.with_extra_args_support(optax.identity())
        if damping is not SGD:
            tx = lbopt.scale_by_kfac(problem.layers(), damping=damping)
        ends.append(trained(problem, tx))
    assert error(ends[0], start) > INEXACT  # training moved it
    assert least <= error(ends[1], ends[0]) < most


def test_16_control_zero_padding_is_not_shifted():
    # The padding is 0, not the shift: the two nets are not the same function at all.
    first, second = cnn_pair("SAME", True)
    assert error(second.predictions, first.predictions) > INEXACT


# ------------------------------------------------------------------ 17: quadratic model


def quadratic_model_step(problem, tx):
    """A step of the whole batch, from the loss alone."""

    @quick_jit
    def step(params, state):
        batch = problem.x, problem.y
        loss, grads = jax.value_and_grad(problem.loss)(params, *batch)
        updates, state = tx.update(
            grads,
            state,
            params,
            value=loss,
            value_fn=lambda p: problem.loss(p, *batch),
            fisher_products=lambda vectors: fisher_products(
                problem.loss, params, vectors, *batch
            ),
        )
        return grads, updates, state

    return step


def times(p):
    """A fixed preconditioner of all parameters together."""

    def update(updates, params):
        del params
        vector, unravel = ravel_pytree(updates)
        return unravel(jnp.asarray(p) @ vector)

    return optax.stateless(update)


def whole_jacobian(problem):
    """Of all parameters, in the order of ``ravel_pytree``: ``[n, events, p]``."""
    n = len(problem.x)
    leaves = jax.tree.leaves(problem.jacobians)
    events = problem.predictions.size // n
    return np.concatenate([x.reshape(n, events, -1) for x in leaves], -1)


def whole(tree):
    return np.asarray(ravel_pytree(tree)[0])


def conjugate_gradients(a, b, p, x):
    """The points of the preconditioned method for ``a x = b``, one a dimension."""
    points, r = [], b - a @ x
    d = p @ r
    for _ in b:
        alpha = (r @ p @ r) / (d @ a @ d)
        x, r_last, r = x + alpha * d, r, r - alpha * a @ d
        d = p @ r + (r @ p @ r) / (r_last @ p @ r_last) * d
        points.append(x)
    return np.asarray(points)


def regression_errors(damping, momentum=True):
    """How far all steps are from conjugate gradients', and the last from the end."""
    problem, decay = Problem(Linear((2,)), normal(0, 9, 3)), 0.2
    p = spd(4, 8)
    tx = scale_by_quadratic_model(
        times(p),
        damping=damping,
        damping_period=100,  # λ stays
        weight_decay=decay,
        momentum=momentum,
    )
    step = quadratic_model_step(problem, tx)
    jac = whole_jacobian(problem).reshape(-1, 8)  # the outputs are linear in θ
    a = jac.T @ jac / len(problem.x) + decay * np.eye(8)
    b = jac.T @ np.ravel(problem.y) / len(problem.x)
    params, state, points = problem.params, tx.init(problem.params), []
    for _ in range(8):
        _, updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        points.append(whole(params))
    expected = conjugate_gradients(a, b, p, whole(problem.params))
    return error(points, expected), error(points[-1], np.linalg.solve(a, b))


def test_17_steps_on_a_quadratic_are_preconditioned_conjugate_gradients():
    assert max(regression_errors(1e-14)) < EXACT


def test_17_control_without_momentum_or_with_damping_they_are_not():
    assert min(regression_errors(1e-14, momentum=False)) > 1e-3
    assert min(regression_errors(0.3)) > 1e-3


def test_17_predicted_change_is_half_the_slope_along_the_step():
    problem = Problem(Linear((4, 3), (nn.tanh,)), normal(0, 7, 6), "categorical")
    damping, decay = 0.5, 1e-2
    tx = scale_by_quadratic_model(
        optax.identity(), damping=damping, weight_decay=decay, damping_period=1
    )
    step = quadratic_model_step(problem, tx)
    start = problem.params
    _, last, state = step(start, tx.init(start))
    problem.params = optax.apply_updates(start, last)
    state = state._replace(damping=jnp.asarray(damping))
    grads, updates, state = step(problem.params, state)
    # The model with the dense Fisher matrix, whose minimum among all combinations of
    # the two directions the step is.
    c = oracles.exact_fisher(
        whole_jacobian(problem), problem.predictions, problem.distribution
    ) + (damping + decay) * np.eye(len(whole(start)))
    g = whole(grads) + decay * whole(problem.params)
    model = lambda d: g @ d + d @ c @ d / 2
    d = whole(updates)
    assert error(state.predicted, model(d)) < EXACT
    assert error(state.predicted, g @ d / 2) < EXACT
    assert np.all(np.abs(np.asarray(state.lengths)) > INEXACT)
    for direction in (g, whole(last)):
        slope = abs(direction @ (g + c @ d))
        assert slope < EXACT * np.linalg.norm(direction) * np.linalg.norm(g)
        assert model(d) < min(model(1.01 * d), model(d + 0.01 * direction))
    # ρ compares it with what the loss and its penalty did.
    h = lambda p: (
        problem.loss(p, problem.x, problem.y)
        + decay / 2 * optax.tree.norm(p, squared=True)
    )
    after = optax.apply_updates(problem.params, updates)
    assert error(state.ratio, (h(after) - h(problem.params)) / model(d)) < EXACT


# ------------------------------------------------------------------ 18: EKFAC


def corrected(problem):
    """Of each layer: F, A ⊗ G, the product's eigenbasis U, and s."""
    layers, plain = problem.layers(), problem.curvature()
    due = {
        path: eigen_moments.CorrectedDue(
            True, True, True, *(jnp.asarray(np.linalg.eigh(m)[1]) for m in moments)
        )
        for path, moments in plain.items()
    }
    evaluate = lbopt.value_grad_and_curvature(problem.loss, layers, fisher="exact")
    found = quick_jit(lambda p, x, y: evaluate(p, x, y, due=due))(
        problem.params, problem.x, problem.y
    )[2]
    return {
        path: (
            problem.fisher(path),
            product(plain[path]),
            np.kron(due[path].a_basis, due[path].g_basis),
            np.ravel(found[path].s),
        )
        for path in plain
    }


@pytest.mark.parametrize("distribution", ["normal", "categorical"])
def test_18_corrected_eigenvalues_are_nearer_to_the_fisher(distribution):
    model = Linear((4, 3, 3), (jnp.tanh, jnp.tanh))
    problem = Problem(model, normal(0, 9, 5), distribution)
    for f, kron, u, s in corrected(problem).values():
        distance = np.linalg.norm(f - u @ np.diag(s) @ u.T)
        # Strictly, except where the product itself is exact.
        exact = np.linalg.norm(f - kron) < EXACT * np.linalg.norm(f)
        assert exact or distance < (1 - INEXACT) * np.linalg.norm(f - kron)
        # No other diagonal in this basis is as near.
        assert error(s, np.diag(u.T @ f @ u)) < EXACT
        for other in s + 1e-3 * s.max() * np.eye(len(s)):
            assert np.linalg.norm(f - u @ np.diag(other) @ u.T) > distance


@pytest.mark.parametrize("distribution", ["normal", "categorical", "bernoulli"])
def test_18_one_datum_is_exact(distribution):
    model = Linear((4, 3), (jnp.tanh,))
    for f, _, u, s in corrected(Problem(model, normal(0, 1, 5), distribution)).values():
        assert error(u @ np.diag(s) @ u.T, f) < EXACT


# ------------------------------------------------------------------ 19: averages


@pytest.mark.parametrize("factor_decay", [0.0, 0.5, 0.95])
def test_19_running_average_of_a_constant_returns_it(factor_decay):
    problem, grads, curvature, _ = classifier()
    layers = problem.layers()
    tx = lbopt.scale_by_kfac(layers, factor_decay=factor_decay)
    state, update = tx.init(problem.params), quick_jit(tx.update)
    constant = {p: layers[p].block.pack(s) for p, s in curvature.items()}
    for _ in range(4):
        _, state = update(grads, state, curvature=curvature)
        assert_close(state.factors, constant, rtol=EXACT, atol=0)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("shards", [2, 4])
def test_19_equal_shards_average_to_the_whole_batch(shards, sharing):
    parts = (conv(3), nn.tanh, dense(2))
    problem = Problem(nn.Sequential(parts), normal(0, 8, 4, 5, 2))
    # Labels drawn from the model once, the same for the shards and for the whole.
    drawn = problem.outputs(problem.params, problem.x) + normal(9, 8, 4, 5, 2)
    evaluate = quick_jit(problem.evaluate("empirical", sharing))
    _, grads, whole = evaluate(problem.params, problem.x, drawn)
    cut = zip(jnp.split(problem.x, shards), jnp.split(drawn, shards), strict=True)
    found = [evaluate(problem.params, x, y)[1:] for x, y in cut]
    average = jax.tree.map(lambda *trees: sum(trees) / shards, *found)
    for part, expected in zip(average, (grads, whole), strict=True):
        for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(expected), strict=True):
            assert error(a, b) < EXACT
