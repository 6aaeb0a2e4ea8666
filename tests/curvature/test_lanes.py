"""The ``vmap`` axes that map an array."""

import jax
import jax.numpy as jnp
import pytest

from lbopt.curvature.lanes import note_lanes


def lanes_of(transform, x, parameter):
    lanes = []

    def noted(x, parameter):
        note_lanes(x, parameter, lanes)
        return x * parameter

    jax.eval_shape(transform(noted), x, parameter)
    return lanes


def over(x, parameter, out=0):
    return lambda f: jax.vmap(f, in_axes=(x, parameter), out_axes=out)


X, P = jnp.ones((5, 3, 2)), jnp.ones(())


@pytest.mark.parametrize(
    ("transform", "parameter", "expected"),
    [
        (lambda f: f, P, []),
        (over(0, None), P, [5]),
        (over(1, None), P, [3]),
        # From the inner one to the outer one.
        (lambda f: over(0, None)(over(0, None)(f)), P, [3, 5]),
        (lambda f: over(0, None)(jax.checkpoint(over(0, None)(f))), P, [3, 5]),
        # Axes of copies of a layer map its parameters, too.
        (over(0, 0), jnp.ones(5), []),
        (lambda f: over(0, 0)(over(0, None)(f)), jnp.ones(5), [3]),
        (lambda f: over(0, None)(over(0, 0)(f)), jnp.ones(3), [5]),
        # The axis of several losses, of parameters alone.
        (over(None, 0), jnp.ones(4), []),
    ],
)
def test_axes_of_the_output_alone_are_noted(transform, parameter, expected):
    assert lanes_of(transform, X, parameter) == expected


def test_derivatives_are_as_without():
    def noted(p, x):
        note_lanes(x * p, p, [])
        return x * p

    grads = jax.vmap(jax.grad(noted), in_axes=(None, 0))(P, jnp.arange(3.0))
    assert grads.tolist() == [0, 1, 2]
