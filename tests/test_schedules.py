"""Schedules in epochs."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lbopt import schedules

EXAMPLES = 1_281_167  # of ImageNet


# sp_ngd.md section 7 (Osawa et al., Table 2): batch, p, start, end, η₀ and epochs;
# section 6.2: what the last value is, as a part of η₀.
@pytest.mark.parametrize(
    ("batch", "power", "start", "end", "rate", "epochs", "last"),
    [
        (4_096, 11.0, 1, 53, 8.18e-3, 35, 8.6e-6),
        (8_192, 8.0, 1, 53.5, 1.25e-2, 35, 2.4e-4),
        (16_384, 8.0, 1, 53.5, 2.5e-2, 35, 2.4e-4),
        (32_768, 3.5, 1.5, 49.5, 3.0e-2, 45, 2.5e-4),
        (65_536, 2.9, 2, 64.5, 4.0e-2, 60, 4.9e-4),
        (131_072, 2.9, 3, 100, 7.0e-2, 90, 1.4e-3),
    ],
)
def test_the_paper_s_runs_end_where_they_should(
    batch, power, start, end, rate, epochs, last
):
    steps_per_epoch = EXAMPLES / batch
    eta = schedules.polynomial(rate, power, start, end, steps_per_epoch=steps_per_epoch)
    factor = float(eta(epochs * steps_per_epoch)) / rate
    np.testing.assert_allclose(factor, last, rtol=2e-2)  # stated to two digits
    exact = (1 - (epochs - start) / (end - start)) ** power
    np.testing.assert_allclose(factor, exact, rtol=1e-5)


def test_every_step_is_the_equation():
    eta = schedules.polynomial(0.3, 2.5, 1.25, 3.6, steps_per_epoch=7.5)
    steps = np.arange(40)
    epochs = steps / 7.5
    inside = np.clip(1 - (epochs - 1.25) / (3.6 - 1.25), 0, 1)
    values = jax.jit(jax.vmap(eta))(jnp.asarray(steps))  # a traced step
    np.testing.assert_allclose(values, 0.3 * inside**2.5, rtol=2e-5, atol=1e-9)
    assert len(np.unique(values[10:27])) == 17  # the epoch is a fraction


def test_constant_before_and_zero_after():
    eta = schedules.polynomial(0.3, 2.0, 1, 4, steps_per_epoch=10)
    assert {float(eta(step)) for step in range(11)} == {float(np.float32(0.3))}
    assert float(eta(11)) < 0.3
    assert float(eta(39)) > 0
    assert {float(eta(step)) for step in (40, 41, 10_000)} == {0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_value": -0.1}, r"init_value=-0.1 must not be negative; "),
        ({"power": 0.0}, r"power=0.0 must be positive; use a number"),
        ({"power": float("nan")}, r"power=nan must be positive"),
        ({"start": -1.0}, r"start=-1.0 must not be negative; 0 decays from"),
        ({"end": 1.0}, r"end=1.0 must be larger than start=1.0; both are epochs"),
        ({"steps_per_epoch": 0.0}, r"steps_per_epoch=0.0 must be positive; it is"),
    ],
)
def test_numbers_out_of_range(change, message):
    settings = {
        "init_value": 0.1,
        "power": 2.0,
        "start": 1.0,
        "end": 4.0,
        "steps_per_epoch": 10.0,
    }
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(schedules.polynomial)(**(settings | change))


def mlperf_4096():
    """Batch 4,096: 5 epochs to 10, then a square to 1e-4 at the end of epoch 42."""
    start, total = round(5 * EXAMPLES / 4_096), round(42 * EXAMPLES / 4_096)
    decay = optax.polynomial_schedule(10.0, 1e-4, 2, total - start + 1, start)
    return schedules.warmup(10.0, start, decay), start, total


def test_warmup_of_mlperf():
    eta, start, total = mlperf_4096()
    assert total == 13_137  # as published
    assert float(eta(0)) == 0.0
    np.testing.assert_allclose(eta(start // 2), 10 * (start // 2) / start, rtol=1e-6)
    np.testing.assert_allclose(eta(start), 10.0, rtol=1e-6)
    # One step short of the end: the source decays over one step more than it has.
    np.testing.assert_allclose(eta(total), 1e-4, rtol=1e-2)
    np.testing.assert_allclose(eta(total + 1), 1e-4, rtol=1e-6)
    middle = (start + total) // 2
    part = 1 - (middle - start) / (total - start + 1)
    np.testing.assert_allclose(eta(middle), 1e-4 + (10 - 1e-4) * part**2, rtol=1e-5)


def test_warmup_of_caffe_at_8k():
    decay = optax.polynomial_schedule(10.0, 0.0, 2, 15_600)
    eta = schedules.warmup(10.0, 600, decay, init_value=1.0)
    values = [float(eta(step)) for step in (0, 300, 599, 600, 15_600)]
    jump = 10 * (15_000 / 15_600) ** 2
    assert round(jump, 4) == 9.2456
    np.testing.assert_allclose(values, [1.0, 5.5, 9.985, jump, 0.0], rtol=1e-6)


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
    np.testing.assert_allclose(
        jax.jit(jax.vmap(eta))(jnp.asarray(steps)), exact, rtol=2e-5, atol=1e-8
    )
    np.testing.assert_allclose(
        [eta(int(k)) for k in steps], exact, rtol=2e-5, atol=1e-8
    )


def test_warmup_of_nlcg():
    steps_per_epoch = 50_000 / 2_048
    count = int(25 * steps_per_epoch)
    assert count == 610
    rest = schedules.staircase(0.8, (102, 153, 204), steps_per_epoch=steps_per_epoch)
    eta = schedules.warmup(0.8, count, rest, init_value=1e-3, shape="sqrt")
    for k in (0, 1, 100, 305, 609):
        exact = 0.8 - (0.8 - 1e-3) * (1 - k / count) ** 0.5
        np.testing.assert_allclose(eta(k), exact, rtol=1e-5)
    np.testing.assert_allclose(eta(count), 0.8, rtol=1e-6)
    for epoch, before, after in ((102, 0.8, 0.08), (153, 0.08, 0.008)):
        boundary = int(steps_per_epoch * epoch)
        np.testing.assert_allclose(eta(boundary), before, rtol=1e-5)
        np.testing.assert_allclose(eta(boundary + 1), after, rtol=1e-5)


def test_warmup_without_steps_and_into_a_number():
    eta = schedules.warmup(5.0, 0, 0.3)
    assert [float(eta(step)) for step in (0, 1, 100)] == [0.3] * 3
    eta = schedules.warmup(5.0, 2, 0.3, init_value=1.0)
    np.testing.assert_allclose([eta(k) for k in range(4)], [1.0, 3.0, 0.3, 0.3])


def test_staircase_drops_after_its_boundaries():
    eta = schedules.staircase(0.8, (1.5, 3, 7.25), 0.25, steps_per_epoch=6.5)
    steps = np.arange(60)
    boundaries = np.array([9, 19, 47])  # 9.75, 19.5, 47.125
    exact = 0.8 * 0.25 ** (steps[:, None] > boundaries).sum(axis=1)
    values = jax.jit(jax.vmap(eta))(jnp.asarray(steps))
    np.testing.assert_allclose(values, exact, rtol=1e-6)
    assert float(schedules.staircase(0.8, (), steps_per_epoch=1)(9)) == 0.8


def test_boundaries_of_a_staircase_may_meet():
    eta = schedules.staircase(1.0, (1, 2), 0.5, steps_per_epoch=0.4)
    assert [float(eta(step)) for step in (0, 1)] == [1.0, 0.25]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peak_value": -1.0}, r"peak_value=-1.0 must not be negative"),
        ({"init_value": float("nan")}, r"init_value=nan must not be negative"),
        ({"after": -0.1}, r"after=-0.1 must not be negative"),
        ({"steps": -1}, r"steps=-1 must be a whole number, at least 0; for epochs"),
        ({"steps": 2.5}, r"steps=2.5 must be a whole number"),
        ({"shape": "cosine"}, r"shape='cosine' must be one of linear, quadratic, sqrt"),
    ],
)
def test_warmups_out_of_range(change, message):
    settings = {"peak_value": 1.0, "steps": 5, "after": 0.5}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(schedules.warmup)(**(settings | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_value": -1.0}, r"init_value=-1.0 must not be negative"),
        ({"factor": 0.0}, r"factor=0.0 must be positive; 0.1 is"),
        ({"epochs": (0, 3)}, r"epochs=\(0, 3\) must be positive and ascend"),
        ({"epochs": [3, 3]}, r"epochs=\(3, 3\) must be positive and ascend"),
        ({"steps_per_epoch": 0}, r"steps_per_epoch=0 must be positive; it is"),
    ],
)
def test_staircases_out_of_range(change, message):
    settings = {"init_value": 1.0, "epochs": (1, 2), "steps_per_epoch": 5}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(schedules.staircase)(**(settings | change))
