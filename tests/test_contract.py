"""What every public optimizer promises; a new one is a new line of ``OPTIMIZERS``."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lbopt
from lbopt.curvature.eigen_moments import CorrectedStatistics
from tests.problems import (
    Mlp,
    Problem,
    all_finite,
    assert_close,
    assert_equal,
    classify,
    inputs,
    labels,
)

RATE, DAMPING, CLIP = 0.1, 1e-2, 1e-4


class Optimizer(NamedTuple):
    """One line of the table.

    Attributes:
      factory: what ``optax.inject_hyperparams`` wraps.
      arguments: ``layers -> its arguments``.
      layerwise: whether a layer's update depends on that layer alone.
      has_curvature: whether it takes curvature statistics.
      bound: its loss after a short training, as a multiple of gradient descent's; None
        for what is not made to converge by itself.
    """

    factory: Any
    arguments: Any
    layerwise: bool = True
    has_curvature: bool = True
    bound: float | None = 0.5

    def make(self, rate, layers):
        arguments = self.arguments(layers)
        rate = {"learning_rate": rate} if "learning_rate" in arguments else {}
        return self.factory(**arguments | rate)


def scaled(transform, learning_rate):
    return optax.chain(transform, optax.scale_by_learning_rate(learning_rate))


def core(layers, damping=DAMPING, statistics=1):
    periods = lbopt.Periods(statistics)
    return lbopt.scale_by_kfac(layers, damping=damping, periods=periods)


def stale(learning_rate, layers, damping):
    """With inverses that have effect later, and a bound that is not felt."""
    periods = lbopt.Periods(inverses=2, delay=1)
    return lbopt.distributed_kfac(
        learning_rate, layers, kl_clip=1e3, damping=damping, periods=periods
    )


def corrected(layers, damping):
    """EKFAC; second moments that it is not given do not depend on its bases."""
    inner = lbopt.scale_by_kfac(layers, damping=damping, eigenvalues="corrected")

    def completed(statistics):
        if isinstance(statistics, CorrectedStatistics):
            return statistics
        a, g = statistics
        return CorrectedStatistics(a, g, jnp.outer(jnp.diag(a), jnp.diag(g)))

    def update(grads, state, params=None, *, curvature, **extra):
        curvature = {path: completed(x) for path, x in curvature.items()}
        return inner.update(grads, state, params, curvature=curvature, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def modelled(weight_decay):
    """Steps on a model whose Fisher matrix is the identity."""
    inner = lbopt.scale_by_quadratic_model(
        optax.identity(), damping=1.0, weight_decay=weight_decay, damping_period=2
    )
    functions = {
        "value_fn": lambda params: optax.tree.norm(params, squared=True),
        "fisher_products": lambda vectors: jnp.stack(
            [jnp.stack([optax.tree.vdot(u, v) for v in vectors]) for u in vectors]
        ),
    }

    def update(grads, state, params=None, **extra):
        return inner.update(grads, state, params, **extra | functions)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def damped(layers):
    return {"learning_rate": RATE, "layers": layers, "damping": DAMPING}


def unbounded(layers):
    """A bound in KL would scale all layers alike."""
    return damped(layers) | {"kl_clip": None}


def rated(**settings):
    return lambda layers: {"learning_rate": RATE} | settings


OPTIMIZERS = {
    "kfac": Optimizer(lbopt.kfac, unbounded),
    "distributed_kfac": Optimizer(stale, damped, layerwise=False),
    "sp_ngd": Optimizer(lbopt.sp_ngd, unbounded),
    "scale_by_kfac": Optimizer(
        lambda learning_rate, layers, damping, statistics: scaled(
            core(layers, damping, statistics), learning_rate
        ),
        lambda layers: damped(layers) | {"statistics": 1},
    ),
    "ekfac": Optimizer(
        lambda learning_rate, layers, damping: scaled(
            corrected(layers, damping), learning_rate
        ),
        damped,
    ),
    # Steps as long as the weights do not settle.
    "lars": Optimizer(lbopt.lars, rated(), has_curvature=False, bound=2.0),
    "nlcg": Optimizer(lbopt.nlcg, rated(), layerwise=False, has_curvature=False),
    # Polak-Ribière's are steepest descent wherever the gradient hardly changes.
    "nlcg_polak_ribiere": Optimizer(
        lbopt.scale_by_nlcg,
        rated(beta="polak_ribiere", step_control="online"),
        layerwise=False,
        has_curvature=False,
        bound=1.0,
    ),
    "nlcg_kfac": Optimizer(
        lbopt.nlcg,
        lambda layers: {"learning_rate": RATE, "preconditioner": core(layers)},
        layerwise=False,
    ),
    "clip_by_kl": Optimizer(
        lambda inner, c: scaled(lbopt.clip_by_kl(inner, c, RATE), RATE),
        lambda layers: {"inner": core(layers), "c": CLIP},
        layerwise=False,
    ),
    "scale_by_quadratic_model": Optimizer(
        modelled,
        lambda layers: {"weight_decay": 1e-2},
        layerwise=False,
        has_curvature=False,
        bound=None,
    ),
    "rescale_weights": Optimizer(
        lambda learning_rate, layers: optax.chain(
            optax.scale_by_learning_rate(learning_rate), lbopt.rescale_weights(layers)
        ),
        lambda layers: {"learning_rate": RATE, "layers": layers},
        has_curvature=False,
        bound=None,
    ),
    "average_params": Optimizer(
        lambda learning_rate: optax.chain(
            optax.sgd(learning_rate), lbopt.average_params(0.5)
        ),
        rated(),
        has_curvature=False,
        bound=None,
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


class Setting(NamedTuple):
    """A problem, its layers, its evaluation and two batches' results of it."""

    problem: Problem
    layers: Any
    evaluate: Any
    given: list

    def make(self, name, rate=RATE):
        return OPTIMIZERS[name].make(rate, self.layers)

    def run(self, tx, **extra_args):
        """Updates and state after each of the two batches; parameters stay."""
        params = self.problem.params
        state, results = tx.init(params), []
        for grads, extra in self.given:
            updates, state = tx.update(grads, state, params, **extra, **extra_args)
            results.append((updates, state))
        return results


