"""How a loss states what its outputs are, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import pytest

import lbopt
from tests.problems import (
    BATCH,
    Mlp,
    Problem,
    assert_close,
    classify,
    cross_entropy,
    inputs,
    labels,
)


def problem_with(declare):
    """A classifier whose loss calls a function on the model's outputs."""
    model = Mlp()

    def loss_fn(params, x, y):
        return cross_entropy(declare(model.apply({"params": params}, x)), y)

    return classify(model)._replace(loss_fn=loss_fn)


@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_likelihood_is_called_once(calls, fisher):
    def declare(f):
        for _ in range(calls):
            f = lbopt.likelihood(f, "categorical")
        return f

    message = rf"fisher='{fisher}'.*once.*loss_fn=loss_fn calls it {calls} times"
    with pytest.raises(ValueError, match=message):
        problem_with(declare).evaluate(fisher=fisher, rng=jax.random.key(0))


TRANSFORMS = {
    "jit": jax.jit,
    "vmap": jax.vmap,
    "map": lambda f: functools.partial(jax.lax.map, f),
    "checkpoint": jax.checkpoint,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_likelihood_is_called_outside_transforms(transform, fisher):
    def declare(f):
        # A new function for each trace: jit would not call the same one again.
        def inner(f):
            return lbopt.likelihood(f, "categorical", terms=BATCH)

        return TRANSFORMS[transform](inner)(f)

    problem = problem_with(declare)
    message = r"lbopt.likelihood\(outputs, 'categorical'\) is called inside a jit, vmap"
    with pytest.raises(ValueError, match=message):
        problem.evaluate(fisher=fisher, rng=jax.random.key(0))


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ({"terms": jnp.float32(2)}, r"terms is an array.*pass weights= too"),
        ({"terms": 0}, "terms=0 must be a whole number"),
        (
            {"weights": jnp.ones(3)},
            r"weights have shape \[3\], but the outputs have \[2, 3\]",
        ),
        ({"weights": jnp.ones([])}, r"weights have shape \[\]"),
    ],
)
def test_statements_that_do_not_fit_the_outputs(statement, message):
    with pytest.raises(ValueError, match=message):
        lbopt.likelihood(jnp.ones((2, 3)), "categorical", **statement)


def test_a_loss_without_arguments_has_the_batch_of_its_outputs():
    x, y = inputs(), labels()
    problem = classify(Mlp())

    def loss_fn(params):
        return problem.loss_fn(params, x, y)

    closed = Problem(loss_fn, problem.params, ())
    assert_close(closed.evaluate(), problem.evaluate())
