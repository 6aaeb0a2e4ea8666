"""Compiles training steps for accelerators that are not there, and reads the programs.

    python -m benchmarks.aot --target v5e:4 h100:1 --model resnet20 --output aot.json
    python -m benchmarks.aot --acceptance --output aot.json

XLA compiles for a TPU (``pip install 'lbopt[aot-tpu]'``) or an H100 (``aot-gpu``) on
a machine that has neither.  The programs are the real ones; nothing runs.  Each is
compiled in a process of its own and added to the record at once.  What the record
holds already is left out, unless ``--again`` is given.

Before the optimizers of each problem, SGD is compiled, in the same run: ratios are over
that one, so that a busy machine slows both.
"""

import argparse
import datetime
import gzip
import importlib.metadata
import itertools
import json
import os
import pathlib
import resource
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

import lbopt
from benchmarks import aot_program, harness, workloads
from experiments.models import resnet
from lbopt import memory_plan, sharding, training
from lbopt.curvature.registry import Layers

# ------------------------------------------------------------------------ the targets

_TORUS_2D = {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"}
_TORUS_3D = {1: "2x2x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8"}
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
runtime_version { major: 12 minor: 9 patch: 0 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Chip(NamedTuple):
    """A kind of device.

    Attributes:
      platform: the compiler's: ``"tpu"``, ``"cuda"`` or ``"cpu"``.
      memory: bytes that programs may use; 0 for the host's.
      topologies: names of the topologies by number of devices; empty for any number.
    """

    platform: Literal["tpu", "cuda", "cpu"]
    memory: int
    topologies: dict[int, str]


CHIPS = {
    "v5e": Chip("tpu", int(15.75 * 2**30), _TORUS_2D),
    "v6e": Chip("tpu", int(31.25 * 2**30), _TORUS_2D),
    "v5p": Chip("tpu", 95 * 2**30, _TORUS_3D),
    "h100": Chip("cuda", 84929347584, {n: f"1x1x{n}" for n in (1, 2, 4, 8)}),
    "cpu": Chip("cpu", 0, {}),
}
_PACKAGES = {"tpu": "libtpu", "cuda": "jax-cuda12-plugin"}
_EXTRAS = {"tpu": "aot-tpu", "cuda": "aot-gpu"}
_VARIABLES = {
    "tpu": {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Else one process at a time may load the compiler.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    },
    # Autotuning would need the device.
    "cuda": {"XLA_FLAGS": "--xla_gpu_shard_autotuning=false"},
    "cpu": {},
}
LOW_EFFORT = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0}


class Target(NamedTuple):
    """A kind of device and their number."""

    chip: str
    devices: int

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Parses ``"v5e:4"``.

        Args:
          text: the chip and the number of devices.

        Returns:
          The target.

        Raises:
          ArgumentTypeError: for a target that is not known.
        """
        chip, _, devices = text.partition(":")
        known = CHIPS[chip].topologies if chip in CHIPS else None
        if known is None or not devices.isdigit() or (known and int(devices) not in known):
            names = [f"{c}:{'|'.join(map(str, CHIPS[c].topologies)) or 'N'}" for c in CHIPS]
            raise argparse.ArgumentTypeError(
                f"{text!r} is none of the targets {', '.join(names)}"
            )
        return cls(chip, int(devices))

    def __str__(self) -> str:
        """Returns the form that ``parse`` reads."""
        return f"{self.chip}:{self.devices}"

    def make_devices(self) -> Sequence[Any]:
        """Returns the devices, of which no more than a description need exist."""
        chip = CHIPS[self.chip]
        if chip.platform == "cpu":
            jax.config.update("jax_num_cpu_devices", self.devices)
            return jax.devices()[: self.devices]
        name = chip.topologies[self.devices]
        if chip.platform == "tpu":
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{self.chip}:{name}"
            )
        else:
            found = topologies.get_topology_desc(
                self.chip, "cuda", target_config=_H100, topology=name
            )
        return found.devices[: self.devices]


def missing_extra(chip: Chip) -> str | None:
    """Returns what to install for a chip's compiler; None if it is there."""
    package = _PACKAGES.get(chip.platform)
    if package is None or _version(package):
        return None
    extra = _EXTRAS[chip.platform]
    return f"{package} is not installed; pip install 'lbopt[{extra}]' installs it"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# -------------------------------------------------------------------------- the steps

MODELS = {
    "tiny": (workloads.TINY, 8, 8),
    "resnet20": (resnet.ResNet20(num_classes=10), 32, 128),
    "resnet50": (resnet.ResNet50(num_classes=1000), 224, 32),
}
"""Models with their default image size, and default batch of each device."""
FIRST_ORDER = ("sgd", "lars", "nlcg")
FIXED = ("kfac", "sp_ngd")
"""Optimizers with fixed periods, whose steps the host tells apart."""
OPTIMIZERS = (*FIRST_ORDER, *FIXED, "sp_ngd_adaptive")
DUES = ("flags", "none", "statistics", "all")


class Case(NamedTuple):
    """A step to compile.

    Attributes:
      target: the devices.
      model: the model's name.
      batch: images on each device.
      image: pixels along each side.
      effort: the compiler's effort, ``"low"`` or ``"default"``.
      optimizer: the optimizer's name.
      placement: where inverses live.
      due: what the step renews, or ``"flags"`` to leave that to flags in the state.
      weight_sharing: the approximation for convolutions.
      label: a name for the version of the code.
    """

    target: str
    model: str
    batch: int
    image: int
    effort: str
    optimizer: str
    placement: str
    due: str
    weight_sharing: str
    label: str

    def baseline(self) -> "Case":
        """Returns SGD's step on the same problem."""
        return self._replace(
            optimizer="sgd", placement="", due="flags", weight_sharing=""
        )

    def normalised(self) -> "Case":
        """Returns the case without the settings that its optimizer does not have."""
        if self.optimizer in FIRST_ORDER:
            return self.baseline()._replace(optimizer=self.optimizer)
        return self if self.optimizer in FIXED else self._replace(due="flags")


def compile_case(case: Case, programs: pathlib.Path | None) -> harness.Record:
    """Compiles a step; meant to run in a process of its own.

    Args:
      case: the step.
      programs: a folder to write the program's text to.

    Returns:
      The case's row of the record.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    target = Target.parse(case.target)
    row: harness.Record = case._asdict()
    start = time.perf_counter()
    try:
        lowered = lower(case, target.make_devices())
        row["lower_seconds"] = time.perf_counter() - start
        start = time.perf_counter()
        options = LOW_EFFORT if case.effort == "low" else None
        compiled = lowered.compile(compiler_options=options)
        row["compile_seconds"] = time.perf_counter() - start
    # Whatever it is, the other cases go on; the message stands in the record.
    except Exception as error:
        row["failed_after_seconds"] = time.perf_counter() - start
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
        return row
    text = compiled.as_text()
    if programs is not None:
        name = "-".join(str(x).replace(":", "_") for x in case if x)
        with gzip.open(programs / f"{name}.hlo.gz", "wt") as file:
            file.write(text)
    row["peak_rss_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row["text_bytes"] = len(text)
    row["memory"] = memory_of(compiled, CHIPS[target.chip])
    row["program"] = aot_program.figures(aot_program.parse(text))._asdict()
    return row


def memory_of(compiled: jax.stages.Compiled, chip: Chip) -> dict[str, int | bool]:
    """Returns the bytes of a program on each device, and whether they fit."""
    counted = compiled.memory_analysis()
    assert counted is not None  # every compiler here counts
    sizes = {
        "arguments": counted.argument_size_in_bytes,
        "outputs": counted.output_size_in_bytes,
        "aliased": counted.alias_size_in_bytes,
        "temporaries": counted.temp_size_in_bytes,
        "code": counted.generated_code_size_in_bytes,
    }
    # Aliased bytes are counted among the arguments and the outputs.
    total = sum(sizes.values()) - 2 * sizes["aliased"]
    return {**sizes, "total": total, "fits": not chip.memory or total <= chip.memory}


def lower(case: Case, devices: Sequence[Any]) -> Any:
    """Lowers a step for devices."""
    network, _, _ = MODELS[case.model]
    model = network.clone(dtype=jnp.bfloat16)

    def batch(examples: int) -> dict[str, Any]:
        shape = (examples, case.image, case.image, 3)
        return {
            "x": jax.ShapeDtypeStruct(shape, jnp.bfloat16),
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
    layers = None
    if case.optimizer not in FIRST_ORDER:
        layers = lbopt.trace_layers(
            loss_fn,
            params,
            model_state,
            batch(2),
            rng,
            has_aux=True,
            weight_sharing=case.weight_sharing,
        )
    tx = optimizer(case, layers, len(devices))
    state = jax.eval_shape(
        lambda *args: training.init_state(tx, *args), params, model_state, rng
    )
    mesh = sharding.make_mesh(devices)
    step: Any = training.make_train_step(loss_fn, tx, layers, mesh)
    shapes = memory_plan.on_mesh(state, batch(case.batch * len(devices)), mesh)
    if case.due == "flags":
        return step.lower(*shapes)
    renewed = lbopt.Due(case.due != "none", case.due == "all")
    return step.lower(*shapes, due=renewed)


def optimizer(
    case: Case, layers: Layers | None, devices: int
) -> optax.GradientTransformationExtraArgs:
    """Makes a case's optimizer."""
    if layers is None:
        first_order = {
            "sgd": lambda: optax.with_extra_args_support(optax.sgd(0.1, momentum=0.9)),
            "lars": lambda: lbopt.lars(0.1),
            "nlcg": lambda: lbopt.nlcg(0.1),
        }
        return first_order[case.optimizer]()
    placement = lbopt.Placement("data", devices, case.placement)
    if case.optimizer == "kfac":
        periods = lbopt.Periods(statistics=10, inverses=10)
        return lbopt.kfac(0.03, layers, periods=periods, placement=placement)
    threshold = 0.1 if case.optimizer == "sp_ngd_adaptive" else None
    return lbopt.sp_ngd(0.03, layers, stale_threshold=threshold, placement=placement)


# ------------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> harness.Record:
    """Runs the command and returns its record."""
    options = _parser().parse_args(argv)
    record = _begin(argv, options.output)
    wanted = acceptance(options) if options.acceptance else chosen(options)
    runnable = []
    for target, cases in itertools.groupby(wanted, lambda case: case.target):
        if message := missing_extra(CHIPS[Target.parse(target).chip]):
            harness.tell(f"{target} is left out: {message}")
        else:
            runnable += cases
    known = set() if options.again else {_key(r) for r in record["rows"]}
    todo = [case for case in runnable if case not in known]
    for case in with_baselines(todo):
        harness.tell(f"compiling {' '.join(str(x) for x in case if x)}")
        row = _in_child(case, options.programs)
        row |= {"date": _now(), "run": record["date"], "versions": record["versions"]}
        record["rows"].append(row)
        # Written as it grows: a run may take hours.
        harness.write(record, options.output)
        harness.tell(_line(row))
    shown = set(runnable) | {case.baseline() for case in runnable}
    print(table([row for row in record["rows"] if _key(row) in shown]))
    return record


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser("aot", __doc__)
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--target", type=Target.parse, default=[Target("v5e", 4)], **several)
    parser.add_argument("--model", choices=tuple(MODELS), default=["resnet50"], **several)
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default=["sp_ngd", "sp_ngd_adaptive"], **several
    )
    parser.add_argument("--placement", choices=("comm", "memory"), default=["comm"], **several)
    parser.add_argument(
        "--due",
        choices=DUES,
        default=["none", "statistics", "all"],
        help="what steps with fixed periods renew; flags in the state decide the others",
        **several,
    )
    parser.add_argument(
        "--weight-sharing", choices=("expand", "reduce"), default=["expand"], **several
    )
    parser.add_argument("--batch", type=int, help="images on each device")
    parser.add_argument("--image", type=int, help="pixels along each side")
    parser.add_argument("--effort", choices=("low", "default"), default="low")
    parser.add_argument("--label", default="", help="a name for the version of the code")
    parser.add_argument(
        "--acceptance", action="store_true", help="the programs that have bounds"
    )
    parser.add_argument(
        "--again", action="store_true", help="also what the record holds already"
    )
    parser.add_argument(
        "--programs", type=pathlib.Path, help="folder for the programs' text"
    )
    return parser


