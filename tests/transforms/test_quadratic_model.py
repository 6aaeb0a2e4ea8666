"""Steps from the quadratic model: conjugate gradients, and the rule for λ."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt.curvature.fisher_products import fisher_products
from lbopt.transforms.quadratic_model import scale_by_quadratic_model
from tests.devices import AXIS, on_devices
from tests.oracles import quick_jit
from tests.problems import Mlp, all_finite, assert_close, assert_equal, classify

START = jnp.array([1.0, -2.0, 0.5])
F = np.asarray([1.0, 3.0, 10.0])
IDENTITY = optax.identity()


def diagonal_products(vectors):
    return jnp.stack(
        [jnp.stack([jnp.sum(u * F * v) for v in vectors]) for u in vectors]
    )


def quadratic(w):
    return jnp.sum(jnp.asarray(F, w.dtype) * w**2) / 2


def stepper(tx, jit=True, loss_fn=quadratic, value_fn=None, products=diagonal_products):
    """One update on the quadratic, some of whose numbers may be replaced."""

    def step(w, state, change):
        loss, grads = jax.value_and_grad(loss_fn)(w)
        given = {"grads": grads, "value": loss} | change
        return tx.update(
            given.pop("grads"),
            state,
            w,
            value_fn=value_fn or loss_fn,
            fisher_products=products,
            **given,
        )

    step = quick_jit(step) if jit else step
    return lambda w=START, state=None, **change: step(w, state or tx.init(w), change)


def descent(tx, steps, w=START, **options):
    """The point and the state after each step."""
    step, state, rows = stepper(tx, **options), tx.init(w), []
    for _ in range(steps):
        update, state = step(w, state)
        w = w + update
        rows.append((w, state))
    return rows


def least_squares(x, y):
    """The loss of a linear regression, and products with its Fisher matrix."""

    def loss_fn(w):
        return jnp.mean(jnp.square(x @ w - y)) / 2

    def products(vectors):
        v = jnp.stack(vectors)
        return v @ (x.T @ x / len(x)) @ v.T

    return {"loss_fn": loss_fn, "products": products}


# ----------------------------------------------------------------- conjugate gradients


def conjugate_gradients(a, b, p, x, steps):
    """The points of the preconditioned method for ``a x = b`` (Golub & Van Loan)."""
    points, r = [], b - a @ x
    z = p @ r
    d = z
    for _ in range(steps):
        alpha = (r @ z) / (d @ a @ d)
        x = x + alpha * d
        points.append(x)
        r_next = r - alpha * a @ d
        z_next = p @ r_next
        d = z_next + (r_next @ z_next) / (r @ z) * d
        r, z = r_next, z_next
    return np.asarray(points)


def spd(seed, size):
    x = np.random.default_rng(seed).normal(size=(2 * size, size))
    return x.T @ x / len(x)


def linear_regression(momentum, weight_decay):
    """The points of as many steps as there are parameters, and what they must be."""
    n, size = 12, 6
    rng = np.random.default_rng(0)
    # The smallest λ is 1e-14 of curvatures as large as these.
    x, y = 1e3 * rng.normal(size=(n, size)), 1e3 * rng.normal(size=n)
    f, p, weight_decay = x.T @ x / n, spd(1, size), 1e6 * weight_decay
    tx = scale_by_quadratic_model(
        optax.stateless(lambda g, _: jnp.asarray(p) @ g),
        damping=1e-8,
        weight_decay=weight_decay,
        momentum=momentum,
    )
    w = rng.normal(size=size)
    a, b = f + weight_decay * np.eye(size), x.T @ y / n
    expected = conjugate_gradients(a, b, p, w, size)
    rows = descent(tx, size, jnp.asarray(w), **least_squares(x, y))
    points = np.asarray([w for w, _ in rows])
    return points, expected, np.linalg.solve(a, b), rows[-1][1]


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_on_a_quadratic_the_steps_are_conjugate_gradients(weight_decay):
    with jax.enable_x64(True):
        points, expected, solution, state = linear_regression(True, weight_decay)
        alone, *_ = linear_regression(False, weight_decay)
    np.testing.assert_allclose(points, expected, atol=1e-9)
    np.testing.assert_allclose(points[-1], solution, atol=1e-9)
    # The model is the loss: ρ of the fifth step is 1, and λ stays at its floor.
    np.testing.assert_allclose(state.ratio, 1, rtol=1e-6)
    assert float(state.damping) == 1e-8
    assert state.rejected == 0
    # Without momentum it is steepest descent, the same at the first step only.
    np.testing.assert_allclose(alone[0], points[0], rtol=1e-12)
    assert np.abs(alone[-1] - solution).max() > 1e-3


# ------------------------------------------------------------------------- the model


@pytest.mark.parametrize("momentum", [False, True])
def test_the_step_is_the_minimum_of_the_model(momentum):
    p, f, w = spd(2, 3), spd(3, 3), np.asarray(START, float)
    grads, last = np.asarray([0.7, -1.0, 2.0]), np.asarray([0.3, 0.2, -0.1])
    products = least_squares(np.linalg.cholesky(3 * f).T, 0)["products"]
    with jax.enable_x64(True):
        tx = scale_by_quadratic_model(
            optax.stateless(lambda g, _: jnp.asarray(p) @ g),
            damping=2.0,
            weight_decay=0.5,
            momentum=momentum,
        )
        state = tx.init(jnp.asarray(w))
        state = state._replace(last=jnp.asarray(last)) if momentum else state
        step = stepper(tx, products=products)
        update, after = step(jnp.asarray(w), state, grads=jnp.asarray(grads))
    g, update = grads + 0.5 * w, np.asarray(update)
    c = f + 2.5 * np.eye(3)
    directions = np.stack([-p @ g, last][: 1 + momentum])
    lengths = -np.linalg.solve(directions @ c @ directions.T, directions @ g)
    np.testing.assert_allclose(after.lengths, lengths, rtol=1e-12)
    np.testing.assert_allclose(update, lengths @ directions, rtol=1e-12)
    model = g @ update + update @ c @ update / 2
    np.testing.assert_allclose(after.predicted, model, rtol=1e-12)
    np.testing.assert_allclose(after.predicted, g @ update / 2, rtol=1e-12)
    assert model < 0
    if momentum:
        np.testing.assert_array_equal(after.last, update)


def test_the_first_step_is_along_the_gradient_alone():
    step, state = stepper(scale_by_quadratic_model(IDENTITY, damping=1.0))()
    g = F * np.asarray(START)
    alpha = g @ g / (g @ ((F + 1) * g))
    np.testing.assert_allclose(step, -alpha * g, rtol=1e-6)
    np.testing.assert_allclose(state.lengths, [alpha, 0], rtol=1e-6)


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_directions_that_are_parallel_count_as_one(size):
    tx = scale_by_quadratic_model(IDENTITY, damping=1.0)
    step, state, g = stepper(tx), tx.init(START), jax.grad(quadratic)(START)
    alone, first = step(START, state)
    same, after = step(START, state._replace(last=size * g))
    assert_close(same, alone)
    assert after.lengths[1] == 0
    # A direction of its own has its share, however long it is.
    other = state._replace(last=size * jnp.array([1.0, 1.0, 0.0]))
    update, after = step(START, other)
    assert after.lengths[1] != 0
    assert after.predicted < first.predicted
    assert np.abs(update - alone).max() > 0.01


def test_nothing_moves_where_the_gradient_is_zero():
    tx = scale_by_quadratic_model(IDENTITY)
    step, w = stepper(tx), jnp.zeros(3)
    for last in (jnp.zeros(3), jnp.ones(3)):
        update, state = step(w, tx.init(w)._replace(last=last))
        np.testing.assert_array_equal(update, 0)
        assert state.rejected == 0


# ---------------------------------------------------------------------------- damping

OMEGA = (19 / 20) ** 2
# ρ, and what λ is multiplied by.
RULE = [
    (1.5, OMEGA),
    (0.76, OMEGA),
    (0.74, 1.0),
    (0.26, 1.0),
    (0.24, 1 / OMEGA),
    (-1.0, 1 / OMEGA),
]


def nothing(vectors):
    return jnp.zeros((2, 2))


def decided(rise, damping=8.0):
    """A decision after a loss of 1 rose by a multiple of the predicted change."""
    tx = scale_by_quadratic_model(IDENTITY, damping=damping, damping_period=2)
    state = tx.init(START)._replace(count=jnp.asarray(1))
    # F = 0 and P = I: M(δ) − M(0) is −|g|² / 2λ.
    g = jnp.array([2.0, 0.0, 0.0])
    after = jnp.asarray(1 + rise * -2 / damping)
    step = stepper(tx, value_fn=lambda w: after, products=nothing)
    return step(START, state, grads=g, value=jnp.ones([]))[1]


@pytest.mark.parametrize(("rho", "factor"), RULE)
def test_every_branch_of_the_rule(rho, factor):
    state = decided(rho)
    np.testing.assert_allclose(state.ratio, rho, rtol=1e-5)
    np.testing.assert_allclose(state.damping, 8 * factor, rtol=1e-6)


def test_the_damping_has_bounds():
    for damping in (1e-8, 1.1e-8):
        assert decided(1.0, damping).damping == np.float32(1e-8)
    assert decided(0.0, 1e12).damping == np.float32(1e12)


def test_a_decision_every_few_steps():
    # ρ > 1, for λ is in the model and not in the loss.
    tx = scale_by_quadratic_model(IDENTITY, damping=2.0, damping_period=3)
    states = [state for _, state in descent(tx, 7)]
    omega = 0.95**3
    expected = 2 * np.asarray([1, 1, omega, omega, omega, omega**2, omega**2])
    np.testing.assert_allclose([s.damping for s in states], expected, rtol=1e-6)
    assert [s.ratio > 1 for s in states] == [False, False, *([True] * 5)]


def test_the_loss_is_evaluated_at_decisions_only():
    calls = []

    def counted(w):
        jax.debug.callback(lambda: calls.append(0))
        return quadratic(w)

    tx, state = scale_by_quadratic_model(IDENTITY, damping_period=3), None
    step = stepper(tx, value_fn=counted)
    for count in range(6):
        _, state = step(START, state)
        jax.effects_barrier()
        assert len(calls) == (count + 1) // 3


def test_the_penalty_is_in_both_losses():
    # The loss is constant, the penalty is all there is; on it the model is exact.
    tx = scale_by_quadratic_model(
        IDENTITY, damping=1e-6, weight_decay=0.7, damping_period=1
    )
    step = stepper(tx, value_fn=lambda w: jnp.ones([]), products=nothing)
    update, state = step(grads=jnp.zeros(3), value=jnp.ones([]))
    np.testing.assert_allclose(update, -START, rtol=1e-5)
    np.testing.assert_allclose(state.ratio, 1, rtol=1e-5)


def test_the_preconditioner_has_the_damping_and_all_other_arguments():
    seen = {}

    def update(updates, state, params, **extra_args):
        seen.update(extra_args)
        return updates, state

    core = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = scale_by_quadratic_model(core, damping=2.0, weight_decay=0.25)
    stepper(tx, jit=False)(curvature={"w": 1})
    assert set(seen) == {"value", "damping", "curvature"}
    assert seen["damping"] == 2.25
    assert seen["value"] == quadratic(START)


# ----------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["grads", "value", "products", "value_fn"])
def test_a_number_that_is_not_finite_changes_no_parameter(where, number):
    tx = scale_by_quadratic_model(optax.trace(0.5), damping=2.0, damping_period=2)
    sound = stepper(tx)
    _, before = sound()
    broken, change = sound, {}
    if where == "grads":
        change = {"grads": jnp.array([1.0, number, 0.0])}
    elif where == "value":
        change = {"value": jnp.asarray(number)}
    elif where == "products":
        broken = stepper(tx, products=lambda v: jnp.full((2, 2), number))
    else:
        broken = stepper(tx, value_fn=lambda w: jnp.asarray(number))
    update, after = broken(START, before, **change)
    np.testing.assert_array_equal(update, 0)
    assert_equal(after.last, before.last)
    np.testing.assert_array_equal(after.lengths, 0)
    assert all_finite(after)
    assert (after.count, after.rejected, after.predicted, after.ratio) == (2, 1, 0, 0)
    np.testing.assert_allclose(after.damping, 2 / OMEGA, rtol=1e-6)
    update, last = sound(START, after)
    assert np.any(update)
    assert last.rejected == 1


def test_a_step_that_is_not_taken_raises_the_damping_at_once():
    tx = scale_by_quadratic_model(IDENTITY, damping=2.0, damping_period=5)
    _, state = stepper(tx)(grads=jnp.full(3, np.nan))
    np.testing.assert_allclose(state.damping, 2 / 0.95**5, rtol=1e-6)


# -------------------------------------------------------------------------- the state


def test_half_precision_parameters_have_a_state_in_float32():
    w = START.astype(jnp.bfloat16)
    tx = scale_by_quadratic_model(IDENTITY)
    state = tx.init(w)
    update, after = stepper(tx)(w, state)
    assert update.dtype == jnp.bfloat16
    assert after.last.dtype == jnp.float32
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


def test_without_momentum_no_update_is_kept():
    state = scale_by_quadratic_model(IDENTITY, momentum=False).init(jnp.zeros(1000))
    assert sum(x.size for x in jax.tree.leaves(state)) < 10


# ------------------------------------------------------------- K-FAC and many devices


def test_preconditioned_by_kfac_the_loss_falls_at_every_step():
    problem = classify(Mlp())
    layers = problem.trace()
    tx = scale_by_quadratic_model(
        lbopt.scale_by_kfac(layers, damping=1.0), damping=1.0, weight_decay=1e-5
    )
    evaluate = lbopt.value_grad_and_curvature(problem.loss_fn, layers, fisher="sampled")

    @quick_jit
    def step(params, state, key):
        loss, grads, curvature = evaluate(
            params, *problem.args, rng=key, due=lbopt.refresh(state)
        )
        updates, state = tx.update(
            grads,
            state,
            params,
            value=loss,
            value_fn=lambda p: problem.loss_fn(p, *problem.args),
            fisher_products=lambda vectors: fisher_products(
                problem.loss_fn, params, vectors, *problem.args
            ),
            curvature=curvature,
        )
        return optax.apply_updates(params, updates), state, loss

    params, state, losses = problem.params, tx.init(problem.params), []
    for key in jax.random.split(jax.random.key(0), 21):
        params, state, loss = step(params, state, key)
        losses.append(float(loss))
    assert np.all(np.diff(losses) < 0)
    assert losses[-1] < 0.2 * losses[0]
    assert state.rejected == 0
    assert float(state.damping) < 1


def test_examples_spread_over_devices():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 3), (8,)))

    def run(x, y, axis_name=None):
        tx = scale_by_quadratic_model(
            IDENTITY,
            damping=1e-3,
            weight_decay=0.1,
            damping_period=1,
            axis_name=axis_name,
        )
        return descent(tx, 3, jit=False, **least_squares(x, y))[-1]

    shares = jnp.stack(jnp.split(x, 2)), jnp.stack(jnp.split(y, 2))
    found = on_devices(2, lambda x, y: run(x, y, AXIS), *shares)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[0], x[1]), found)
    whole = quick_jit(run)(x, y)
    assert_close(jax.tree.map(lambda x: x[0], found), whole, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------- messages


@pytest.mark.parametrize("name", ["value", "value_fn", "fisher_products"])
def test_all_arguments_are_needed(name):
    tx = scale_by_quadratic_model(IDENTITY)
    given = {
        "value": jnp.ones([]),
        "value_fn": quadratic,
        "fisher_products": diagonal_products,
    }
    given.pop(name)
    message = (
        rf"scale_by_quadratic_model.update needs {name}=; call .*value_fn=lambda p: "
        r"loss_fn\(p, batch\), fisher_products=lambda vectors: lbopt.fisher_products\("
    )
    with pytest.raises(ValueError, match=message):
        tx.update(START, tx.init(START), START, **given)
    with pytest.raises(ValueError, match=rf"needs params, {name}=; call"):
        tx.update(START, tx.init(START), **given)


def test_products_are_a_matrix():
    message = (
        r"fisher_products returned shape \[\] for 2 trees; return the matrix of their "
        r"products, \[2, 2\]"
    )
    with pytest.raises(ValueError, match=message):
        stepper(scale_by_quadratic_model(IDENTITY), products=lambda v: jnp.ones([]))()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preconditioner": "kfac"}, r"preconditioner='kfac' must be a transformation"),
        ({"damping": 0.0}, r"damping=0.0 must be positive; 150 is a usual start"),
        ({"weight_decay": -1.0}, r"weight_decay=-1.0 must be 0 or positive; 0"),
        ({"damping_period": 0}, r"damping_period=0 must be a whole number, ≥ 1; 5"),
        ({"damping_period": 2.5}, r"damping_period=2.5 must be a whole number, ≥ 1"),
    ],
)
def test_settings_out_of_range(change, message):
    settings = {"preconditioner": IDENTITY} | change
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(scale_by_quadratic_model)(**settings)
