"""One forward pass with taps: how many terms it has, and what it pulls back."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lbopt
from lbopt.curvature import tapped_pass
from lbopt.curvature.layer_table import Layers
from tests import oracles

B, T, C = 8, 5, 3
MODEL = nn.Dense(C)
X = jax.random.normal(jax.random.key(0), (B, 2))
TOKENS = jax.random.normal(jax.random.key(1), (B, T, 2))
PARAMS = {"top": MODEL.init(jax.random.key(2), X)["params"]}
Y = jnp.arange(B) % C


def apply(params, x):
    return MODEL.apply({"params": params["top"]}, x)


def losses(f, y):
    hot = jax.nn.one_hot(y, C)
    return -jnp.sum(hot * jax.nn.log_softmax(f), -1)


def mean(params, x, y):
    return jnp.mean(losses(apply(params, x), y))


def stating(terms):
    def loss(params, x, y):
        f = lbopt.likelihood(apply(params, x), "categorical", terms=terms)
        return jnp.mean(losses(f, y))

    return loss


def masked(params, x, y, w):
    own = losses(apply(params, x), y)
    w = w.reshape(w.shape + (1,) * (own.ndim - w.ndim))
    return jnp.sum(own * w) / jnp.sum(jnp.broadcast_to(w, own.shape))


def stating_weights(params, x, y, w):
    f = lbopt.likelihood(apply(params, x), "categorical", weights=w)
    return jnp.sum(losses(f, y) * w) / jnp.sum(w)


def stating_both(params, x, y, w):
    f = lbopt.likelihood(apply(params, x), "categorical", weights=w, terms=B)
    return jnp.sum(losses(f, y) * w) / B


def evaluator_of(loss_fn, args, stated=None, **trace):
    layers = lbopt.trace_layers(loss_fn, PARAMS, *args, **trace)
    return tapped_pass.make_evaluator(
        loss_fn, layers, has_aux=False, fisher="empirical", batch_size=stated
    )


def tapped(evaluator, args):
    wanted, bases = tapped_pass.wanted_of(evaluator.layers.preconditioned, None)
    return tapped_pass.tap(evaluator, wanted, bases, PARAMS, args, {})


def counts(evaluator, args):
    """The numbers of terms and of positions, from shapes alone."""
    seen = []

    def run(args):
        found = tapped(evaluator, args)
        seen.append((found.terms, found.positions))
        return found.value

    jax.eval_shape(run, args)
    return seen[0]


def first(n, *args):
    return tuple(x[:n] for x in args)


LABELS = jnp.zeros((B, T), jnp.int32)

# ------------------------------------------------------------------- counted terms


@pytest.mark.parametrize(
    ("loss_fn", "args", "trace", "stated", "expected"),
    [
        (mean, (X, Y), {}, None, {B: B, 3: 3}),
        (mean, (TOKENS, LABELS), {}, None, {B: B * T, 3: 3 * T}),
        # A number stated to trace_layers is in proportion for another batch.
        (mean, (TOKENS, LABELS), {"batch_size": B * T}, None, {B: B * T, 4: 4 * T}),
        # Stated for each part, it is taken as it is.
        (mean, (X, Y), {}, 32, {B: 32, 3: 32}),
        (stating(32), (X, Y), {}, None, {B: 32, 3: 32}),
        (stating(32), (X, Y), {}, 32, {B: 32}),
    ],
)
def test_terms_are_counted(loss_fn, args, trace, stated, expected):
    evaluator = evaluator_of(loss_fn, args, stated, **trace)
    found = {n: counts(evaluator, first(n, *args))[0] for n in expected}
    assert found == expected


def test_two_numbers_of_terms_are_refused():
    evaluator = evaluator_of(stating(32), (X, Y), 16)
    with pytest.raises(ValueError, match=r"is stated as \[16, 32\]; state it once"):
        counts(evaluator, (X, Y))


def test_a_batch_that_no_argument_shows_is_refused():
    def loss_fn(params, scale):
        return scale * jnp.mean(apply(params, X) ** 2) / 2

    evaluator = evaluator_of(loss_fn, (1.0,), B)
    assert counts(evaluator, (1.0,))[0] == B
    # Of terms that are not found.
    unknown = Layers(dict(evaluator.layers))
    unstated = evaluator._replace(batch_size=None, layers=unknown)
    with pytest.raises(ValueError, match=r"looks like a batch.*batch_size= or by like"):
        counts(unstated, (1.0,))


# ---------------------------------------------------------------- weighted terms

WEIGHTS = jnp.array([2.0, 1, 0.5, 0, 1, 0, 0, 3])


@pytest.mark.parametrize(
    ("loss_fn", "args", "stated", "terms", "positions"),
    [
        (masked, (X, Y, WEIGHTS), None, 7.5, B),
        # The weight of an example is that of each of its tokens.
        (masked, (TOKENS, LABELS, WEIGHTS), None, 7.5 * T, B * T),
        (stating_weights, (X, Y, WEIGHTS), None, 7.5, B),
        (stating_weights, (X, Y, WEIGHTS > 0), None, 5, B),
        (stating_both, (X, Y, WEIGHTS), None, B, B),
        (stating_weights, (X, Y, WEIGHTS), 20, 20, B),
    ],
)
def test_weights_are_added_up(loss_fn, args, stated, terms, positions):
    evaluator = evaluator_of(loss_fn, args, stated)
    assert evaluator.weighted
    numbers = []

    @oracles.quick_jit
    def run(args):
        found = tapped(evaluator, args)
        numbers.append(found.positions)
        return jnp.float32(found.terms), tapped_pass.share(evaluator, PARAMS, args)

    found, share = run(args)
    assert numbers == [positions]
    assert found == terms
    np.testing.assert_allclose(share, terms / positions, rtol=1e-6)


def test_weights_that_are_stated_twice_are_refused():
    evaluator = evaluator_of(stating_weights, (X, Y, WEIGHTS))

    def twice(params, x, y, w):
        again = lbopt.likelihood(apply(params, x), "normal", weights=w)
        return stating_weights(params, x, y, w) + 0 * jnp.sum(again)

    other = evaluator._replace(loss_fn=twice)
    with pytest.raises(ValueError, match=r"loss_fn=twice states weights .* 2 times"):
        counts(other, (X, Y, WEIGHTS))
    without = evaluator._replace(loss_fn=lambda p, x, y, w: mean(p, x, y))
    with pytest.raises(ValueError, match=r"states weights .* 0 times"):
        counts(without, (X, Y, WEIGHTS))


def test_another_loss_than_the_one_that_was_traced_is_refused():
    evaluator = evaluator_of(masked, (X, Y, WEIGHTS))

    def modelless(params, x, y, w):
        return jnp.sum(params["top"]["kernel"])

    other = evaluator._replace(loss_fn=modelless)
    with pytest.raises(ValueError, match="modelless does not make the outputs that"):
        counts(other, (X, Y, WEIGHTS))


# --------------------------------------------------------------- the backward pass


def test_one_pass_gives_gradient_and_sums():
    evaluator = evaluator_of(mean, (X, Y))

    @oracles.quick_jit
    def run(x, y):
        found = tapped(evaluator, (x, y))
        grads, sums, _ = found.pull(2, None, square=False)
        return found.value, grads, sums["top"]

    value, grads, sums = run(X, Y)
    expected, plain = oracles.quick_jit(jax.value_and_grad(mean))(PARAMS, X, Y)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for name in ("kernel", "bias"):
        assert oracles.error(grads["top"][name], 2 * plain["top"][name]) < 1e-5
    x = oracles.with_ones(np.asarray(X))
    assert oracles.error(sums.a, x.T @ x) < 1e-5
    p = np.asarray(jax.nn.softmax(apply(PARAMS, X)))
    signal = 2 * (p - np.eye(C)[np.asarray(Y)]) / B
    assert oracles.error(sums.g, signal.T @ signal) < 1e-5
    assert sums.rows == B


# ----------------------------------------------------------------------- settings

unchecked = inspect.unwrap(tapped_pass.make_evaluator)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fisher": "true"}, "fisher='true' must be"),
        ({"layers": {}}, "layers=dict must be the table that lbopt.trace_layers"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number"),
        (
            {"batch_size": jnp.float32(3)},
            r"batch_size is an array.*layers knows of none.*weights=",
        ),
    ],
)
def test_settings_out_of_range(changes, message):
    own = evaluator_of(mean, (X, Y))
    settings = {"layers": own.layers, "has_aux": False, "fisher": "exact"} | changes
    with pytest.raises(ValueError, match=message):
        unchecked(mean, settings.pop("layers"), **settings)


def test_a_mask_belongs_to_its_layers():
    own = evaluator_of(mean, (X, Y)).layers.preconditioned
    wanted, bases = tapped_pass.wanted_of(own, None)
    assert (wanted["top"].a, wanted["top"].g, bases) == (True, True, {"top": ()})
    # An optimizer of other layers has no entry: nothing is due.
    wanted, _ = tapped_pass.wanted_of(own, {})
    assert (wanted["top"].a, wanted["top"].g) == (False, False)
    with pytest.raises(ValueError, match=r"due has entries \['other'\].*\['top'\]"):
        tapped_pass.wanted_of(own, {"other": wanted["top"]})
    with pytest.raises(ValueError, match=r"due\['top'\] is a tuple, not a Kronecker"):
        tapped_pass.wanted_of(own, {"top": (True, True)})
