"""What one abstract trace of a loss notes of its layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lbopt.curvature import locations, observation
from lbopt.curvature.observation import Call, Traced
from tests.problems import BATCH, FEATURES, WIDTH, Mlp, classify, cross_entropy


def traced_of(problem, loss_fn=None):
    places = locations.find_locations(problem.params)
    loss = loss_fn or problem.loss_fn
    return Traced(loss, problem.params, problem.args, places, {})


def test_layers_are_noted_with_their_shapes():
    traced = traced_of(classify(Mlp()))
    observer = observation.observe(traced)
    numbers = {place.path: i for i, place in enumerate(traced.locations)}
    assert set(observer.sightings) == set(numbers.values())
    first = observer.sightings[numbers["first"]].seen
    assert isinstance(first.module, nn.Dense)
    assert first.module.scope is None  # unbound: it holds no tracers
    assert first.arguments["inputs"].shape == (BATCH, FEATURES)
    assert {n: x.shape for n, x in first.params.items()} == {
        "kernel": (FEATURES, WIDTH),
        "bias": (WIDTH,),
    }
    last = observer.sightings[numbers["last"]].seen
    assert set(last.params) == {"kernel"}
    assert observer.unknown == []
    assert observer.refused == {}
    assert not observer.lifted | observer.differentiated


def test_lanes_are_the_axes_of_examples():
    problem = classify(Mlp())

    def per_example(params, x, y):
        return jnp.mean(jax.vmap(lambda *z: problem.loss_fn(params, *z))(x, y))

    observer = observation.observe(traced_of(problem, per_example))
    assert [s.lanes for s in observer.sightings.values()] == [[BATCH], [BATCH]]
    shapes = [s.seen.arguments["inputs"].shape for s in observer.sightings.values()]
    assert shapes == [(FEATURES,), (WIDTH,)]


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3,), name="conv")(x)
        x = nn.LayerNorm(name="norm")(x).reshape(len(x), -1)
        x = nn.Dense(5, name="wide")(x)
        return nn.Dense(3, name="top")(x)


def test_a_layer_knows_the_channels_of_the_convolution_before_it():
    problem = classify(ConvNet(), jnp.ones((BATCH, 4, 2)))
    traced = traced_of(problem)
    seen = observation.observe(traced).sightings
    channels = {traced.locations[i].path: s.map_channels for i, s in seen.items()}
    # A normalisation has no kernel; after a dense layer there is no map any more.
    assert channels == {"conv": None, "norm": 6, "wide": 6, "top": None}


@pytest.mark.parametrize("compiled_before", [False, True])
def test_markers_find_their_way_into_a_compiled_function(compiled_before):
    problem = classify(Mlp())
    apply = jax.jit(lambda params, x: Mlp().apply({"params": params}, x))

    def loss_fn(params, x, y):
        return cross_entropy(apply(params, x), y)

    traced = traced_of(problem, loss_fn)
    if compiled_before:
        jax.eval_shape(loss_fn, problem.params, *problem.args)
    without = observation.observe(traced)
    assert without.sightings == {}
    # JAX does not call a function again that it has traced before.
    paths = [call.path for call in without.inner_calls()]
    assert paths == ([] if compiled_before else [("first",), ("last",)])
    marked = observation.observe(traced, in_params={0, 1})
    assert set(marked.sightings) == marked.lifted == {0, 1}
    assert set(traced.params["first"]) == {"kernel", "bias"}


@pytest.mark.parametrize("backward", [False, True])
def test_derivatives_of_outputs_are_noted(backward):
    problem = classify(Mlp())

    def with_a_penalty(params, x, y):
        slope = jax.grad(lambda x: jnp.sum(Mlp().apply({"params": params}, x)))(x)
        return problem.loss_fn(params, x, y) + jnp.mean(slope**2)

    seen = observation.observe(traced_of(problem, with_a_penalty), backward=backward)
    plain = observation.observe(traced_of(problem), backward=backward)
    if backward:
        assert seen.derived == {0, 1}
        assert plain.derived == set()
    else:
        assert seen.differentiated == {0, 1}
        assert plain.differentiated == set()


def test_calls_match_by_the_ends_of_their_paths_and_by_names():
    kernel, both = {"kernel": jnp.ones(1)}, {"kernel": jnp.ones(1), "bias": jnp.ones(1)}
    params = {"a": {"dense": both}, "b": {"dense": kernel}, "dense": both}
    places = locations.find_locations(params)
    traced = Traced(lambda params: jnp.zeros([]), params, (), places, {})

    def matched(path, *names):
        call = Call(path, frozenset(names), False, False, [])
        numbers = observation.matching(traced, [call])
        return {places[number].path for number in numbers}

    assert matched(("dense",), "kernel") == {"a/dense", "b/dense", "dense"}
    assert matched(("dense",), "kernel", "bias") == {"a/dense", "dense"}
    assert matched(("b", "dense"), "kernel") == {"b/dense"}
    assert matched(("c", "dense"), "kernel") == set()
    assert observation.matching(traced, []) == set()


def test_arguments_that_are_no_arrays_arrive_as_they_are():
    seen = []

    def function(x, options):
        seen.append((type(x).__name__, options))
        return x

    observation.eval_shape(function, jnp.ones(2), {"name": "a", "n": 3, "none": None})
    (found,) = seen
    assert found[1] == {"name": "a", "n": 3, "none": None}
    assert "Tracer" in found[0]
