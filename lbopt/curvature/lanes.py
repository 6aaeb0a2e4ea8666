"""Sees the ``vmap`` axes that map an array."""

import jax

from lbopt._typing import Array


def note_lanes(outputs: Array, parameter: Array, lanes: list[int]) -> None:
    """Records the sizes of ``vmap`` axes that map the output but not the parameters."""

    # Only a batching rule sees the size of an axis that is mapped over.
    @jax.custom_batching.custom_vmap
    def mark(x, parameter):
        del parameter
        return x

    @mark.def_vmap
    def rule(axis_size, in_batched, x, parameter):
        if not in_batched[1]:
            lanes.append(axis_size)
        # The rule is traced inside the next vmap out, if there is one.
        note_lanes(x[0] if in_batched[0] else x, parameter, lanes)
        return x, in_batched[0]

    mark(jax.lax.stop_gradient(outputs), jax.lax.stop_gradient(parameter))
