"""Training steps compiled for accelerators that need not exist.

XLA:TPU and XLA:GPU run on machines without the device, and their programs are those
that the device would run.  ``compile_case`` is meant for a process of its own: the
compilers read environment variables when they start (``Chip.variables``), take
gigabytes, and may die.
"""

import argparse
import gzip
import importlib.metadata
import os
import pathlib
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

import lbopt
from benchmarks import aot_figures, aot_program, harness, workloads
from experiments.models import resnet
from lbopt import memory_plan, sharding, training
from lbopt.curvature.registry import Layers

# ------------------------------------------------------------------------ the targets


class Chip(NamedTuple):
    """A kind of device.

    Attributes:
      platform: the compiler's name of it.
      memory: bytes that a program may use; None for those of the host.
      topologies: a topology for each number of devices; empty where any number will do.
      variables: the environment that its compiler needs.
      package: the package with its compiler; None for jaxlib itself.
      extra: the extra of lbopt that installs the package.
    """

    platform: Literal["tpu", "cuda", "cpu"]
    memory: int | None
    topologies: Mapping[int, str]
    variables: Mapping[str, str]
    package: str | None = None
    extra: str | None = None

    def missing(self) -> str | None:
        """Returns how to install the compiler, or None if it is installed."""
        if self.package is None or version(self.package) is not None:
            return None
        return (
            f"its compiler is in {self.package}; "
            f"pip install 'lbopt[{self.extra}]' installs it"
        )


def version(package: str) -> str | None:
    """Returns the version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tpu(memory: float, shapes: Mapping[int, str]) -> Chip:
    variables = {
        # Else it asks a server on the network which chips this machine has.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Else one process at a time may load the compiler.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    size = int(memory * 2**30)
    return Chip("tpu", size, shapes, variables, "libtpu", "aot-tpu")


_PLANE = {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"}
_CUBE = {1: "2x2x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8"}
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
CHIPS = {
    # What the runtime leaves to programs of 16, 95 and 32 GB.
    "v5e": _tpu(15.75, _PLANE),
    "v5p": _tpu(95, _CUBE),
    "v6e": _tpu(31.25, _PLANE),
    "h100": Chip(
        "cuda",
        84929347584,
        {n: f"1x1x{n}" for n in (1, 2, 4, 8)},
        # Each process would wait for others to share what it tuned.
        {"XLA_FLAGS": "--xla_gpu_shard_autotuning=false"},
        "jax-cuda12-plugin",
        "aot-gpu",
    ),
    "cpu": Chip("cpu", None, {}, {}),
}


class Target(NamedTuple):
    """A kind of device and their number; ``str`` returns what ``parse`` reads."""

    chip: str
    devices: int

    def __str__(self) -> str:
        """Returns ``"chip:devices"``."""
        return f"{self.chip}:{self.devices}"

    @property
    def kind(self) -> Chip:
        """The chip's description."""
        return CHIPS[self.chip]

    def make_devices(self) -> Sequence[Any]:
        """Returns the devices, of which no more than a description need exist."""
        if self.kind.platform == "cpu":
            jax.config.update("jax_num_cpu_devices", self.devices)
            return jax.devices()
        shape = self.kind.topologies[self.devices]
        if self.kind.platform == "tpu":
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{self.chip}:{shape}"
            )
        else:
            found = topologies.get_topology_desc(
                self.chip, "cuda", target_config=_H100, topology=shape
            )
        return found.devices[: self.devices]


def parse_target(text: str) -> Target:
    """Parses ``"v5e:4"``.

    Args:
      text: the chip and the number of devices.

    Returns:
      The target.

    Raises:
      ArgumentTypeError: for a target that is not known.
    """
    chip, _, devices = text.partition(":")
    if chip in CHIPS and devices.isdigit() and int(devices):
        shapes = CHIPS[chip].topologies
        if not shapes or int(devices) in shapes:
            return Target(chip, int(devices))
    known = (f"{name}:{_numbers(chip)}" for name, chip in CHIPS.items())
    raise argparse.ArgumentTypeError(f"{text!r} is not a target: {', '.join(known)}")


def _numbers(chip: Chip) -> str:
    return "|".join(map(str, chip.topologies)) or "N"


# -------------------------------------------------------------------------- the cases

MODELS = {
    "tiny": (workloads.TINY, 8, 8),
    "resnet20": (resnet.ResNet20(num_classes=10), 32, 128),
    "resnet50": (resnet.ResNet50(num_classes=1000), 224, 32),
}
"""Each model with the usual pixels along a side, and images on each device."""
FIRST_ORDER: Mapping[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "lars": lambda: lbopt.lars(0.1),
    "nlcg": lambda: lbopt.nlcg(0.1),
}
FIXED = ("kfac", "sp_ngd")
"""Optimizers with fixed periods, whose kinds of step the host tells apart."""
OPTIMIZERS = (*FIRST_ORDER, *FIXED, "sp_ngd_adaptive")
DUES = ("flags", "none", "statistics", "all")


