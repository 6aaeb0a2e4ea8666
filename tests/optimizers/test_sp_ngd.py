"""SP-NGD is the chain that its docstring writes out."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lbopt
from lbopt.transforms.velocity import scale_by_velocity
from tests.optimizers.test_kfac import trajectory
from tests.problems import assert_close


@pytest.mark.parametrize("rescale", ["always", "shrink_only", None])
def test_sp_ngd_is_its_chain(gradients, rescale):
    layers = gradients[1]
    tx = lbopt.sp_ngd(
        0.02, layers, damping=2.5e-4, momentum=0.5, kl_clip=None, rescale=rescale
    )
    core = lbopt.scale_by_kfac(
        layers, damping=2.5e-4, factor_decay=0.0, stale_threshold=0.1
    )
    last = [lbopt.rescale_weights(layers, shrink_only=rescale == "shrink_only")]
    chain = optax.chain(core, scale_by_velocity(0.02, 0.5), *(last if rescale else []))
    assert_close(trajectory(gradients, tx), trajectory(gradients, chain))


def test_the_first_setting_of_sp_ngd(gradients):
    layers = gradients[1]
    core = lbopt.scale_by_kfac(
        layers,
        damping=lambda k: jnp.maximum(0.1 * 0.9**k, 3e-3),
        factor_decay=0.0,
        stale_threshold=0.1,
    )
    chain = optax.chain(
        lbopt.clip_by_kl(core, 0.01, 0.1),
        scale_by_velocity(0.1, 0.7),
        lbopt.rescale_weights(layers, shrink_only=True),
    )
    found = trajectory(gradients, lbopt.sp_ngd(0.1, layers))
    assert_close(found, trajectory(gradients, chain))


def test_a_kernel_that_starts_at_zero_is_lengthened_by_the_paper_s_rescaling(gradients):
    params, layers, batches = gradients
    head = {"kernel": jnp.zeros_like(params["last"]["kernel"])}
    params = {**params, "last": head}
    grads, curvature = jax.tree.map(lambda x: x[0], batches)
    norms = {}
    for rescale in ("shrink_only", "always"):
        tx = lbopt.sp_ngd(0.1, layers, rescale=rescale)
        update = jax.jit(tx.update)
        updates, _ = update(grads, tx.init(params), params, curvature=curvature)
        norms[rescale] = float(jnp.linalg.norm(updates["last"]["kernel"]))
    outputs = head["kernel"].shape[-1]
    assert norms["always"] == pytest.approx((2 * outputs) ** 0.5, rel=1e-5)
    assert 0 < norms["shrink_only"] < 0.5 * norms["always"]


def test_a_bound_that_is_not_positive(gradients):
    with pytest.raises(ValueError, match=r"kl_clip=0.0 must be positive; None for no"):
        lbopt.sp_ngd(0.1, gradients[1], kl_clip=0.0)


def test_messages_name_the_arguments_of_sp_ngd(gradients):
    params, layers = gradients[0], gradients[1]
    with pytest.raises(ValueError, match=r'0.0 at step 0.*velocity="code"'):
        lbopt.sp_ngd(optax.linear_schedule(0.0, 0.1, 10), layers).init(params)


def test_an_unknown_rescaling(gradients):
    with pytest.raises(ValueError, match=r"rescale='never' must be 'always', 'shrink"):
        lbopt.sp_ngd.__wrapped__(0.1, gradients[1], rescale="never")
