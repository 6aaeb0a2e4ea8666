"""Compiled programs that are kept on disk."""

import pathlib

import jax


def share_programs(runs: pathlib.Path) -> None:
    """Keeps compiled programs beside runs, for other seeds and for starts that resume.

    Does nothing if jax already has a directory for them, by
    ``JAX_COMPILATION_CACHE_DIR``.

    Args:
      runs: the directory of the runs; programs go to its directory ``compiled``.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(runs.resolve() / "compiled"))
