"""What a loss does with the outputs of its model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lbopt
from lbopt.curvature import loss_head
from lbopt.curvature.loss_head import LIKELIHOOD
from tests import oracles


class TwoHeads(nn.Module):
    """Inner layers, a setup of its own, and a tree of outputs."""

    def setup(self):
        self.inner = nn.Dense(4)
        self.top = nn.Dense(3)

    def __call__(self, x):
        x = self.inner(x)
        return {"logits": self.top(x), "size": jnp.arange(len(x)), "hidden": x}


X, Y = jnp.ones((5, 2)), jnp.arange(5) % 3
MODEL = TwoHeads()
PARAMS = MODEL.init(jax.random.key(0), X)["params"]
DENSE = nn.Dense(3)
OWN = DENSE.init(jax.random.key(0), X)["params"]


def seen_by(loss_fn, *args):
    loss, head = loss_head.observe(loss_fn)
    jax.eval_shape(loss, *args)
    return head


def of_tree(params, x, y):
    outputs = MODEL.apply({"params": params}, x)
    log_p = jax.nn.log_softmax(outputs["logits"])
    return jnp.mean(outputs["hidden"] ** 2) - jnp.mean(log_p[jnp.arange(len(y)), y])


def test_outputs_are_what_the_outermost_modules_return():
    head = seen_by(of_tree, PARAMS, X, Y)
    # Leaves in the order of the keys: hidden, logits, size; the last has no gradient.
    shapes = {name: x.shape for name, x in head.outputs.items()}
    assert shapes == {(0, 0): (5, 4), (0, 1): (5, 3)}
    assert set(head.structures[0]) == {"hidden", "logits", "size"}
    assert head.inner == {}
    assert head.stated == {}


def test_calls_of_likelihood_have_names_of_their_own():
    def loss(params, x):
        f = DENSE.apply({"params": params}, x)
        f = lbopt.likelihood(f, "categorical", terms=7)
        g = lbopt.likelihood(f[:, :2], "normal", weights=jnp.ones(5))
        return jnp.sum(f) + jnp.sum(g)

    head = seen_by(loss, OWN, X)
    shapes = {name: x.shape for name, x in head.outputs.items()}
    assert shapes == {(0, 0): (5, 3), (LIKELIHOOD, 0): (5, 3), (LIKELIHOOD, 1): (5, 2)}
    assert head.stated == {"terms": [(LIKELIHOOD, 0)], "weights": [(LIKELIHOOD, 1)]}


@pytest.mark.parametrize(
    ("transform", "shape", "lanes"),
    [
        (jax.jit, (5, 3), []),
        (lambda f: jax.vmap(f, in_axes=(None, 0)), (3,), [5]),
        (lambda f: jax.checkpoint(jax.vmap(f, in_axes=(None, 0))), (3,), [5]),
    ],
)
def test_outputs_inside_a_transform_are_marked(transform, shape, lanes):
    def loss(params, x):
        def apply(params, x):
            return DENSE.apply({"params": params}, x)

        return jnp.mean(transform(apply)(params, x))

    head = seen_by(loss, OWN, X)
    assert head.outputs[0, 0].shape == shape
    assert head.inner == {(0, 0): lanes}


def test_a_second_trace_forgets_the_first():
    loss, head = loss_head.observe(of_tree)
    jax.eval_shape(loss, PARAMS, X, Y)
    jax.eval_shape(loss, PARAMS, X[:2], Y[:2])
    assert len(head.structures) == 1
    assert head.outputs[0, 1].shape == (2, 3)


def test_the_head_is_a_function_of_its_outputs_alone():
    head = seen_by(of_tree, PARAMS, X, Y)
    # Of another batch; the model does not run, so that it needs no parameters.
    logits, y = jax.random.normal(jax.random.key(1), (2, 3)), jnp.array([2, 0])

    def by_logits(logits):
        outputs = {(0, 0): jnp.zeros((2, 4)), (0, 1): logits}
        return loss_head.replaced(head, outputs, of_tree)({}, X[:2], y)

    found = jax.grad(by_logits)(logits)
    expected = (jax.nn.softmax(logits) - jax.nn.one_hot(y, 3)) / 2
    assert oracles.error(found, expected) < 1e-6


def test_the_argument_of_likelihood_is_replaced():
    def loss(params, x):
        f = DENSE.apply({"params": params}, x)
        return jnp.sum(lbopt.likelihood(2 * f, "normal") ** 2)

    head = seen_by(loss, OWN, X)
    run = loss_head.replaced(
        head, {(0, 0): jnp.ones((1, 3)), (LIKELIHOOD, 0): jnp.full((1, 3), 5.0)}, loss
    )
    assert run({}, X) == 3 * 5**2
