"""The test session is stricter than users are."""

import atexit
import os
import shutil
import tempfile

# One thread: LAPACK's own threads fight with XLA's, and times become erratic.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's older code generator compiles a small program in half the time of the newer one.
os.environ["XLA_FLAGS"] = (
    f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Most of the time goes into compiling small programs that run once or twice.
jax.config.update("jax_disable_most_optimizations", True)
# Different tests compile the same programs; a third of the time goes without this.
_PROGRAMS = tempfile.mkdtemp(prefix="lbopt-programs-")
atexit.register(shutil.rmtree, _PROGRAMS, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", _PROGRAMS)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_rank_promotion", "raise")
# They start here, so that no experiment's command line can change their number.
assert len(jax.devices()) == 8


@pytest.fixture(scope="module", autouse=True)
def _programs_of_a_file_end_with_it():
    """Else a process of a whole run grows to more memory than machines have."""
    yield
    jax.clear_caches()
