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
    Problem,
    classify,
    cross_entropy,
    inputs,
    labels,
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
    unused = [path for path in layers if path not in layers.preconditioned]
    assert unused == ["unused/kernel", "unused/bias"]


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
    assert lines[-2].split()[:2] == [str(len(layers)), "layers"]
    assert f"{total} B" in lines[-2]
    assert lines[-1].startswith("! 3 without a block of their own")


def test_the_state_has_the_bytes_of_the_table():
    problem = classify(Gated())
    layers = problem.trace()
    state = lbopt.scale_by_kfac(layers).init(problem.params)
    held = jax.tree.leaves((state.factors, state.inverses))
    assert sum(x.nbytes for x in held) == sum(
        x.state_bytes() for x in layers.preconditioned.values()
    )


def test_an_unused_layer_has_no_curvature_and_no_state():
    problem = classify(Gated())
    _, grads, curvature = problem.evaluate()
    assert set(curvature) == {"gate", "dense", "norm", "head"}
    assert not np.any(grads["unused"]["kernel"])
    state = lbopt.scale_by_kfac(problem.trace()).init(problem.params)
    assert set(state.factors) == {"gate", "dense", "norm", "head"}


def test_strict_refuses_by_path():
    with pytest.raises(ValueError, match="strict=True") as error:
        classify(Gated()).trace(strict=True)
    message = str(error.value)
    assert "'gate' (no layer with a rule reads it)" in message
    assert "'unused/kernel' (the loss does not use it)" in message
    assert "strict=False" in message
    assert "'dense'" not in message
    classify(Mlp()).trace(strict=True)  # all known


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


def test_a_layer_at_the_root_of_the_parameters():
    problem = classify(nn.Dense(CLASSES))
    layers = problem.trace()
    assert [layer.block.kind for layer in layers.values()] == ["kronecker"]
    (statistics,) = problem.evaluate()[2].values()
    assert statistics.a.shape == (FEATURES + 1, FEATURES + 1)


def test_a_subclass_that_calls_super_is_tapped_once():
    class Scaled(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return 2 * super().__call__(inputs)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Scaled(CLASSES, name="scaled")(x)

    layers = classify(Net()).trace(verify=True)
    assert layers["scaled"].block.kind == "kronecker"


def test_a_subclass_with_its_own_rule_falls_back():
    class Other(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            kernel = self.param("kernel", nn.initializers.ones, (FEATURES, CLASSES))
            return inputs @ jnp.abs(kernel)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Other(CLASSES, name="other")(x)

    layers = classify(Net()).trace()
    assert layers["other/kernel"].fallback


def test_weight_sharing_by_path():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(WIDTH, name="low")(x)
            return jnp.mean(nn.Dense(CLASSES, name="top")(x), 1)

    x = jnp.tile(inputs()[:, None], (1, 2, 1))
    problem = classify(Net(), x)
    seen = []

    def choose(path):
        seen.append(path)
        return "reduce" if path == "top" else "expand"

    layers = problem.trace(weight_sharing=choose)
    assert seen == ["low", "top"]
    assert layers["top"].why.startswith("reduce")
    assert layers["low"].why.startswith("expand")


class Pictures(nn.Module):
    """A map of 2 × 2 locations and 3 channels under a wide layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3), name="conv")(x).reshape(x.shape[0], -1)
        return nn.Dense(CLASSES, name="wide")(x)


@pytest.mark.parametrize("choice", [9, {"wide": (4, 3)}], ids=str)
def test_a_doubly_factored_layer_in_the_table(choice):
    problem = classify(Pictures(), jnp.ones((8, 2, 2, 2)))
    layers = problem.trace(doubly_factored=choice)
    kinds = {path: layer.block.kind for path, layer in layers.items()}
    assert kinds == {"conv": "kronecker", "wide": "doubly_factored"}
    (row,) = [line for line in str(layers).splitlines() if "wide" in line]
    assert row.split(maxsplit=3)[:3] == ["wide", "Dense", "doubly_factored"]
    assert "4×4 + 3×3 + 3×3" in row
    assert row.endswith("4 locations × 3 channels, rank one an example")
    # 3 outputs: G as a factor of the kernel, and again for the bias.
    packed, whole = 10 + 6 + 6 + 6, 16 + 9 + 9 + 9
    assert layers["wide"].state_bytes() == 4 * (packed + whole)


# ----------------------------------------------------------------------- messages


def test_unknown_weight_sharing():
    problem = classify(Mlp())
    trace_layers = inspect.unwrap(lbopt.trace_layers)  # the test run checks types, too
    with pytest.raises(ValueError, match=r"weight_sharing='share' must be 'expand'"):
        trace_layers(
            problem.loss_fn, problem.params, *problem.args, weight_sharing="share"
        )

    def choose(path):
        return "share"

    message = r"weight_sharing\('first'\) returned 'share'.*'expand' or 'reduce'"
    with pytest.raises(ValueError, match=message):
        problem.trace(weight_sharing=choose)


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
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
            return nn.Dense(CLASSES, kernel_init=init, name="dense")(x)

    problem = classify(Net())
    message = r"params\['dense'\]\['kernel'\] is a boxed Partitioned.*meta.unbox"
    with pytest.raises(ValueError, match=message):
        problem.trace()
    unboxed = problem._replace(params=nn.meta.unbox(problem.params))
    assert list(unboxed.trace()) == ["dense"]


def test_parameters_in_a_list():
    problem = classify(Mlp())

    def loss_fn(params, x, y):
        return problem.loss_fn(params[0], x, y)

    message = r"params\[0\]\['first'\].*nested dictionaries.*in one dictionary"
    with pytest.raises(ValueError, match=message):
        lbopt.trace_layers(loss_fn, [problem.params], *problem.args)


def test_a_loss_that_is_not_one_number():
    problem = classify(Mlp())

    def vector(params, x, y):
        return problem.loss_fn(params, x, y) * jnp.ones(2)

    with pytest.raises(ValueError, match=r"loss_fn=vector returns float32\[2\]"):
        problem._replace(loss_fn=vector).trace()


def test_aux_must_be_announced():
    problem = classify(Mlp())

    def pair(params, x, y):
        return problem.loss_fn(params, x, y), {}

    with pytest.raises(ValueError, match=r"loss_fn=pair returns a pair.*has_aux=False"):
        problem._replace(loss_fn=pair).trace()
    with pytest.raises(ValueError, match="has_aux=True; return"):
        problem._replace(has_aux=True).trace()


def test_messages_come_before_any_compile():
    # Abstract arrays cannot be compiled with: all that trace_layers refuses, it
    # refuses from shapes.
    problem = classify(Gated())
    shapes = jax.eval_shape(lambda *x: x, problem.params, problem.args)
    with pytest.raises(ValueError, match="strict=True"):
        lbopt.trace_layers(problem.loss_fn, shapes[0], *shapes[1], strict=True)
    with pytest.raises(
        ValueError, match=r"verify=True runs the loss.*ShapeDtypeStruct"
    ):
        lbopt.trace_layers(problem.loss_fn, shapes[0], *shapes[1], verify=True)


def test_problem_of_two_inputs():
    # The batch may be any tree.
    model = Mlp()
    params = model.init(jax.random.key(0), inputs())["params"]

    def loss_fn(params, batch):
        return cross_entropy(model.apply({"params": params}, batch["x"]), batch["y"])

    batch = {"x": inputs(), "y": labels()}
    assert list(Problem(loss_fn, params, (batch,)).trace()) == ["first", "last"]
