"""A step's scalars against plain JAX, the layer that is named, and reports by path."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import lbopt
from lbopt import health, sharding, training
from tests.devices import AXIS, mesh_of, spread
from tests.problems import BATCH, assert_close, cross_entropy, inputs, labels

RNG = jax.random.key(5)
# Where a number that is not finite appears; the order of the calls is not alphabetical.
NOWHERE, INPUT, NORM, MIDDLE, LAST, LOSS, BACKWARD, SQUARE = range(8)


def spoiled(x, at, place):
    return jnp.where(jnp.any(at == place), jnp.nan, x)


class Net(nn.Module):
    """Four layers, before each of which a number may be spoiled."""

    @nn.compact
    def __call__(self, x, at):
        x = nn.tanh(nn.Dense(5, name="zero")(spoiled(x, at, INPUT)))
        x = nn.LayerNorm(name="norm")(spoiled(x, at, NORM))
        x = nn.tanh(nn.Dense(4, name="middle")(spoiled(x, at, MIDDLE)))
        # Finite, with a derivative ∞ · 0.
        root = jnp.sqrt(1 + 0 * x - (1 + 0 * x) * jnp.any(at == BACKWARD))
        x = x + root - jax.lax.stop_gradient(root)
        return nn.Dense(3, name="a_last")(spoiled(x, at, LAST))


def loss_fn(params, model_state, batch, rng):
    del rng
    logits = Net().apply({"params": params}, batch["x"], batch["at"])
    loss = cross_entropy(logits, batch["y"])
    loss = spoiled(loss, batch["at"], LOSS)
    return jnp.where(jnp.any(batch["at"] == SQUARE), 1e30, 1.0) * loss, (
        model_state,
        {},
    )


def batch_at(place=NOWHERE, example=0, seed=0):
    at = jnp.full(BATCH, NOWHERE).at[example].set(place)
    return {"x": inputs(seed), "y": labels(), "at": at}


PARAMS = Net().init(jax.random.key(1), inputs(), jnp.zeros(BATCH))["params"]
LAYERS = lbopt.trace_layers(loss_fn, PARAMS, {}, batch_at(), RNG, has_aux=True)
RATE, DAMPING, BOUND = 0.1, 1e-2, 1e-3


def rate(step):
    return RATE / (1.0 + step)


@pytest.fixture(scope="module")
def one_device():
    """A step whose state holds the rate, the damping and the scale of its clip."""
    make = optax.inject_hyperparams(lbopt.kfac, static_args=("layers", "kl_clip"))
    tx = make(rate, LAYERS, damping=DAMPING, kl_clip=BOUND)
    return tx, training.make_train_step(loss_fn, tx, LAYERS)


def test_scalars_equal_those_by_hand(one_device):
    tx, train_step = one_device
    state = training.init_state(tx, PARAMS, {}, RNG)
    state, first = train_step(state, batch_at())
    params = jax.tree.map(jnp.copy, state.params)
    state, second = train_step(state, batch_at(seed=1))
    gradient = jax.jit(lambda p, b: jax.grad(lambda p: loss_fn(p, {}, b, RNG)[0])(p))
    for of_step, p, seed, step in ((first, PARAMS, 0, 0), (second, params, 1, 1)):
        norm = optax.tree.norm(gradient(p, batch_at(seed=seed)))
        np.testing.assert_allclose(of_step["grad_norm"], norm, rtol=1e-5)
        np.testing.assert_allclose(of_step["learning_rate"], rate(step), rtol=1e-6)
        assert of_step["damping"] == jnp.float32(DAMPING)
        assert of_step["first_not_finite"] == -1
        assert health.path_of(of_step["first_not_finite"], LAYERS) is None
    # √(c / η² Δᵀg), and the length of the step after it is c.
    tx = lbopt.scale_by_kfac(LAYERS, damping=DAMPING)
    evaluate = lbopt.value_grad_and_curvature(loss_fn, LAYERS, has_aux=True)

    @jax.jit
    def product(params, batch):
        _, grads, curvature = evaluate(params, {}, batch, RNG)
        natural, _ = tx.update(grads, tx.init(params), curvature=curvature)
        return optax.tree.vdot(natural, grads)

    scale = np.sqrt(BOUND / (RATE**2 * product(PARAMS, batch_at())))
    assert scale < 1
    np.testing.assert_allclose(first["kl_scale"], scale, rtol=1e-4)


PLACES = {
    INPUT: "zero",
    NORM: "middle",  # a norm layer has no statistic of its inputs, the next layer has
    MIDDLE: "middle",
    LAST: "a_last",
    LOSS: None,  # a constant, whose gradient is zero
    BACKWARD: "zero",  # all inputs are finite, the gradients of three layers are not
    SQUARE: "zero",
}


@pytest.mark.parametrize("place", PLACES)
def test_the_first_layer_that_is_not_finite_is_named(one_device, place):
    tx, train_step = one_device
    state = training.init_state(tx, PARAMS, {}, RNG)
    state, metrics = train_step(state, batch_at(place))
    assert metrics["skipped"] == 1
    assert health.path_of(metrics["first_not_finite"], LAYERS) == PLACES[place]
    state, metrics = train_step(state, batch_at())
    assert metrics["first_not_finite"] == -1


def test_a_statistic_that_is_rejected_in_a_sound_step_is_named():
    # Two examples that pull in opposite directions: the gradient is zero, the square
    # of each signal overflows.
    def steep(params, model_state, batch, rng):
        del rng
        h = nn.Dense(5).apply({"params": params["zero"]}, batch["x"])
        out = nn.Dense(3).apply({"params": params["a_last"]}, nn.tanh(h))
        h = jnp.sum(h, -1) * batch["pull"]
        return jnp.mean(h + jnp.sum(out, -1)), (model_state, {})

    own = {
        "zero": PARAMS["zero"],
        "a_last": nn.Dense(3).init(RNG, jnp.ones(5))["params"],
    }
    batch = {"x": jnp.ones((2, 4)), "pull": jnp.asarray([1e22, -1e22])}
    layers = lbopt.trace_layers(steep, own, {}, batch, RNG, has_aux=True, batch_size=2)
    tx = lbopt.kfac(1e-3, layers)
    state = training.init_state(tx, own, {}, RNG)
    state, metrics = training.make_train_step(steep, tx, layers)(state, batch)
    assert metrics["skipped"] == 0
    assert health.path_of(metrics["first_not_finite"], layers) == "zero"
    report = lbopt.layer_report(state, layers)
    assert {path: row.rejected for path, row in report.items()} == {
        "zero": 1,
        "a_last": 0,
    }


def test_on_a_mesh_all_devices_name_the_same_layer():
    mesh = mesh_of(2)
    # The middle layer runs in the loss of both devices, but only one has the NaN.
    tx = lbopt.kfac(RATE, LAYERS, damping=DAMPING, **spread(2))
    train_step = training.make_train_step(loss_fn, tx, LAYERS, mesh)
    state = training.init_state(tx, PARAMS, {}, RNG, mesh)
    state, metrics = train_step(state, batch_at(MIDDLE, example=BATCH - 1))
    assert health.path_of(metrics["first_not_finite"], LAYERS) == "middle"
    _, metrics = train_step(state, batch_at())
    assert metrics["first_not_finite"] == -1
    halves = [
        jax.tree.map(
            lambda x, i=i: x[i * BATCH // 2 : (i + 1) * BATCH // 2], batch_at()
        )
        for i in (0, 1)
    ]
    gradient = jax.jit(jax.grad(lambda p, b: loss_fn(p, {}, b, RNG)[0]))
    grads = [gradient(PARAMS, half) for half in halves]
    squares = [optax.tree.norm(g, squared=True) for g in grads]
    np.testing.assert_allclose(
        metrics["device_grad_norm"], np.sqrt(np.mean(squares)), rtol=1e-5
    )
    tx = optax.sgd(RATE)
    state = training.init_state(tx, PARAMS, {}, RNG, mesh)
    _, metrics = training.make_train_step(loss_fn, tx, mesh=mesh)(state, batch_at())
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(mean), rtol=1e-5)
    assert sorted(metrics) == ["grad_norm", "loss", "skipped"]


def test_path_of_refuses_another_table():
    with pytest.raises(ValueError, match=r"index=4 must lie in \[-1, 4\)"):
        health.path_of(4, LAYERS)


# ------------------------------------------------------------------------- reports


class Many(nn.Module):
    """A layer of every kind of factor, in an order that is not alphabetical."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2, 2), feature_group_count=2, name="z_conv")(x)
        x = nn.GroupNorm(2, name="y_norm")(x)
        x = x.reshape(len(x), -1) * self.param("own", nn.initializers.ones, (1, 16))
        cell = nn.scan(
            Cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = cell(name="stack")(nn.Dense(4, name="wide")(x), None)
        x = nn.RMSNorm(name="b_norm")(x)
        return nn.Embed(3, 4, name="a_embed").attend(x) + nn.Dense(3, name="d")(x)


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(4, name="cell")(x)), None


