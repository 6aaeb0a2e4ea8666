"""Parameters named by what is found in their paths."""

import jax.numpy as jnp
import pytest

from lbopt.parameter_paths import matching

PARAMS = {"Conv_0": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "scale": jnp.ones(2)}


def test_a_mask_of_everything_else():
    mask = matching("skip", r"(^|/)(bias|scale)$").inverted(PARAMS)
    assert mask == {"Conv_0": {"kernel": True, "bias": False}, "scale": False}


def test_none_matches_nothing():
    nothing = matching("skip", None)
    nothing.require(PARAMS)
    assert nothing.inverted(PARAMS) == {
        "Conv_0": {"kernel": True, "bias": True},
        "scale": True,
    }


def test_an_expression_that_is_found_nowhere_is_refused():
    with pytest.raises(
        ValueError,
        match=r"skip='\^bais' is found in no path of the parameters \(Conv_0/bias, "
        r"Conv_0/kernel, scale\); correct it, or pass skip=None",
    ):
        matching("skip", "^bais").require(PARAMS)
    many = {f"w{i}": jnp.ones(1) for i in range(9)}
    with pytest.raises(ValueError, match=r"\(w0, w1, w2, w3, w4 and 4 more\)"):
        matching("stacked", "x").inverted(many)


def test_what_is_no_expression_is_refused():
    with pytest.raises(ValueError, match=r"skip='\(' must be a regular expression: "):
        matching("skip", "(")