def _begin(argv: Sequence[str] | None, path: pathlib.Path | None) -> harness.Record:
    """Starts a record, with the rows that its file holds already."""
    # The machine's own accelerator, if it has one, is of no use here.
    jax.config.update("jax_platforms", "cpu")
    record = harness.begin("aot", argv, {})
    packages = {name: _version(name) for name in _PACKAGES.values()}
    record["versions"] |= {name: v for name, v in packages.items() if v}
    known = path is not None and path.exists()
    record["rows"] = json.loads(path.read_text("utf-8"))["rows"] if known else []
    return record


def chosen(options: argparse.Namespace) -> list[Case]:
    """Returns the cases that the command line names."""
    cases = []
    for target, model, name, placement, due, sharing in itertools.product(
        options.target,
        options.model,
        options.optimizer,
        options.placement,
        options.due,
        options.weight_sharing,
    ):
        _, image, batch = MODELS[model]
        case = Case(
            target=str(target),
            model=model,
            batch=options.batch or batch,
            image=options.image or image,
            effort=options.effort,
            optimizer=name,
            placement=placement,
            due=due,
            weight_sharing=sharing,
            label=options.label,
        )
        cases.append(case.normalised())
    return list(dict.fromkeys(cases))


def acceptance(options: argparse.Namespace) -> list[Case]:
    """Returns the cases that have bounds."""
    cases = []
    for changes in (
        {"target": ["v5e:4"], "weight_sharing": ["expand", "reduce"]},
        {"target": ["h100:1", "h100:8"], "model": ["resnet20", "resnet50"]},
        {
            "target": ["v5e:16", "v5e:64", "v5e:256"],
            "placement": ["comm", "memory"],
            "optimizer": ["sp_ngd"],
            "due": ["all"],
        },
    ):
        cases += chosen(argparse.Namespace(**{**vars(options), **changes}))
    return list(dict.fromkeys(cases))