def many_loss(params, x, y):
    return cross_entropy(Many().apply({"params": params}, x), y)


X = jax.random.normal(jax.random.key(3), (BATCH, 2, 2, 4))
MANY = Many().init(jax.random.key(1), X)["params"]
MANY_LAYERS = lbopt.trace_layers(
    many_loss, MANY, X, labels(), doubly_factored={"wide": (4, 4)}
)


@pytest.fixture(scope="module")
def evaluated():
    f = lbopt.value_grad_and_curvature(many_loss, MANY_LAYERS)
    return jax.jit(f)(MANY, X, labels())


def after_one_update(evaluated, devices=None, **options):
    """The state after the same gradients and statistics on each device."""
    _, grads, curvature = evaluated
    tx = lbopt.scale_by_kfac(MANY_LAYERS, **options, **spread(devices))

    def update(state, grads, curvature):
        return tx.update(grads, state, curvature=curvature)[1]

    state = tx.init(MANY)
    if devices:
        specs = sharding.specs(state, AXIS)
        update = jax.shard_map(
            update,
            mesh=mesh_of(devices),
            in_specs=(specs, PartitionSpec(), PartitionSpec()),
            out_specs=specs,
            check_vma=False,
        )
    return jax.jit(update)(state, grads, curvature)


@pytest.mark.parametrize("devices", [None, 4])
def test_factors_are_the_first_statistics(evaluated, devices):
    """Debiased, the average after one statistic is the statistic."""
    state = after_one_update(evaluated, devices)
    factors = lbopt.layer_factors(state, MANY_LAYERS)
    assert list(factors) == list(MANY_LAYERS.preconditioned)
    assert_close(factors, {path: evaluated[2][path] for path in factors})


