"""The collectives of an optimizer as XLA:TPU compiles them, by topology.

    python -m benchmarks.collectives            # the table; about a minute and a half
    python -m benchmarks.collectives v5e:4x4    # of one topology

The compiler runs on a machine without a TPU (``pip install 'lbopt[aot-tpu]'``), nothing
is run, and no time is measured.  Each device has a vector of 1 million float32 numbers,
which JAX's collectives or those of ``lbopt.collectives`` cut into shares, none of them
a multiple of 128.  A cell holds the collectives in the compiled program and the bytes
that a device sends, over those of the whole vector, if each collective is a ring:
(N−1)/N for a reduce-scatter, an all-gather and an all-to-all over groups of N devices,
twice that for an all-reduce.

XLA:TPU writes a reduce-scatter in two ways: as such, and as a fusion of a padded
all-reduce and a slice, "all-reduce-scatter", which computes the slice alone.  Any other
all-reduce sums and sends the whole vector.
"""

import argparse
import collections
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from lbopt import collectives, sharding
from lbopt.collectives import Axis

TOPOLOGIES = (
    *("v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v6e:4x4", "v6e:16x16"),
    *("v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4", "v5p:4x8x8"),
)
NUMBERS = 1_000_000
_VARIABLES = {
    # Else it asks a server on the network which chips this machine has.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Else one process at a time may load the compiler.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_KINDS = (
    "all-reduce",
    "reduce-scatter",
    "all-gather",
    "all-to-all",
    "collective-permute",
)
_BYTES = {"f32": 4, "bf16": 2}
_INSTRUCTION = re.compile(
    rf" = \(?(\w+)\[([\d,]*)\].*? ({'|'.join(_KINDS)})(-start)?\("
)


class Traffic(NamedTuple):
    """What a program's collectives send.

    Attributes:
      counts: their number by kind.
      bytes: the bytes that a device sends, if each is a ring.
    """

    counts: Mapping[str, int]
    bytes: float

    def cell(self, whole: int) -> str:
        """Returns the collectives, and the bytes sent over ``whole``."""
        names = [
            kind if number == 1 else f"{number} {kind}"
            for kind, number in sorted(self.counts.items())
        ]
        return f"{' + '.join(names)} {self.bytes / whole:.2f}"


def traffic(text: str) -> Traffic:
    """Reads the collectives of a program for a TPU.

    Args:
      text: the optimised HLO.

    Returns:
      Their kinds and bytes; those of a reduce-scatter that is a fusion as its own, with
      its padding, and the permutation that undoes the padding as bytes alone.

    Raises:
      ValueError: for a collective that it cannot read.
    """
    counts: collections.Counter[str] = collections.Counter()
    total, fusion = 0.0, False
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            fusion = line.startswith("%all-reduce-scatter")
        found = _INSTRUCTION.search(line)
        if found is None:
            continue
        dtype, dims, kind, start = found.groups()
        if start and kind != "collective-permute":
            raise ValueError(f"cannot read the collective {line.strip()[:200]}")
        size = math.prod(map(int, dims.split(","))) * _BYTES[dtype]
        if kind == "collective-permute":
            total += size
            continue
        group = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
        if group is None:
            raise ValueError(f"cannot read the groups of {line.strip()[:200]}")
        devices = group[1].count(",") + 1
        kind = "reduce-scatter" if fusion else kind
        counts[kind] += 1
        # The result of a reduce-scatter is a share; in a fusion it is still the whole.
        whole = size * devices if kind == "reduce-scatter" and not fusion else size
        ways = 2 if kind == "all-reduce" else 1
        total += ways * whole * (devices - 1) / devices
    return Traffic(counts, total)


def _psum_scatter(x: jax.Array, axis: Axis, *row: int) -> jax.Array:
    padded = jnp.pad(x, (0, -x.size % (axis.size * math.prod(row))))
    pieces = padded.reshape(axis.size, -1, *row)
    return lax.psum_scatter(pieces, axis.name, scatter_dimension=0)


def _share(x: jax.Array, axis: Axis) -> jax.Array:
    return x[: axis.share(x.size)].reshape(1, -1)


FORMS: Mapping[str, Callable[[jax.Array, Axis], jax.Array]] = {
    "`psum_scatter` of `[n, share]`": _psum_scatter,
    "of `[n, rows, 128]`": lambda x, axis: _psum_scatter(x, axis, 128),
    "`scatter_mean`": lambda x, axis: collectives.scatter_mean([x[None]], axis)[0],
    "`all_gather` of `[1, share]`": lambda x, axis: lax.all_gather(
        _share(x, axis), axis.name, axis=1, tiled=True
    ),
    "`gather`": lambda x, axis: collectives.gather(_share(x, axis), axis),
    "`exchange`": lambda x, axis: collectives.exchange(
        collectives.cut(x[None], axis)[0], axis
    ),
}
"""What each column of the table compiles, on a vector of which all devices have one."""


def measure(topology: str, numbers: int = NUMBERS) -> dict[str, Traffic]:
    """Compiles every form for a topology.

    Args:
      topology: its name, as ``"v5e:4x4"``.
      numbers: the length of each device's vector.

    Returns:
      The traffic of each form.
    """
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)  # read when the compiler starts
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices = collectives.by_place(found.devices)
    mesh, axis = sharding.make_mesh(devices), Axis("data", len(devices))
    along = PartitionSpec("data")
    vectors = jax.ShapeDtypeStruct(
        (axis.size, numbers), jnp.float32, sharding=NamedSharding(mesh, along)
    )

    def compiled(form: Callable[[jax.Array, Axis], jax.Array]) -> str:
        program = jax.shard_map(
            lambda x: form(x[0], axis)[None],
            mesh=mesh,
            in_specs=along,
            out_specs=along,
            check_vma=False,
        )
        return jax.jit(program).lower(vectors).compile().as_text() or ""

    return {name: traffic(compiled(form)) for name, form in FORMS.items()}


def row(topology: str, found: Mapping[str, Traffic], numbers: int = NUMBERS) -> str:
    """Returns a line of the table."""
    cells = [one.cell(4 * numbers) for one in found.values()]
    return f"| {topology.replace(':', ' ')} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collectives")
    parser.add_argument("topology", nargs="*", help="as v5e:4x4; without, the table's")
    names = parser.parse_args(arguments).topology or TOPOLOGIES
    print(f"| | {' | '.join(FORMS)} |\n|{'---|' * (len(FORMS) + 1)}")
    for name in names:
        print(row(name, measure(name)), flush=True)


if __name__ == "__main__":
    main()
