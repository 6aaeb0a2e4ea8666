"""The layer-wise trust ratio: golden numbers, invariances, optax, stacks."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt.transforms.lars import scale_by_lars
from tests.problems import Mlp, assert_close, assert_equal, classify

# lars.md section 6; the paper's own settings.
RATES = (10.0, 8.0)
GOLDEN = {
    "paper": (
        {
            "k": [2.9999625468164792, 3.950012484394507, 0, 0],
            "b": [0.29500049987503124, 0.39999900024993756],
        },
        {
            "k": [2.971877505713295, 3.9049684017681523, 0, -0.02800931978286056],
            "b": [0.2904997773864723, 0.39602236132598634],
        },
    ),
    "mlperf": (
        {
            "k": [2.9999625468164792, 3.950012484394507, 0, 0],
            "b": [-9.7, 0.4],
        },
        {
            "k": [2.971877505713295, 3.9049684017681523, 0, -0.02800931978286056],
            "b": [-18.7, -3.6],
        },
    ),
    "optax": (
        {
            "k": [2.9999625374730527, 3.950000014034411, 0, 0],
            "b": [0.29500000009997, 0.3999990001499975],
        },
        {
            "k": [2.971849446487514, 3.9049446529596508, 0, -0.02803731925757444],
            "b": [0.29049882770289887, 0.39602197812429735],
        },
    ),
}


def golden_problem():
    params = {"k": jnp.asarray([[3.0, 4], [0, 0]]), "b": jnp.asarray([0.3, 0.4])}
    grads = [
        {"k": jnp.asarray([[0.0, 2], [0, 0]]), "b": jnp.asarray([1.0, 0])},
        {"k": jnp.asarray([[1.0, 0], [0, 1]]), "b": jnp.asarray([0, 0.5])},
    ]
    return params, grads


def trajectory(tx, params, grads):
    """The parameters after each step, with the gradients that are given."""
    state, rows = tx.init(params), []
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        rows.append(params)
    return rows


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("variant", GOLDEN)
def test_golden_numbers(variant, x64):
    with jax.enable_x64(x64):
        params, grads = golden_problem()
        skip = "^b$" if variant == "mlperf" else None
        tx = lbopt.lars(lambda k: jnp.asarray(RATES)[k], variant=variant, skip=skip)
        for found, expected in zip(
            trajectory(tx, params, grads), GOLDEN[variant], strict=True
        ):
            for name, values in expected.items():
                tolerance = 1e-12 if x64 else 1e-6
                np.testing.assert_allclose(
                    found[name].ravel(), values, rtol=tolerance, atol=tolerance / 100
                )


# ------------------------------------------------------------------------ a network


@pytest.fixture(scope="module")
def network():
    """Parameters of two layers and five gradients of each."""
    params = Mlp().init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    params["first"]["bias"] = jnp.linspace(-0.1, 0.2, 5)
    draws = [
        jax.tree.map(
            lambda w, k=k: jax.random.normal(jax.random.key(k), w.shape), params
        )
        for k in range(5)
    ]
    return params, draws


def norms(tree):
    return np.asarray([float(jnp.linalg.norm(x)) for x in jax.tree.leaves(tree)])


def test_without_decay_a_step_has_the_length_of_the_weights(network):
    params, (grads, *_) = network
    tx = scale_by_lars(weight_decay=0.0, trust_coefficient=0.02)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(norms(updates), 0.02 * norms(params), rtol=1e-6)
    stretched = jax.tree.map(lambda g: 1e3 * g, grads)
    again, _ = tx.update(stretched, tx.init(params), params)
    assert_close(again, updates, rtol=1e-5)


def test_with_decay_a_step_is_shorter_but_for_optax(network):
    params, draws = network
    for grads in draws:
        ours = scale_by_lars(weight_decay=0.1, trust_coefficient=0.02)
        updates, _ = ours.update(grads, ours.init(params), params)
        assert np.all(norms(updates) < 0.02 * norms(params) * (1 - 1e-4))
        optax_s = lbopt.lars(
            1.0, weight_decay=0.1, trust_coefficient=0.02, momentum=0, variant="optax"
        )
        updates, _ = optax_s.update(grads, optax_s.init(params), params)
        np.testing.assert_allclose(norms(updates), 0.02 * norms(params), rtol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("skip", [None, r"bias$"])
def test_the_variant_of_optax_is_optax_bit_for_bit(network, skip, nesterov):
    params, draws = network
    rate = optax.linear_schedule(3.0, 0.1, 5)
    ours = lbopt.lars(rate, variant="optax", eps=1e-9, skip=skip, nesterov=nesterov)
    mask = {
        "first": {"kernel": True, "bias": skip is None},
        "last": {"kernel": True},
    }
    theirs = optax.lars(
        rate,
        weight_decay=5e-4,
        weight_decay_mask=mask,
        trust_coefficient=1e-3,
        eps=1e-9,
        trust_ratio_mask=mask,
        momentum=0.9,
        nesterov=nesterov,
    )
    assert_equal(trajectory(ours, *network), trajectory(theirs, params, draws))


@pytest.mark.parametrize("zero", ["weights", "gradient", "both"])
def test_zero_norms_give_plain_steps(network, zero):
    params, (grads, *_) = network
    if zero in ("weights", "both"):
        params = jax.tree.map(jnp.zeros_like, params)
    if zero in ("gradient", "both"):
        grads = jax.tree.map(jnp.zeros_like, grads)
    tx = scale_by_lars(weight_decay=0.1)
    updates, state = tx.update(grads, tx.init(params), params)
    assert_close(updates, jax.tree.map(lambda g, w: g + 0.1 * w, grads, params))
    assert all(x == 1 for x in jax.tree.leaves(state.trust_ratio))


def test_where_everything_is_skipped_it_is_momentum(network):
    params, draws = network
    rate = optax.linear_schedule(0.3, 0.1, 5)
    ours = lbopt.lars(rate, momentum=0.8, skip=".")
    # The rate within the velocity, as in Caffe.
    momentum = optax.chain(optax.scale_by_learning_rate(rate), optax.trace(0.8))
    expected = trajectory(momentum, params, draws)
    assert_close(trajectory(ours, params, draws), expected)
    constant = trajectory(lbopt.lars(0.3, momentum=0.8, skip="."), params, draws)
    assert_close(constant, trajectory(optax.sgd(0.3, momentum=0.8), params, draws))


def test_inside_and_outside_momentum_part_when_the_rate_decays(network):
    params, draws = network
    # Weights and gradients of constant norms: λ does not change.
    grads = [jax.tree.map(lambda g, s=s: s * g, draws[0]) for s in (1, -1, 1, 1, -1)]

    def updates(rate, scaled):
        tx = lbopt.lars(rate, scaled_momentum=scaled)
        state, rows = tx.init(params), []
        for g in grads:
            u, state = tx.update(g, state, params)
            rows.append(u)
        return rows

    # g + βw is not ±g, but λ is the same: the norms are.
    assert_close(updates(2.0, False), updates(2.0, True), rtol=1e-4)
    decay = optax.linear_schedule(2.0, 0.5, 4)
    inside, outside = updates(decay, False), updates(decay, True)
    assert_close(inside[0], outside[0])
    assert np.all(np.abs(norms(inside[-1]) / norms(outside[-1]) - 1) > 0.05)


def test_scaled_momentum_is_its_equation(network):
    params, draws = network
    w, v = params, jax.tree.map(jnp.zeros_like, params)
    rate = optax.linear_schedule(2.0, 0.5, 4)
    found = trajectory(lbopt.lars(rate, scaled_momentum=True), params, draws)
    for k, g in enumerate(draws):
        v = jax.tree.map(lambda v, g, w: 0.9 * v + g + 5e-4 * w, v, g, w)
        scale = jax.tree.map(
            lambda g, w: (
                1e-3
                * jnp.linalg.norm(w)
                / (jnp.linalg.norm(g) + 5e-4 * jnp.linalg.norm(w))
            ),
            g,
            w,
        )
        w = jax.tree.map(lambda w, s, v, k=k: w - rate(k) * s * v, w, scale, v)
        assert_close(found[k], w)


def test_larc_s_clip_is_the_smaller_of_both_rates(network):
    params, (grads, *_) = network
    free = scale_by_lars(trust_coefficient=0.02)
    _, state = free.update(grads, free.init(params), params)
    ratios = state.trust_ratio
    gamma = float(np.median(jax.tree.leaves(ratios)))
    for clip in (gamma, optax.constant_schedule(gamma)):
        tx = scale_by_lars(trust_coefficient=0.02, clip=clip)
        _, clipped = tx.update(grads, tx.init(params), params)
        rates = jax.tree.map(lambda r: gamma * r, clipped.trust_ratio)
        assert_close(rates, jax.tree.map(lambda r: min(float(r), gamma), ratios))
    larc = lbopt.lars(gamma, trust_coefficient=0.02, clip=True, momentum=0.0)
    updates, _ = larc.update(grads, larc.init(params), params)
    expected = jax.tree.map(
        lambda g, w, r: -min(float(r), gamma) * (g + 5e-4 * w), grads, params, ratios
    )
    assert_close(updates, expected)


def test_larc_with_a_rate_of_zero_does_not_move(network):
    params, (grads, *_) = network
    larc = lbopt.lars(optax.constant_schedule(0.0), clip=True)
    updates, _ = larc.update(grads, larc.init(params), params)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))


def test_mlperf_leaves_biases_and_scales_alone():
    model = nn.Sequential([nn.Dense(3), nn.LayerNorm()])
    params = model.init(jax.random.key(0), jnp.ones((2, 4)))["params"]
    params = jax.tree.map(lambda w: w + 0.5, params)
    grads = jax.tree.map(jnp.ones_like, params)
    tx = lbopt.lars(2.0, variant="mlperf", momentum=0.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    for path, u in jax.tree_util.tree_leaves_with_path(updates):
        plain = bool(np.all(u == -2.0))
        assert plain == (path[-1].key in ("bias", "scale")), path


# ---------------------------------------------------------------------- stacked layers


class Stack(nn.Module):
    """Three dense layers under ``nn.scan`` and one of its own."""

    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = body(name="blocks")(x, None)
        return nn.Dense(2, name="head")(x)


class Step(nn.Module):
    """A dense layer as the body of a scan."""

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(4)(x)), None


def test_each_copy_of_a_scanned_layer_has_its_own_ratio():
    params = Stack().init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    scale = jnp.asarray([1.0, 10.0, 0.1])
    params["blocks"]["Dense_0"]["kernel"] *= scale[:, None, None]
    grads = jax.tree.map(
        lambda w: jnp.cos(jnp.arange(1.0 + w.size)[1:]).reshape(w.shape), params
    )
    tx = scale_by_lars(stacked="^blocks/")
    state = tx.init(params)
    updates, after = tx.update(grads, state, params)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    plain = scale_by_lars()
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], (grads["blocks"], params["blocks"]))
        expected, alone = plain.update(one[0], plain.init(one[1]), one[1])
        assert_close(jax.tree.map(lambda u, i=i: u[i], updates["blocks"]), expected)
        ratio = after.trust_ratio["blocks"]["Dense_0"]["kernel"][i]
        assert_close(ratio, alone.trust_ratio["Dense_0"]["kernel"])
    whole, _ = plain.update(grads, plain.init(params), params)
    assert_close(updates["head"], whole["head"])
    kernels = (u["blocks"]["Dense_0"]["kernel"] for u in (updates, whole))
    assert np.abs(np.divide(*kernels) - 1).max() > 0.5


# ---------------------------------------------------------------------------- numbers


def test_norms_of_half_precision_are_taken_in_float32():
    # In float16 the square of the norm would overflow.
    params = {"w": jnp.full(4096, 8.0, jnp.float16)}
    grads = {"w": jnp.full(4096, 16.0, jnp.float16)}
    tx = scale_by_lars(weight_decay=0.0, trust_coefficient=0.5)
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates["w"].dtype == jnp.float16
    assert state.trust_ratio["w"].dtype == jnp.float32
    np.testing.assert_array_equal(updates["w"], 4.0)


def test_after_kfac_it_is_the_natural_gradient_that_is_scaled():
    problem = classify(Mlp())
    layers = problem.trace()
    core = lbopt.scale_by_kfac(layers, damping=1e-2)
    tx = optax.chain(core, lbopt.lars(1.0, weight_decay=0.0, trust_coefficient=0.02))
    _, grads, curvature = problem.evaluate(layers)
    params, state = problem.params, tx.init(problem.params)
    updates, state = tx.update(grads, state, params, curvature=curvature)
    natural, _ = core.update(grads, core.init(params), curvature=curvature)
    for u, z, w in zip(*map(jax.tree.leaves, (updates, natural, params)), strict=True):
        length = 0.02 * jnp.linalg.norm(w) if jnp.any(w) else jnp.linalg.norm(z)
        np.testing.assert_allclose(u, -z * length / jnp.linalg.norm(z), rtol=1e-4)


# ----------------------------------------------------------------------------- errors


def test_the_parameters_are_needed(network):
    params, (grads, *_) = network
    tx = scale_by_lars()
    with pytest.raises(ValueError, match=r"scale_by_lars.update needs params, whose"):
        tx.update(grads, tx.init(params))


@pytest.mark.parametrize("argument", ["skip", "stacked"])
def test_an_expression_that_matches_nothing(network, argument):
    tx = lbopt.lars(0.1, **{argument: "norm"})
    with pytest.raises(ValueError, match=rf"{argument}='norm' is found in no path of"):
        tx.init(network[0])


def test_nothing_to_skip_for_mlperf():
    tx = lbopt.lars(0.1, variant="mlperf")
    with pytest.raises(ValueError, match=r"is found in no path of the parameters \(ke"):
        tx.init({"kernel": jnp.ones(3)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_decay": -1e-4}, r"weight_decay=-0.0001 must not be negative; 0 for"),
        ({"eps": -1e-9}, r"eps=-1e-09 must not be negative"),
        ({"trust_coefficient": -1e-3}, r"trust_coefficient=-0.001 must be positive; 1"),
        ({"trust_coefficient": 0.0}, r"trust_coefficient=0.0 must be positive"),
        ({"clip": 0.0}, r"clip=0.0 must be the positive learning rate, a schedule"),
        ({"skip": "["}, r"skip='\[' must be a regular expression"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        scale_by_lars(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "larc"}, r"variant='larc' must be 'paper', 'mlperf' or 'optax'"),
        ({"momentum": 1.0}, r"momentum=1.0 must lie in \[0, 1\); 0 for none"),
        ({"learning_rate": -1.0}, r"learning_rate=-1.0 must not be negative; it is"),
        ({"variant": "optax", "weight_decay": -1.0}, r"weight_decay=-1.0 must not be"),
        (
            {"variant": "optax", "stacked": "^blocks"},
            r"variant='optax' is optax.lars, which has no scaled_momentum, clip or st",
        ),
    ],
)
def test_settings_of_the_ready_optimizer(change, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(lbopt.lars)(**({"learning_rate": 1.0} | change))
