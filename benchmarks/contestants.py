"""Plain SGD and lbopt's K-FAC as contestants of a benchmark."""

import functools
import time
from typing import Any

import jax
import optax

import lbopt
from benchmarks import timing
from benchmarks.workloads import Workload
from lbopt import training
from lbopt.curvature.fisher import Fisher

LEARNING_RATE = 1e-3
MOMENTUM = 0.9
DAMPING = 1e-3
FACTOR_DECAY = 0.95


def sgd(workload: Workload) -> timing.Contestant:
    """Momentum SGD, through the same training step.

    Args:
      workload: the problem.

    Returns:
      The contestant.
    """
    tx = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    return _trained("SGD", workload, tx, layers=None, setup_seconds=0.0)


def kfac(workload: Workload, fisher: Fisher = "empirical") -> timing.Contestant:
    """Lbopt's K-FAC.

    Args:
      workload: the problem.
      fisher: which Fisher matrix.

    Returns:
      The contestant.
    """
    start = time.perf_counter()
    layers = lbopt.trace_layers(
        workload.train_loss,
        workload.params,
        workload.model_state,
        workload.batch,
        jax.random.key(0),
        has_aux=True,
    )
    setup_seconds = time.perf_counter() - start
    tx = lbopt.kfac(
        LEARNING_RATE,
        layers,
        momentum=MOMENTUM,
        damping=DAMPING,
        factor_decay=FACTOR_DECAY,
        stats_period=timing.STATS_PERIOD,
        inverse_period=timing.INVERSE_PERIOD,
    )
    return _trained("lbopt", workload, tx, layers, setup_seconds, fisher=fisher)


def _trained(
    name: str,
    workload: Workload,
    tx: optax.GradientTransformation,
    layers: Any,
    setup_seconds: float,
    **options: Any,
) -> timing.Contestant:
    state = training.init_state(
        tx, workload.params, workload.model_state, jax.random.key(1)
    )
    program = timing.compile_step(
        training.make_train_step(workload.train_loss, tx, layers, **options),
        state,
        workload.batch,
    )
    return timing.Contestant(
        name=name,
        step=functools.partial(_step, program.call, workload.batch),
        state=state,
        has_curvature=layers is not None,
        setup_seconds=setup_seconds,
        compile_seconds=program.seconds,
        state_bytes=training.opt_state_bytes(state.opt_state),
        temporary_bytes=program.temporary_bytes,
    )


def _step(program: Any, batch: Any, state: Any, index: int) -> tuple[Any, jax.Array]:
    del index  # the state counts
    state, metrics = program(state, batch)
    return state, metrics["loss"]
