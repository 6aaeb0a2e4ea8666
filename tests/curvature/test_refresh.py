"""The clocks, and the mask that is read off a state."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lbopt
from lbopt.curvature import refresh as clocks
from tests.problems import Mlp, classify


def test_is_due_counts_from_zero():
    due = [bool(clocks.is_due(jnp.asarray(count), 3)) for count in range(7)]
    assert due == [True, False, False, True, False, False, True]


def test_everything_is_due_at_first():
    clock = clocks.init_refresh(3, 2)
    assert clock.due.tolist() == [True] * 3
    assert clock.statistic_step.tolist() == [-1] * 3
    assert clock.inverse_step.tolist() == [-1] * 2


def chains(layers):
    inner = lbopt.scale_by_kfac(layers, stats_period=2)
    return {
        "bare": inner,
        "chain": optax.chain(optax.identity(), inner, optax.trace(0.9)),
        "clip": lbopt.clip_by_kl(inner, 1.0, 0.1),
        "finite": optax.apply_if_finite(inner, 3),
        "steps": optax.MultiSteps(inner, 2),
        "masked": optax.masked(inner, {"first": True, "last": True}),
    }


@pytest.mark.parametrize("name", ["bare", "chain", "clip", "finite", "steps", "masked"])
def test_the_mask_is_found_in_any_chain(name):
    problem = classify(Mlp())
    layers = problem.trace()
    state = chains(layers)[name].init(problem.params)
    mask = lbopt.refresh(state)
    assert set(mask) == {"first", "last"}
    assert all(bool(flag) for flag in jax.tree.leaves(mask))


def test_two_curvature_transforms_share_the_mask():
    problem = classify(Mlp())
    layers = problem.trace()
    tx = optax.partition(
        {"often": lbopt.scale_by_kfac(layers), "rarely": lbopt.scale_by_kfac(layers)},
        {"first": "often", "last": "rarely"},
    )
    assert set(lbopt.refresh(tx.init(problem.params))) == {"first", "last"}


def test_a_state_without_curvature():
    state = optax.sgd(0.1, momentum=0.9).init({"w": jnp.ones(2)})
    message = r"opt_state=tuple holds no curvature transform.*leave due= out"
    with pytest.raises(ValueError, match=message):
        lbopt.refresh(state)
