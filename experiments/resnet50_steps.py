"""Steps of the full-size ResNet-50, 224x224 and 1,000 classes, with every optimizer.

    python -m experiments.resnet50_steps            every case; writes the record
    python -m experiments.resnet50_steps CASE       one case; prints its row

Each case has a process of its own, one after the other: a program is built as
`experiments.classifier` builds it, compiled, and taken two steps with on random images.
A row tells what a step moved, the time to trace and to compile, the time of the second
step, the peak memory of the process until it was compiled and in all, and the memory
plan with XLA's own count. Nobody trains on a CPU like this; the figures say that every
step is complete at full size, and how much memory it takes.

The last case is a batch of 131,072 on eight devices, 32 images on each at a time, with
the settings of SP-NGD's paper: 512 micro-batches a device. It is compiled and not run.

What is finished is kept in `runs/resnet50_steps` and not repeated. Writes
`experiments/results/resnet50_steps.json`.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments import classifier, study
from experiments.configs import resnet50
from experiments.data import pipeline
from experiments.models import resnet
from experiments.runs import write_text
from experiments.settings import Config
from lbopt import memory_plan

BATCH = 4
BASE = Config(
    dataset="imagenet2012",
    model="resnet50",
    norm_momentum=0.9,
    batch_size=BATCH,
    eval_batch_size=BATCH,
    warmup_epochs=0.0,  # a first step of rate 0 would move nothing
)
ACCUMULATED = "sp_ngd 131,072"
CASES: dict[str, Config] = {
    **{
        name: dataclasses.replace(BASE, optimizer=name)
        for name in ("sgd", "lars", "nlcg", "kfac", "sp_ngd")
    },
    "sp_ngd bfloat16 remat": dataclasses.replace(
        BASE, optimizer="sp_ngd", dtype="bfloat16", remat=True
    ),
    ACCUMULATED: dataclasses.replace(resnet50.RUNS["sp_ngd_131k"].config, devices=8),
}
"""Settings by the name of the case; the last is compiled only."""

RUNS = pathlib.Path("runs/resnet50_steps")
RESULTS = study.RESULTS / "resnet50_steps.json"


class Case:
    """A program at full size, built from shapes alone."""

    def __init__(self, config: Config):
        absent: Any = None
        data = pipeline.Data(
            train=absent,
            test=absent,
            image_shape=(224, 224, 3),
            num_classes=1000,
            steps_per_epoch=1_281_167 / config.batch_size,
        )
        self.config = config
        self.program = classifier.build_program(config, data)
        self.batch = pipeline.batch_shapes(
            config.batch_size, data.image_shape, jnp.dtype(config.dtype)
        )
        self.state = jax.eval_shape(self.program.init)

    def plan(self) -> memory_plan.MemoryPlan:
        """Returns the memory plan, before anything is compiled."""
        return memory_plan.plan(
            self.state,
            self.batch,
            1 if self.program.mesh is None else self.program.mesh.size,
            per_example=self.program.per_example,
        )

    def lower(self) -> jax.stages.Lowered:
        """Returns the step, traced."""
        shapes = memory_plan.on_mesh(
            self.state,
            self.batch,
            self.program.mesh,
            per_example=self.program.per_example,
        )
        return self.program.train_step.lower(*shapes)

    def compiler_options(self) -> dict[str, Any]:
        """Returns the compiler's options."""
        on_cpu = jax.default_backend() == "cpu"
        return resnet.CPU_KEEPS_BARRIERS if on_cpu and self.config.remat else {}


def row_of(name: str) -> dict[str, Any]:
    """Compiles a case, takes two steps unless it is too large, returns its row."""
    begin = time.perf_counter()
    case = Case(CASES[name])
    lowered = case.lower()
    traced = time.perf_counter()
    step = lowered.compile(compiler_options=case.compiler_options())
    compiled = time.perf_counter()
    plan = memory_plan.with_xla(case.plan(), step)
    devices = 1 if case.program.mesh is None else case.program.mesh.size
    row = {
        "case": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "batch_size": case.config.batch_size,
        "devices": devices,
        "micro_batches": case.config.accumulate(devices),
        "seconds_to_trace": round(traced - begin, 1),
        "seconds_to_compile": round(compiled - traced, 1),
        "memory_plan": plan._asdict(),
        "line": str(plan),
        "peak_memory_compiling": _peak_memory(),
    }
    if name != ACCUMULATED:
        row |= _two_steps(case, step)
    return row | {"peak_memory": _peak_memory()}


def _peak_memory() -> int:
    """Returns the peak memory of the process in bytes, on Linux."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _two_steps(case: Case, step: jax.stages.Compiled) -> dict[str, Any]:
    """Returns the parameters that the first step left, and the second step's time."""
    random = jax.random.normal(jax.random.key(1), case.batch["image"].shape)
    batch = {
        "image": random.astype(case.config.dtype),
        "label": jnp.arange(len(random), dtype=jnp.int32),
    }
    state = case.program.init()
    before = jax.device_get(state.params)
    state, metrics = step(state, batch)
    after = jax.device_get(state.params)
    unmoved = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, same in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
        )
        if same
    ]
    begin = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, batch))
    seconds = time.perf_counter() - begin
    finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(state.params)]
    return {
        "seconds_a_step": round(seconds, 2),
        "loss": float(metrics["loss"]),
        "skipped": int(state.skipped),
        "unmoved": unmoved,
        "finite": bool(jnp.stack(finite).all()),
    }


def in_own_process(name: str) -> dict[str, Any]:
    """Returns the row of a case, measured in a process of its own."""
    command = [sys.executable, "-m", "experiments.resnet50_steps", name]
    done = subprocess.run(
        command, cwd=study.ROOT, stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def kept(name: str) -> dict[str, Any]:
    """Returns the row of a case, measured unless it is kept."""
    path = RUNS / f"{name.replace(' ', '_').replace(',', '')}.json"
    if not path.exists():
        row = in_own_process(name)
        write_text(path, json.dumps(row) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def main(arguments: Sequence[str]) -> None:
    """Prints the row of one case, or writes the record of all."""
    if arguments:
        (name,) = arguments
        jax.config.update("jax_num_cpu_devices", CASES[name].devices)
        print(json.dumps(row_of(name)))
        return
    rows = []
    for name in CASES:
        rows.append(kept(name))
        print(f"{name}: {rows[-1]['line']}")
        write_record(rows)  # each takes long


def write_record(rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows that have been measured so far."""
    record = {
        "command": "python -m experiments.resnet50_steps",
        "device": jax.devices()[0].device_kind,
        "cpu_cores": os.cpu_count(),
        "jax": jax.__version__,
        "rows": list(rows),
    }
    study.write_record(RESULTS, record)


if __name__ == "__main__":
    main(sys.argv[1:])
