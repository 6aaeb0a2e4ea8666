"""Natural gradients take the place of gradients, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np

from lbopt import sharding
from lbopt.collectives import Axis
from lbopt.transforms import kfac_state, natural_gradient
from tests.problems import Mlp, assert_close, assert_equal, classify

ALONE = Axis(None, 1)
PROBLEM = classify(Mlp())
LAYERS = PROBLEM.trace()


def test_every_layer_is_multiplied_by_its_inverses():
    own = {path: LAYERS[path] for path in sorted(LAYERS)}
    owners = sharding.owners_of(sharding.units_of(own), 1)
    state = kfac_state.init_state(own, owners, ALONE, adaptive=False)
    rng = np.random.default_rng(0)
    inverses = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state.inverses
    )
    state = state._replace(inverses=inverses)
    grads = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), PROBLEM.params
    )
    unchanged, natural = natural_gradient.precondition(own, owners, state, grads, ALONE)
    assert_equal(unchanged, grads)  # nothing here is for others to average
    a, g = (np.asarray(x, np.float64) for x in inverses["first"])
    whole = np.vstack([grads["first"]["kernel"], grads["first"]["bias"][None]])
    expected = a @ whole @ g
    assert_close(
        natural["first"], {"kernel": expected[:-1], "bias": expected[-1]}, rtol=1e-4
    )


def test_what_is_no_layer_stays():
    tree = {"first": {"kernel": jnp.ones(3)}, "other": {"scale": jnp.full(2, 5.0)}}
    own = {"first": LAYERS["first"]}
    insert = natural_gradient.insert(own, tree, {"first": {"kernel": jnp.zeros(3)}})
    assert_equal(insert["other"], tree["other"])
    assert not insert["first"]["kernel"].any()
