"""The messages about settings and arrays, before anything is compiled."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lbopt
from tests.problems import Mlp, classify

ADAPTIVE = {"factor_decay": 0.0, "stale_threshold": 0.1}


@pytest.fixture(scope="module")
def layers():
    return classify(Mlp()).trace()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": -1e-3}, r"damping=-0.001 must be positive; 1e-3 is a usual start"),
        ({"damping": 0.0}, "damping=0.0 must be positive"),
        ({"damping": float("nan")}, "damping=nan must be positive"),
        ({"norm_damping": 0}, "norm_damping=0 must be positive; 1 damps them like"),
        ({"factor_decay": 1.0}, r"factor_decay=1.0 must lie in \[0, 1\); 0 keeps"),
        ({"factor_decay": -0.1}, r"factor_decay=-0.1 must lie in \[0, 1\)"),
        (
            {"periods": 5},
            r"periods=5 must be lbopt.Periods\(statistics=…, inverses=…\)",
        ),
        ({"placement": "comm"}, r"placement='comm' must be lbopt.Placement\(axis_name"),
        ({"block_size": 0}, "block_size=0 must be a whole number, ≥ 1; None keeps"),
        ({"block_size": 2.5}, "block_size=2.5 must be a whole number, ≥ 1"),
        ({"block_size": jnp.asarray(3)}, "block_size=3 must be a Python int, for it"),
        (ADAPTIVE | {"stale_threshold": -1}, "stale_threshold=-1 must be 0 or positi"),
        ({"stale_threshold": 0.1}, "factor_decay=0.95 must be 0 with stale_threshold="),
        (
            ADAPTIVE | {"periods": lbopt.Periods(statistics=2)},
            "periods.statistics=2 must be 1 with stale_threshold=0.1, which compares",
        ),
        (
            ADAPTIVE | {"periods": lbopt.Periods(inverses=5)},
            "periods.inverses=5 must be 1 with .* pass stale_threshold=None",
        ),
        (
            ADAPTIVE | {"periods": lbopt.Periods(statistics=jnp.asarray(2))},
            "periods.statistics=2 must be 1",
        ),
        ({"eigenvalues": "exact"}, "eigenvalues='exact' must be 'kronecker' or 'corr"),
        (
            {
                "eigenvalues": "corrected",
                "placement": lbopt.Placement("data", 2, "memory"),
            },
            "placement.inverses='memory' must not be set with eigenvalues='corrected'",
        ),
        (
            {
                "eigenvalues": "corrected",
                "placement": lbopt.Placement("data", 2, 0.5),
            },
            "placement.inverses=0.5 must not be set .*: every device .* use 'comm'",
        ),
        (
            {"eigenvalues": "corrected", "periods": lbopt.Periods(inverses=None)},
            "periods.inverses=None must not be set .*: BackgroundInversion .* give a",
        ),
        (
            {"eigenvalues": "corrected"} | ADAPTIVE,
            "stale_threshold=0.1 must not be set .* leave it None",
        ),
    ],
)
def test_settings_out_of_range(layers, settings, message):
    # Before the types are checked, which would object in other words.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(lbopt.scale_by_kfac)(layers, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        ADAPTIVE,
        {"factor_decay": 0, "stale_threshold": 0},
        {"factor_decay": np.float32(0.9), "damping": np.float64(1e-3)},
        {"damping": lambda count: 1e-3, "block_size": 1},
        {"placement": lbopt.Placement("data", 8), "norm_damping": 16},
        {"eigenvalues": "corrected", "placement": lbopt.Placement("data", 2)},
    ],
)
def test_settings_that_are_taken(layers, settings):
    lbopt.scale_by_kfac(layers, **settings)


def test_a_traced_period_passes_with_an_adaptive_refresh(layers):
    def count(period):
        lbopt.scale_by_kfac(layers, periods=lbopt.Periods(period, period), **ADAPTIVE)
        return period

    assert jax.jit(count)(1) == 1


def test_layers_of_another_kind(layers):
    make = inspect.unwrap(lbopt.scale_by_kfac)
    with pytest.raises(ValueError, match=r"layers=dict must be the result of lbopt"):
        make(dict(layers))
    with pytest.raises(ValueError, match=r"layers=\[\] must hold a layer that the los"):
        make(type(layers)({}))
