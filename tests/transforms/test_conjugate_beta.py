"""The rules for β against their authors' vector formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from lbopt.transforms import conjugate_beta
from lbopt.transforms.conjugate_beta import RULES, Products

RNG = np.random.default_rng(0)
G_BEFORE, G, D = RNG.normal(size=(3, 6))
if D @ (G - G_BEFORE) < 0:
    D = -D


def products(g=G, g_before=G_BEFORE, d=D, p=None):
    """With a fixed diagonal preconditioner."""
    p = np.ones(6) if p is None else p
    y, z, z_before = g - g_before, p * g, p * g_before
    values = {
        "gz": g @ z,
        "gz_before": g_before @ z_before,
        "gz_cross": g @ z_before,
        "yz": y @ z,
        "dy": d @ y,
        "dg": d @ g,
        "yy": y @ (z - z_before),
    }
    return Products(**{name: jnp.asarray(x) for name, x in values.items()})


def formulas(p):
    """As the authors write them, on vectors."""
    y, metric = G - G_BEFORE, np.diag(p)
    hs, dy = G @ metric @ y / (D @ y), G @ metric @ G / (D @ y)
    return {
        "fletcher_reeves": G @ metric @ G / (G_BEFORE @ metric @ G_BEFORE),
        "polak_ribiere": G @ metric @ y / (G_BEFORE @ metric @ G_BEFORE),
        "hestenes_stiefel": hs,
        "dai_yuan": dy,
        "hybrid": max(0, min(hs, dy)),
        "hager_zhang": (metric @ y - 2 * D * (y @ metric @ y) / (D @ y)) @ G / (D @ y),
    }


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("p", [np.ones(6), RNG.uniform(0.5, 2, 6)], ids=["1", "diag"])
def test_is_the_formula(name, p):
    beta = RULES[name].beta(products(p=p))
    np.testing.assert_allclose(beta, formulas(p)[name], rtol=1e-5)


def test_every_rule_is_a_function_of_the_module():
    for name, rule in RULES.items():
        assert rule.beta is getattr(conjugate_beta, name)


@pytest.mark.parametrize("name", RULES)
def test_rules_use_no_more_than_they_keep(name):
    # What is not kept is (), which arithmetic refuses.
    rule, p = RULES[name], products()
    if not rule.keeps_residual:
        p = p._replace(gz_cross=(), yy=())
    if not rule.keeps_gradient:
        p = p._replace(yz=(), dy=(), yy=())
    assert np.isfinite(rule.beta(p))


@pytest.mark.parametrize(
    "name", ["hestenes_stiefel", "dai_yuan", "hybrid", "hager_zhang"]
)
@pytest.mark.parametrize("dy", [0.0, -1.0])
def test_no_curvature_along_the_direction_restarts(name, dy):
    assert RULES[name].beta(products()._replace(dy=jnp.asarray(dy))) == 0


def test_hybrid_lies_between_zero_and_both():
    rng = np.random.default_rng(1)
    kinds = set()
    for _ in range(60):
        p = products(*rng.normal(size=(3, 6)))
        hs, dy = RULES["hestenes_stiefel"].beta(p), RULES["dai_yuan"].beta(p)
        beta = RULES["hybrid"].beta(p)
        assert beta == max(0, min(hs, dy))
        kinds.add("zero" if beta == 0 else "hs" if beta == hs else "dy")
    assert kinds == {"zero", "hs", "dy"}
