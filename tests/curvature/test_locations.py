"""Addresses in the tree of parameters."""

import types

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import lbopt
from lbopt.curvature import locations
from lbopt.curvature.locations import Location

TREE = {
    "top": {
        "scale": jnp.ones(2),
        "inner": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)},
    },
    "empty": {},
    "list": [jnp.ones(4)],
}
TOP, INNER = (
    Location(("top",), ("scale",)),
    Location(("top", "inner"), ("kernel", "bias")),
)


class Plain(dict):
    """A mapping of the user's own."""


def test_every_dictionary_that_holds_arrays_is_a_location():
    assert locations.find_locations(TREE) == [TOP, INNER]
    assert INNER.path == "top/inner"
    assert locations.find_locations({"w": jnp.ones(2)}) == [Location((), ("w",))]
    assert locations.find_locations({}) == []
    # Shapes are arrays without values, and keys need be no strings.
    shapes = {0: {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}}
    (only,) = locations.find_locations(shapes)
    assert only == Location((0,), ("w",))
    assert only.path == "0"


def test_a_lookup_ends_where_optax_masks():
    assert locations.lookup(TREE, INNER) is TREE["top"]["inner"]
    assert locations.lookup(TREE, Location((), ())) is TREE
    for masked in ({"top": optax.MaskedNode()}, optax.MaskedNode()):
        assert locations.lookup(masked, INNER) == optax.MaskedNode()
    with pytest.raises(KeyError):
        locations.lookup({"top": {}}, INNER)


@pytest.mark.parametrize(
    "make", [dict, flax.core.FrozenDict, Plain, types.MappingProxyType]
)
def test_mappings_keep_their_types(make):
    inner, new, old = {"kernel": jnp.ones(2)}, jnp.ones([]), jnp.zeros([])
    tree = make({"top": inner if make is flax.core.FrozenDict else make(inner)})
    added = locations.insert(tree, {("top",): {"probe1_0_a": new, "kernel": old}})
    assert type(added) is make
    # A FrozenDict shows its inner dictionaries frozen.
    assert type(added["top"]) is type(tree["top"])
    assert dict(added["top"]) == {"probe1_0_a": new, "kernel": old}
    assert list(tree["top"]) == ["kernel"]  # the user's own tree is as before
    own = lbopt.plain(added)
    assert type(own) is make
    assert type(own["top"]) is type(tree["top"])
    assert dict(own["top"]) == {"kernel": old}


def test_arrays_are_the_same_objects_and_may_be_added_at_the_root():
    x = jnp.ones(3)
    added = locations.insert(TREE, {(): {"x": x}, ("empty",): {"y": x}})
    assert added["x"] is added["empty"]["y"] is x
    assert added["top"]["inner"]["kernel"] is TREE["top"]["inner"]["kernel"]
    assert added["list"] is TREE["list"]


def test_plain_takes_away_lbopts_names_alone():
    kept = {"probe": 1, "probe_scale": 2, "marker7": 3, "probes1_0": 4, "w": 5}
    tree = {"a": kept | {"probe12_3_a": 6, "marker0_1": 7}, "marker4_2": 8}
    assert lbopt.plain(tree) == {"a": kept}
    assert lbopt.plain([1, 2]) == [1, 2]
    # The gradient by the tree with additions has zeros for them.
    grads = jax.grad(lambda p: lbopt.plain(p)["w"] ** 2)({"w": 3.0, "probe1_0_a": 1.0})
    assert grads == {"w": 6, "probe1_0_a": 0}


def test_boxes_are_opened():
    x = jnp.ones((2, 3))
    boxed = {"kernel": nn.Partitioned(x, names=("in", "out")), "bias": x}
    opened = locations.without_boxes(boxed)
    assert opened["kernel"] is x
    assert opened["bias"] is x


def test_own_params_are_those_of_the_scope_itself():
    seen = {}

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            gate = self.param("gate", nn.initializers.ones, (3,))
            y = nn.Dense(3, name="inner")(x) * gate[None]
            seen.update(locations.own_params(self))
            return y

    shapes = jax.eval_shape(Outer().init, jax.random.key(0), jnp.ones((1, 2)))
    assert set(shapes["params"]) == {"gate", "inner"}
    assert set(seen) == {"gate"}
