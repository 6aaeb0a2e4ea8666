"""Schedules in epochs."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
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
