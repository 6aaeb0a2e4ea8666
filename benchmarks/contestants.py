"""Plain SGD and lbopt's optimizers as contestants of a benchmark."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import lbopt
from benchmarks import timing
from benchmarks.workloads import Workload
from lbopt import training
from lbopt.curvature.fisher import Fisher
from lbopt.curvature.registry import Layers

LEARNING_RATE = 1e-3
MOMENTUM = 0.9
DAMPING = 1e-3
FACTOR_DECAY = 0.95


class Setup(NamedTuple):
    """What finding a model's layers gave and took.

    Attributes:
      layers: the layers.
      seconds: wall time.
    """

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


def sgd(workload: Workload, learning_rate: float = LEARNING_RATE) -> timing.Contestant:
    """Momentum SGD, through the same training step.

    Args:
      workload: the problem.
      learning_rate: its rate.

    Returns:
      The contestant.
    """
    tx = optax.sgd(learning_rate, momentum=MOMENTUM)
    return without_curvature("SGD", workload, tx)


def without_curvature(
    name: str, workload: Workload, tx: optax.GradientTransformation
) -> timing.Contestant:
    """An optimizer that takes nothing but gradients and the loss.

    Args:
      name: its name in the tables.
      workload: the problem.
      tx: the optimizer.

    Returns:
      The contestant.
    """
    return _trained(name, workload, tx, layers=None, setup_seconds=0.0)


def kfac(workload: Workload, fisher: Fisher = "empirical") -> timing.Contestant:
    """Lbopt's K-FAC with statistics and inverses as in a cycle.

    Args:
      workload: the problem.
      fisher: which Fisher matrix.

    Returns:
      The contestant.
    """
    make = functools.partial(
        lbopt.kfac,
        LEARNING_RATE,
        momentum=MOMENTUM,
        damping=DAMPING,
        factor_decay=FACTOR_DECAY,
        periods=lbopt.Periods(timing.STATS_PERIOD, timing.INVERSE_PERIOD),
    )
    return with_curvature("lbopt", workload, set_up(workload), make, fisher)


def with_curvature(
    name: str,
    workload: Workload,
    setup: Setup,
    make: Callable[..., optax.GradientTransformation],
    fisher: Fisher = "empirical",
) -> timing.Contestant:
    """An optimizer of this library.

    Args:
      name: its name in the tables.
      workload: the problem.
      setup: its layers.
      make: makes it, given ``layers=``.
      fisher: which Fisher matrix.

    Returns:
      The contestant.
    """
    tx = make(layers=setup.layers)
    return _trained(name, workload, tx, *setup, fisher=fisher)


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
        step=functools.partial(_step, program.call),
        state=state,
        has_curvature=layers is not None,
        setup_seconds=setup_seconds,
        compile_seconds=program.seconds,
        state_bytes=training.opt_state_bytes(state.opt_state),
        temporary_bytes=program.temporary_bytes,
    )


def _step(program: Any, state: Any, batch: Any, index: int) -> tuple[Any, jax.Array]:
    del index  # the state counts
    state, metrics = program(state, batch)
    return state, metrics["loss"]
