"""Scale shown without a cluster: what SP-NGD's step sends, inverts and stores.

    python -m benchmarks.scaling --compile 8     # compiles for 8 virtual devices
    python -m benchmarks.scaling                 # the tables

The step is compiled and not run: the collectives and their bytes are read from the
program's text.  Bytes are those that each device puts in, as ``state.report`` counts
them.  How often a collective runs follows from the loops around it: up to one (the
guard against numbers that are not finite) it runs at every step; inside two, once if
its statistic is due; inside three or four, as often as there are rounds in its class
of units; inside five, as there are units.
"""

import argparse
import datetime
import json
import pathlib
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lbopt
from benchmarks.program_bytes import (
    KINDS,
    Collective,
    Counts,
    collectives_of,
    sent,
    step_bytes,
)
from benchmarks.scaling_model import (
    Machine,
    Problem,
    model_seconds,
    planned,
    turns_of,
)
from experiments.models import resnet
from lbopt import sharding, training
from lbopt.curvature.registry import Layer, Layers

RESULTS = pathlib.Path(__file__).parent / "results"
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
VARIANTS = ((0.1, "comm"), (0.1, "memory"), (None, "comm"))
"""Stale threshold and placement of the programs that ``--compile`` makes."""
REMAINING = {4096: 0.236, 8192: 0.151, 16384: 0.054, 32768: 0.078}
"""Share of the statistics' bytes that is sent, by batch size: the paper's Table 2."""
_FLOAT = 4


# --------------------------------------------------------------- from the owner table


def contiguous(layers: Mapping[str, Layer], devices: int) -> np.ndarray:
    """Inversion work where layers in their order are split into equally many a device.

    Args:
      layers: the layers by path.
      devices: how many devices.

    Returns:
      Multiplications of each device.
    """
    by_layer: dict[str, int] = {}
    for unit in sharding.units_of(layers):
        by_layer[unit.path] = by_layer.get(unit.path, 0) + unit.factor.work
    parts = np.array_split(np.asarray(list(by_layer.values())), devices)
    return np.asarray([part.sum() for part in parts])


def state_bytes(
    problem: Problem, devices: int, stale_threshold: float | None, placement: str
) -> int:
    """Bytes of the optimizer's state on each device.

    Args:
      problem: the model.
      devices: how many devices.
      stale_threshold: as for ``lbopt.sp_ngd``.
      placement: likewise.

    Returns:
      Bytes, arrays of ``Sharded`` counted by their share.
    """
    tx = optimizer(problem.layers, devices, stale_threshold, placement)
    nodes = jax.tree.leaves(
        jax.eval_shape(tx.init, problem.params),
        is_leaf=lambda x: isinstance(x, sharding.Sharded),
    )
    return sum(
        training.opt_state_bytes(node)
        // (devices if isinstance(node, sharding.Sharded) else 1)
        for node in nodes
    )


# ------------------------------------------------------------------------- compiling


