"""The messages about settings; those about arrays are in ``test_kfac``."""

import inspect

import jax.numpy as jnp
import pytest

import lbopt
from lbopt.transforms import validation
from tests.problems import Mlp, classify


@pytest.fixture(scope="module")
def layers():
    return classify(Mlp()).trace()


def refused(layers, settings, message):
    # Before the types are checked, which would object in other words.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(lbopt.scale_by_kfac)(layers, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size=0 must be a number of rows, ≥ 1, or None"),
        ({"block_size": 2.5}, "block_size=2.5 must be a number of rows"),
        ({"axis_size": 0}, "axis_size=0 must be a number of devices, ≥ 1"),
        (
            {"axis_name": "data", "axis_size": 1.0},
            "axis_size=1.0 must be a number of devices",
        ),
        ({"axis_size": 2}, "axis_size=2 needs axis_name, the mesh axis"),
        ({"norm_damping": 0}, "norm_damping=0 must be positive"),
        ({"norm_damping": -1.0}, "norm_damping=-1.0 must be positive"),
    ],
)
def test_sizes_out_of_range(layers, settings, message):
    refused(layers, settings, message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stale_threshold": -1}, "stale_threshold=-1 must not be negative; SP-NGD"),
        ({"factor_decay": 0.95}, "it needs factor_decay=0, not 0.95; pass stale_thr"),
        ({"stats_period": 2}, "it needs stats_period=1, not 2"),
        ({"inverse_period": 5}, "it needs inverse_period=1, not 5"),
        ({"stats_period": jnp.asarray(2)}, "it needs stats_period=1, not 2"),
    ],
)
def test_an_adaptive_refresh_takes_no_averages_or_periods(layers, settings, message):
    refused(layers, {"factor_decay": 0.0, "stale_threshold": 0.1} | settings, message)


def test_the_default_average_does_not_go_with_an_adaptive_refresh(layers):
    refused(layers, {"stale_threshold": 0.1}, "it needs factor_decay=0, not 0.95")


def test_settings_that_are_taken(layers):
    for settings in (
        {"factor_decay": 0.0, "stale_threshold": 0.1},
        {"factor_decay": 0, "stale_threshold": 0},
        {"block_size": 1},
        {"axis_name": "data", "axis_size": 8, "norm_damping": 16},
    ):
        lbopt.scale_by_kfac(layers, **settings)


@pytest.mark.parametrize("placement", ["comm", "memory", 0, 0.5, 1])
def test_placements(placement):
    validation.check_placement(placement)


@pytest.mark.parametrize("placement", ["owner", -0.1, 1.5, None, float("nan")])
def test_placements_that_are_none(placement):
    message = (
        rf"placement={placement!r} must be 'comm', 'memory', or a share in \[0, 1\]"
    )
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(validation.check_placement)(placement)
