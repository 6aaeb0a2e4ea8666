"""``verify=True`` finds what would be silently wrong, and nothing else."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from tests.curvature import test_embedding
from tests.curvature.test_capture import lifted_pair, normalised_problem
from tests.problems import (
    BATCH,
    CLASSES,
    WIDTH,
    Mlp,
    Problem,
    assert_close,
    classify,
    inputs,
)


def penalised(penalty, **kinds):
    problem = classify(Mlp(**kinds))

    def loss_fn(params, x, y):
        return problem.loss_fn(params, x, y) + penalty(params, x)

    return problem._replace(loss_fn=loss_fn)


def absolute(params, x):
    return 0.1 * sum(jnp.sum(jnp.abs(w)) for w in jax.tree.leaves(params))


def squares(params, x):
    return 0.1 * sum(jnp.sum(jnp.square(w)) for w in jax.tree.leaves(params))


def global_norm(params, x):
    return 0.1 * optax.tree.norm(params)


def unmappable(x):
    """``x``, by code that ``jax.vmap`` cannot map: the abstract trace sees no use."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda x: x, shape, x)


def unseen_use(params, x):
    return jnp.mean(jnp.square(unmappable(x) @ params["first"]["kernel"]))


@pytest.mark.parametrize("penalty", [absolute, squares, global_norm])
def test_harmless_penalties_are_clean(penalty):
    problem = penalised(penalty)
    problem.trace(verify=True)
    loss, grads, _ = problem.evaluate()
    expected = problem.untapped()
    assert_close((loss, grads), expected)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_use_beside_the_layer_is_found(dtype):
    message = r"layer 'first': the sum of input times.*'kernel'.*optax.partition"
    with pytest.raises(ValueError, match=message):
        penalised(unseen_use, dtype=dtype).trace(verify=True)


class ByHand(nn.Module):
    """Embeddings tied by hand: the second use is no layer."""

    @nn.compact
    def __call__(self, words):
        embed = nn.Embed(CLASSES, WIDTH, name="embed")
        return jnp.mean(embed(unmappable(words)), 1) @ embed.embedding.T


def test_embeddings_tied_by_hand_are_found():
    words = jnp.arange(BATCH * 2).reshape(BATCH, 2) % CLASSES
    with pytest.raises(ValueError, match=r"'embed'.*'embedding'"):
        classify(ByHand(), words).trace(verify=True)


class Reparametrised(nn.Module):
    """A dense layer whose kernel is a function of the parameters."""

    how: str

    @nn.compact
    def __call__(self, x):
        if self.how == "weight_norm":
            return nn.WeightNorm(nn.Dense(CLASSES, name="dense"))(x)
        double = lambda variables: jax.tree.map(lambda w: 2 * w, variables)
        kind = nn.map_variables(nn.Dense, "params", trans_in_fn=double, init=True)
        return kind(CLASSES, name="dense")(x)


@pytest.mark.parametrize("how", ["weight_norm", "map_variables"])
def test_reparametrised_layers_are_marked(how):
    layers = classify(Reparametrised(how)).trace(verify=True)
    assert {layer.block.kind for layer in layers.values()} == {"diagonal"}


@pytest.mark.parametrize(
    "lift", ["scan_axis_1", "scan_remat", "scan_broadcast", "vmap_shared", "vmap_scan"]
)
def test_lifted_transforms_are_clean(lift):
    lifted_pair(lift)[0].trace(verify=True)


class Twice(nn.Module):
    """One layer on two inputs."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(CLASSES, name="layer")
        return layer(x) + layer(jnp.flip(x, -1))


class Recurrent(nn.Module):
    """A cell of two dense layers, used at every step of a sequence."""

    @nn.compact
    def __call__(self, x):  # [batch, time, features]
        y = nn.RNN(nn.SimpleCell(WIDTH, name="cell"), name="rnn")(x)[:, -1]
        return nn.Dense(CLASSES, name="head")(y)


def tied():
    """An embedding that is looked up and attended."""
    return Problem(*test_embedding.problem(test_embedding.Model()))


def other_models():
    sequence = inputs(batch=BATCH * 3).reshape(BATCH, 3, -1)
    return {
        "batch_norm": normalised_problem,
        "twice": lambda: classify(Twice()),
        "tied": tied,
        "recurrent": lambda: classify(Recurrent(), sequence),
        "mixed": lambda: classify(Mlp(dtype=jnp.bfloat16)),
        "bfloat16": lambda: classify(Mlp(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)),
    }


@pytest.mark.parametrize("name", other_models())
def test_other_models_are_clean(name):
    other_models()[name]().trace(verify=True)
