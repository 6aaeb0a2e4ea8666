"""Scale shown without a cluster: what SP-NGD's step sends, inverts and stores.

    python -m benchmarks.scaling --compile 8     # compiles for 8 virtual devices
    python -m benchmarks.scaling                 # the tables

The step is compiled and not run: the collectives and their bytes are read from the
program's text.  Bytes are those that each device puts in, as ``state.report`` counts
them.  How often a collective runs follows from the loops around it: up to one (the
guard against numbers that are not finite) it runs at every step; inside two, once if
its statistic is due; inside three, as often as there are rounds in its class of units.
"""

import argparse
import collections
import datetime
import json
import math
import pathlib
import re
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lbopt
from experiments.models import resnet
from lbopt import sharding, training
from lbopt.collectives import Axis
from lbopt.curvature.registry import Layer, Layers
from lbopt.transforms import inversion

RESULTS = pathlib.Path(__file__).parent / "results"
KINDS = ("reduce-scatter", "all-to-all", "all-gather", "all-reduce")
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
VARIANTS = ((0.1, "comm"), (0.1, "memory"), (None, "comm"))
"""Stale threshold and placement of the programs that ``--compile`` makes."""
REMAINING = {4096: 0.236, 8192: 0.151, 16384: 0.054, 32768: 0.078}
"""Share of the statistics' bytes that is sent, by batch size: the paper's Table 2."""
_FLOAT = 4


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of ``KINDS``.
      bytes: what each device puts in, whenever it runs.
      loops: how many loops are around it.
    """

    kind: str
    bytes: int
    loops: int


Counts = Mapping[Collective, int]


class Problem(NamedTuple):
    """A model and its loss, as shapes.

    Attributes:
      params: shapes of the parameters.
      model_state: shapes of the other collections.
      layers: what ``trace_layers`` found.
      loss_fn: the loss as ``lbopt.training`` takes it.
      batch: ``examples -> `` shapes of a batch.
    """

    params: Any
    model_state: Any
    layers: Layers
    loss_fn: training.LossFn
    batch: Callable[[int], Any]


class Machine(NamedTuple):
    """What the model of a step's time takes for granted.

    Attributes:
      flops: operations a second by the data sheet.
      products: share of it that convolutions and products reach.
      inversions: share of it that Cholesky-based inversion reaches.
      bandwidth: bytes a second that a device sends.
      latency: seconds of each collective for each doubling of the devices.
      images: images a device and step.
    """

    flops: float = 15.7e12
    products: float = 0.5
    inversions: float = 0.2
    bandwidth: float = 6.25e9
    latency: float = 5e-6
    images: int = 32


# Of one image of 224×224: 4.1 G multiplications forward, twice as many backward; and
# the statistics of ResNet-50's inputs and output gradients.
_STEP_FLOP, _STATISTICS_FLOP = 24.6e9, 50.2e9


# ---------------------------------------------------------------- from the program


def operand_bytes(shapes: str, kind: str, devices: int) -> int:
    """What each device puts into a collective.

    Args:
      shapes: the type of its result in HLO text, an array's or a tuple's.
      kind: one of ``KINDS``.
      devices: how many take part.

    Returns:
      Bytes.
    """
    total = 0
    for bits, dims in re.findall(r"\b(?:[a-z]+(\d+)\w*|pred)\[([\d,]*)\]", shapes):
        size = math.prod(int(d) for d in dims.split(",") if d)
        total += size * int(bits or 8) // 8
    if kind == "reduce-scatter":
        return total * devices
    return total // devices if kind == "all-gather" else total


def collectives_of(text: str, devices: int) -> Counts:
    """The collectives of a compiled program and how often each stands in it.

    Args:
      text: the program as HLO text.
      devices: its devices, all of which take part in each collective.

    Returns:
      Numbers of equal collectives.

    Raises:
      ValueError: for a collective that starts and ends apart (those of CPU do not), or
        without the name that tells its loops.
    """
    counts: collections.Counter[Collective] = collections.Counter()
    for line in text.splitlines():
        found = re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if found is None:
            continue
        name = re.search(r'op_name="([^"]*)"', line)
        if found[3] or name is None:
            raise ValueError(f"cannot read the collective {line.strip()[:200]}")
        size = operand_bytes(found[1], found[2], devices)
        counts[Collective(found[2], size, name[1].count("while/body"))] += 1
    return counts


def step_bytes(
    counts: Counts, rounds: Mapping[int, Sequence[int]], due: bool
) -> dict[str, tuple[int, int]]:
    """How often collectives run in a step, and with how many bytes.

    Args:
      counts: a program's collectives.
      rounds: the rounds of each class of units whose collectives have so many bytes.
      due: whether everything is due, or nothing.

    Returns:
      ``{kind: (runs, bytes)}``.

    Raises:
      ValueError: for a collective in a loop that belongs to no class of units.
    """
    result = {}
    for kind in KINDS:
        runs = size = 0
        for one, number in counts.items():
            if one.kind != kind or (one.loops > 1 and not due):
                continue
            times = number
            if one.loops > 2:
                classes = rounds.get(one.bytes, ())
                if not classes or number % len(classes):
                    raise ValueError(f"{number} × {one} for rounds {classes}")
                times = number // len(classes) * sum(classes)
            runs, size = runs + times, size + times * one.bytes
        result[kind] = (runs, size)
    return result


# --------------------------------------------------------------- from the owner table


def rounds_of(owners: sharding.Owners) -> dict[int, list[int]]:
    """The rounds of each class of units when everything is due.

    Args:
      owners: who inverts what.

    Returns:
      Rounds of the classes by the bytes of their collectives.
    """
    axis = Axis("data", owners.devices)
    rounds: dict[int, list[int]] = {}
    for units in inversion.classes_of(owners):
        size = _padded(units.factor.size, axis)
        rounds.setdefault(size, []).append(units.queues.shape[1])
    return rounds


def planned(
    problem: Problem, owners: sharding.Owners, *, adaptive: bool = True
) -> Counts:
    """The collectives that a step should have; of the all-reduces the gradient's alone.

    Args:
      problem: the model.
      owners: who inverts what.
      adaptive: whether each statistic travels on its own.

    Returns:
      Numbers of equal collectives; none on one device.
    """
    counts: collections.Counter[Collective] = collections.Counter()
    if owners.devices == 1:
        return counts
    axis = Axis("data", owners.devices)
    layers = sharding.configured(problem.layers.preconditioned)
    statistics = [
        x.size // f.size * _padded(f.size, axis)
        for layer in layers.values()
        for x, f in zip(layer.factor_shapes(), layer.block.factors, strict=True)
    ]
    for size in statistics if adaptive else [sum(statistics)]:
        counts[Collective("reduce-scatter", size, 2)] += 1
    for units in inversion.classes_of(owners):
        size = _padded(units.factor.size, axis)
        counts[Collective("all-to-all", size, 3)] += 2 if units.gathered else 1
        if units.gathered:
            counts[Collective("all-gather", size, 3)] += 1
    kept = _kept_rows(problem, owners)
    if kept:
        _plan_pipeline(counts, kept, owners, axis)
    whole = sum(x.size for x in jax.tree.leaves(problem.params))
    if left := _FLOAT * (whole - sum(kept.values())):
        counts[Collective("all-reduce", left, 1)] += 1
    return counts


def _padded(size: int, axis: Axis) -> int:
    return _FLOAT * axis.size * axis.share(size)


def _kept_rows(problem: Problem, owners: sharding.Owners) -> dict[str, int]:
    """Numbers of the gradients of the layers whose inverses stay with their owners."""
    rows: dict[str, int] = {}
    for unit, gathered in zip(owners.units, owners.gathered, strict=True):
        if not gathered:
            location = problem.layers.preconditioned[unit.path].tapped.location
            node = problem.params
            for key in location.keys:
                node = node[key]
            rows[unit.path] = sum(node[name].size for name in location.names)
    return rows


def _plan_pipeline(
    counts: collections.Counter[Collective],
    rows: Mapping[str, int],
    owners: sharding.Owners,
    axis: Axis,
) -> None:
    """Adds what placement "memory" sends at every step."""
    gradients = sum(_padded(size, axis) for size in rows.values())
    counts[Collective("reduce-scatter", gradients, 1)] += 1
    counts[Collective("all-gather", gradients // axis.size, 1)] += 1
    owner = {u.path: o for u, o in zip(owners.units, owners.owner, strict=True)}
    queues: dict[int, list[str]] = {}
    for path in sorted(rows, key=lambda p: (-rows[p], p)):
        queues.setdefault(owner[path], []).append(path)
    for turn in range(max(map(len, queues.values()))):
        largest = max(rows[q[turn]] for q in queues.values() if turn < len(q))
        counts[Collective("all-to-all", _padded(largest, axis), 1)] += 2


def sent(kind: str, size: int, devices: int) -> float:
    """Bytes that leave a device in the ring algorithm.

    Args:
      kind: one of ``KINDS``.
      size: what the device puts in.
      devices: how many take part.

    Returns:
      Bytes.
    """
    others = devices - 1
    ways = {"all-gather": others, "all-reduce": 2 * others / devices}
    return size * ways.get(kind, others / devices)


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


def path_work(owners: sharding.Owners) -> int:
    """Multiplications on the longest path: rounds wait for their longest unit.

    Args:
      owners: who inverts what.

    Returns:
      The sum over classes of rounds × work.
    """
    classes = inversion.classes_of(owners)
    return sum(units.queues.shape[1] * units.factor.work for units in classes)


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
        axis_name="data",
        axis_size=devices,
        placement=placement,
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
    rounds = rounds_of(owners)
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
        "all": step_bytes(counts, rounds, due=True),
        "nothing": step_bytes(counts, rounds, due=False),
        "collectives": [[*one, number] for one, number in sorted(counts.items())],
    }


def _without_reduce(counts: Counts) -> dict[Collective, int]:
    return {one: n for one, n in counts.items() if one.kind != "all-reduce"}


# ------------------------------------------------------------------------- the model


def model_seconds(
    problem: Problem, owners: sharding.Owners, machine: Machine, remaining: float
) -> dict[str, float]:
    """A step's time by its parts, none of them measured and none overlapping.

    Args:
      problem: the model.
      owners: who inverts what.
      machine: the assumptions.
      remaining: share of the statistics and inverses that is renewed.

    Returns:
      Seconds of each part.
    """
    counts, rounds = planned(problem, owners), rounds_of(owners)
    seconds = []
    for due in (False, True):
        total = 0.0
        for kind, (runs, size) in step_bytes(counts, rounds, due).items():
            total += sent(kind, size, owners.devices) / machine.bandwidth
            total += runs * machine.latency * math.log2(owners.devices)
        seconds.append(total)
    nothing, everything = seconds
    rate = machine.flops * machine.products
    applied = precondition_flop(problem, owners)
    return {
        "gradient": machine.images * _STEP_FLOP / rate,
        "statistics": remaining * machine.images * _STATISTICS_FLOP / rate,
        "inversion": remaining
        * 2
        * path_work(owners)
        / (machine.flops * machine.inversions),
        "precondition": applied / rate,
        "communication": nothing + remaining * (everything - nothing),
    }


def precondition_flop(problem: Problem, owners: sharding.Owners) -> int:
    """Operations of the device that multiplies gradients by the most inverses.

    Args:
      problem: the model.
      owners: who has which inverses.

    Returns:
      Operations of gathered layers, which are everybody's, and of the longest owner's.
    """
    everybody, own = 0, [0] * owners.devices
    orders: dict[str, list[int]] = {}
    for unit in owners.units:
        if unit.row == 0 and unit.kind in ("a", "g"):
            orders.setdefault(unit.path, []).append(unit.factor.order)
    place = {
        u.path: (o, g)
        for u, o, g in zip(owners.units, owners.owner, owners.gathered, strict=True)
    }
    for path, sizes in orders.items():
        flop = 2 * math.prod(sizes) * sum(sizes)
        owner, gathered = place[path]
        everybody += flop * gathered
        own[owner] += flop * (not gathered)
    return everybody + max(own)


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
    """Mean over longest work: of the devices alone, and where rounds wait."""
    rows = [
        "| devices | split of layers | longest first, layers | units | blocks of 1024 "
        "| 256 | units, with rounds |",
        "|---|---|---|---|---|---|---|",
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
        whole = sharding.owner_table(problem.layers, n)
        cells.append(ideal / path_work(whole))
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
    make = resnet.MODELS["resnet50"]
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
