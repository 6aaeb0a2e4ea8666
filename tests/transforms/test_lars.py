"""The layer-wise trust ratio: golden numbers, invariances, optax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt.transforms.lars import scale_by_lars
from tests.problems import Mlp, assert_close

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


def test_small_weights_count_as_large_as_the_least_root_mean_square(network):
    params, (grads, *_) = network
    params = {**params, "first": {**params["first"], "bias": jnp.zeros(5)}}
    tx = scale_by_lars(weight_decay=0.0, trust_coefficient=0.02, least_rms=0.3)
    updates, _ = tx.update(grads, tx.init(params), params)
    roots = [np.sqrt(x.size) for x in jax.tree.leaves(params)]
    floor = 0.3 * np.asarray(roots)
    assert np.any(norms(params) > floor)
    assert np.any(norms(params) < floor)
    expected = 0.02 * np.maximum(norms(params), floor)
    np.testing.assert_allclose(norms(updates), expected, rtol=1e-6)
    # With a decay, the denominator has the weights' own norm.
    tx = scale_by_lars(weight_decay=0.1, trust_coefficient=0.02, least_rms=0.3)
    _, state = tx.update(grads, tx.init(params), params)
    ratio = expected / (norms(grads) + 0.1 * norms(params))
    found = np.asarray(jax.tree.leaves(state.trust_ratio))
    np.testing.assert_allclose(found, ratio, rtol=1e-6)


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


# ----------------------------------------------------------------------------- errors


def test_the_parameters_are_needed(network):
    params, (grads, *_) = network
    tx = scale_by_lars()
    with pytest.raises(ValueError, match=r"scale_by_lars.update needs params, whose"):
        tx.update(grads, tx.init(params))


def test_an_expression_that_matches_nothing(network):
    tx = lbopt.lars(0.1, skip="norm")
    with pytest.raises(ValueError, match=r"skip='norm' is found in no path of"):
        tx.init(network[0])


def test_nothing_to_skip_for_mlperf():
    tx = lbopt.lars(0.1, variant="mlperf")
    with pytest.raises(ValueError, match=r"is found in no path of the parameters \(ke"):
        tx.init({"kernel": jnp.ones(3)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_decay": -1e-4}, r"weight_decay=-0.0001 must be 0 or positive; 0 for"),
        ({"trust_coefficient": -1e-3}, r"trust_coefficient=-0.001 must be positive; 1"),
        ({"trust_coefficient": 0.0}, r"trust_coefficient=0.0 must be positive"),
        ({"least_rms": -0.1}, r"least_rms=-0.1 must be 0 or positive; 0 for the paper"),
        ({"clip": 0.0}, r"clip=0.0 must be positive; pass the learning rate or"),
        ({"skip": "["}, r"skip='\[' must be a regular expression"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        scale_by_lars(**change)
