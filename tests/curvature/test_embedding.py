"""Embeddings: looked up, attended, and tied."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt.curvature import embedding
from tests import oracles
from tests.oracles import error, quick_jit

# float32 against float64: sums of at most a hundred products.
ROUNDING = 1e-5
WORDS, WIDTH, BATCH, LENGTH = 7, 4, 5, 6


class Model(nn.Module):
    """Words to logits over the same words, by the roles that are asked for."""

    lookup: bool = True
    attend: bool = True

    @nn.compact
    def __call__(self, words):
        embed = nn.Embed(WORDS, WIDTH, name="embed")
        x = embed(words) if self.lookup else nn.one_hot(words, WIDTH) + 0.5
        x = nn.tanh(nn.Dense(WIDTH, name="mix")(x))
        return embed.attend(x) if self.attend else nn.Dense(WORDS, name="top")(x)


def problem(model):
    rng = np.random.default_rng(0)
    words = jnp.asarray(rng.integers(0, WORDS - 1, (BATCH, LENGTH)))
    targets = jnp.asarray(rng.integers(0, WORDS, (BATCH, LENGTH)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), words)["params"]
    params = jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape)), shapes)

    def loss_fn(params, words, targets):
        f = model.apply({"params": params}, words)
        losses = optax.softmax_cross_entropy_with_integer_labels(f, targets)
        return jnp.mean(jnp.sum(losses, -1))

    return loss_fn, params, (words, targets)


def by_role(calls):
    """The two pairs of factors, summed row by row; None where a role is missing."""
    looked_up = attended = None
    for x, g in calls:
        g = np.asarray(g, np.float64)
        if np.issubdtype(x.dtype, np.integer):
            looked_up = oracles.second_moments(np.eye(WORDS)[x], g)
        else:
            # The other way round: the query is the input, the logits the outputs.
            query, logits = oracles.second_moments(np.asarray(x, np.float64), g)
            attended = logits, query
    return looked_up, attended


@pytest.mark.parametrize(
    ("lookup", "attend"), [(True, False), (False, True), (True, True)]
)
def test_factors_of_each_role(lookup, attend):
    loss_fn, params, (words, targets) = problem(Model(lookup, attend))
    layers = lbopt.trace_layers(
        loss_fn, params, words, targets, strict=True, verify=True
    )
    evaluate = lbopt.value_grad_and_curvature(loss_fn, layers)
    block, damping = layers["embed"].block, 0.1

    @quick_jit
    def run(params):
        _, grads, curvature = evaluate(params, words, targets)
        inverses = block.invert(block.pack(curvature["embed"]), damping)
        natural = block.precondition(inverses, grads["embed"])
        return grads["embed"], curvature["embed"], natural

    grads, statistics, natural = run(params)
    calls = oracles.layer_calls(loss_fn, params, words, targets)["embed"]
    assert len(calls) == lookup + attend
    looked_up, attended = by_role(calls)
    if looked_up and attended:
        (a1, g1), (a2, g2) = looked_up, attended
        c = np.sqrt(np.trace(a1) * np.trace(g2) / (np.trace(a2) * np.trace(g1)))
        a, g = a1 + c * a2, g1 + g2 / c
        # c makes the excess of the product's trace over the sum's least.
        excess = [
            np.trace(a1 + k * a2) * np.trace(g1 + g2 / k) for k in (c, 0.9 * c, 1.1 * c)
        ]
        assert excess[0] < min(excess[1:])
    else:
        a, g = looked_up or attended
    a = np.diag(a)  # the vocabulary's side is kept as a diagonal
    assert error(statistics.a, a) < ROUNDING
    assert error(statistics.g, g) < ROUNDING
    expected = oracles.natural_gradient(np.diag(a), g, damping, grads["embedding"])
    assert error(natural["embedding"], expected) < ROUNDING


@pytest.mark.parametrize(("lookups", "queries"), [(1, 0), (0, 1), (0, 0), (2, 3)])
def test_a_role_that_is_not_played_adds_nothing(lookups, queries):
    rng = np.random.default_rng(0)
    a1, a2 = (k * rng.uniform(1, 2, WORDS) for k in (lookups, queries))
    g1, g2 = (k * np.eye(WIDTH) for k in (lookups, queries))
    none = np.zeros((1, 1))
    sums = embedding.EmbedSums(a1, g1, none, a2, g2, none)
    with jax.disable_jit(), jax.debug_nans(True), jax.debug_infs(True):
        found = embedding._sum_of_roles(jax.tree.map(jnp.asarray, sums))
    both = lookups and queries
    c = np.sqrt(a1.sum() * np.trace(g2) / (a2.sum() * np.trace(g1))) if both else 1
    np.testing.assert_allclose(found.a, a1 + c * a2, rtol=ROUNDING)
    np.testing.assert_allclose(found.g, g1 + g2 / c, rtol=ROUNDING)
