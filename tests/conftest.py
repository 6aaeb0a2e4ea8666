"""The test session is stricter than users are."""

import atexit
import os
import pathlib
import shutil
import tempfile

# One thread: LAPACK's own threads fight with XLA's, and times become erratic.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's older code generator compiles a small program in half the time of the newer one.
os.environ["XLA_FLAGS"] = (
    f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"
)
# Different tests compile the same programs; a third of the time goes without this. The
# workers and the processes that tests start inherit the place from the first process.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _PROGRAMS = tempfile.mkdtemp(prefix="lbopt-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS
    atexit.register(shutil.rmtree, _PROGRAMS, ignore_errors=True)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Most of the time goes into compiling small programs that run once or twice.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_rank_promotion", "raise")
# They start here, so that no experiment's command line can change their number.
assert len(jax.devices()) == 8


# Bytes. Two workers run at once, so about 5 GB are used before programs are dropped.
_LARGE = 2.5e9


def _memory():
    """Bytes that this process holds, infinity where the system does not tell."""
    path = pathlib.Path("/proc/self/statm")
    if not path.exists():
        return float("inf")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module", autouse=True)
def _programs_end_before_memory_does():
    """Else a process of a whole run grows to more memory than machines have."""
    yield
    if _memory() > _LARGE:
        jax.clear_caches()