def make_problem(model: resnet.ResNet, image_size: int) -> Problem:
    """A classifier of images, without an array of it.

    Args:
      model: the network.
      image_size: height and width.

    Returns:
      The problem.
    """

    def batch(examples: int) -> dict[str, Any]:
        shape = (examples, image_size, image_size, 3)
        return {
            "x": jax.ShapeDtypeStruct(shape, jnp.float32),
            "y": jax.ShapeDtypeStruct((examples,), jnp.int32),
        }

    def loss_fn(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        del rng
        variables = {"params": params, **model_state}
        logits, model_state = model.apply(
            variables, batch["x"], train=True, mutable=list(model_state)
        )
        lbopt.likelihood(logits, "categorical")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return jnp.mean(losses), (model_state, {})

    rng = jax.eval_shape(lambda: jax.random.key(0))
    init = jax.eval_shape(lambda r, x: model.init(r, x, train=True), rng, batch(2)["x"])
    model_state = dict(init)
    params = model_state.pop("params")
    layers = lbopt.trace_layers(
        loss_fn, params, model_state, batch(2), rng, has_aux=True
    )
    return Problem(params, model_state, layers, loss_fn, batch)


def optimizer(
    layers: Layers, devices: int, stale_threshold: float | None, placement: str
) -> optax.GradientTransformationExtraArgs:
    """SP-NGD on so many devices."""
    return lbopt.sp_ngd(
        0.03,
        layers,
        stale_threshold=stale_threshold,
        placement=lbopt.Placement("data", devices, placement),
    )


def compile_step(
    problem: Problem, devices: int, stale_threshold: float | None, placement: str
) -> tuple[Any, float]:
    """Compiles one training step, two examples a device.

    Args:
      problem: the model.
      devices: how many devices.
      stale_threshold: as for ``lbopt.sp_ngd``.
      placement: likewise.

    Returns:
      The compiled step and the seconds that tracing and compiling took.
    """
    tx = optimizer(problem.layers, devices, stale_threshold, placement)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(
        lambda *args: training.init_state(tx, *args),
        problem.params,
        problem.model_state,
        rng,
    )
    mesh = sharding.make_mesh(jax.devices()[:devices])
    step: Any = training.make_train_step(problem.loss_fn, tx, problem.layers, mesh)
    start = time.perf_counter()
    compiled = step.lower(state, problem.batch(2 * devices)).compile()
    return compiled, time.perf_counter() - start


def measure(
    problem: Problem, devices: int, stale_threshold: float | None, placement: str
) -> dict[str, Any]:
    """Compiles a step and reads its collectives.

    Args:
      problem: the model.
      devices: how many devices.
      stale_threshold: as for ``lbopt.sp_ngd``.
      placement: likewise.

    Returns:
      A record of the program.
    """
    compiled, seconds = compile_step(problem, devices, stale_threshold, placement)
    counts = collectives_of(compiled.as_text(), devices)
    owners = sharding.owner_table(problem.layers, devices, placement=placement)
    turns = turns_of(owners)
    plan = planned(problem, owners, adaptive=stale_threshold is not None)
    memory = compiled.memory_analysis()
    return {
        "devices": devices,
        "stale_threshold": stale_threshold,
        "placement": placement,
        "seconds": round(seconds, 1),
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "as_planned": _without_reduce(counts) == _without_reduce(plan),
        "all": step_bytes(counts, turns, due=True),
        "nothing": step_bytes(counts, turns, due=False),
        "collectives": [[*one, number] for one, number in sorted(counts.items())],
    }


def _without_reduce(counts: Counts) -> dict[Collective, int]:
    return {one: n for one, n in counts.items() if one.kind != "all-reduce"}


# ------------------------------------------------------------------------- the tables


def sizes_table(problem: Problem) -> str:
    """Bytes of the model's statistics."""
    square = packed = 0
    for unit in sharding.units_of(sharding.configured(problem.layers.preconditioned)):
        packed += unit.factor.size
        matrix = unit.kind in ("a", "g") and len(unit.factor.shape) == 1
        square += unit.factor.order**2 if matrix else 4 * unit.factor.work
    return (
        f"statistics in float32: {_FLOAT * square:.4g} bytes square, "
        f"{_FLOAT * packed:.4g} packed (paper: 6.158e8 and 3.082e8)"
    )


def balance_table(problem: Problem) -> str:
    """Mean over longest work of the devices."""
    rows = [
        "| devices | split of layers | longest first, layers | units | blocks of 1024 "
        "| 256 |",
        "|---|---|---|---|---|---|",
    ]
    layers = sharding.configured(problem.layers.preconditioned)
    for n in DEVICES:
        split = contiguous(layers, n)
        ideal = split.sum() / n
        cells = [ideal / split.max()]
        for placement, block in (
            *(("memory", None), ("comm", None)),
            *(("comm", 1024), ("comm", 256)),
        ):
            owners = sharding.owner_table(
                problem.layers, n, placement=placement, block_size=block
            )
            work = owners.work().sum(1)
            cells.append(work.sum() / n / work.max())
        rows.append(f"| {n} | " + " | ".join(f"{x:.1%}" for x in cells) + " |")
    return "\n".join(rows)


def state_table(problem: Problem) -> str:
    """Bytes of the optimizer's state on each device."""
    rows = ["| devices | comm, MB | memory, MB |", "|---|---|---|"]
    for n in DEVICES:
        cells = [state_bytes(problem, n, 0.1, p) / 1e6 for p in ("comm", "memory")]
        rows.append(f"| {n} | " + " | ".join(f"{x:.1f}" for x in cells) + " |")
    return "\n".join(rows)


def communication_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Bytes that each device puts in, as compiled."""
    rows = [
        "| devices | threshold | placement | due | "
        + " | ".join(f"{kind}, MB (runs)" for kind in KINDS)
        + " | sent by a ring, MB | compile s | temporary MB | as planned |",
        "|" + "---|" * 12,
    ]
    for record in records:
        n = record["devices"]
        head = f"| {n} | {record['stale_threshold']} | {record['placement']} "
        tail = (
            f"{record['seconds']:.0f} | {record['temporary_bytes'] / 1e6:.0f} | "
            f"{'yes' if record['as_planned'] else 'NO'} |"
        )
        ends = [_ring(record[due], n) for due in ("nothing", "all")]
        for due, total in zip(("nothing", "all"), ends, strict=True):
            cells = " | ".join(
                f"{size / 1e6:.1f} ({runs})" for runs, size in record[due].values()
            )
            rows.append(f"{head}| {due} | {cells} | {total / 1e6:.1f} | {tail}")
        if record["stale_threshold"] is not None:
            for batch, share in REMAINING.items():
                total = ends[0] + share * (ends[1] - ends[0])
                rows.append(
                    f"{head}| {share:.1%}, the paper's at {batch:,} | | | | | "
                    f"{total / 1e6:.1f} | | | |"
                )
    return "\n".join(rows)


def _ring(kinds: Mapping[str, Sequence[int]], devices: int) -> float:
    return sum(sent(kind, size, devices) for kind, (_, size) in kinds.items())


def model_table(problem: Problem, machine: Machine) -> str:
    """The model's milliseconds, and its ratio to one device."""
    rows = [
        "| devices | "
        + " | ".join(f"{p}, {s:.1%}: ms (× 1 device)" for p, s in _CASES),
        "|" + "---|" * (len(_CASES) + 1),
    ]
    rows[0] += " |"
    first: list[float] = []
    for n in DEVICES:
        cells = []
        for placement, share in _CASES:
            owners = sharding.owner_table(problem.layers, n, placement=placement)
            parts = model_seconds(problem, owners, machine, share)
            cells.append(sum(parts.values()))
        first = first or cells
        pairs = zip(cells, first, strict=True)
        shown = (f"{1e3 * x:.0f} ({x / one:.2f})" for x, one in pairs)
        rows.append(f"| {n} | " + " | ".join(shown) + " |")
    return "\n".join(rows)


_CASES = (("comm", 1.0), ("comm", 0.078), ("memory", 1.0), ("memory", 0.078))


# --------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles for one number of devices, or prints the tables.

    Args:
      argv: arguments of the command line; those of the process by default.
    """
    options = _parse(argv)
    make = resnet.ResNet50
    if options.compile:
        jax.config.update("jax_num_cpu_devices", options.compile)
        jax.config.update("jax_enable_compilation_cache", False)
        problem = make_problem(make(num_classes=1000), 64)
        for threshold, placement in (VARIANTS[i] for i in options.variants):
            record = measure(problem, options.compile, threshold, placement)
            record["date"] = datetime.datetime.now(datetime.UTC).isoformat()
            kind = "adaptive" if threshold is not None else "periodic"
            name = f"scaling_{options.compile}_{kind}_{placement}.json"
            (options.results / name).write_text(json.dumps(record) + "\n", "utf-8")
            print(communication_table([record]), flush=True)
        return
    problem = make_problem(make(num_classes=1000), 64)
    records = [
        json.loads(path.read_text("utf-8"))
        for path in sorted(options.results.glob("scaling_*.json"))
    ]
    records.sort(key=lambda r: r["devices"])
    machine = Machine(*(getattr(options, name) for name in Machine._fields))
    for title, table in (
        ("Statistics", sizes_table(problem)),
        ("Inversion: mean work over the longest device's", balance_table(problem)),
        ("Optimizer's state on each device", state_table(problem)),
        ("Collectives as compiled, a device and step", communication_table(records)),
        (f"Model, not measured: {machine}", model_table(problem, machine)),
    ):
        print(f"\n{title}\n\n{table}", flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument(
        "--compile", type=int, metavar="N", help="compile for N virtual devices"
    )
    parser.add_argument(
        "--variants",
        type=int,
        nargs="+",
        default=range(len(VARIANTS)),
        choices=range(len(VARIANTS)),
        help=f"which of {VARIANTS} (threshold, placement) to compile; all by default",
    )
    parser.add_argument(
        "--results", type=pathlib.Path, default=RESULTS, help="folder of the records"
    )
    for name, default in Machine()._asdict().items():
        parser.add_argument(
            f"--{name}",
            type=type(default),
            default=default,
            help=f"of the model of a step's time; {default} by default",
        )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