def test_cut_factors_have_zeros_beside_their_blocks(evaluated):
    state = after_one_update(evaluated, block_size=3)
    factors = lbopt.layer_factors(state, MANY_LAYERS)
    a, whole = factors["d"].a, evaluated[2]["d"].a  # 5 rows in blocks of 3 and 2
    blocks = np.kron(np.eye(2), np.ones((3, 3)))[:5, :5]
    assert_close(a, whole * blocks)
    np.testing.assert_array_equal(a == 0, blocks == 0)
    assert_close(
        factors["stack/cell"].a[1, :3, :3], evaluated[2]["stack/cell"].a[1, :3, :3]
    )
    # The mean eigenvalue is of the whole factor, not of a block.
    report = lbopt.layer_report(state, MANY_LAYERS)
    np.testing.assert_allclose(report["d"].eigenvalue.a, np.trace(whole) / 5, rtol=1e-5)


@pytest.mark.parametrize("devices", [None, 4])
def test_what_was_rejected_is_reported_at_its_path(evaluated, devices):
    loss, grads, curvature = evaluated
    bad = dict(curvature)
    # Two statistics, one inverse: −1e3 I has no Cholesky factor.
    bad["z_conv"] = jax.tree.map(lambda x: jnp.nan * x, bad["z_conv"])
    bad["d"] = bad["d"]._replace(a=-1e3 * jnp.eye(5))
    state = after_one_update((loss, grads, bad), devices)
    report = lbopt.layer_report(state, MANY_LAYERS)
    paths = list(MANY_LAYERS.preconditioned)
    assert list(report) == paths
    assert paths != sorted(paths)
    rejected = dict.fromkeys(paths, 0) | {"z_conv": 2, "d": 1}
    assert {path: row.rejected for path, row in report.items()} == rejected
    boosts = dict.fromkeys(paths, 1.0) | {"d": 10.0}
    assert {path: row.boost for path, row in report.items()} == boosts
    # The others were renewed in this step, that of z_conv one step ago: never.
    assert report["z_conv"].statistic_age == (1, 1)
    assert report["d"].inverse_age.a == 1
    assert report["y_norm"].inverse_age == (0,)
    table = str(report).splitlines()
    assert table[0].split()[:3] == ["path", "rejected", "boost"]
    assert [line.split()[:3] for line in table[1:]] == [
        [path, str(row.rejected), f"{row.boost:g}"] for path, row in report.items()
    ]