@pytest.fixture(scope="module")
def setting():
    problem = classify(Mlp())
    layers = problem.trace()
    f = jax.jit(lbopt.value_grad_and_curvature(problem.loss_fn, layers))
    batches = [(inputs(i), problem.args[1]) for i in range(2)]
    given = []
    for batch in batches:
        loss, grads, curvature = f(problem.params, *batch)
        given.append((grads, {"curvature": curvature, "value": loss}))
    return Setting(problem, layers, f, given)


def compiled(tx):
    """The transformation with its update in one program."""
    update = jax.jit(lambda g, s, p, extra: tx.update(g, s, p, **extra))
    return optax.GradientTransformationExtraArgs(
        tx.init, lambda g, s, p=None, **extra: update(g, s, p, extra)
    )


@pytest.fixture(scope="module")
def alone(setting):
    """Each optimizer by itself, compiled once for all tests."""
    return functools.cache(lambda name: compiled(setting.make(name)))


@pytest.fixture(scope="module")
def plain(setting, alone):
    """What each optimizer does by itself, in one program."""
    return functools.cache(lambda name: setting.run(alone(name)))


def updates_of(results):
    return [updates for updates, _ in results]


# --------------------------------------------------------------------- by itself


@every_optimizer
def test_updates_do_something(plain, name):
    for updates, state in plain(name):
        assert all_finite((updates, state))
        assert all(np.any(u) for u in jax.tree.leaves(updates))


@every_optimizer
def test_is_the_same_without_jit_and_takes_unknown_extra_args(setting, plain, name):
    results = setting.run(
        setting.make(name), value_fn=sum, grad=None, stranger=object()
    )
    # XLA fuses what runs op by op without jit; inverses amplify the rounding.
    assert_close(results, plain(name), rtol=1e-3, atol=1e-5)


@every_optimizer
def test_compiles_once_and_keeps_the_state_s_types(setting, name):
    tx = setting.make(name)
    traces = []

    @functools.partial(jax.jit, donate_argnums=1)
    def update(grads, state, params, extra):
        traces.append(None)
        return tx.update(grads, state, params, **extra)

    state = tx.init(setting.problem.params)
    before = jax.tree.map(lambda x: jax.typeof(x), state)
    for grads, extra in setting.given * 2:
        _, state = update(grads, state, setting.problem.params, extra)
        assert jax.tree.map(lambda x: jax.typeof(x), state) == before
    assert len(traces) == 1


