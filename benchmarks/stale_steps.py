"""SP-NGD's step time over SGD's with stale statistics, in steady state.

    python -m benchmarks.stale_steps [--steps 200] [--batch-size 128] [--threshold 0.1]
        [--label-noise 0.4]

Momentum SGD, SP-NGD that renews everything at every step, and SP-NGD whose statistics
have clocks of their own (``stale_threshold``) train ResNet-20 in one process and take
turns at every step.  Each step has a fresh batch, the same for all three: on a fixed
one statistics would change with the parameters alone.  A share of the labels is drawn
anew, as the loss of these pictures otherwise vanishes within twenty steps, and the
statistics of gradients that come from a few examples alone are never similar.  Steady
state is the last half of the steps; figures of the whole run leave out the first step,
at which everything is due.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import lbopt
from benchmarks import contestants, renewals, reporting, timing
from benchmarks.workloads import Workload, resnet20, resnet50, tiny
from lbopt import sharding

CLASSIFIERS = {"resnet20": resnet20, "resnet50": resnet50, "tiny": tiny}
SGD_RATE = 0.05
SP_NGD_RATE = 1e-3
DAMPING = 2.5e-4
_SETTINGS = {
    "sgd_rate": SGD_RATE,
    "sp_ngd_rate": SP_NGD_RATE,
    "momentum": contestants.MOMENTUM,
    "damping": DAMPING,
}
_PARTS = {"steady": "last half of the steps", "whole": "all steps but the first"}
_NAMES = ("SGD", "SP-NGD never stale", "SP-NGD stale")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what the command line asks for, prints a table, writes the record.

    Args:
      argv: arguments of the command line; those of the process by default.

    Returns:
      The record, as it is written to ``--output``.
    """
    options = _parse(argv)
    record = reporting.begin("stale_steps", argv, _SETTINGS)
    workload = CLASSIFIERS[options.workload](options.batch_size)
    record |= measure(workload, options.steps, options.threshold, options.label_noise)
    reporting.write(record, options.output)
    print(table(record))
    return record


def measure(
    workload: Workload, steps: int, threshold: float, label_noise: float
) -> dict[str, Any]:
    """Times the three contestants and notes what they renew.

    Args:
      workload: the problem.
      steps: steps of each, at least 2.
      threshold: α of the adaptive refresh.
      label_noise: the share of labels drawn anew.

    Returns:
      The record without its head.
    """
    jax.jit(jnp.sin).lower(0.0).compile()  # the compiler's own start is nobody's
    reporting.tell("compiling")
    sgd, never, stale = _NAMES
    setup = contestants.set_up(workload)
    runners = [
        contestants.sgd(workload, SGD_RATE),
        contestants.with_curvature(never, workload, setup, _sp_ngd(None)),
        contestants.with_curvature(stale, workload, setup, _sp_ngd(threshold)),
    ]
    units = sharding.units_of(sharding.configured(setup.layers.preconditioned))
    seconds: dict[str, list[float]] = {name: [] for name in _NAMES}
    losses: dict[str, list[float]] = {name: [] for name in _NAMES}
    renewed: dict[str, list[renewals.Renewed]] = {never: [], stale: []}

    for turn in timing.turns(runners, fresh(workload, label_noise), steps):
        seconds[turn.name].append(turn.seconds)
        losses[turn.name].append(turn.loss)
        if turn.name in renewed:
            clocks = turn.state.opt_state[0].refresh
            renewed[turn.name].append(renewals.at_step(units, clocks, turn.index))
        if turn.name == stale and (turn.index + 1) % timing.STRETCHES == 0:
            reporting.tell(f"step {turn.index + 1} of {steps}")
    entries = []
    for runner in runners:
        name = runner.name
        result = reporting.entry(runner, seconds[name], losses[name])
        if name in renewed:
            result["renewed"] = [
                {field: x.tolist() for field, x in step._asdict().items()}
                for step in renewed[name]
            ]
            result["parts"] = {
                part: {
                    **timing.stretched_ratios(
                        seconds[name][start:], seconds[sgd][start:]
                    ),
                    "shares": renewals.shares(units, renewed[name][start:]),
                }
                for part, start in {"steady": steps // 2, "whole": 1}.items()
            }
        entries.append(result)
    return {
        "workload": workload.name,
        "description": workload.description,
        "steps": steps,
        "threshold": threshold,
        "label_noise": label_noise,
        "contestants": entries,
    }


def fresh(workload: Workload, label_noise: float) -> Callable[[int], Any]:
    """Batches by step.

    Args:
      workload: a classifier.
      label_noise: the share of labels that are exchanged for those of other examples.

    Returns:
      ``index -> batch``.
    """

    @jax.jit
    def batch(rng: jax.Array) -> dict[str, jax.Array]:
        sample_rng, which_rng, order_rng = jax.random.split(rng, 3)
        batch = workload.sample(sample_rng)
        labels = batch["targets"]
        wrong = jax.random.bernoulli(which_rng, label_noise, labels.shape)
        others = jax.random.permutation(order_rng, labels)
        return {**batch, "targets": jnp.where(wrong, others, labels)}

    return lambda index: batch(jax.random.fold_in(jax.random.key(2), index))


def table(record: dict[str, Any]) -> str:
    """The tables of a record.

    Args:
      record: what ``measure`` returned.

    Returns:
      Text of several lines.
    """
    sgd, *others = record["contestants"]
    half = sgd["seconds"][record["steps"] // 2 :]
    lines = [
        "",
        f"{record['workload']}: {record['description']}; a fresh batch at every step, "
        f"{record['steps']} steps, threshold {record['threshold']}, label noise "
        f"{record['label_noise']}",
        f"SGD: {1e3 * statistics.median(half):.1f} ms a step; in brackets smallest and "
        f"largest of {timing.STRETCHES} stretches",
    ]
    for part, title in _PARTS.items():
        figures = {runner["name"]: runner["parts"][part] for runner in others}
        rows = [("over SGD", "total / total", "median of steps")]
        rows += [
            (name, *(str(timing.Spread(**f[key])) for key in ("total", "paired")))
            for name, f in figures.items()
        ]
        kinds = list(next(iter(figures.values()))["shares"]["statistics"])
        renewed = [("renewed", *kinds)]
        renewed += [
            (f"{name}: {field}", *(f"{share[kind]:.1%}" for kind in kinds))
            for name, f in figures.items()
            for field, share in f["shares"].items()
        ]
        lines += ["", f"{part}, {title}", *reporting.aligned(rows)]
        lines += ["", *reporting.aligned(renewed)]
    return "\n".join([*lines, "", *reporting.costs(record["contestants"])])


def _sp_ngd(threshold: float | None) -> Any:
    return functools.partial(
        lbopt.sp_ngd,
        SP_NGD_RATE,
        momentum=contestants.MOMENTUM,
        damping=DAMPING,
        stale_threshold=threshold,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.arguments("stale_steps", __doc__)
    parser.add_argument("--workload", default="resnet20", choices=CLASSIFIERS)
    parser.add_argument("--batch-size", type=reporting.positive, default=128)
    parser.add_argument("--steps", type=_at_least_two, default=200)
    parser.add_argument(
        "--threshold", type=float, default=0.1, help="α of the adaptive refresh"
    )
    parser.add_argument(
        "--label-noise", type=_share, default=0.4, help="share of labels drawn anew"
    )
    return parser.parse_args(argv)


def _at_least_two(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{number} leaves no step but the first")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and 1")
    return number


if __name__ == "__main__":
    main()
