"""Scale shown without a cluster: what a step of SP-NGD sends, inverts and stores.

    python -m benchmarks.scaling --compile 8     # compiles for 8 virtual devices
    python -m benchmarks.scaling                 # the tables

The step is compiled and not run: the collectives and their bytes are read from the
program's text.  Bytes are those that each device puts in, as ``state.report`` counts
them.  How often a collective runs follows from the loops around it: inside none or one
(the guard against values that are not finite) it runs at every step; inside two, once
if its statistic is due; inside three or four, once for each round of its class of
units; inside five, once for each unit.
"""

import argparse
import datetime
import json
import pathlib
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lbopt
from benchmarks import workloads
from benchmarks.scaling_model import (
    KINDS,
    Collective,
    Counts,
    Machine,
    Problem,
    collectives_of,
    model_seconds,
    planned,
    ring_bytes,
    runs_of,
    step_bytes,
)
from experiments.models import resnet
from lbopt import sharding, training
from lbopt.curvature import layer_table
from lbopt.curvature.registry import Layer, Layers

RESULTS = pathlib.Path(__file__).parent / "results"
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TABLED = (8, 64, 1024)
"""Numbers of devices in the tables of bytes."""
PLACEMENTS = ("comm", 0.5, "memory")
REMAINING = {4096: 0.236, 8192: 0.151, 16384: 0.054, 32768: 0.078}
"""Share of the statistics' bytes that is sent, by batch size: the paper's Table 2."""
_CASES = (("comm", 1.0), ("comm", 0.078), ("memory", 1.0), ("memory", 0.078))


class Variant(NamedTuple):
    """Settings of ``lbopt.sp_ngd``; without a threshold it renews everything always."""

    placement: str | float
    stale_threshold: float | None = 0.1


VARIANTS = (*map(Variant, PLACEMENTS), Variant("comm", None))
"""The programs that ``--compile`` makes."""


# ------------------------------------------------------------------------- compiling


def make_problem(model: resnet.ResNet, image_size: int) -> Problem:
    """Makes a classifier of square images as shapes, without an array."""
    loss_fn, params, model_state, batch, rng = workloads.image_shapes(
        model, image_size, jnp.float32
    )
    layers = lbopt.trace_layers(
        loss_fn, params, model_state, batch(2), rng, has_aux=True
    )
    return Problem(params, model_state, layers, loss_fn, batch)


def optimizer(
    layers: Layers, devices: int, variant: Variant
) -> optax.GradientTransformationExtraArgs:
    """Returns SP-NGD on ``devices`` devices."""
    return lbopt.sp_ngd(
        0.03,
        layers,
        momentum=0.9,
        kl_clip=None,
        stale_threshold=variant.stale_threshold,
        rescale="always",
        placement=lbopt.Placement("data", devices, variant.placement),
    )


def compile_step(problem: Problem, devices: int, variant: Variant) -> tuple[Any, float]:
    """Compiles a training step on two examples a device; returns it and the seconds."""
    tx = optimizer(problem.layers, devices, variant)
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


def measure(problem: Problem, devices: int, variant: Variant) -> dict[str, Any]:
    """Compiles a step and returns a record of its collectives, time and memory."""
    compiled, seconds = compile_step(problem, devices, variant)
    counts = collectives_of(compiled.as_text(), devices)
    owners = sharding.owner_table(problem.layers, devices, placement=variant.placement)
    plan = planned(problem, owners, adaptive=variant.stale_threshold is not None)
    memory = compiled.memory_analysis()
    return {
        **_figures(counts, owners, variant.placement),
        "stale_threshold": variant.stale_threshold,
        "seconds": round(seconds, 1),
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "as_planned": without_reduce(counts) == without_reduce(plan),
        "collectives": [[*one, number] for one, number in sorted(counts.items())],
    }


def _figures(
    counts: Counts, owners: sharding.Owners, placement: str | float
) -> dict[str, Any]:
    """Returns the part of a record that a plan has as well."""
    runs = runs_of(owners)
    return {
        "devices": owners.devices,
        "placement": placement,
        "all": step_bytes(counts, runs, due=True),
        "nothing": step_bytes(counts, runs, due=False),
    }