@every_optimizer
def test_init_from_shapes(setting, name):
    tx, params = setting.make(name), setting.problem.params
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    if name != "average_params":  # which starts with the parameters' numbers
        assert_equal(tx.init(shapes), tx.init(params))
    abstract = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(tx.init(params))


@every_optimizer
def test_the_state_is_arrays_that_do_not_share_memory(setting, name):
    leaves = jax.tree.leaves(setting.make(name).init(setting.problem.params))
    assert all(isinstance(x, jax.Array) for x in leaves)
    addresses = [x.unsafe_buffer_pointer() for x in leaves]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize(
    ("name", "stated"),
    [*[(name, False) for name in OPTIMIZERS], ("kfac", True), ("nlcg_kfac", True)],
)
def test_keeps_the_sharding(setting, plain, name, stated):
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=kinds)
    sharding = NamedSharding(mesh, PartitionSpec())
    tx = setting.make(name)
    params, (grads, extra) = jax.device_put(
        (setting.problem.params, setting.given[0]), sharding
    )
    state = jax.device_put(tx.init(params), sharding)
    options = {"out_shardings": sharding} if stated else {}
    update = jax.jit(lambda g, s, p, e: tx.update(g, s, p, **e), **options)
    updates, after = update(grads, state, params, extra)
    for x in jax.tree.leaves((updates, after)):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    assert_close(updates, plain(name)[0][0], rtol=1e-3, atol=1e-5)


@every_optimizer
def test_runs_in_a_scan(setting, plain, name):
    tx = setting.make(name)

    def step(state, given):
        updates, state = tx.update(given[0], state, setting.problem.params, **given[1])
        return state, updates

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *setting.given)
    init = tx.init(setting.problem.params)
    state, updates = jax.jit(lambda s: jax.lax.scan(step, s, stacked))(init)
    rows = [jax.tree.map(lambda u: u[i], updates) for i in range(2)]
    assert_close(rows, updates_of(plain(name)), rtol=1e-3, atol=1e-5)
    assert_close(state, plain(name)[-1][1], rtol=1e-3, atol=1e-5)


@every_optimizer
@pytest.mark.parametrize("how", ["bytes", "leaves"])
def test_survives_sleep(setting, alone, name, how):
    tx = alone(name)
    params = setting.problem.params
    grads, extra = setting.given[0]
    _, state = tx.update(grads, tx.init(params), params, **extra)
    if how == "bytes":
        asleep = flax.serialization.to_bytes(state)
        awake = flax.serialization.from_bytes(tx.init(params), asleep)
    else:
        leaves = [np.asarray(x) for x in jax.tree.leaves(state)]
        awake = jax.tree.unflatten(jax.tree.structure(tx.init(params)), leaves)
    assert_equal(awake, state)
    grads, extra = setting.given[1]
    expected = tx.update(grads, state, params, **extra)
    assert_equal(tx.update(grads, awake, params, **extra), expected)


# ------------------------------------------------------------------ inside optax


@every_optimizer
def test_inside_chains(setting, plain, name):
    named = optax.named_chain(("first", optax.identity()), ("main", setting.make(name)))
    tx = optax.chain(optax.identity(), named, optax.scale(1.0))
    assert_equal(updates_of(setting.run(compiled(tx))), updates_of(plain(name)))


@every_optimizer
def test_inside_masked(setting, plain, name):
    if not OPTIMIZERS[name].layerwise:  # else a part says as much
        everything = optax.masked(setting.make(name), {"first": True, "last": True})
        results = setting.run(compiled(everything))
        assert_equal(updates_of(results), updates_of(plain(name)))
    part = optax.masked(setting.make(name), {"first": True, "last": False})
    for (updates, _), (expected, _), (grads, _) in zip(
        setting.run(compiled(part)), plain(name), setting.given, strict=True
    ):
        assert_equal(updates["last"], grads["last"])
        if OPTIMIZERS[name].layerwise:
            assert_equal(updates["first"], expected["first"])


