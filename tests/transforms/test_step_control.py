"""The step control: its table, its bounds, its two clocks."""

import jax.numpy as jnp
import pytest

from lbopt.transforms import step_control
from lbopt.transforms.step_control import StepControlState
from tests.problems import assert_equal

# nlcg.md section 2: a ratio of losses, what b is multiplied by, the share undone.
ROWS = [
    (1.20, 0.5, 0.9),
    (1.1501, 0.5, 0.9),
    (1.1499, 0.7, 0.7),
    (1.1251, 0.7, 0.7),
    (1.1249, 0.8, 0.5),
    (1.1001, 0.8, 0.5),
    (1.0999, 0.9, 0.3),
    (1.0751, 0.9, 0.3),
    (1.0749, 0.95, 0.2),
    (1.0501, 0.95, 0.2),
    (1.0499, 0.975, 0.1),
    (1.0251, 0.975, 0.1),
    (1.0249, 1.0, 0.1),
    (1.0101, 1.0, 0.1),
    (1.0099, "grows", 0.0),
    (1.0, "grows", 0.0),
    (0.3, "grows", 0.0),
]
GROWTH = {"step": 1.05, "online": 1.02}
both_modes = pytest.mark.parametrize("mode", ["step", "online"])


def decided(mode, ratio, b=0.6, count=10):
    """A decision at a ratio: with E = 1 before the loss, or at the last decision."""
    if mode == "step":  # E after the loss is the ratio
        state = StepControlState(*map(jnp.asarray, (b, ratio, 1.0)))
        loss = ratio
    else:  # ℓ / (0.7 + 0.3 ℓ) is the ratio
        loss = 0.7 * ratio / (1 - 0.3 * ratio)
        state = StepControlState(*map(jnp.asarray, (b, 1.0, 1.0)))
    return step_control.update(mode, 5, state, loss, jnp.asarray(count))


@both_modes
@pytest.mark.parametrize(("ratio", "factor", "share"), ROWS)
def test_every_row_of_the_table(mode, ratio, factor, share):
    state, undone = decided(mode, ratio)
    factor = GROWTH[mode] if factor == "grows" else factor
    assert float(state.multiplier) == pytest.approx(0.6 * factor, rel=1e-6)
    assert float(undone) == pytest.approx(share)


def test_a_ratio_of_just_a_hundredth_changes_nothing():
    reference = 1 + jnp.float32(0.01)
    state = StepControlState(jnp.asarray(0.6), reference, jnp.asarray(1.0))
    after, undone = step_control.update("step", 5, state, reference, jnp.asarray(5))
    assert after.average == reference  # 0.7 E + 0.3 E is E here
    assert after.multiplier == state.multiplier
    assert undone == 0


@both_modes
def test_the_multiplier_has_bounds(mode):
    assert float(decided(mode, 2.0, b=1.5e-4)[0].multiplier) == pytest.approx(1e-4)
    assert decided(mode, 0.5, b=0.99)[0].multiplier == 1
    assert decided(mode, 0.5, b=1.0)[0].multiplier == 1


@both_modes
def test_the_first_loss_is_the_average(mode):
    start = step_control.init()
    state, undone = step_control.update(mode, 5, start, 7.0, jnp.asarray(0))
    assert [float(x) for x in state] == [1.0, 7.0, 7.0]
    assert undone == 0


def run(mode, losses, b=1.0, period=5):
    state = step_control.init()._replace(multiplier=jnp.asarray(b))
    history = []
    for count, loss in enumerate(losses):
        state, undone = step_control.update(
            mode, period, state, loss, jnp.asarray(count)
        )
        history.append((float(state.multiplier), float(undone)))
    return history


def test_fifteen_calm_periods_recover_from_a_halving():
    history = run("step", [2.0] * 81, b=0.5)
    values = [b for b, _ in history]
    assert values[74] < 1  # fourteen decisions, at steps 5 to 70
    assert values[75] == 1
    assert all(b == values[5 * (k // 5)] for k, b in enumerate(values))


def test_the_step_control_decides_at_multiples_of_the_period_only():
    history = run("step", [1.0, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0], period=3)
    undone = [share for _, share in history]
    assert undone == pytest.approx([0, 0, 0, 0, 0, 0, 0.9, 0])
    assert [b for b, _ in history] == [1, 1, 1, 1, 1, 1, 0.5, 0.5]
    # A jump at a decision itself is seen at once.
    jump = run("step", [1.0, 1.0, 1.0, 9.0], period=3)
    assert jump[-1] == (0.5, pytest.approx(0.9))


@both_modes
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_is_forgotten(mode, bad):
    state = decided(mode, 1.2)[0]
    after, undone = step_control.update(mode, 5, state, bad, jnp.asarray(15))
    assert_equal(after, state)
    assert undone == 0
