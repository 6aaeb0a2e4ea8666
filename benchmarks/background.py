"""What it costs a step to invert in it, and what inverting beside it saves.

    python -m benchmarks.background [--width 800] [--period 1] [--steps 60] [--seeds 3]

K-FAC trains a network of wide dense layers on one CPU core, in processes of their own
that take turns: with all factors inverted at every step, or every so many; with
``BackgroundInversion``, whose process has the second core; and with the first inverses
for ever, which nothing can be faster than.  Seeds draw the parameters and the data.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lbopt
from benchmarks import own_process, reporting

MODES = ("synchronous", "background", "never again")
BATCH, CLASSES, FEATURES = 256, 10, 256
_SETTINGS = {
    "learning_rate": 1.0,
    "kl_clip": 0.01,
    "damping": 1e-2,
    "batch": BATCH,
}
_SIZES = {
    "width": (800, "of the dense layers"),
    "period": (1, "steps from one inversion to the next, if it is in the step"),
    "steps": (60, "timed steps of each run"),
}
_WARM_UP = 5
"""Steps that are not timed: they compile."""


class Mlp(nn.Module):
    """Four dense layers, three of them wide."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of a batch."""
        for number in range(3):
            x = nn.tanh(nn.Dense(self.width, name=f"dense{number}")(x))
        return nn.Dense(CLASSES, name="head")(x)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what the command line asks for, prints tables, writes the record.

    Args:
      argv: arguments of the command line; those of the process by default.

    Returns:
      The record, as it is written to ``--output``; of a single run what it measured.
    """
    options = _parse(argv)
    sizes = reporting.sizes(options, _SIZES)
    if options.mode:
        result = train(options.mode, options.seed, **sizes)
        print(json.dumps(result))
        return result
    record = reporting.begin("background", argv, _SETTINGS)
    runs: dict[str, list[Any]] = {mode: [] for mode in MODES}
    for seed in range(options.seeds):
        for mode in MODES[seed % 3 :] + MODES[: seed % 3]:
            reporting.tell(f"seed {seed}: {mode}")
            part = {"mode": mode, "seed": seed} | sizes
            core = min(os.sched_getaffinity(0))
            run = own_process.result_of("benchmarks.background", part, core=core)
            runs[mode].append(run)
    record |= sizes | {"runs": runs}
    reporting.write(record, options.output)
    print(table(record))
    return record


def train(
    mode: str, seed: int, *, width: int, period: int, steps: int
) -> dict[str, Any]:
    """Trains for some steps.

    Args:
      mode: one of ``MODES``.
      seed: of the parameters and the data.
      width: of the layers.
      period: of the synchronous inversions.
      steps: how many are timed.

    Returns:
      ``seconds`` and ``losses`` of each timed step; ``ages``, the mean age of the
      inverses that it used.
    """
    model, key = Mlp(width), jax.random.key(seed)
    teacher = Mlp(64)
    keys = jax.random.split(key, 3)
    scales = jnp.logspace(0, -2, FEATURES)
    answers = teacher.init(keys[1], jnp.zeros((1, FEATURES)))

    def batch_of(step: int) -> tuple[jax.Array, jax.Array]:
        x = jax.random.normal(jax.random.fold_in(keys[2], step), (BATCH, FEATURES))
        x = x * scales
        answer: Any = teacher.apply(answers, 5 * x)
        return x, jnp.argmax(answer, -1)

    batches = jax.jit(batch_of)

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, x)
        logits = lbopt.likelihood(logits, "categorical")
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    params = model.init(keys[0], jnp.zeros((1, FEATURES)))["params"]
    layers = lbopt.trace_layers(loss_fn, params, *batches(0))
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
    cores = sorted(os.sched_getaffinity(os.getppid()))[1:] or None
    with lbopt.BackgroundInversion(layers, cores=cores) as exchange:
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
                exchange.wait()  # for its own start and compilation
    return result


def table(record: Mapping[str, Any]) -> str:
    """The table of a record.

    Args:
      record: what ``main`` returned.

    Returns:
      Text of several lines.
    """
    rows = [("", "ms a step", "over synchronous", "mean age", "last losses")]
    base = record["runs"]["synchronous"]
    for mode, runs in record["runs"].items():
        means = [statistics.mean(run["seconds"]) for run in runs]
        ratios = [
            mean / statistics.mean(other["seconds"])
            for mean, other in zip(means, base, strict=True)
        ]
        ages = [statistics.mean(run["ages"]) for run in runs]
        rows.append(
            (
                mode,
                f"{1e3 * statistics.median(means):.0f}",
                f"{statistics.median(ratios):.2f} "
                f"({min(ratios):.2f}-{max(ratios):.2f})",
                f"{statistics.mean(ages):.1f}",
                ", ".join(f"{last_loss(run):.3f}" for run in runs),
            )
        )
    return "\n".join(
        [
            "",
            f"dense layers of {record['width']}, batch {BATCH}, inverses every "
            f"{record['period']} steps; {record['steps']} steps on one core",
            f"means over steps, median of {len(base)} seeds",
            *reporting.aligned(rows),
        ]
    )


def last_loss(run: Mapping[str, Any]) -> float:
    """The mean loss of the last quarter of the steps."""
    losses = run["losses"]
    return statistics.mean(losses[-max(len(losses) // 4, 1) :])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.arguments("background", __doc__)
    reporting.add_sizes(parser, _SIZES)
    parser.add_argument(
        "--seeds", type=reporting.positive, default=3, help="runs of each kind"
    )
    parser.add_argument("--mode", choices=MODES, help="a single run, in this process")
    parser.add_argument("--seed", type=int, default=0, help="of the single run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
