"""Sums that add up over the parts of a batch, and one division at the end."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lbopt
from lbopt.collectives import Axis
from lbopt.curvature import evaluation
from tests import oracles

B, C = 6, 3


class Gated(nn.Module):
    """A dense layer, and an array without a tap."""

    @nn.compact
    def __call__(self, x):
        gate = self.param("gate", nn.initializers.ones, (1, C))
        return gate * nn.Dense(C, name="dense")(x)


MODEL = Gated()
X = jax.random.normal(jax.random.key(0), (B, 2))
Y = jnp.array([0, 1, 2, 2, 1, 0])
PARAMS = MODEL.init(jax.random.key(1), X)["params"]
ONE = Axis(None, 1)


def losses(params, x, y):
    f = lbopt.likelihood(MODEL.apply({"params": params}, x), "categorical")
    return -jnp.sum(jax.nn.one_hot(y, C) * jax.nn.log_softmax(f), -1)


def mean(params, x, y):
    return jnp.mean(losses(params, x, y))


def weighted(params, x, y, w):
    return jnp.sum(losses(params, x, y) * w) / jnp.sum(w)


def evaluator_of(loss_fn, args, fisher="empirical"):
    layers = lbopt.trace_layers(loss_fn, PARAMS, *args)
    return evaluation.make_evaluator(loss_fn, layers, has_aux=False, fisher=fisher)


def in_parts(evaluator, parts, loss_scale=None):
    """Loss, gradient and statistics of a batch that is cut into equal parts."""

    @oracles.quick_jit
    def run(parts):
        totals = [
            evaluation.evaluate(
                evaluator,
                PARAMS,
                part,
                {},
                rng=None,
                due=None,
                gradient=True,
                additive=True,
                loss_scale=loss_scale,
            )
            for part in parts
        ]
        mean = jax.tree.map(lambda *x: sum(x) / len(x), *totals)
        curvature = evaluation.finish(evaluator, mean, None, axis=ONE, parts=len(parts))
        whole = evaluation.divided(evaluator, mean, ONE)
        return whole.value, whole.grads, curvature

    return run(parts)


def expected_of(x, y, w):
    """From the definition, example by example."""
    x, y, w = (jnp.asarray(v) for v in (x, y, w))
    value, grads = oracles.quick_jit(jax.value_and_grad(weighted))(PARAMS, x, y, w)
    own = oracles.quick_jit(
        jax.vmap(lambda x, y: jax.grad(mean)(PARAMS, x[None], y[None]))
    )(x, y)
    g = np.asarray(own["dense"]["bias"])  # the gradient by the layer's outputs
    a, w = oracles.with_ones(np.asarray(x)), np.asarray(w)
    total = np.sum(w)
    return (
        value,
        grads,
        {
            "a": np.einsum("n,ni,nj->ij", w, a, a) / total,
            "g": np.einsum("n,ni,nj->ij", w, g, g) / total,
            "f": total * np.asarray(grads["gate"]) ** 2,
        },
    )


def assert_agrees(found, expected):
    value, grads, curvature = found
    assert oracles.error(value, expected[0]) < 1e-5
    for one, other in zip(
        jax.tree.leaves(grads), jax.tree.leaves(expected[1]), strict=True
    ):
        assert oracles.error(one, other) < 2e-5
    dense, gate = curvature["dense"], curvature["gate"]
    assert oracles.error(dense.a, expected[2]["a"]) < 2e-5
    assert oracles.error(dense.g, expected[2]["g"]) < 2e-5
    assert oracles.error(gate.f, expected[2]["f"]) < 5e-5


def cut(n, *args):
    return [tuple(x[i : i + n] for x in args) for i in range(0, len(args[0]), n)]


@pytest.mark.parametrize("size", [B, 2])
@pytest.mark.parametrize("loss_scale", [None, 64.0])
def test_parts_add_up_to_the_whole_batch(size, loss_scale):
    evaluator = evaluator_of(mean, (X, Y))
    found = in_parts(evaluator, cut(size, X, Y), loss_scale)
    assert_agrees(found, expected_of(X, Y, jnp.ones(B)))


@pytest.mark.parametrize(
    "w",
    [
        jnp.array([True, True, True, False, False, False]),  # a part of padding alone
        jnp.array([2.0, 0, 0.5, 1, 0, 3]),
        jnp.zeros(B).at[4].set(1.0),
    ],
    ids=["mask", "numbers", "one"],
)
def test_parts_of_unequal_weight_add_up(w):
    evaluator = evaluator_of(weighted, (X, Y, w))
    assert_agrees(in_parts(evaluator, cut(2, X, Y, w)), expected_of(X, Y, w))


def test_what_a_part_totals():
    w = jnp.array([2.0, 0, 0.5, 1, 0, 3])
    evaluator = evaluator_of(weighted, (X, Y, w))

    def totals(additive):
        run = oracles.quick_jit(
            lambda *args: evaluation.evaluate(
                evaluator,
                PARAMS,
                args,
                {},
                rng=None,
                due=None,
                gradient=additive,
                additive=additive,
            )
        )
        return run(X, Y, w)

    value, grads, _ = expected_of(X, Y, w)
    alone, part = totals(False), totals(True)
    assert (alone.share, alone.terms, alone.grads) == (1, 6.5, ())
    assert oracles.error(alone.value, value) < 1e-6
    np.testing.assert_allclose(part.share, 6.5 / B, rtol=1e-6)
    assert part.terms == B
    assert oracles.error(part.value, value * 6.5 / B) < 1e-6
    assert oracles.error(part.grads["gate"], grads["gate"] * 6.5 / B) < 1e-5


def test_means_over_a_part_are_multiplied_by_its_share():
    w = jnp.ones(B)
    tree = {"a": jnp.array([2.0, jnp.nan])}
    own = evaluator_of(weighted, (X, Y, w))
    half = evaluation.times_share(own, {"a": jnp.array([2.0])}, jnp.float32(0.5))
    assert half == {"a": 1}
    # Of padding alone, means are 0 / 0.
    none = evaluation.times_share(own, tree, jnp.float32(0))
    assert none["a"].tolist() == [0, 0]
    plain = evaluator_of(mean, (X, Y))
    assert evaluation.times_share(plain, tree, jnp.float32(0.5)) is tree


@pytest.mark.parametrize(
    ("fisher", "args", "message"),
    [
        ("sampled", (X, Y), "fisher='sampled' draws labels: pass rng="),
        ("empirical", (X[:0], Y[:0]), "loss_fn=mean holds no examples"),
    ],
)
def test_messages(fisher, args, message):
    evaluator = evaluator_of(mean, (X, Y), fisher)
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate(
            evaluator,
            PARAMS,
            args,
            {},
            rng=None,
            due=None,
            gradient=True,
            additive=False,
        )
