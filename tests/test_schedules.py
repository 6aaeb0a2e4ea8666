"""Schedules in epochs; the papers' own are tested with their presets."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt import schedules


def test_every_step_is_the_equation():
    eta = schedules.polynomial(0.3, 2.5, 1.25, 3.6, steps_per_epoch=7.5)
    steps = np.arange(40)
    epochs = steps / 7.5
    inside = np.clip(1 - (epochs - 1.25) / (3.6 - 1.25), 0, 1)
    values = jax.jit(jax.vmap(eta))(jnp.asarray(steps))  # a traced step
    np.testing.assert_allclose(values, 0.3 * inside**2.5, rtol=2e-5, atol=1e-9)
    assert len(np.unique(values[10:27])) == 17  # the epoch is a fraction


@pytest.mark.parametrize(
    ("shape", "rise"),
    [
        ("linear", lambda a: a),
        ("quadratic", lambda a: a * a),
        ("sqrt", lambda a: 1 - np.sqrt(1 - a)),
    ],
)
def test_shapes_of_the_warmup(shape, rise):
    decay = schedules.polynomial(0.8, 2.0, 0, 4, steps_per_epoch=20)
    eta = schedules.warmup(0.7, 31, decay, init_value=0.05, shape=shape)
    steps = np.arange(90)
    ramp = 0.05 + 0.65 * rise(np.minimum(steps / 31, 1.0))
    after = 0.8 * np.clip(1 - steps / 80, 0, 1) ** 2  # counts from 0
    exact = np.where(steps < 31, ramp, after)
    for values in (jax.jit(jax.vmap(eta))(jnp.asarray(steps)), [*map(eta, range(90))]):
        np.testing.assert_allclose(values, exact, rtol=2e-5, atol=1e-8)
        assert np.isrealobj(np.asarray(values))


def test_warmup_without_steps_and_into_a_number():
    eta = schedules.warmup(5.0, 0, 0.3)
    assert [float(eta(step)) for step in (0, 1, 100)] == [0.3] * 3
    eta = schedules.warmup(5.0, 2, 0.3)
    np.testing.assert_allclose([eta(k) for k in range(4)], [0.0, 2.5, 0.3, 0.3])


def test_staircase_drops_after_its_boundaries():
    eta = schedules.staircase(0.8, (1.5, 3, 7.25), steps_per_epoch=6.5)
    steps = np.arange(60)
    boundaries = np.array([9, 19, 47])  # 9.75, 19.5, 47.125
    exact = 0.8 * 0.1 ** (steps[:, None] > boundaries).sum(axis=1)
    values = jax.jit(jax.vmap(eta))(jnp.asarray(steps))
    np.testing.assert_allclose(values, exact, rtol=1e-6)
    assert float(schedules.staircase(0.8, (), steps_per_epoch=1)(9)) == 0.8


def test_boundaries_of_a_staircase_may_meet():
    eta = schedules.staircase(1.0, (1, 2), steps_per_epoch=0.4)
    assert [float(eta(step)) for step in (0, 1)] == pytest.approx([1.0, 0.01])


P, W, S = "polynomial", "warmup", "staircase"
SETTINGS = {
    P: {"init_value": 0.1, "power": 2, "start": 1, "end": 4, "steps_per_epoch": 10},
    W: {"peak_value": 1.0, "steps": 5, "after": 0.5},
    S: {"init_value": 1.0, "epochs": (1, 2), "steps_per_epoch": 10},
}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (P, {"init_value": -0.1}, "init_value=-0.1 must be 0 or positive; an"),
        (P, {"power": 0.0}, "power=0.0 must be positive; 1 is a linear"),
        (P, {"power": float("nan")}, "power=nan must be positive"),
        (P, {"start": -1.0}, "start=-1.0 must be 0 or positive; 0 decays"),
        (P, {"end": 1.0}, "end=1.0 must be larger than start=1; both"),
        (P, {"steps_per_epoch": 0.0}, "steps_per_epoch=0.0 must be positive"),
        (W, {"peak_value": -1.0}, "peak_value=-1.0 must be 0 or positive"),
        (W, {"init_value": -1.0}, "init_value=-1.0 must be 0 or positive"),
        (W, {"after": -0.1}, "after=-0.1 must be 0 or positive"),
        (W, {"steps": -1}, "steps=-1 must be a whole number, ≥ 0; for epochs"),
        (W, {"shape": "cosine"}, "shape='cosine' must be 'linear', 'quadratic' or"),
        (S, {"init_value": -1.0}, "init_value=-1.0 must be 0 or positive"),
        (S, {"epochs": (0, 3)}, "epochs=0 must be positive; pass .* for a constant"),
        (S, {"epochs": (1, "2")}, "epochs='2' must be a number, positive; pass"),
        (S, {"epochs": (1, float("nan"))}, "epochs=nan must be positive; pass"),
        (P, {"end": float("inf")}, "end=inf must be positive; it is the epoch from"),
        (P, {"end": "5"}, "end='5' must be a number, positive; it is the epoch"),
        (S, {"epochs": [3, 3]}, r"epochs=\(3, 3\) must be positive and asc"),
        (S, {"steps_per_epoch": 0}, "steps_per_epoch=0 must be positive; it"),
    ],
)
def test_settings_out_of_range(name, change, message):
    function = inspect.unwrap(getattr(schedules, name))
    with pytest.raises(ValueError, match=message):
        function(**(SETTINGS[name] | change))


def test_the_first_damping_falls_by_tenths_to_its_floor():
    found = [float(schedules.first_damping(jnp.asarray(k))) for k in (0, 5, 33, 34, 99)]
    expected = [0.1, 0.059049, 0.00309031543826443, 0.003, 0.003]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
