"""``trace_layers`` and its table."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lbopt
from tests.problems import (
    CLASSES,
    FEATURES,
    WIDTH,
    Mlp,
    classify,
    inputs,
)


class Gated(nn.Module):
    """A known layer, an array of the module's own, and a layer for something else."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(nn.Dense(WIDTH, name="dense")(x))
        x = x * self.param("gate", nn.initializers.ones, (1, WIDTH))
        if self.is_initializing():
            nn.Dense(2, name="unused")(x)
        return nn.Dense(CLASSES, name="head")(x)


def test_every_parameter_is_reported():
    problem = classify(Gated())
    layers = problem.trace()
    reported = {
        (*layer.tapped.location.keys, name): shape
        for layer in layers.values()
        for name, shape in layer.shapes.items()
    }
    paths = jax.tree_util.tree_leaves_with_path(problem.params)
    expected = {tuple(k.key for k in path): leaf.shape for path, leaf in paths}
    assert reported == expected
    kinds = {path: layer.block.kind for path, layer in layers.items() if layer.used}
    assert kinds == {
        "dense": "kronecker",
        "norm": "unit_wise",
        "gate": "diagonal",
        "head": "kronecker",
    }
    assert [p for p in layers if p not in kinds] == ["unused/kernel", "unused/bias"]


def test_the_table():
    layers = classify(Gated()).trace()
    lines = str(layers).splitlines()
    assert lines[0].split() == ["path", "module", "block", "sizes", "state", "why"]
    rows = {line[3:].split()[0]: line for line in lines[1 : 1 + len(layers)]}
    assert set(rows) == set(layers)
    # 5 × 5 (4 inputs and the bias) and 5 × 5: factors as triangles, inverses whole.
    assert "5×5 + 5×5" in rows["dense"]
    assert "320 B" in rows["dense"]
    assert layers["dense"].state_bytes() == 4 * (2 * 15 + 2 * 25)
    marked = {path for path, line in rows.items() if line.startswith("!")}
    assert marked == {"gate", "unused/kernel", "unused/bias"}
    assert "no layer with a rule reads it" in rows["gate"]
    assert "the loss does not use it" in rows["unused/kernel"]
    total = sum(x.state_bytes() for x in layers.preconditioned.values())
    assert lines[-3].split()[:2] == [str(len(layers)), "layers"]
    assert f"{total} B" in lines[-3]
    assert lines[-2] == "terms: 8, mean over axis 0 of likelihood's outputs"
    assert lines[-1].startswith("! 3 without a block of their own")


def test_the_state_holds_what_the_table_says():
    problem = classify(Gated())
    layers = problem.trace()
    used = {"gate", "dense", "norm", "head"}
    state = lbopt.scale_by_kfac(layers).init(problem.params)
    assert set(state.factors) == set(layers.preconditioned) == used
    held = jax.tree.leaves((state.factors, state.inverses))
    assert sum(x.nbytes for x in held) == sum(layers[p].state_bytes() for p in used)
    _, grads, curvature = problem.evaluate(layers)
    assert set(curvature) == used
    assert not np.any(grads["unused"]["kernel"])


def test_strict_refuses_by_path():
    with pytest.raises(ValueError, match="strict=True") as error:
        classify(Gated()).trace(strict=True)
    message = str(error.value)
    assert "'gate' (no layer with a rule reads it)" in message
    assert "'unused/kernel' (the loss does not use it)" in message
    assert "strict=False" in message
    assert "'dense'" not in message
    classify(Mlp()).trace(strict=True)  # all known
    # Of a known layer that runs, but that no gradient flows to.
    layers = [nn.Dense(WIDTH), jax.lax.stop_gradient, nn.Dense(CLASSES)]
    with pytest.raises(ValueError, match=r"'layers_0' \(the loss does not use it\)"):
        classify(nn.Sequential(layers)).trace(strict=True)


def test_abstract_arguments_suffice():
    problem = classify(Mlp())
    shapes = jax.eval_shape(lambda *x: x, problem.params, problem.args)
    layers = lbopt.trace_layers(problem.loss_fn, shapes[0], *shapes[1])
    assert str(layers) == str(problem.trace())


def test_arguments_that_are_no_arrays_stay_as_they_are():
    problem = classify(Mlp())

    def loss_fn(params, x, y, name, scale):
        loss = problem.loss_fn(params, x, y)
        return loss * scale if name == "scaled" and scale else 0.0

    layers = lbopt.trace_layers(
        loss_fn, problem.params, *problem.args, "scaled", 2.0, verify=True
    )
    assert list(layers) == ["first", "last"]


