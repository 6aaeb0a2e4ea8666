"""The optimizers that run on an accelerator, compiled by kind of step.

Programs are compiled at the same time, by threads, and none is timed meanwhile.
"""

import concurrent.futures
import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lbopt
from benchmarks import contestants, step_time, workloads
from benchmarks.contestants import Contestant
from benchmarks.harness import Record
from benchmarks.workloads import Workload
from experiments.models import resnet
from lbopt import training
from lbopt.curvature.registry import Layers

CYCLE = step_time.CYCLE
RATE = 1e-3
LARS_RATE = 1.0  # multiplied by the trust coefficient, which is 1e-3
# So small that statistics of one batch stay similar: each step then renews all or none.
ADAPTIVE_RATE = 1e-7

MODELS: dict[str, Callable[..., resnet.ResNet]] = {
    "resnet50": resnet.ResNet50,
    "resnet20": resnet.ResNet20,
    "tiny": lambda num_classes, dtype: workloads.TINY.clone(
        num_classes=num_classes, dtype=dtype
    ),
}


class Network(NamedTuple):
    """What is trained: a name in ``MODELS``, sizes of the data, type of activations."""

    model: str
    image_size: int
    num_classes: int
    dtype: str

    def workload(self, batch_size: int) -> Workload:
        """Returns the network with a batch of noise."""
        dtype = jnp.dtype(self.dtype)
        model = MODELS[self.model](num_classes=self.num_classes, dtype=dtype)
        return workloads.random_images(
            self.model, model, self.image_size, int(batch_size)
        )


class Entrant(NamedTuple):
    """An optimizer before its step is compiled.

    Attributes:
      make: returns the transformation; takes the layers.
      schedule: which programs its steps have: ``"one"``, ``"fixed"`` for one by kind of
        step if the library holds them apart, ``"adaptive"`` for flags in the program.
    """

    make: Callable[[Layers], optax.GradientTransformation]
    schedule: str = "one"


def kfac(layers: Layers, **options: Any) -> optax.GradientTransformationExtraArgs:
    """Returns K-FAC with the library's settings, and the periods of ``CYCLE``."""
    periods = lbopt.Periods(contestants.STATS_PERIOD, contestants.INVERSE_PERIOD)
    return lbopt.kfac(RATE, layers, periods=periods, **options)


def _muon_axes(params: Any) -> Any:
    """Matrices and convolution kernels are orthogonalized, the latter as one matrix."""

    def axes(x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        if x.ndim < 2:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    return jax.tree.map(axes, params)


# In the order of the memory that they take: a process tells only the peak so far.
CURVATURE = {
    "K-FAC": Entrant(kfac, "fixed"),
    "SP-NGD": Entrant(lambda layers: lbopt.sp_ngd(ADAPTIVE_RATE, layers), "adaptive"),
}
FIRST_ORDER = {
    "LARS": Entrant(lambda _: lbopt.lars(LARS_RATE)),
    "AdamW": Entrant(lambda _: optax.adamw(RATE)),
    "Muon": Entrant(
        lambda _: optax.contrib.muon(RATE, muon_weight_dimension_numbers=_muon_axes)
    ),
    "NLCG": Entrant(lambda _: lbopt.nlcg(RATE)),
}
EIGENVALUES = {
    "K-FAC": CURVATURE["K-FAC"],
    "EKFAC": Entrant(functools.partial(kfac, eigenvalues="corrected"), "fixed"),
}
GROUPS = {"curvature": CURVATURE, "first order": FIRST_ORDER, "EKFAC": EIGENVALUES}
SGD = Entrant(lambda _: optax.sgd(RATE, momentum=contestants.MOMENTUM))


class Prepared(NamedTuple):
    """An optimizer with its step's programs, by kind of step."""

    name: str
    tx: optax.GradientTransformation
    programs: Mapping[str, jax.stages.Compiled]
    seconds: float

    def contestant(self, workload: Workload) -> Contestant:
        """Returns it with a state of its own, at the first step."""
        state = new_state(self.tx, workload)

        def step(state: Any, batch: Any, index: int) -> tuple[Any, jax.Array]:
            program = self.programs[CYCLE[index % len(CYCLE)]]
            state, metrics = program(state, batch)
            return state, metrics["loss"]

        return Contestant(
            name=self.name,
            step=step,
            state=state,
            setup_seconds=0.0,
            compile_seconds=self.seconds,
            state_bytes=training.opt_state_bytes(state.opt_state),
            temporary_bytes=max(m["temporary"] for m in self.bytes().values()),
        )

    def bytes(self) -> dict[str, dict[str, int]]:
        """Returns the compiler's count of each program's bytes."""
        return {kind: bytes_of(p) for kind, p in self.programs.items()}


def bytes_of(program: jax.stages.Compiled) -> dict[str, int]:
    """Returns a program's bytes: in all (without code), temporary, and code."""
    memory: Any = program.memory_analysis()
    temporary = int(memory.temp_size_in_bytes)
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    kept -= memory.alias_size_in_bytes  # outputs in the place of donated arguments
    code = int(memory.generated_code_size_in_bytes)
    return {"total": int(kept) + temporary, "temporary": temporary, "code": code}


def new_state(tx: optax.GradientTransformation, workload: Workload) -> Any:
    """Returns the state before the first step; no two calls share a buffer."""
    return training.init_state(
        tx, workload.params, workload.model_state, jax.random.key(1)
    )


def prepare(
    entrants: Mapping[str, Entrant], workload: Workload, layers: Layers
) -> list[Prepared]:
    """Compiles the programs of all optimizers at the same time."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = []
        for name, entrant in entrants.items():
            tx = entrant.make(layers)
            lowered = lowered_steps(tx, entrant, workload, layers)
            begin = time.perf_counter()
            # One program for several kinds is compiled once.
            jobs = {id(x): pool.submit(x.compile) for x in lowered.values()}
            kinds = {kind: jobs[id(x)] for kind, x in lowered.items()}
            waiting.append((name, tx, kinds, begin))
        return [
            Prepared(
                name,
                tx,
                {kind: job.result() for kind, job in kinds.items()},
                time.perf_counter() - begin,
            )
            for name, tx, kinds, begin in waiting
        ]


def lowered_steps(
    tx: optax.GradientTransformation,
    entrant: Entrant,
    workload: Workload,
    layers: Layers,
) -> dict[str, jax.stages.Lowered]:
    """Traces an optimizer's step, for each kind of step that it has a program for."""
    own = None if entrant.schedule == "one" else layers
    step = training.make_train_step(workload.train_loss, tx, own)
    # Shapes alone: the states of all optimizers do not fit beside a large batch.
    state = jax.eval_shape(functools.partial(new_state, tx, workload))
    lower: Callable[..., Any] = functools.partial(step.lower, state, workload.batch)
    if entrant.schedule != "fixed":
        return dict.fromkeys(CYCLE, lower())
    return {kind: lower(**contestants.due(kind)) for kind in dict.fromkeys(CYCLE)}


def peak_bytes() -> int | None:
    """Returns the peak of the device's memory in this process, None if unknown."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def if_it_fits(function: Callable[[], Record]) -> Record:
    """Returns a function's result, or the row ``error`` if memory does not suffice."""
    try:
        return function()
    except jax.errors.JaxRuntimeError as error:
        # jax has no type of its own for it; the first word is the status of XLA.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
    return {"error": "out of memory"}
