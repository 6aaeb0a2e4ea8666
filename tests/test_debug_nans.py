"""No number is NaN or infinite on the way of sound ones, not even one that is not used.

Operation by operation: compiled, and in conditionals, ``jax_debug_nans`` sees outputs
alone.
"""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import lbopt
from lbopt.transforms import conjugate_beta
from lbopt.transforms.velocity import scale_by_velocity
from tests.problems import CLASSES, all_finite, cross_entropy

WORDS, WIDTH, BATCH = 5, 3, 4


class Words(nn.Module):
    """An embedding that is looked up, and so has one role of two, and a norm layer."""

    @nn.compact
    def __call__(self, words):
        x = nn.Embed(WORDS, WIDTH, name="embed")(words).mean(1)
        x = nn.relu(nn.BatchNorm(use_running_average=False, name="norm")(x))
        return nn.Dense(CLASSES, name="top")(x)


@contextlib.contextmanager
def every_number_is_checked(infinite=True):
    with jax.disable_jit(), jax.debug_nans(True), jax.debug_infs(infinite):
        yield


def test_curvature():
    model, words = Words(), jnp.arange(2 * BATCH).reshape(BATCH, 2) % (WORDS - 1)
    variables = model.init(jax.random.key(0), words)
    params, averages = variables["params"], variables["batch_stats"]

    def loss_fn(params, words):
        collections = {"params": params, "batch_stats": averages}
        logits, _ = model.apply(collections, words, mutable=["batch_stats"])
        return cross_entropy(logits, words[:, 0] % CLASSES)

    layers = lbopt.trace_layers(loss_fn, params, words)
    # The embedding keeps its factors' inverses, and so has the main path of K-FAC.
    tx = optax.chain(
        lbopt.clip_by_kl(
            lbopt.scale_by_kfac(layers, eigenvalues="corrected"), 0.01, 0.1
        ),
        scale_by_velocity(0.1, 0.9),
        lbopt.rescale_weights(layers),
    )
    evaluate = lbopt.value_grad_and_curvature(loss_fn, layers)
    state = tx.init(params)
    # JAX's own maximum, in the cross entropy, starts at minus infinity.
    with every_number_is_checked(infinite=False):
        for _ in range(2):
            due = lbopt.refresh(state)
            _, grads, curvature = evaluate(params, words, due=due)
            updates, state = tx.update(grads, state, params, curvature=curvature)
            params = optax.apply_updates(params, updates)
    assert all_finite(params)


def products(vectors):
    inner = [[optax.tree.vdot(u, v) for v in vectors] for u in vectors]
    return jnp.asarray(inner)


# Arrays of zeros, and gradients of zeros, are where lengths are divided by.
@pytest.mark.parametrize(
    "tx",
    [
        lbopt.lars(10.0),
        lbopt.lars(optax.constant_schedule(0.0), clip=True),
        *(
            lbopt.nlcg(0.1, beta=rule, control_period=1)
            for rule in conjugate_beta.RULES
        ),
        lbopt.nlcg(0.1, step_control="online"),
        lbopt.scale_by_quadratic_model(optax.identity(), damping=1.0),
        lbopt.clip_by_kl(optax.identity(), 0.1, 0.0),
        scale_by_velocity(lambda step: 0.1 * step, 0.9, velocity="code"),
    ],
    ids=["lars", "larc", *conjugate_beta.RULES, "online", "quadratic", "clip", "code"],
)
@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_others(tx, slope):
    params = {"zeros": jnp.zeros(2), "ones": jnp.ones(2)}

    def loss_fn(params):
        return slope * sum(jnp.sum((x - 2.0) ** 2) for x in params.values())

    tx, state = optax.with_extra_args_support(tx), tx.init(params)
    with every_number_is_checked():
        for _ in range(2):
            loss, grads = jax.value_and_grad(loss_fn)(params)
            extra = {"value": loss, "value_fn": loss_fn, "fisher_products": products}
            updates, state = tx.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
    assert all_finite(params)
