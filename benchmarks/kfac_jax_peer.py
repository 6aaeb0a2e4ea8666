"""kfac-jax as a contestant, with one repair and one faster block.

Version 0.0.8 needs two changes to take part:

* ``repair``: since jax 0.9.2 ``Primitive.get_bind_params`` returns a dictionary alone,
  where 0.0.8 expects a pair.
* ``SlicedConv``: its factor of a convolution's inputs runs convolutions that XLA
  executes naively on a CPU (one 3×3 layer of ResNet-20 takes seconds).  Shifted slices
  and one matrix product give the same factor; otherwise the comparison would be one of
  two ways to sum over patches.

The package is used as it is otherwise, with its default estimation mode.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax
from jax import lax
from jax.extend import source_info_util
from kfac_jax._src import tag_graph_matcher

from benchmarks import contestants
from benchmarks.workloads import Workload
from lbopt import training


def repair() -> None:
    """Patches kfac-jax 0.0.8, in this process, to run on jax 0.9.2 and later."""
    # The package reads the name from its module at each use.
    tag_graph_matcher.eval_jaxpr_eqn = _eval_jaxpr_eqn


def _eval_jaxpr_eqn(eqn: Any, in_values: Sequence[Any]) -> list[Any]:
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, options = bound if isinstance(bound, tuple) else ((), bound)
    with source_info_util.user_context(eqn.source_info.traceback):
        output = eqn.primitive.bind(*functions, *in_values, **options)
    return output if isinstance(output, list) else [output]


class SlicedConv(kfac_jax.Conv2DTwoKroneckerFactored):
    """kfac-jax's block of a convolution with a faster input factor."""

    def compute_inputs_stats(
        self, inputs: jax.Array, weighting_array: jax.Array | None = None
    ) -> jax.Array:
        """Returns the mean of p pᵀ over examples and locations (channels last)."""
        if weighting_array is not None or self.inputs_channel_index != 3:
            return super().compute_inputs_stats(inputs, weighting_array)
        options = self._layer_tag_eq.params
        (kh, kw), (sh, sw) = self.weights_spatial_shape, options["window_strides"]
        padding = [(0, 0, 0), *((a, b, 0) for a, b in options["padding"]), (0, 0, 0)]
        x = lax.pad(inputs, jnp.zeros((), inputs.dtype), padding)
        height, width = (x.shape[1] - kh) // sh + 1, (x.shape[2] - kw) // sw + 1
        patches = [
            x[:, i : i + (height - 1) * sh + 1 : sh, j : j + (width - 1) * sw + 1 : sw]
            for i in range(kh)
            for j in range(kw)
        ]
        if self.number_of_parameters == 2:
            patches.append(jnp.ones_like(patches[0][..., :1]))
        rows = jnp.concatenate(patches, axis=-1)
        rows = rows.reshape(-1, rows.shape[-1])
        return rows.T @ rows / rows.shape[0]


_REGISTER = {
    "categorical": kfac_jax.register_softmax_cross_entropy_loss,
    "bernoulli": kfac_jax.register_sigmoid_cross_entropy_loss,
}


def kfac_jax_contestant(workload: Workload) -> contestants.Contestant:
    """Returns kfac-jax with the settings of the other contestants.

    Its step is compiled in two variants, with and without statistics; both are counted.
    They are compiled here rather than by the package's own ``step`` method, so that
    tracing and compiling can be timed and none of that method's Python is.
    """
    repair()

    def loss(params, model_state, batch):
        return workload.loss(
            params, model_state, batch, _REGISTER[workload.distribution]
        )

    optimizer = kfac_jax.Optimizer(
        value_and_grad_func=jax.value_and_grad(loss, has_aux=True),
        l2_reg=0.0,
        value_func_has_state=True,
        curvature_ema=contestants.FACTOR_DECAY,
        curvature_update_period=contestants.STATS_PERIOD,
        inverse_update_period=contestants.INVERSE_PERIOD,
        num_burnin_steps=0,
        layer_tag_to_block_ctor={"conv2d": SlicedConv},
        batch_size_extractor=lambda batch: batch["inputs"].shape[0],
    )
    rng = jax.random.PRNGKey(0)
    params, model_state = jax.tree.map(
        jnp.copy, (workload.params, workload.model_state)
    )
    start = time.perf_counter()
    state = optimizer.init(params, rng, workload.batch, model_state)
    setup_seconds = time.perf_counter() - start

    def step(carry, batch, *, with_statistics):
        params, state, model_state, rng = carry
        rng, step_rng = jax.random.split(rng)
        with optimizer.staging_context():
            params, state, model_state, stats = optimizer._step(
                params,
                state,
                step_rng,
                batch,
                model_state,
                jnp.asarray(contestants.LEARNING_RATE),
                jnp.asarray(contestants.MOMENTUM),
                jnp.asarray(contestants.DAMPING),
                with_statistics,
                False,  # the damping stays
            )
        return (params, state, model_state, rng), stats["loss"]

    carry = (params, state, model_state, rng)
    programs = {
        with_statistics: contestants.compile_step(
            jax.jit(
                functools.partial(step, with_statistics=with_statistics),
                donate_argnums=0,
            ),
            carry,
            workload.batch,
        )
        for with_statistics in (True, False)
    }

    def run(carry, batch, index):
        with_statistics = index % contestants.STATS_PERIOD == 0
        return programs[with_statistics].call(carry, batch)

    return contestants.Contestant(
        name="kfac-jax",
        step=run,
        state=carry,
        setup_seconds=setup_seconds,
        compile_seconds=sum(p.seconds for p in programs.values()),
        state_bytes=training.opt_state_bytes(state),
        temporary_bytes=max(p.temporary_bytes for p in programs.values()),
    )