def without_reduce(counts: Counts) -> dict[Collective, int]:
    """Returns the collectives that the owner table foretells: all but all-reduces."""
    return {one: n for one, n in counts.items() if one.kind != "all-reduce"}


# ------------------------------------------------------------------------- the tables


def sizes_table(problem: Problem) -> str:
    """Returns a line with the bytes of the model's statistics."""
    square = packed = 0
    for unit in sharding.units_of(
        layer_table.configured(problem.layers.preconditioned)
    ):
        packed += unit.factor.size
        matrix = unit.kind in ("a", "g") and len(unit.factor.shape) == 1
        square += unit.factor.order**2 if matrix else 4 * unit.factor.work
    return (
        f"statistics in float32: {4 * square:.4g} bytes square, "
        f"{4 * packed:.4g} packed (paper: 6.158e8 and 3.082e8)"
    )


def programs(problem: Problem, records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Returns the records of adaptive programs, with plans where there is none."""
    known = {
        (record["devices"], record["placement"]): record
        for record in records
        if record["stale_threshold"] is not None
    }
    for n in TABLED:
        for placement in PLACEMENTS:
            if (n, placement) not in known:
                owners = sharding.owner_table(problem.layers, n, placement=placement)
                plan = planned(problem, owners)
                known[n, placement] = _figures(plan, owners, placement)
    order = list(map(str, PLACEMENTS))
    return [
        known[key]
        for key in sorted(known, key=lambda k: (k[0], order.index(str(k[1]))))
    ]


def collectives_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns the bytes of each kind of collective; plans have no compile time."""
    heads = ("devices", "placement", "due", *KINDS, "sent", "compile s", "temporary MB")
    rows = []
    for record in records:
        for due in ("nothing", "all"):
            cells = [f"{size / 1e6:.1f} ({n})" for n, size in record[due].values()]
            tail = ["", ""]
            if "seconds" in record and due == "nothing":
                tail = [f"{record['seconds']:.0f}", _mega(record["temporary_bytes"], 0)]
            place = record["placement"]
            place = (
                place if record.get("as_planned", True) else f"{place} NOT AS PLANNED"
            )
            sent = _mega(_sent(record, due))
            rows.append([record["devices"], place, due, *cells, sent, *tail])
    return _markdown(heads, rows)


def sent_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns the bytes sent when the paper's share of the statistics is due."""
    shares = [f"{share:.1%} ({size // 1024}K)" for size, share in REMAINING.items()]
    rows = []
    for record in records:
        whole, nothing = _sent(record, "all"), _sent(record, "nothing")
        sent = [nothing + share * (whole - nothing) for share in REMAINING.values()]
        cells = map(_mega, (whole, *sent, nothing))
        rows.append([record["devices"], record["placement"], *cells])
    return _markdown(("devices", "placement", "all", *shares, "nothing"), rows)


def _sent(record: Mapping[str, Any], due: str) -> float:
    return sum(
        ring_bytes(kind, size, record["devices"])
        for kind, (_, size) in record[due].items()
    )


def balance_table(problem: Problem) -> str:
    """Returns the mean inversion work of the devices over the longest device's."""
    settings = (("memory", None), ("comm", None), ("comm", 1024), ("comm", 256))
    layers = layer_table.configured(problem.layers.preconditioned)
    rows = []
    for n in DEVICES:
        loads = [contiguous(layers, n)]
        for placement, block_size in settings:
            owners = sharding.owner_table(
                problem.layers, n, placement=placement, block_size=block_size
            )
            loads.append(owners.work().sum(1))
        rows.append([n, *(f"{work.sum() / n / work.max():.1%}" for work in loads)])
    heads = ("devices", "equal split", "whole layers (memory)", "units (comm)")
    return _markdown((*heads, "`block_size` 1024", "256"), rows)


def contiguous(layers: Mapping[str, Layer], devices: int) -> np.ndarray:
    """Returns each device's inversion work if it gets equally many layers, in order."""
    by_layer: dict[str, int] = {}
    for unit in sharding.units_of(layers):
        by_layer[unit.path] = by_layer.get(unit.path, 0) + unit.factor.work
    parts = np.array_split(np.asarray(list(by_layer.values())), devices)
    return np.asarray([part.sum() for part in parts])


def state_table(problem: Problem) -> str:
    """Returns the megabytes of the optimizer's state on each device."""
    rows = []
    for n in DEVICES:
        sizes = (state_bytes(problem, n, Variant(p)) for p in PLACEMENTS)
        rows.append([n, *(f"{size / 1e6:.1f}" for size in sizes)])
    return _markdown(("devices", *map(str, PLACEMENTS)), rows)


def state_bytes(problem: Problem, devices: int, variant: Variant) -> int:
    """Returns the bytes of the optimizer's state on each device."""
    tx = optimizer(problem.layers, devices, variant)
    nodes = jax.tree.leaves(
        jax.eval_shape(tx.init, problem.params),
        is_leaf=lambda x: isinstance(x, sharding.Sharded),
    )
    return sum(
        training.opt_state_bytes(node)
        // (devices if isinstance(node, sharding.Sharded) else 1)
        for node in nodes
    )


def model_table(problem: Problem, machine: Machine) -> str:
    """Returns the model's milliseconds, and their ratio to one device's."""
    rows: list[list[Any]] = []
    first: list[float] = []
    for n in DEVICES:
        cells = []
        for placement, share in _CASES:
            owners = sharding.owner_table(problem.layers, n, placement=placement)
            cells.append(sum(model_seconds(problem, owners, machine, share).values()))
        first = first or cells
        pairs = zip(cells, first, strict=True)
        rows.append([n, *(f"{1e3 * x:.0f} (× {x / one:.2f})" for x, one in pairs)])
    return _markdown(("devices", *(f"{p}, {s:.1%} due" for p, s in _CASES)), rows)


def _mega(size: float, digits: int = 1) -> str:
    return f"{size / 1e6:,.{digits}f}"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


# --------------------------------------------------------------------- command line


def main(
    argv: Sequence[str] | None = None,
    make: Callable[[], Problem] = lambda: make_problem(
        resnet.ResNet50(num_classes=1000), 64
    ),
    results: pathlib.Path = RESULTS,
) -> None:
    """Compiles for some devices and writes records, or prints tables from them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument(
        "--compile", type=int, metavar="N", help="compile for N virtual devices"
    )
    options = parser.parse_args(argv)
    if options.compile:
        jax.config.update("jax_num_cpu_devices", options.compile)
        jax.config.update("jax_enable_compilation_cache", False)
        problem = make()
        for variant in VARIANTS:
            record = measure(problem, options.compile, variant)
            record["date"] = datetime.datetime.now(datetime.UTC).isoformat()
            kind = "periodic" if variant.stale_threshold is None else "adaptive"
            name = f"scaling_{options.compile}_{kind}_{variant.placement}.json"
            (results / name).write_text(json.dumps(record) + "\n", "utf-8")
            print(f"{kind}\n\n{collectives_table([record])}\n", flush=True)
        return
    problem = make()
    paths = sorted(results.glob("scaling_*.json"))
    known = programs(problem, [json.loads(path.read_text("utf-8")) for path in paths])
    machine = Machine()
    for title, table in (
        ("Statistics", sizes_table(problem)),
        ("Collectives, MB a device and step (runs)", collectives_table(known)),
        ("Sent by a device, MB", sent_table(known)),
        ("Inversion: mean work over the longest device's", balance_table(problem)),
        ("Optimizer's state on each device, MB", state_table(problem)),
        (
            f"Step time by a model, not measured: {machine}",
            model_table(problem, machine),
        ),
    ):
        print(f"\n{title}\n\n{table}", flush=True)


if __name__ == "__main__":
    main()
