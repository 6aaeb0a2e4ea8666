"""Preconditioning on the owners against every layer's own block, in one place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lbopt import sharding
from lbopt.collectives import Axis
from lbopt.curvature import (
    capture,
    diagonal,
    kronecker,
    linear_maps,
    locations,
    unit_wise,
)
from lbopt.curvature.registry import Layer
from lbopt.transforms import kfac_state, owner_buffers
from lbopt.transforms.placement import precondition_on_owners


def layer(path, block, shapes):
    location = locations.Location((path,), tuple(shapes))
    return Layer(
        path=path,
        module="test",
        tapped=capture.Tapped(location, block),
        has_tap=False,
        shapes=shapes,
        why="",
        fallback=False,
        used=True,
    )


def dense(path, d_in, d_out):
    linear = linear_maps.dense_linear((d_in, d_out), True, True)
    block = kronecker.kronecker_block(linear, "expand", jnp.float32)
    return layer(path, block, {"kernel": (d_in, d_out), "bias": (d_out,)})


LAYERS = {
    x.path: x
    for x in (
        dense("a", 4, 3),
        dense("b", 3, 5),
        dense("c", 4, 3),
        # One channel and one number: axes of size 1 that are not the devices'.
        layer(
            "norm",
            unit_wise.unit_wise_block(1, ("scale", "bias"), True, jnp.float32),
            {"scale": (1,), "bias": (1,)},
        ),
        layer("gate", diagonal.diagonal_block("w", (1,), jnp.float32), {"w": (1,)}),
    )
}
RNG = np.random.default_rng(0)


def random_inverses():
    """Made-up inverses of every layer, by the block's own shapes."""
    shapes = jax.eval_shape(lambda: {p: x.block.init(())[1] for p, x in LAYERS.items()})
    return jax.tree.map(lambda s: jnp.float32(RNG.normal(size=s.shape)), shapes)


def on_their_owners(owners, inverses):
    """The same on each owner's desk, put there by hand."""
    kept = np.zeros((owners.devices, owner_buffers.kept_layout(owners).length))
    ends = [0] * owners.devices
    for unit, device in zip(owners.units, owners.owner, strict=True):
        names = type(LAYERS[unit.path].block.factors)._fields
        numbers = np.ravel(inverses[unit.path][names.index(unit.kind)])
        kept[device, ends[device] : ends[device] + numbers.size] = numbers
        ends[device] += numbers.size
    assert max(ends) == kept.shape[1]
    return sharding.Sharded(jnp.asarray(kept, jnp.float32))


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_natural_gradients_of_the_mean(devices, how):
    units = sharding.units_of(LAYERS)
    owners = sharding.owners_of(units, devices, gathered=())
    inverses = random_inverses()
    kept = on_their_owners(owners, inverses)
    gradients = {
        path: {
            name: jnp.float32(RNG.normal(size=(devices, *shape)))
            for name, shape in x.shapes.items()
        }
        for path, x in LAYERS.items()
    }
    axis = Axis("data", devices)

    def work(kept, gradients):
        own = kfac_state.local(kept)
        again = kfac_state.as_in(kept, own)
        assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, kept)
        return precondition_on_owners(LAYERS, owners, own, gradients, axis)

    mesh = sharding.make_mesh(jax.devices()[:devices])
    if how == "pmap":
        mapped = jax.pmap(work, "data", devices=list(mesh.devices))
        actual = jax.tree.map(lambda x: x[-1], mapped(kept, gradients))
    else:
        along = PartitionSpec("data")
        mapped = jax.shard_map(
            lambda kept, g: work(kept, jax.tree.map(lambda x: x[0], g)),
            mesh=mesh,
            in_specs=along,
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        actual = jax.jit(mapped)(kept, gradients)
    for path, x in LAYERS.items():
        mean = {name: jnp.mean(g, 0) for name, g in gradients[path].items()}
        expected = x.block.precondition(inverses[path], mean)
        for name, natural in expected.items():
            np.testing.assert_allclose(
                actual[path][name], natural, rtol=2e-5, atol=1e-6, err_msg=path
            )
