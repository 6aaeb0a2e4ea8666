"""Nonlinear conjugate gradients: golden runs, linear CG, momentum, a textbook loop."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt.transforms.conjugate_beta import RULES
from lbopt.transforms.nlcg import scale_by_nlcg
from tests.problems import Mlp, assert_close, assert_equal, classify

# nlcg.md section 7, printed there to eight digits.
DIGITS = {"rtol": 1e-5, "atol": 2e-8}
A = np.asarray([1.0, 3.0, 10.0])
START = [1.0, -2.0, 0.5]
A_RATES = [0.05, 0.05, 0.1, 0.1, 0.1, 0.05]
B_GRADIENTS = [
    [1, -2, 0.5],
    [0.2, -0.4, 1],
    [-0.6, 0.3, 0.9],
    [0.5, 0.5, -1],
    [1.5, -1, 2],
]
B_RATES = [0.1, 0.1, 0.2, 0.2, 0.1]
LOSSES = [2, 1.8, 2.5, 2, 3.5]


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def rates(values):
    return lambda count: jnp.asarray(values, float)[count]


def course(tx, gradients, losses=None):
    """Updates and states for gradients that are given."""
    w = jnp.zeros(3)
    state, rows = tx.init(w), []
    update = jax.jit(lambda g, s, v: tx.update(g, s, w, value=v))
    for k, g in enumerate(gradients):
        value = None if losses is None else jnp.asarray(losses[k], float)
        updates, state = update(jnp.asarray(g, float), state, value)
        rows.append((np.asarray(updates), state))
    return rows


def descent(tx, gradient, start, steps):
    """The parameters after each step."""
    w = jnp.asarray(start, float)
    state, rows = tx.init(w), []
    update = jax.jit(lambda w, s: tx.update(gradient(w), s, w))
    for _ in range(steps):
        updates, state = update(w, state)
        w = optax.apply_updates(w, updates)
        rows.append((np.asarray(w), state))
    return rows


def quadratic(w):
    return jnp.asarray(A, w.dtype) * w


# ------------------------------------------------------------------- golden numbers

# The last of six points on the quadratic, and β of each step.
GOLDEN = {
    ("fletcher_reeves", None): (
        (0.425954726, 0.186686564, 0.037600835),
        (0, 0.53487903, 0.4711603, 0.5618704, 0.24091749, 0.30370302),
    ),
    ("fletcher_reeves", "bfgs"): (
        (0.439274407, -0.367288209, -0.039205201),
        (0, 0.34545413, 0.56745809, 0.21630638, 0.55783095, 0.3464584),
    ),
    ("polak_ribiere", "bfgs"): ((0.614141539, -0.950332962, 0.14418993), (0,) * 6),
}
# The last of five updates for gradients that are given, and β of each step.
GOLDEN_GIVEN = {
    ("fletcher_reeves", None): (
        (-0.18285714, 0.10571429, -0.30142857),
        (0, 0.2285714, 1, 1, 1),
    ),
    ("fletcher_reeves", "bfgs"): (
        (-0.02155307, 0.01312273, -0.05504236),
        (0, 0.1249889, 1, 0.2366896, 1),
    ),
    ("polak_ribiere", None): ((-0.15, 0.04, -0.24), (0, 0, 0.5, 1, 1)),
    ("polak_ribiere", "bfgs"): (
        (-0.01405742, 0.00660805, -0.31772671),
        (0, 0, 1, 1, 1),
    ),
}
# Likewise with step control: the last update, and the multipliers.
GOLDEN_CONTROL = {
    "step": ((0.00560125, 0.00090745, 0.01646085), (1, 1, 0.95, 0.95, 0.475)),
    "online": ((0.00227246, 0.00143234, 0.00646786), (1, 1, 0.5, 0.51, 0.255)),
}


@pytest.mark.parametrize("rule", GOLDEN, ids=str)
def test_golden_run_on_a_quadratic(precision, rule):
    beta, preconditioner = rule
    tx = scale_by_nlcg(
        rates(A_RATES), beta=beta, preconditioner=preconditioner, step_control=None
    )
    rows = descent(tx, quadratic, START, 6)
    point, betas = GOLDEN[rule]
    np.testing.assert_allclose(rows[-1][0], point, **DIGITS)
    np.testing.assert_allclose([s.beta for _, s in rows], betas, **DIGITS)
    if rule == ("fletcher_reeves", "bfgs"):
        h = rows[-1][1].preconditioner.h
        np.testing.assert_allclose(h, (1.10080433, 5.51245931, 7.0936185), **DIGITS)


@pytest.mark.parametrize("rule", GOLDEN_GIVEN, ids=str)
def test_golden_run_on_given_gradients(precision, rule):
    beta, preconditioner = rule
    tx = scale_by_nlcg(
        rates(B_RATES), beta=beta, preconditioner=preconditioner, step_control=None
    )
    rows = course(tx, B_GRADIENTS)
    update, betas = GOLDEN_GIVEN[rule]
    np.testing.assert_allclose(rows[-1][0], update, **DIGITS)
    np.testing.assert_allclose([s.beta for _, s in rows], betas, **DIGITS)
    if rule == ("fletcher_reeves", "bfgs"):
        *_, before, last = (s.preconditioner.h for _, s in rows)
        expected = (10.9852907, 7.5573405, 6.211866)
        np.testing.assert_allclose(before, expected, **DIGITS)
        assert_equal(last, before)  # the skip branch


@pytest.mark.parametrize("mode", GOLDEN_CONTROL)
def test_golden_run_with_step_control(precision, mode):
    tx = scale_by_nlcg(rates(B_RATES), step_control=mode, control_period=2)
    rows = course(tx, B_GRADIENTS, LOSSES)
    update, multipliers = GOLDEN_CONTROL[mode]
    np.testing.assert_allclose(rows[-1][0], update, **DIGITS)
    controls = [s.control for _, s in rows]
    np.testing.assert_allclose([c.multiplier for c in controls], multipliers, rtol=1e-6)
    averages = (2, 1.94, 2.108, 2.0756, 2.50292)
    np.testing.assert_allclose([c.average for c in controls], averages, rtol=1e-6)


# -------------------------------------------------------------------------- oracles


def textbook(rule, preconditioner, gradients, rates, losses=None, period=5):
    """nlcg.md sections 1 and 2, line by line, in float64."""
    eps, n = 1e-8, len(gradients[0])
    h, b, e, e_ref = np.ones(n), 1.0, 0.0, 0.0
    d, s, g_old, delta = np.zeros(n), np.zeros(n), np.zeros(n), 0.0
    table = (
        (1.15, 0.5, 0.9),
        (1.125, 0.7, 0.7),
        (1.10, 0.8, 0.5),
        (1.075, 0.9, 0.3),
        (1.05, 0.95, 0.2),
        (1.025, 0.975, 0.1),
        (1.01, 1.0, 0.1),
    )
    updates = []
    for k, (g, eta) in enumerate(zip(gradients, rates, strict=True)):
        d_last, b_last, rho = d, b, 0.0
        p = np.ones(n)
        if k and preconditioner == "bfgs":
            y, t = g - g_old, eta * b * d
            yt, tbt = y @ t, t @ (h * t)
            if yt >= eps and tbt >= eps:
                h = abs(
                    h - ((h * t) ** 2 + eps) / (tbt + eps) + (y**2 + eps) / (yt + eps)
                )
            p = 1 / (h + eps)
        g_old = g
        r = -g
        s_new = p * r
        delta_new = r @ s_new
        beta = 0.0
        if k:
            numerator = delta_new - (r @ s if rule == "polak_ribiere" else 0)
            beta = min(max(numerator / (delta + eps), 0), 1)
        d, s, delta = s_new + beta * d, s_new, delta_new
        if losses is not None:
            e = losses[k] if k == 0 else 0.7 * e + 0.3 * losses[k]
            e_ref = losses[k] if k == 0 else e_ref
            if k and k % period == 0:
                q = e / e_ref
                e_ref = e
                hit = next((row for row in table if q > row[0]), None)
                if hit:
                    b, rho = max(hit[1] * b, 1e-4), hit[2]
                elif q < 1.01:
                    b = min(1, 1.05 * b)
        tau = eta * b
        if tau <= eps:
            rho = 0.0
        updates.append((1 - rho) * tau * d - rho * eta * b_last * d_last)
    return np.asarray(updates)


@pytest.mark.parametrize("control", [None, "step"])
@pytest.mark.parametrize("preconditioner", [None, "bfgs"])
@pytest.mark.parametrize("rule", ["fletcher_reeves", "polak_ribiere"])
def test_is_the_textbook_loop(rule, preconditioner, control):
    rng = np.random.default_rng(0)
    steps = 40
    gradients = rng.normal(size=(steps, 3)) + np.asarray([1.0, -0.5, 0.2])
    eta = rng.uniform(0.01, 0.1, steps)
    eta[0] = 0
    eta[5::10] = 5e-9  # at decisions: of so short a step nothing is undone
    losses = np.exp(0.6 * rng.normal(size=steps)) if control else None
    expected = textbook(rule, preconditioner, gradients, eta, losses)
    with jax.enable_x64(True):
        tx = scale_by_nlcg(
            rates(eta), beta=rule, preconditioner=preconditioner, step_control=control
        )
        rows = course(tx, gradients, losses)
        updates = np.asarray([u for u, _ in rows])
    np.testing.assert_allclose(updates, expected, rtol=1e-12, atol=1e-14)
    if control:
        multipliers = [float(s.control.multiplier) for _, s in rows]
        assert min(multipliers) < 1
        assert len(set(multipliers)) > 3


def linear_cg(a, b, start):
    """Hestenes & Stiefel 1952: points, directions, step lengths."""
    x, r = start.copy(), b - a @ start
    d, points, directions, lengths = r.copy(), [], [], []
    for _ in range(len(b)):
        alpha = (r @ r) / (d @ a @ d)
        x = x + alpha * d
        new = r - alpha * a @ d
        points.append(x)
        directions.append(d)
        lengths.append(alpha)
        d = new + (new @ new) / (r @ r) * d
        r = new
    return points, directions, lengths


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_linear_conjugate_gradients(rule, preconditioned):
    n = 6
    rng = np.random.default_rng(0)
    root = rng.normal(size=(n, n))
    # So well conditioned that no β is above 1.
    a, solution = root @ root.T + 20 * np.eye(n), 1e3 * rng.normal(size=n)
    scales = rng.uniform(0.5, 2.0, n) if preconditioned else np.ones(n)
    # With P = S², CG on w is CG without a preconditioner on S⁻¹ w.
    s = np.diag(np.sqrt(scales))
    points, directions, lengths = linear_cg(s @ a @ s, s @ a @ solution, np.zeros(n))
    with jax.enable_x64(True):
        p = optax.stateless(lambda g, _: jnp.asarray(scales) * g)
        tx = scale_by_nlcg(
            rates(lengths),
            beta=rule,
            preconditioner=p if preconditioned else None,
            step_control=None,
        )
        rows = descent(tx, lambda w: a @ (w - solution), np.zeros(n), n)
    scale = np.abs(solution).max()
    for k in range(n):
        np.testing.assert_allclose(rows[k][0], s @ points[k], atol=1e-7 * scale)
        d = np.asarray(rows[k][1].direction)
        np.testing.assert_allclose(d, s @ directions[k], atol=1e-6 * scale)
        for earlier in rows[:k]:
            other = np.asarray(earlier[1].direction)
            lengths_of_both = np.sqrt((d @ a @ d) * (other @ a @ other))
            assert abs(d @ a @ other) < 1e-6 * lengths_of_both
    np.testing.assert_allclose(rows[-1][0], solution, atol=1e-7 * scale)


def test_a_constant_beta_is_momentum():
    rate = optax.linear_schedule(0.3, 0.01, 8)
    ours = scale_by_nlcg(rate, beta=0.9, preconditioner=None, step_control=None)
    grads = np.random.default_rng(0).normal(size=(8, 3))
    sgd = optax.with_extra_args_support(optax.sgd(rate, momentum=0.9))
    np.testing.assert_allclose(
        [u for u, _ in course(ours, grads)],
        [u for u, _ in course(sgd, grads)],
        rtol=1e-5,
        atol=1e-7,
    )


@pytest.mark.parametrize("rule", ["fletcher_reeves", "polak_ribiere", "hager_zhang"])
def test_beta_does_not_know_the_scale_of_the_loss(rule):
    tx = scale_by_nlcg(0.1, beta=rule, preconditioner=None, step_control=None)
    grads = np.asarray(B_GRADIENTS)
    plain = [s.beta for _, s in course(tx, grads)]
    scaled = [s.beta for _, s in course(tx, 64.0 * grads)]
    np.testing.assert_allclose(scaled, plain, rtol=1e-6)
    assert len({float(x) for x in plain}) > 2


# -------------------------------------------------------------------------- the state


@pytest.mark.parametrize(
    ("options", "vectors"),
    [
        ({}, 3),
        ({"beta": "polak_ribiere"}, 4),
        ({"beta": "hestenes_stiefel"}, 3),
        ({"beta": "hager_zhang"}, 4),
        ({"preconditioner": None}, 1),
        ({"preconditioner": None, "beta": "polak_ribiere"}, 2),
    ],
    ids=str,
)
def test_the_state_is_no_larger_than_it_must_be(options, vectors):
    n = 1000
    state = scale_by_nlcg(0.1, **options).init({"w": jnp.zeros(n)})
    numbers = sum(x.size for x in jax.tree.leaves(state))
    assert vectors * n <= numbers < vectors * n + 12


def test_half_precision_parameters_have_a_state_in_float32():
    w = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = lbopt.nlcg(0.1, beta="polak_ribiere")
    state = tx.init(w)
    kinds = {x.dtype for x in jax.tree.leaves(state) if x.ndim}
    assert kinds == {jnp.dtype("float32")}
    updates, after = tx.update(w, state, w, value=jnp.bfloat16(1.0))
    assert updates["w"].dtype == jnp.bfloat16
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


def test_a_preconditioner_that_breaks_down_leaves_everything_as_it_was():
    breaks = optax.stateless(lambda g, _: jax.tree.map(lambda g: g / g[2], g))
    tx = scale_by_nlcg(
        0.1, beta="polak_ribiere", preconditioner=breaks, step_control=None
    )
    grads = [[1.0, 2, 4], [2.0, 2, 1], [1.0, 1, 0], [1.0, 3, 2]]
    rows = course(tx, grads)
    (_, before), (broken, after), (updates, last) = rows[1:]
    np.testing.assert_array_equal(broken, 0)
    kept = {"count": before.count, "rejected": before.rejected}
    assert_equal(after._replace(**kept), before)
    assert after.rejected == last.rejected == 1
    assert np.all(np.isfinite(updates))
    assert np.any(updates)


# -------------------------------------------------------- other preconditioners


def test_preconditioned_by_kfac():
    problem = classify(Mlp())
    layers = problem.trace()
    core = lbopt.scale_by_kfac(layers, damping=1e-2)
    tx = lbopt.nlcg(0.1, preconditioner=core, step_control=None)
    f = jax.jit(lbopt.value_grad_and_curvature(problem.loss_fn, layers))
    params, state, inner = problem.params, None, core.init(problem.params)
    state = tx.init(params)
    assert set(lbopt.refresh(state)) == {"first", "last"}
    d, delta = jax.tree.map(jnp.zeros_like, params), None
    update = jax.jit(lambda g, s, c: tx.update(g, s, params, curvature=c))
    for k in range(3):
        _, g, curvature = f(params, *problem.args)
        z, inner = core.update(g, inner, curvature=curvature)
        product = optax.tree.vdot(g, z)
        beta = 0.0 if k == 0 else min(max(float(product / delta), 0), 1)
        d, delta = jax.tree.map(lambda d, z: beta * d - z, d, z), product
        updates, state = update(g, state, curvature)
        expected = jax.tree.map(lambda d: 0.1 * d, d)
        assert_close(updates, expected, rtol=1e-3, atol=1e-5)
        params = optax.apply_updates(params, updates)
    assert 0 < float(state.beta) < 1
    assert float(problem.loss_fn(params, *problem.args)) < float(
        problem.loss_fn(problem.params, *problem.args)
    )


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize("mode", ["step", "online"])
def test_the_loss_is_needed(mode):
    tx, w = lbopt.nlcg(0.1, step_control=mode), jnp.ones(3)
    with pytest.raises(
        ValueError,
        match=r"scale_by_nlcg.update needs value=.*value=loss\), or pass "
        r"step_control=None",
    ):
        tx.update(w, tx.init(w), w)
    free = lbopt.nlcg(0.1, step_control=None)
    free.update(w, free.init(w), w)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": -0.1}, r"learning_rate=-0.1 must be 0 or positive; the d"),
        ({"beta": "polak"}, r"beta='polak' must be 'dai_yuan', .* or 'polak_rib"),
        ({"beta": -0.5}, r"beta=-0.5 must lie in \[0, 1\]; it is a momen"),
        ({"beta": 1.5}, r"beta=1.5 must lie in \[0, 1\]; it is a momentum"),
        ({"preconditioner": "kfac"}, r"preconditioner='kfac' must be 'bfgs', None, or"),
        ({"preconditioner": 3.0}, r"preconditioner=3.0 must be 'bfgs', None, or a tra"),
        ({"step_control": "armijo"}, r"step_control='armijo' must be 'step', 'online'"),
        ({"control_period": 0}, r"control_period=0 must be a whole number, ≥ 1; 5"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(scale_by_nlcg)(**({"learning_rate": 0.1} | change))