class Case(NamedTuple):
    """A step to compile.

    Attributes:
      target: the devices.
      model: the model.
      batch: images on each device.
      image: pixels along each side of an image.
      effort: the compiler's effort, ``"low"`` or ``"default"``.
      label: a name for the version of the code.
      optimizer: the optimizer.
      placement: where inverses live.
      due: what the step renews, or ``"flags"`` if flags in the state decide.
      weight_sharing: the approximation for convolutions.
    """

    target: Target
    model: str
    batch: int
    image: int
    effort: str
    label: str
    optimizer: str
    placement: str
    due: str
    weight_sharing: Literal["expand", "reduce"]

    def baseline(self) -> "Case":
        """Returns SGD's step on the same problem."""
        return self._of("sgd")

    def normal(self) -> "Case":
        """Returns the case without the settings that its optimizer does not have."""
        # Low effort is for XLA:TPU, whose default takes many minutes.
        effort = self.effort if self.target.kind.platform == "tpu" else "default"
        case = self._replace(effort=effort)
        if self.optimizer in FIRST_ORDER:
            return case._of(self.optimizer)
        return case if self.optimizer in FIXED else case._replace(due="flags")

    def _of(self, first_order: str) -> "Case":
        return self._replace(
            optimizer=first_order, placement="", due="flags", weight_sharing="expand"
        )

    def step(self) -> str:
        """Returns the optimizer and its settings in words."""
        words = [self.label, self.optimizer, self.placement]
        if self.weight_sharing == "reduce":
            words.append("reduce")
        if self.optimizer not in FIRST_ORDER:
            words.append(self.due)
        return " ".join(filter(None, words))

    def problem(self) -> str:
        """Returns all the rest in words."""
        return (
            f"{self.target}, {self.model}, {self.batch} images of {self.image}×"
            f"{self.image} a device, {self.effort} effort"
        )


# ----------------------------------------------------------------------- compile a case


def compile_case(case: Case, programs: pathlib.Path | None) -> harness.Record:
    """Compiles a step and reads its program.

    Args:
      case: the step.
      programs: a folder to write the program's text to; None for none.

    Returns:
      What the record holds of the case beside its settings.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    # Typed as strings by jax, which takes numbers only.
    low: Any = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0}
    start = time.perf_counter()
    try:
        devices = case.target.make_devices()
        # Starts the compiler, which would count for the step.
        placed = jax.sharding.SingleDeviceSharding(devices[0])
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=placed)
        jax.jit(jnp.sin).lower(number).compile()
        start = time.perf_counter()
        lowered = lower(case, devices)
        between, before = time.perf_counter(), os.times()
        compiled = lowered.compile(
            compiler_options=low if case.effort == "low" else None
        )
        end, after = time.perf_counter(), os.times()
    # Whatever fails is a finding, and the other cases go on.
    except Exception as error:
        seconds = time.perf_counter() - start
        return {"error": f"after {seconds:.0f} s: {error}"[:2000]}
    text = compiled.as_text() or ""
    if programs is not None:
        words = f"{case.target} {case.model} {case.step()}".replace(":", "_")
        path = programs / f"{words.replace(' ', '-')}.hlo.gz"
        path.write_bytes(gzip.compress(text.encode()))
    figures = aot_figures.figures(aot_program.parse(text))
    return {
        "lower_seconds": round(between - start, 2),
        "compile_seconds": round(end - between, 2),
        # Of all threads and children, which other work on the machine changes least.
        "compile_cpu_seconds": round(sum(after[:4]) - sum(before[:4]), 2),
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "text_bytes": len(text),
        "memory": memory_of(compiled, case.target.kind),
        "instructions": figures.instructions,
        "collectives": [one._asdict() for one in figures.collectives],
        "statistics_all_reduce": figures.statistics_all_reduce,
        "cycles": figures.cycles,
        "open_loops": figures.open_loops,
    }


def memory_of(compiled: jax.stages.Compiled, chip: Chip) -> dict[str, int | bool]:
    """Returns the bytes of a program on each device by kind, and whether they fit."""
    counted = compiled.memory_analysis()
    assert counted is not None  # all of these compilers count
    sizes = {
        "arguments": counted.argument_size_in_bytes,
        "outputs": counted.output_size_in_bytes,
        "aliased": counted.alias_size_in_bytes,
        "temporaries": counted.temp_size_in_bytes,
        "code": counted.generated_code_size_in_bytes,
    }
    # Aliased bytes are among the arguments, and again among the outputs.
    total = sum(sizes.values()) - 2 * sizes["aliased"]
    fits = chip.memory is None or total <= chip.memory
    return {**sizes, "total": total, "fits": fits}


def lower(case: Case, devices: Sequence[Any]) -> jax.stages.Lowered:
    """Lowers a step for devices."""
    model = MODELS[case.model][0].clone(dtype=jnp.bfloat16)

    loss_fn, params, model_state, batch, rng = workloads.image_shapes(
        model, case.image, jnp.bfloat16
    )
    layers, tx = None, None
    if case.optimizer in FIRST_ORDER:
        tx = FIRST_ORDER[case.optimizer]()
    else:
        layers = lbopt.trace_layers(
            loss_fn,
            params,
            model_state,
            batch(2),
            rng,
            has_aux=True,
            weight_sharing=case.weight_sharing,
        )
        tx = second_order(case, layers)
    state = jax.eval_shape(
        lambda *args: training.init_state(tx, *args), params, model_state, rng
    )
    mesh = sharding.make_mesh(devices)
    step: Any = training.make_train_step(loss_fn, tx, layers, mesh)
    shapes = memory_plan.on_mesh(state, batch(case.batch * len(devices)), mesh)
    if case.due == "flags":
        return step.lower(*shapes)
    due = lbopt.Due(statistics=case.due != "none", inverses=case.due == "all")
    return step.lower(*shapes, due=due)


def second_order(case: Case, layers: Layers) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a case that has curvature."""
    placement = lbopt.Placement("data", case.target.devices, case.placement)
    if case.optimizer == "kfac":
        periods = lbopt.Periods(statistics=10, inverses=10)
        return lbopt.kfac(0.03, layers, periods=periods, placement=placement)
    threshold = 0.1 if case.optimizer == "sp_ngd_adaptive" else None
    return lbopt.sp_ngd(0.03, layers, stale_threshold=threshold, placement=placement)