@every_optimizer
def test_inside_partition(setting, plain, name):
    tx = optax.partition(
        {"ours": setting.make(name), "sgd": optax.sgd(0.5)},
        {"first": "ours", "last": "sgd"},
    )
    for (updates, _), (expected, _), (grads, _) in zip(
        setting.run(compiled(tx)), plain(name), setting.given, strict=True
    ):
        assert_close(updates["last"], jax.tree.map(lambda g: -0.5 * g, grads["last"]))
        if OPTIMIZERS[name].layerwise:
            assert_equal(updates["first"], expected["first"])
    if not OPTIMIZERS[name].has_curvature:
        return
    # Through the front door, where only our part's statistics are wanted.
    due = lbopt.refresh(tx.init(setting.problem.params))
    assert set(due) == {"first"}
    args = (setting.problem.params, *setting.problem.args)
    curvature = setting.evaluate(*args, due=due)[2]
    assert np.any(curvature["first"].g)
    assert not np.any(curvature["last"].g)


@every_optimizer
def test_inside_multi_steps(setting, plain, name):
    tx = optax.MultiSteps(setting.make(name), 2)
    params, (grads, extra) = setting.problem.params, setting.given[0]
    state = tx.init(params)
    update = jax.jit(lambda s: tx.update(grads, s, params, **extra))
    if OPTIMIZERS[name].has_curvature:
        # It holds the mean of gradients; the statistics would be the last ones.
        with pytest.raises(ValueError, match=r"optax\.MultiSteps.*accumulate="):
            update(state)
        return
    waiting, state = update(state)
    assert not any(np.any(u) for u in jax.tree.leaves(waiting))
    updates, state = update(state)  # the mean of two equal gradients
    assert_close(updates, plain(name)[0][0], rtol=1e-3, atol=1e-5)
    assert all_finite(state)


@every_optimizer
def test_inside_inject_hyperparams(setting, plain, name):
    line = OPTIMIZERS[name]
    tx = compiled(
        optax.inject_hyperparams(line.factory)(**line.arguments(setting.layers))
    )
    results = setting.run(tx)
    assert_close(updates_of(results), updates_of(plain(name)), rtol=1e-3, atol=1e-5)
    state = tx.init(setting.problem.params)
    grads, extra = setting.given[0]
    first = results[0][0]
    for number in state.hyperparams.keys() & {"learning_rate", "damping", "c"}:
        smaller = state.hyperparams | {number: state.hyperparams[number] / 16}
        changed, _ = tx.update(
            grads,
            state._replace(hyperparams=smaller),
            setting.problem.params,
            **extra,
        )
        if number == "damping":  # less damping, longer steps
            assert float(optax.tree.norm(changed)) > float(optax.tree.norm(first))
            continue
        # The rate, or the square of the length.
        expected = {"learning_rate": 1 / 16, "c": 1 / 4}[number]
        # A bias: rescaling gives kernels their norm whatever the rate.
        ratio = changed["first"]["bias"] / first["first"]["bias"]
        np.testing.assert_allclose(ratio, expected, rtol=1e-3)


@every_optimizer
def test_inside_apply_if_finite(setting, plain, name):
    tx = compiled(optax.apply_if_finite(setting.make(name), 3))
    results = setting.run(tx)
    assert_close(updates_of(results), updates_of(plain(name)), rtol=1e-3, atol=1e-5)
    grads, extra = jax.tree.map(lambda x: x * jnp.nan, setting.given[1])
    state = results[0][1]
    updates, after = tx.update(grads, state, setting.problem.params, **extra)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert_equal(after.inner_state, state.inner_state)
    assert after.total_notfinite == 1
    assert all_finite(after)
    again = tx.update(
        setting.given[1][0],
        after,
        setting.problem.params,
        **setting.given[1][1],
    )
    assert_equal(again[0], results[1][0])


