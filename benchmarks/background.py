"""Step time of K-FAC with inversion inside the step, beside it, and never again.

    python -m benchmarks.background [--steps 60] [--period 1]

K-FAC trains a network of wide dense layers on one CPU core: with all factors inverted
at every step, or every ``--period`` steps; with ``BackgroundInversion``, whose process
has the other cores; and with the first inverses kept for ever, the lower bound.  Each
run has a process of its own; the three take turns for each of three seeds, which draw
the parameters and the data.
"""

import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lbopt
from benchmarks import harness, timing

MODES = ("synchronous", "background", "never again")
BATCH, CLASSES, FEATURES = 256, 10, 256
_SETTINGS = {
    "learning_rate": 1.0,
    "kl_clip": 0.01,
    "damping": 1e-2,
    "batch": BATCH,
}
_WARM_UP = 5  # steps that are not timed: they compile


class Mlp(nn.Module):
    """Four dense layers, three of them wide."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of a batch."""
        for number in range(3):
            x = nn.tanh(nn.Dense(self.width, name=f"dense{number}")(x))
        return nn.Dense(CLASSES, name="head")(x)


def measure(
    steps: int, period: int, width: int = 800, seeds: int = 3
) -> harness.Record:
    """Trains in every mode with every seed, each run in a process of its own."""
    runs: dict[str, list[Any]] = {mode: [] for mode in MODES}
    for seed in range(seeds):
        for mode in MODES[seed % 3 :] + MODES[: seed % 3]:
            harness.tell(f"seed {seed}: {mode}")
            run = harness.in_new_process(train, mode, seed, width, period, steps)
            runs[mode].append(run)
    return {"width": width, "period": period, "steps": steps, "runs": runs}


def train(mode: str, seed: int, width: int, period: int, steps: int) -> dict[str, Any]:
    """Trains on the first CPU core alone, in a process that has not used JAX yet.

    Args:
      mode: one of ``MODES``.
      seed: seed of the parameters and the data.
      width: units of the wide layers.
      period: steps between synchronous inversions.
      steps: number of timed steps.

    Returns:
      ``seconds`` and ``losses`` of the timed steps, and ``ages``, the mean age of the
      inverses that each used.
    """
    core, *others = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # JAX starts a thread for each core it sees
    model, teacher, key = Mlp(width), Mlp(64), jax.random.key(seed)
    keys = jax.random.split(key, 3)
    scales = jnp.logspace(0, -2, FEATURES)
    answers = teacher.init(keys[1], jnp.zeros((1, FEATURES)))

    def batch_of(step: int) -> tuple[jax.Array, jax.Array]:
        x = jax.random.normal(jax.random.fold_in(keys[2], step), (BATCH, FEATURES))
        x = x * scales
        answer: Any = teacher.apply(answers, 5 * x)
        return x, jnp.argmax(answer, -1)

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, x)
        logits = lbopt.likelihood(logits, "categorical")
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    params = model.init(keys[0], jnp.zeros((1, FEATURES)))["params"]
    layers = lbopt.trace_layers(loss_fn, params, *jax.jit(batch_of)(0))
    periods = {"synchronous": period, "background": None, "never again": 10**9}
    settings = {name: _SETTINGS[name] for name in ("kl_clip", "damping")}
    tx = lbopt.distributed_kfac(
        _SETTINGS["learning_rate"],
        layers,
        periods=lbopt.Periods(inverses=periods[mode]),
        **settings,
    )
    evaluate = lbopt.value_grad_and_curvature(loss_fn, layers, fisher="sampled")

    @jax.jit
    def train_step(params: Any, state: Any, step: int) -> Any:
        x, y = batch_of(step)
        rng = jax.random.fold_in(key, step)
        loss, grads, curvature = evaluate(
            params, x, y, rng=rng, due=lbopt.refresh(state)
        )
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, loss

    state, result = tx.init(params), {"seconds": [], "losses": [], "ages": []}
    with lbopt.BackgroundInversion(layers, cores=others or None) as exchange:
        for step in range(_WARM_UP + steps):
            start = time.perf_counter()
            params, state, loss = train_step(params, state, step)
            if mode == "background":
                state = exchange(state)
            loss = float(loss)
            jax.block_until_ready(state)
            seconds = time.perf_counter() - start
            if step >= _WARM_UP:
                ages = jax.tree.leaves(lbopt.inverse_age(state))
                result["seconds"].append(seconds)
                result["losses"].append(loss)
                result["ages"].append(float(np.mean(ages)))
            elif mode == "background":
                exchange.wait()  # for the process to start and compile
    return result


def table(record: harness.Record) -> str:
    """Formats a record."""
    rows = [("", "ms a step", "over synchronous", "mean age", "last losses")]
    base = record["runs"]["synchronous"]
    for mode, runs in record["runs"].items():
        means = [statistics.mean(run["seconds"]) for run in runs]
        ratios = [
            mean / statistics.mean(other["seconds"])
            for mean, other in zip(means, base, strict=True)
        ]
        rows.append(
            (
                mode,
                f"{1e3 * statistics.median(means):.0f}",
                str(timing.spread(ratios)),
                f"{statistics.mean(statistics.mean(run['ages']) for run in runs):.1f}",
                ", ".join(f"{_last_loss(run):.3f}" for run in runs),
            )
        )
    return harness.page(
        f"dense layers of {record['width']}, batch {BATCH}, inverses every "
        f"{record['period']} steps; {record['steps']} steps on one core",
        f"means over steps, median of {len(base)} seeds",
        rows,
    )


def _last_loss(run: Mapping[str, Any]) -> float:
    """Returns the mean loss of the last quarter of the steps."""
    losses = run["losses"]
    return statistics.mean(losses[-max(len(losses) // 4, 1) :])


main = harness.command(
    "background",
    __doc__,
    measure,
    table,
    _SETTINGS,
    steps=(60, "timed steps of each run"),
    period=(1, "steps between inversions that are part of the step"),
)

if __name__ == "__main__":
    main()
