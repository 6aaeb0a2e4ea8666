"""Small problems that several test modules share."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lbopt
from lbopt.curvature import head_experiment, loss_head, observation

BATCH, FEATURES, WIDTH, CLASSES = 8, 4, 5, 3


class Problem(NamedTuple):
    """A loss with what it is called on."""

    loss_fn: Any
    params: Any
    args: tuple
    has_aux: bool = False

    def trace(self, **options):
        return lbopt.trace_layers(
            self.loss_fn, self.params, *self.args, has_aux=self.has_aux, **options
        )

    def evaluate(self, layers=None, *, due=None, rng=None, **options):
        """Loss, gradient and curvature, compiled in one program."""
        f = lbopt.value_grad_and_curvature(
            self.loss_fn, layers or self.trace(), has_aux=self.has_aux, **options
        )
        return jax.jit(lambda p, *args: f(p, *args, rng=rng, due=due))(
            self.params, *self.args
        )

    def captured(self, layers=None, **options):
        """The curvature, once loss and gradient are those without taps, bit for bit."""
        loss, grads, curvature = self.evaluate(layers, **options)
        assert_equal((loss, grads), self.untapped())
        return curvature

    def untapped(self):
        f = jax.value_and_grad(self.loss_fn, has_aux=self.has_aux)
        return jax.jit(f)(self.params, *self.args)


class Mlp(nn.Module):
    """Two dense layers; the second one has no bias."""

    width: int = WIDTH
    classes: int = CLASSES
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.tanh(nn.Dense(self.width, name="first", **kinds)(x))
        return nn.Dense(self.classes, use_bias=False, name="last", **kinds)(x)


def cross_entropy(logits, labels):
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def inputs(seed=0, batch=BATCH, features=FEATURES):
    return jax.random.normal(jax.random.key(seed), (batch, features))


def labels(batch=BATCH, classes=CLASSES):
    return jnp.arange(batch) % classes


def classify(model, x=None, y=None, seed=1, **apply_options) -> Problem:
    """A model's cross entropy."""
    x = inputs() if x is None else x
    y = labels(x.shape[0]) if y is None else y
    params = model.init(jax.random.key(seed), x)["params"]

    def loss_fn(params, x, y):
        logits = model.apply({"params": params}, x, **apply_options)
        return cross_entropy(lbopt.likelihood(logits, "categorical"), y)

    return Problem(loss_fn, params, (x, y))


def assert_equal(actual, expected):
    """Bit for bit, types of the containers included."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected, rtol=2e-5, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)

    def compare(a, e):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=rtol, atol=atol)

    jax.tree.map(compare, actual, expected)


def assert_near_largest(actual, expected, rounding):
    """Close relative to the largest entry of each array."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        atol = rounding * np.abs(e).max()
        np.testing.assert_allclose(a, e, rtol=rounding, atol=atol)


def all_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


# ------------------------------------------------------------- for the head of a loss

# One dense layer, of five classes at each position.
TOKEN_MODEL = nn.Dense(5)


def head_of(loss_fn, *args):
    """An experiment on the head of a loss of ``TOKEN_MODEL``'s parameters."""
    shapes = jax.eval_shape(TOKEN_MODEL.init, jax.random.key(0), jnp.ones((1, 1)))
    params = shapes["params"]
    leaves, tree = jax.tree.flatten(args)
    observed, head = loss_head.observe(loss_fn)
    observation.eval_shape(observed, params, *args)
    (output,) = head.outputs
    return head_experiment.make_experiment(loss_fn, head, params, leaves, tree, output)


# ------------------------------------------------------------- for the training step


class NormNet(nn.Module):
    """A dense layer, batch normalisation, a head."""

    axis_name: str | None = None
    width: int = WIDTH
    classes: int = CLASSES
    between: Any = nn.tanh

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="dense")(x)
        norm = nn.BatchNorm(
            use_running_average=False,
            momentum=0.9,
            axis_name=self.axis_name,
            name="norm",
        )
        return nn.Dense(self.classes, name="head")(self.between(norm(x)))


def noisy_loss(model):
    """Cross entropy and a term like dropout: another key, another loss."""

    def loss_fn(params, model_state, batch, rng):
        logits, updated = model.apply(
            {"params": params, **model_state}, batch["x"], mutable=["batch_stats"]
        )
        plain = cross_entropy(lbopt.likelihood(logits, "categorical"), batch["y"])
        noise = jax.random.normal(rng)
        return plain + noise, (updated, {"plain": plain, "noise": noise})

    return loss_fn


def batch_of(seed, size=BATCH):
    return {"x": inputs(seed, batch=size), "y": labels(size)}


@functools.cache
def norm_net():
    """``NormNet``'s noisy loss, parameters, model state and layers."""
    loss_fn, variables = (
        noisy_loss(NormNet()),
        NormNet().init(jax.random.key(1), inputs()),
    )
    start = variables["params"], {"batch_stats": variables["batch_stats"]}
    layers = lbopt.trace_layers(
        loss_fn, *start, batch_of(0), jax.random.key(5), has_aux=True, strict=True
    )
    return loss_fn, *start, layers
