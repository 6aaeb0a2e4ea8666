"""A loss sees its own tree of parameters, whatever it does with it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.flatten_util import ravel_pytree

import lbopt
from tests import oracles
from tests.problems import Mlp, cross_entropy, inputs, labels

MODEL, X, Y = Mlp(), inputs(), labels()
PARAMS = MODEL.init(jax.random.key(1), X)["params"]
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)
TEACHER = MODEL.init(jax.random.key(5), X)["params"]


def plain_loss(params, x, y):
    return cross_entropy(MODEL.apply({"params": params}, x), y)


def l2_sp(params, x, y):
    squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, ZEROS)
    return plain_loss(params, x, y) + 0.1 * sum(jax.tree.leaves(squares))


def sam(params, x, y):
    grads = jax.lax.stop_gradient(jax.grad(plain_loss)(params, x, y))
    norm = optax.tree.norm(grads)
    moved = jax.tree.map(lambda w, g: w + 0.5 * g / norm, params, grads)
    return plain_loss(moved, x, y)


def norms(params, x, y):
    each = [jnp.sqrt(jnp.sum(w**2) + 1) for w in jax.tree.leaves(params)]
    return plain_loss(params, x, y) + 0.1 * sum(each) / len(each)


def raveled(params, x, y):
    flat, unravel = ravel_pytree(params)
    return plain_loss(unravel(flat), x, y) + jnp.mean(flat**4)


def in_bfloat16(params, x, y):
    return plain_loss(jax.tree.map(lambda w: w.astype(jnp.bfloat16), params), x, y)


def beside_a_teacher(params, x, y):
    taught = jax.nn.softmax(MODEL.apply({"params": TEACHER}, x))
    student = MODEL.apply({"params": params}, x)
    return jnp.mean(optax.softmax_cross_entropy(student, taught)) + 0 * jnp.sum(y)


def in_a_frozen_dict(params, x, y):
    from flax.core import freeze

    return plain_loss(freeze(params), x, y)


@pytest.mark.parametrize(
    "loss_fn",
    [l2_sp, sam, norms, raveled, in_bfloat16, beside_a_teacher, in_a_frozen_dict],
)
def test_loss_and_gradient_are_the_plain_ones(loss_fn):
    layers = lbopt.trace_layers(loss_fn, PARAMS, X, Y, batch_size=len(X))
    f = lbopt.value_grad_and_curvature(loss_fn, layers)
    value, grads, curvature = jax.jit(f)(PARAMS, X, Y)
    value0, grads0 = jax.jit(jax.value_and_grad(loss_fn))(PARAMS, X, Y)
    assert oracles.error(value, value0) < 1e-6
    assert max(jax.tree.leaves(jax.tree.map(oracles.error, grads, grads0))) < 1e-5
    if loss_fn is not raveled:  # which makes new arrays of them
        assert {layer.block.kind for layer in layers.values()} == {"kronecker"}
        assert float(jnp.trace(curvature["first"].g)) > 0


def test_the_statistics_of_sam_are_those_of_the_moved_parameters():
    layers = lbopt.trace_layers(sam, PARAMS, X, Y)
    _, _, curvature = lbopt.value_grad_and_curvature(sam, layers)(PARAMS, X, Y)
    grads = jax.grad(plain_loss)(PARAMS, X, Y)
    norm = optax.tree.norm(grads)
    moved = jax.tree.map(lambda w, g: w + 0.5 * g / norm, PARAMS, grads)
    there = lbopt.trace_layers(plain_loss, moved, X, Y)
    _, _, expected = lbopt.value_grad_and_curvature(plain_loss, there)(moved, X, Y)
    assert oracles.error(curvature["last"].g, expected["last"].g) < 1e-5
    assert oracles.error(curvature["last"].a, expected["last"].a) < 1e-5


@pytest.mark.parametrize(
    "reparametrise",
    [
        lambda params: jax.tree.map(lambda w: 2 * w, params),
        lambda params: jax.tree.map(lambda w, z: 0.9 * w + z, params, ZEROS),
        lambda params: jax.tree.map(lambda w: w / jnp.linalg.norm(w), params),
    ],
)
def test_other_maps_of_the_parameters_are_marked(reparametrise):
    layers = lbopt.trace_layers(
        lambda p, x, y: plain_loss(reparametrise(p), x, y), PARAMS, X, Y
    )
    assert {layer.block.kind for layer in layers.values()} == {"diagonal"}
    assert "mapped by the loss" in layers["first/kernel"].why


class Twins(nn.Module):
    """Two layers of one shape."""

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = nn.tanh(nn.Dense(width, name="a")(x))
        return nn.Dense(width, name="b")(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: {"a": p["b"], "b": p["a"]},
        lambda p: dict.fromkeys("ab", jax.tree.map(jnp.add, p["a"], p["b"])),
    ],
)
def test_layers_of_one_shape_that_change_places_are_marked(change):
    params = Twins().init(jax.random.key(0), X)["params"]

    def loss_fn(params, x):
        moved = jax.tree.map(lambda w: w + 0.01, change(params))
        return jnp.mean(Twins().apply({"params": moved}, x) ** 2)

    layers = lbopt.trace_layers(loss_fn, params, X)
    assert [layer.fallback for layer in layers.values()] == [True] * len(layers)


def test_a_mask_of_weights_that_is_still_full_is_no_identity():
    def pruned(params, x, y, mask):
        return plain_loss(jax.tree.map(jnp.multiply, params, mask), x, y)

    layers = lbopt.trace_layers(
        pruned, PARAMS, X, Y, jax.tree.map(jnp.ones_like, PARAMS)
    )
    assert all(layer.fallback for layer in layers.values())


def test_a_loss_that_bears_no_more_arrays_is_still_searched():
    # No layer with a rule reads the temperature.
    params = {"net": PARAMS, "temperature": jnp.ones([])}
    start = jax.tree.map(jnp.zeros_like, params)

    def loss_fn(params, x, y, w):
        apart = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, start)
        logits = MODEL.apply({"params": params["net"]}, x) * params["temperature"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return sum(jax.tree.leaves(apart)) + jnp.sum(losses * w) / jnp.sum(w)

    layers = lbopt.trace_layers(loss_fn, params, X, Y, jnp.ones(len(X)))
    assert layers.terms.text.endswith("weighted by argument 3")

    def linearised(params, x, y):  # around other parameters
        apart = jax.tree.map(jnp.subtract, params, TEACHER)
        apply = lambda p: MODEL.apply({"params": p}, x)
        value, change = jax.jvp(apply, (TEACHER,), (apart,))
        return cross_entropy(value + change, y)

    layers = lbopt.trace_layers(linearised, PARAMS, X, Y)
    assert all(layer.fallback for layer in layers.values())


def test_a_boxed_model_as_the_message_advises():
    init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    model = nn.Dense(3, kernel_init=init)
    boxed = {"top": model.init(jax.random.key(0), X)["params"]}
    params = nn.meta.unbox(boxed)

    def loss_fn(params, x):
        own = nn.meta.replace_boxed(boxed, params)
        return jnp.mean(model.apply({"params": own["top"]}, x) ** 2)

    layers = lbopt.trace_layers(loss_fn, params, X)
    assert layers["top"].block.kind == "kronecker"


def jitted(params, x, y):
    logits = jax.jit(lambda p, x: MODEL.apply({"params": p}, x))(params, x)
    return cross_entropy(logits, y)


def with_the_tree(params, x, y, tree):
    squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), tree(params), ZEROS)
    return jitted(params, x, y) + 0.1 * sum(jax.tree.leaves(squares))


def with_norms(params, x, y, tree):
    each = [jnp.sqrt(jnp.sum(w**2) + 1) for w in jax.tree.leaves(tree(params))]
    return jitted(params, x, y) + 0.1 * sum(each)


def with_a_count(params, x, y, tree):
    return jitted(params, x, y) + len(jax.tree.leaves(tree(params)))


@pytest.mark.parametrize("loss_fn", [with_the_tree, with_norms, with_a_count])
def test_where_params_carry_more_plain_takes_it_away(loss_fn):
    # Inside jax.jit the layers have other arrays, so that theirs travel in params.
    with pytest.raises(ValueError, match=r"use lbopt.plain\(params\)|Use lbopt.plain"):
        lbopt.trace_layers(loss_fn, PARAMS, X, Y, lambda p: p)
    args = X, Y, lbopt.plain
    layers = lbopt.trace_layers(loss_fn, PARAMS, *args)
    assert {layer.tapped.route for layer in layers.values()} == {"params"}
    value, grads, _ = lbopt.value_grad_and_curvature(loss_fn, layers)(PARAMS, *args)
    value0, grads0 = jax.value_and_grad(loss_fn)(PARAMS, *args)
    assert oracles.error(value, value0) < 1e-6
    assert max(jax.tree.leaves(jax.tree.map(oracles.error, grads, grads0))) < 1e-5


def test_a_function_compiled_before_is_seen():
    apply = jax.jit(MODEL.apply)
    apply({"params": PARAMS}, X)

    def loss_fn(params, x, y):
        return cross_entropy(apply({"params": params}, x), y)

    layers = lbopt.trace_layers(loss_fn, PARAMS, X, Y)
    assert {layer.block.kind for layer in layers.values()} == {"kronecker"}
    curvature = lbopt.value_grad_and_curvature(loss_fn, layers)(PARAMS, X, Y)[2]
    plain = lbopt.trace_layers(plain_loss, PARAMS, X, Y)
    expected = lbopt.value_grad_and_curvature(plain_loss, plain)(PARAMS, X, Y)[2]
    assert max(jax.tree.leaves(jax.tree.map(oracles.error, curvature, expected))) < 1e-6


@pytest.mark.parametrize("wrap", [nn.WeightNorm, nn.SpectralNorm])
def test_normalised_layers_are_marked(wrap):
    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = wrap(nn.Dense(4))
            x = layer(x, update_stats=True) if wrap is nn.SpectralNorm else layer(x)
            return nn.Dense(3)(nn.tanh(x))

    variables = Normalised().init(jax.random.key(0), X)
    params = variables.pop("params")

    def loss_fn(params, state, x, y):
        f, state = Normalised().apply(
            {"params": params, **state}, x, mutable=list(state)
        )
        return cross_entropy(f, y), state

    layers = lbopt.trace_layers(loss_fn, params, variables, X, Y, has_aux=True)
    kinds = {path: layer.block.kind for path, layer in layers.items()}
    assert kinds.pop("Dense_1") == "kronecker"
    assert set(kinds.values()) == {"diagonal"}
    assert "on the way to it" in layers["Dense_0/kernel"].why
    f = lbopt.value_grad_and_curvature(loss_fn, layers, has_aux=True)
    (value, _), grads, _ = f(params, variables, X, Y)
    (value0, _), grads0 = jax.value_and_grad(loss_fn, has_aux=True)(
        params, variables, X, Y
    )
    assert value == value0
    assert max(jax.tree.leaves(jax.tree.map(oracles.error, grads, grads0))) < 1e-6


def test_mapped_variables_are_marked():
    class Halved(nn.Module):
        @nn.compact
        def __call__(self, x):
            half = nn.map_variables(
                nn.Dense,
                "params",
                lambda p: jax.tree.map(lambda w: w / 2, p),
                init=True,
            )
            return half(3)(x)

    model = Halved()
    params = model.init(jax.random.key(0), X)["params"]

    def loss_fn(params, x):
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    layers = lbopt.trace_layers(loss_fn, params, X)
    assert {layer.block.kind for layer in layers.values()} == {"diagonal"}


def test_keys_with_a_slash_that_collide_are_refused():
    params = {"a": {"b": PARAMS}, "a/b": PARAMS}

    def loss_fn(params, x, y):
        return plain_loss(params["a"]["b"], x, y) + plain_loss(params["a/b"], x, y)

    with pytest.raises(ValueError, match="contains a slash"):
        lbopt.trace_layers(loss_fn, params, X, Y)


def test_complex_parameters_are_refused():
    model = nn.Dense(3, param_dtype=jnp.complex64)
    params = {"top": model.init(jax.random.key(0), X)["params"]}

    def loss_fn(params, x):
        return jnp.mean(jnp.abs(model.apply({"params": params["top"]}, x)) ** 2)

    with pytest.raises(ValueError, match=r"\['top'\].* is complex64"):
        lbopt.trace_layers(loss_fn, params, X)
