"""Optimizers compiled into training steps, ready to be timed side by side."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import lbopt
from benchmarks.workloads import Workload
from lbopt import training
from lbopt.curvature.registry import Layers

LEARNING_RATE = 1e-3
MOMENTUM = 0.9
DAMPING = 1e-3
FACTOR_DECAY = 0.95
SETTINGS = {
    "learning_rate": LEARNING_RATE,
    "momentum": MOMENTUM,
    "damping": DAMPING,
    "factor_decay": FACTOR_DECAY,
}
STATS_PERIOD = 2
INVERSE_PERIOD = 4
DUE = {"none": (False, False), "stats": (True, False), "full": (True, True)}
"""Whether statistics and inverses are renewed, by kind of step."""


class Compiled(NamedTuple):
    """A compiled program, the time to trace and compile it, and XLA's own memory."""

    call: Callable[..., Any]
    seconds: float
    temporary_bytes: int


class Contestant(NamedTuple):
    """An optimizer with its compiled step, ``(state, batch, index) -> (state, loss)``.

    If it has several programs, ``compile_seconds`` is their sum and ``temporary_bytes``
    the largest of them; ``setup_seconds`` is the time to find the layers.
    """

    name: str
    step: Callable[[Any, Any, int], tuple[Any, jax.Array]]
    state: Any
    setup_seconds: float
    compile_seconds: float
    state_bytes: int
    temporary_bytes: int


class Setup(NamedTuple):
    """A model's layers, and the seconds that finding them took."""

    layers: Layers
    seconds: float


def set_up(workload: Workload) -> Setup:
    """Finds the layers of a workload's model."""
    start = time.perf_counter()
    layers = lbopt.trace_layers(
        workload.train_loss,
        workload.params,
        workload.model_state,
        workload.batch,
        jax.random.key(0),
        has_aux=True,
    )
    return Setup(layers, time.perf_counter() - start)


def compile_step(function: Any, *args: Any) -> Compiled:
    """Compiles a jitted function ahead of time, with the caches of traces cleared."""
    jax.clear_caches()
    start = time.perf_counter()
    program = function.lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    return Compiled(program, seconds, int(memory.temp_size_in_bytes))


def due(kind: str) -> dict[str, Any]:
    """Returns the argument ``due=`` of a kind of step of fixed periods."""
    return {"due": lbopt.Due(*DUE[kind])}


def sgd(workload: Workload, learning_rate: float = LEARNING_RATE) -> Contestant:
    """Returns momentum SGD, trained by the same step as the others."""
    return trained("SGD", workload, optax.sgd(learning_rate, momentum=MOMENTUM))


def kfac(name: str, workload: Workload, setup: Setup, **options: Any) -> Contestant:
    """Returns K-FAC with the common settings, except where ``options`` differ."""
    settings = {
        "momentum": MOMENTUM,
        "damping": DAMPING,
        "kl_clip": None,
        "factor_decay": FACTOR_DECAY,
        "periods": lbopt.Periods(STATS_PERIOD, INVERSE_PERIOD),
    }
    tx = lbopt.kfac(LEARNING_RATE, setup.layers, **settings | options)
    return trained(name, workload, tx, setup)


def trained(
    name: str,
    workload: Workload,
    tx: optax.GradientTransformation,
    setup: Setup | None = None,
) -> Contestant:
    """Compiles a training step; optimizers without curvature have no ``setup``."""
    state = training.init_state(
        tx, workload.params, workload.model_state, jax.random.key(1)
    )
    layers = None if setup is None else setup.layers
    step = training.make_train_step(workload.train_loss, tx, layers)
    program = compile_step(step, state, workload.batch)
    return Contestant(
        name=name,
        step=functools.partial(_step, program.call),
        state=state,
        setup_seconds=0.0 if setup is None else setup.seconds,
        compile_seconds=program.seconds,
        state_bytes=training.opt_state_bytes(state.opt_state),
        temporary_bytes=program.temporary_bytes,
    )


def _step(program: Any, state: Any, batch: Any, index: int) -> tuple[Any, jax.Array]:
    del index  # the state counts its own steps
    state, metrics = program(state, batch)
    return state, metrics["loss"]