WRAPPERS = {
    "conditionally_transform": lambda inner: optax.conditionally_transform(
        inner, lambda step: step < 1
    ),
    "conditionally_mask": lambda inner: optax.conditionally_mask(
        inner, lambda step: step < 1
    ),
    "later in a chain": lambda inner: optax.chain(
        inner,
        optax.ema(0.9),
        optax.contrib.reduce_on_plateau(0.5, patience=1),
        optax.add_noise(0.1, 0.5, key=0),
        optax.freeze({"first": True, "last": False}),
    ),
    "selective_transform": lambda inner: optax.selective_transform(
        inner, freeze_mask={"first": False, "last": True}
    ),
    "schedule_free": lambda inner: optax.contrib.schedule_free(inner, RATE),
    "mechanize": lambda inner: optax.contrib.mechanize(inner),
    "extra_args": lambda inner: optax.with_extra_args_support(inner),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_inside_other_wrappers(setting, plain, wrapper):
    """As around a transformation that is known to return the same updates."""
    known = updates_of(plain("scale_by_kfac"))

    def update(grads, state, params=None, **extra):
        del grads, params, extra
        chosen = jax.tree.map(lambda a, b: jnp.where(state == 0, a, b), *known)
        return chosen, state + 1

    replay = optax.GradientTransformationExtraArgs(lambda _: jnp.zeros([]), update)
    wrap = WRAPPERS[wrapper]
    if wrapper == "selective_transform":  # replays what is left of masked parameters
        expected = updates_of(setting.run(compiled(wrap(optax.identity()))))
        for row, own in zip(expected, known, strict=True):
            row["first"] = own["first"]
    else:
        expected = updates_of(setting.run(compiled(wrap(replay))))
    found = updates_of(setting.run(compiled(wrap(setting.make("scale_by_kfac")))))
    assert_close(found, expected, rtol=1e-3, atol=1e-5)


@every_optimizer
def test_tree_map_params_finds_the_copies_of_the_parameters(setting, name):
    tx, params = setting.make(name), setting.problem.params
    state = tx.init(params)
    marked = optax.tree_map_params(tx, lambda x: jnp.full_like(x, 7), state)
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    ends = {path for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    for path, x in jax.tree_util.tree_leaves_with_path(marked):
        assert bool(jnp.all(x == 7)) == (path[-2:] in ends), jax.tree_util.keystr(path)


def test_tree_map_params_with_masked_layers(setting):
    ours = lbopt.kfac(RATE, setting.layers)
    tx = optax.partition(
        {"ours": ours, "adam": optax.adam(RATE)}, {"first": "ours", "last": "adam"}
    )
    state = tx.init(setting.problem.params)
    same = optax.tree_map_params(
        tx, lambda x: x, state, transform_non_params=lambda x: x + 0
    )
    assert_equal(same, state)


@every_optimizer
def test_gradients_that_do_not_fit_are_refused(setting, name):
    tx, params = setting.make(name), setting.problem.params
    grads, extra = setting.given[0]
    kernel = grads["first"]["kernel"]
    turned = grads | {"first": grads["first"] | {"kernel": kernel.T}}
    if not OPTIMIZERS[name].has_curvature:
        # Elementwise, they fail as optax's own do.
        with pytest.raises((TypeError, ValueError)):
            tx.update(turned, tx.init(params), params, **extra)
        return
    missing = {"first": grads["first"]}
    for wrong, message in (
        (turned, r"updates\W+first\W+kernel\W+ has shape \[5, 4\] where .* \[4, 5\]"),
        (missing, r"updates.*'?last'?"),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(wrong, tx.init(params), params, **extra)


def test_the_clip_refuses_gradients_of_other_shapes(setting):
    tx = lbopt.clip_by_kl(optax.identity(), CLIP, RATE)
    params, (grads, _) = setting.problem.params, setting.given[0]
    turned = grads | {"last": {"kernel": grads["last"]["kernel"].T}}
    message = (
        r"updates\['last'\]\['kernel'\] has shape \[3, 5\] where params has \[5, 3"
    )
    with pytest.raises(ValueError, match=message):
        tx.update(turned, tx.init(params), params)


@pytest.mark.parametrize("name", ["kfac", "sp_ngd"])
def test_outside_of_jit_it_compiles_once(setting, name):
    tx, params = setting.make(name), setting.problem.params
    counts = [0]

    def listen(event, seconds, **_):
        del seconds
        counts[-1] += event.endswith("backend_compile_duration")

    state = tx.init(params)
    jax.monitoring.register_event_duration_secs_listener(listen)
    for number in range(3):
        grads, extra = setting.given[number % 2]
        _, state = tx.update(grads, state, params, **extra)
        counts.append(0)
    jax.monitoring.clear_event_listeners()
    assert counts[0] > 0
    assert counts[2] == 0


def test_without_curvature_the_message_names_the_way_out(setting):
    for tx in (
        lbopt.kfac(RATE, setting.layers),
        optax.masked(core(setting.layers), True),
    ):
        params = setting.problem.params
        with pytest.raises(ValueError, match=r"needs curvature=.*from_your_optax_loop"):
            tx.update(setting.given[0][0], tx.init(params), params)


@pytest.mark.parametrize("read", [lbopt.refresh, lbopt.curvature_state])
def test_a_state_that_lost_its_types_is_refused(setting, read):
    """As orbax restores it without a target: lists and dictionaries."""

    def bare(node):
        if hasattr(node, "_asdict"):
            return {key: bare(child) for key, child in node._asdict().items()}
        return [bare(x) for x in node] if isinstance(node, tuple) else node

    params, (grads, extra) = setting.problem.params, setting.given[0]
    tx = lbopt.kfac(RATE, setting.layers)
    states = [bare(tx.init(params)), {"0": bare(core(setting.layers).init(params))}]
    for state in states:
        with pytest.raises(ValueError, match="restored without a target: restore it"):
            read(state)
    with pytest.raises(ValueError, match="restored without a target: restore it"):
        tx.update(grads, states[0], params, **extra)
    with pytest.raises(ValueError, match="pass the state of a chain"):
        read(optax.adam(RATE).init(params))


# ------------------------------------------------------------------- convergence

RATES = np.asarray([3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0], np.float32)
STEPS = 30


def least_squares():
    """A linear map to be found from inputs of very unequal scales."""
    x = inputs(batch=32) * jnp.asarray([[10.0, 1.0, 1.0, 0.3]])
    y = x @ jax.random.normal(jax.random.key(9), (4, 2)) + 1.0
    model = nn.Dense(2, name="linear")
    params = {"linear": model.init(jax.random.key(0), x)["params"]}

    def loss_fn(params, x, y):
        f = model.apply({"params": params["linear"]}, x)
        f = lbopt.likelihood(f, "normal")
        return jnp.mean(jnp.sum(jnp.square(f - y), -1)) / 2

    return Problem(loss_fn, params, (x, y))


def classification():
    """Labels that a hidden layer must find."""
    x = inputs(batch=32)
    y = labels(32) * 0 + (x[:, 0] * x[:, 1] > 0) + (x[:, 2] > 0)
    return classify(Mlp(width=8), x, y)


def best_loss(problem, layers, make, due=lambda state: None):
    """The lowest final loss over the rates, all of them trained by one program."""
    # Near a fit the empirical Fisher matrix is that of the residuals; the exact one is
    # the curvature.
    f = lbopt.value_grad_and_curvature(problem.loss_fn, layers, fisher="exact")

    def train(rate):
        tx = make(rate)

        def step(carry, _):
            params, state = carry
            loss, grads, curvature = f(params, *problem.args, due=due(state))
            updates, state = tx.update(
                grads, state, params, curvature=curvature, value=loss
            )
            return (optax.apply_updates(params, updates), state), None

        init = (problem.params, tx.init(problem.params))
        (params, _), _ = jax.lax.scan(step, init, None, STEPS)
        return problem.loss_fn(params, *problem.args)

    train = jax.jit(train)
    return float(np.nanmin([train(rate) for rate in RATES]))


@functools.cache
def baseline(target):
    """A problem, its layers, and the loss that gradient descent leaves of its first."""
    problem = target()
    layers = problem.trace()
    start = float(problem.loss_fn(problem.params, *problem.args))
    descent = best_loss(
        problem, layers, lambda rate: optax.with_extra_args_support(optax.sgd(rate))
    )
    assert descent < start
    return problem, layers, descent


OTHER_SETTINGS = {
    # The table's bound is for short steps, which would not arrive in time.
    "clip_by_kl": lambda rate, layers: lbopt.kfac(
        rate, layers, damping=DAMPING, kl_clip=1.0
    ),
    # The solution's kernels do not have the norm that rescaling gives them.
    "sp_ngd": lambda rate, layers: lbopt.sp_ngd(
        rate, layers, damping=DAMPING, kl_clip=None, rescale=None
    ),
    # Rates of LARS are usually a hundred times as large.
    "lars": lambda rate, layers: lbopt.lars(
        rate, trust_coefficient=0.3, variant="paper"
    ),
}
CONTENDERS = [name for name, line in OPTIMIZERS.items() if line.bound is not None]


@pytest.mark.parametrize("target", [least_squares, classification])
@pytest.mark.parametrize("name", CONTENDERS)
def test_converges_faster_than_gradient_descent(target, name):
    problem, layers, descent = baseline(target)
    make = OTHER_SETTINGS.get(name, OPTIMIZERS[name].make)
    due = {"due": lbopt.refresh} if name == "ekfac" else {}
    final = best_loss(problem, layers, lambda rate: make(rate, layers), **due)
    assert final < OPTIMIZERS[name].bound * descent
