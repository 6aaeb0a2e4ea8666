"""Where the time of K-FAC's step goes on an accelerator.

The parts of the step are programs of their own, and figures are differences of their
times.  They are not read from a profile: a fusion there bears the name of one of its
operations, so that averages, guards and products cannot be told apart, and the format
of traces differs between backends.  The price is that parts compiled apart may take
longer than together; beside the whole step, which is timed too, their sum tells.
"""

import concurrent.futures
import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import optax

import lbopt
from benchmarks import contestants, timing
from benchmarks.accelerator_entrants import CYCLE, Network, kfac
from benchmarks.accelerator_steps import largest
from benchmarks.harness import Record
from benchmarks.parts import Run
from benchmarks.workloads import Workload


def measure(run: Run, *, network: Network, batch_size: int | None, rounds: int) -> None:
    """Times gradient, gradient with statistics, and update by kind of step.

    Args:
      run: gets the rows ``gradient``, ``with statistics`` and ``update``, the last by
        kind of step, all in milliseconds.
      network: what is trained.
      batch_size: examples; None for the largest batch that was found before.
      rounds: timed rounds.

    Raises:
      NotNeededError: if no larger batch was found than the one of the other parts.
    """
    network = Network(*network)
    workload = network.workload(batch_size or largest(run))
    layers = contestants.set_up(workload).layers
    tx = optax.with_extra_args_support(kfac(layers))
    rng = jax.random.key(0)

    @jax.jit
    def gradient(params: Any, model_state: Any, batch: Any) -> Any:
        f = jax.value_and_grad(workload.train_loss, has_aux=True)
        return f(params, model_state, batch, rng)

    @jax.jit
    def with_statistics(params: Any, model_state: Any, batch: Any) -> Any:
        f = lbopt.value_grad_and_curvature(workload.train_loss, layers, has_aux=True)
        return f(params, model_state, batch, rng)

    arguments = workload.params, workload.model_state, workload.batch
    _, grads, curvature = jax.eval_shape(with_statistics, *arguments)
    state = jax.eval_shape(tx.init, workload.params)

    def lower(kind: str) -> Any:
        # A new function: one that is traced again might be taken from the cache.
        def update(state: Any, grads: Any, params: Any, curvature: Any) -> Any:
            due = contestants.due(kind)
            return tx.update(grads, state, params, curvature=curvature, **due)

        update = jax.jit(update, donate_argnums=0)
        return update.lower(state, grads, workload.params, curvature)

    lowered = [gradient.lower(*arguments), with_statistics.lower(*arguments)]
    kinds: list[str] = list(dict.fromkeys(CYCLE))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        lowered += [lower(kind) for kind in kinds]
        first, second, *updates = pool.map(lambda x: x.compile(), lowered)
    timed = {"gradient": first, "with statistics": second}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    results: Any = None
    for index in range(rounds + 1):
        for name, program in timed.items():
            start = time.perf_counter()
            results = jax.block_until_ready(program(*arguments))
            if index:
                seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        run.report(name, timing.spread([1e3 * s for s in values])._asdict())
    programs: dict[str, Any] = dict(zip(kinds, updates, strict=True))
    times = _updates(tx.init(workload.params), results, workload, programs, rounds)
    run.report("update", times)


def _updates(
    state: Any,
    results: Any,
    workload: Workload,
    programs: Mapping[str, jax.stages.Compiled],
    rounds: int,
) -> Record:
    """Returns the milliseconds of updates by kind of step."""
    _, grads, curvature = results
    seconds: dict[str, list[float]] = {kind: [] for kind in CYCLE}
    for index in range((rounds + 1) * len(CYCLE)):
        kind = CYCLE[index % len(CYCLE)]
        program = programs.get(kind, programs["full"])
        start = time.perf_counter()
        _, state = jax.block_until_ready(
            program(state, grads, workload.params, curvature)
        )
        if index >= len(CYCLE):
            seconds[kind].append(1e3 * (time.perf_counter() - start))
    return {kind: statistics.median(values) for kind, values in seconds.items()}
