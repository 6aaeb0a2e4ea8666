"""The test session is stricter than users are."""

import os

# One thread: LAPACK's own threads fight with XLA's, and times become erratic.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
# Most of the time goes into compiling small programs that run once or twice.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
# They start here, so that no experiment's command line can change their number.
assert len(jax.devices()) == 8
