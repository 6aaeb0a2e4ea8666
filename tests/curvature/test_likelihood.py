"""How a loss states what its outputs are, and what is refused."""

import functools

import jax
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


@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_likelihood_is_called_once(calls, fisher):
    model = Mlp()

    def loss_fn(params, x, y):
        f = model.apply({"params": params}, x)
        for _ in range(calls):
            f = lbopt.likelihood(f, "categorical")
        return cross_entropy(f, y)

    problem = classify(model)._replace(loss_fn=loss_fn)
    f = lbopt.value_grad_and_curvature(loss_fn, problem.trace(), fisher=fisher)
    message = rf"fisher='{fisher}'.*once.*loss_fn=loss_fn calls it {calls} times"
    with pytest.raises(ValueError, match=message):
        f(problem.params, *problem.args, rng=jax.random.key(0))


@pytest.mark.parametrize("transform", ["jit", "vmap", "map", "checkpoint"])
@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_likelihood_is_called_outside_transforms(transform, fisher):
    wrap = {
        "jit": jax.jit,
        "vmap": jax.vmap,
        "map": lambda f: functools.partial(jax.lax.map, f),
        "checkpoint": jax.checkpoint,
    }[transform]
    model = Mlp()

    def loss_fn(params, x, y):
        f = model.apply({"params": params}, x)
        f = wrap(lambda f: lbopt.likelihood(f, "categorical", terms=BATCH))(f)
        return cross_entropy(f, y)

    problem = classify(model)._replace(loss_fn=loss_fn)
    f = lbopt.value_grad_and_curvature(loss_fn, problem.trace(), fisher=fisher)
    message = r"lbopt.likelihood\(outputs, 'categorical'\) is called inside a jit, vmap"
    with pytest.raises(ValueError, match=message):
        f(problem.params, *problem.args, rng=jax.random.key(0))


def test_the_number_of_terms_is_stated_once():
    model = Mlp()

    def loss_fn(params, x, y):
        f = model.apply({"params": params}, x)
        return cross_entropy(lbopt.likelihood(f, "categorical", terms=4), y)

    problem = classify(model)._replace(loss_fn=loss_fn)
    f = lbopt.value_grad_and_curvature(loss_fn, problem.trace(), batch_size=BATCH)
    with pytest.raises(ValueError, match=r"stated as \[4, 8\]; state it once"):
        f(problem.params, *problem.args)


def test_a_loss_without_a_batch_needs_its_size():
    x, y = inputs(), labels()
    problem = classify(Mlp())

    def loss_fn(params):
        return problem.loss_fn(params, x, y)

    closed = Problem(loss_fn, problem.params, ())
    with pytest.raises(ValueError, match=r"state it by batch_size="):
        closed.evaluate()
    assert_close(closed.evaluate(batch_size=BATCH), problem.evaluate())
