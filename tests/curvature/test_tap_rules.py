"""Layers of the user's own, tapped by the user's own rules."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt.curvature import block, kronecker, linear_maps, tap_rules, unit_wise
from tests.problems import CLASSES, FEATURES, WIDTH, classify, inputs


class Gain(nn.Module):
    """Multiplies each channel by a number."""

    @nn.compact
    def __call__(self, values):
        scale = self.param("scale", nn.initializers.ones, values.shape[-1:])
        return values * scale[None]


class Net(nn.Module):
    """Two gains, one of them used twice, around a layer that is known."""

    @nn.compact
    def __call__(self, x):
        twice = Gain(name="twice")
        x = nn.Dense(WIDTH, name="dense")(twice(jnp.tanh(twice(x))))
        return nn.Dense(CLASSES, name="head")(Gain(name="once")(x))


def gain_block(seen, batched, choice):
    del choice
    (channels,) = seen.params["scale"].shape
    dtype = block.statistics_dtype(seen.params["scale"].dtype)
    return unit_wise.full_block(channels, ("scale",), batched, dtype)


def gain_residual(seen):
    x = seen.arguments["values"]
    zero, one = jnp.zeros_like(x[:1]), jnp.ones_like(x[:1])
    return unit_wise.NormResidual(x, zero, one)


RULES = {Gain.__call__: tap_rules.Rule(gain_block, gain_residual, ("scale",))}


def test_a_rule_gives_a_layer_its_block():
    layers = classify(Net()).trace(rules=RULES, strict=True, verify=True)
    kinds = {path: layer.block.kind for path, layer in layers.items()}
    assert kinds == {
        "twice": "full",
        "dense": "kronecker",
        "once": "full",
        "head": "kronecker",
    }
    assert layers["once"].why == "by a rule of your own"
    assert layers["dense"].why == "expand over locations"


def test_the_statistic_is_the_mean_of_each_examples_products():
    problem = classify(Net())
    layers = problem.trace(rules=RULES)
    curvature = problem.captured(layers)

    def one(x, y):
        return jax.grad(problem.loss_fn)(problem.params, x[None], y[None])

    each = jax.vmap(one)(*problem.args)["once"]["scale"]
    expected = each.T @ each / len(each)
    np.testing.assert_allclose(curvature["once"].f, expected, rtol=1e-5, atol=1e-7)


def test_a_lifted_layer_has_a_statistic_for_each_copy():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            gain = nn.scan(
                lambda module, x, _: (jnp.tanh(module(x)), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            x, _ = gain(Gain(name="gain"), x, None)
            return nn.Dense(CLASSES, name="head")(x)

    layers = classify(Stack()).trace(rules=RULES, verify=True)
    assert layers["gain"].block.kind == "full"
    assert layers["gain"].factor_shapes().f.shape[0] == 3


def test_a_rule_of_ones_own_comes_before_the_librarys():
    def plain(seen, batched, choice):
        linear = linear_maps.dense_linear(seen.params["kernel"].shape, True, batched)
        return kronecker.kronecker_block(linear, "reduce", jnp.float32)

    rule = tap_rules.Rule(plain, lambda seen: seen.arguments["inputs"])
    problem = classify(nn.Dense(CLASSES))
    layers = problem.trace(rules={nn.Dense.__call__: rule}, verify=True)
    (layer,) = layers.values()
    assert layer.why == "by a rule of your own"
    (statistics,) = problem.evaluate(layers)[2].values()
    assert statistics.a.shape == (FEATURES + 1, FEATURES + 1)


def test_a_refusal_falls_back_with_its_reason():
    def refuse(seen, batched, choice):
        raise tap_rules.Refusal("it is Tuesday")

    rules = {Gain.__call__: tap_rules.Rule(refuse, gain_residual, ("scale",))}
    layers = classify(Net()).trace(rules=rules)
    assert layers["once/scale"].fallback
    assert layers["once/scale"].why == "it is Tuesday"


def test_what_is_no_rule_is_refused_by_name():
    problem = classify(Gain(), inputs()[:, :CLASSES])
    with pytest.raises(ValueError, match=r"rules\[Gain.__call__\].* a function.*Rule"):
        problem.trace(rules={Gain.__call__: gain_block})
    with pytest.raises(ValueError, match=r"rules\[.*Gain.*\].*a method, .*Gain.__call"):
        problem.trace(rules={Gain: RULES[Gain.__call__]})


def test_arguments_are_bound_by_name_with_defaults():
    def method(inputs, mask=None, *, train=False):
        raise NotImplementedError

    bound = tap_rules.bind_arguments(method, (1,), {"train": True})
    assert dict(bound) == {"inputs": 1, "mask": None, "train": True}