class Scaled(nn.Dense):
    """A subclass that calls Flax's method."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Other(nn.Dense):
    """A subclass with a method of its own."""

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", nn.initializers.ones, (FEATURES, CLASSES))
        return inputs @ jnp.abs(kernel)


def test_layers_are_the_functions_that_run():
    layers = classify(nn.Sequential([Scaled(CLASSES)])).trace(verify=True)
    assert layers["layers_0"].block.kind == "kronecker"
    layers = classify(nn.Sequential([Other(CLASSES)])).trace()
    assert layers["layers_0/kernel"].fallback


def test_weight_sharing_by_path():
    seen = []

    def choose(path):
        seen.append(path)
        return "reduce" if path == "last" else "expand"

    layers = classify(Mlp()).trace(weight_sharing=choose)
    assert seen == ["first", "last"]
    whys = [layer.why for layer in layers.values()]
    assert whys == ["expand over locations", "reduce over locations"]


def test_a_doubly_factored_layer_in_the_table():
    layers = classify(Mlp()).trace(doubly_factored={"first": (2, FEATURES // 2)})
    (row,) = [line for line in str(layers).splitlines() if "first" in line]
    assert row.split(maxsplit=3)[:3] == ["first", "Dense", "doubly_factored"]
    assert "2×2 + 2×2 + 5×5" in row
    assert row.endswith("2 locations × 2 channels, rank one per example")
    # 5 outputs: G as a factor of the kernel, and again for the bias.
    packed, whole = 3 + 3 + 15 + 15, 4 + 4 + 25 + 25
    assert layers["first"].state_bytes() == 4 * (packed + whole)


# ----------------------------------------------------------------------- messages


# The test run checks types before we do.
untyped = inspect.unwrap(lbopt.trace_layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_sharing": "share"}, "weight_sharing='share' must be 'expand' or 'r"),
        (
            {"weight_sharing": lambda path: "share"},
            r"weight_sharing\('first'\)='share' must be 'expand' or 'reduce'",
        ),
        ({"norm_blocks": "dense"}, "norm_blocks='dense' must be 'unit_wise' or 'full'"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number, ≥ 1; None reads"),
        ({"has_aux": True}, "has_aux=True; return"),
    ],
)
def test_unknown_options(options, message):
    problem = classify(Mlp())
    with pytest.raises(ValueError, match=message):
        untyped(problem.loss_fn, problem.params, *problem.args, **options)


def test_a_loss_that_ignores_the_model():
    problem = classify(Mlp())
    outside = problem.params

    def ignorant(params, x, y):
        return problem.loss_fn(outside, x, y)

    message = "loss_fn=ignorant does not depend on params.*argument params"
    with pytest.raises(ValueError, match=message):
        problem._replace(loss_fn=ignorant).trace()
    with pytest.raises(ValueError, match="does not depend on params"):
        problem._replace(loss_fn=lambda params, x, y: 0.0).trace()


@pytest.mark.parametrize("params", [{}, {"dense": {}}, None])
def test_empty_params(params):
    with pytest.raises(ValueError, match=r"params=\w+ holds no arrays.*model.init"):
        lbopt.trace_layers(lambda params, x: jnp.mean(x), params, inputs())


def test_boxed_params():
    init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    problem = classify(nn.Sequential([nn.Dense(CLASSES, kernel_init=init)]))
    message = r"params\['layers_0'\]\['kernel'\] is a boxed Partitioned.*meta.unbox"
    with pytest.raises(ValueError, match=message):
        problem.trace()
    unboxed = problem._replace(params=nn.meta.unbox(problem.params))
    assert list(unboxed.trace()) == ["layers_0"]


def test_parameters_in_a_list():
    problem = classify(Mlp())

    def loss_fn(params, x, y):
        return problem.loss_fn(params[0], x, y)

    message = r"params\[0\]\['first'\].*nested dictionaries.*in one dictionary"
    with pytest.raises(ValueError, match=message):
        lbopt.trace_layers(loss_fn, [problem.params], *problem.args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loss: loss * jnp.ones(2), r"loss_fn=changed returns float32\[2\]"),
        (
            lambda loss: loss.astype(complex),
            r"returns complex64\[\]; the loss is one r",
        ),
        (lambda loss: (loss, {}), r"loss_fn=changed returns a pair.*has_aux=False"),
    ],
)
def test_a_loss_that_is_not_one_number(change, message):
    problem = classify(Mlp())

    def changed(params, x, y):
        return change(problem.loss_fn(params, x, y))

    with pytest.raises(ValueError, match=message):
        problem._replace(loss_fn=changed).trace()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strict": True}, "strict=True"),
        ({"verify": True}, r"verify=True runs the loss.*ShapeDtypeStruct"),
    ],
)
def test_messages_come_before_any_compile(options, message):
    # Abstract arrays cannot be compiled with: all that trace_layers refuses, it
    # refuses from shapes.
    problem = classify(Gated())
    shapes = jax.eval_shape(lambda *x: x, problem.params, problem.args)
    with pytest.raises(ValueError, match=message):
        lbopt.trace_layers(problem.loss_fn, shapes[0], *shapes[1], **options)