def with_baselines(cases: Sequence[Case]) -> Iterator[Case]:
    """Yields the cases, with SGD's before those of each problem."""
    for baseline, group in itertools.groupby(cases, Case.baseline):
        yield baseline
        yield from (case for case in group if case != baseline)


def _in_child(case: Case, programs: pathlib.Path | None) -> harness.Record:
    """Compiles a case in a process with the variables of its compiler."""
    if programs is not None:
        programs.mkdir(parents=True, exist_ok=True)
    variables = dict(_VARIABLES[CHIPS[Target.parse(case.target).chip].platform])
    if "XLA_FLAGS" in variables:
        variables["XLA_FLAGS"] += f" {os.environ.get('XLA_FLAGS', '')}"
    variables["JAX_PLATFORMS"] = "cpu"
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        return harness.in_new_process(compile_case, case, programs)
    except BrokenProcessPool:
        return case._asdict() | {"error": "the process died; is the memory used up?"}
    finally:
        os.environ.clear()
        os.environ.update(before)


def _key(row: harness.Record) -> Case:
    return Case(*(row[field] for field in Case._fields))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# -------------------------------------------------------------------------- the table


def table(rows: Sequence[harness.Record]) -> str:
    """Formats rows in Markdown, the latest of each case, beside SGD's of its run."""
    latest = {_key(row): row for row in rows}
    base = {(row["run"], _key(row)): row for row in rows}
    heads = (
        "target", "model", "optimizer", "due", "lower s", "compile s", "code MB",
        "text MB", "arguments MB", "temporaries MB", "fits", "loops", "conditionals",
        "fusions", "collectives (MB)", "statistics' all-reduce", "cycles, M",
        "statistics", "averaging", "inversion", "preconditioning", "everything else",
    )
    lines = [heads, ["---"] * len(heads)]
    for case, row in latest.items():
        lines.append(_cells(case, row, base.get((row["run"], case.baseline()))))
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def _cells(case, row, sgd):
    names = [case.optimizer, case.placement, case.weight_sharing if case.weight_sharing != "expand" else "", case.label]
    first = [case.target, f"{case.model}, {case.batch}×{case.image}²", ", ".join(x for x in names if x), case.due]
    if "error" in row:
        return [*first, f"FAILED: {row['error'].splitlines()[0][:120]}"]
    return first


def _line(row):
    return json.dumps({k: v for k, v in row.items() if k not in Case._fields})


if __name__ == "__main__":
    main()
