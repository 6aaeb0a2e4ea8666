"""K-FAC with three factors for a wide dense layer, beside its full factor, and SGD.

    python -m experiments.archive.doubly_factored_study

`convnet_wide` on `strokes/20_small`, whose hidden layer reads a map of 16 locations ×
64 channels. Of all its inputs a factor has 1,025 rows, which can be inverted still; in
its place the doubly factored block has one of 16 rows and one of 64. K-FAC with either
gets the same four settings, SGD with Nesterov momentum four rates, all with constant
rates and seed 0. The setting of each with the lowest training loss at the end is
repeated with three more seeds, which alone are compared and drawn. Training losses are
means over the last 2,048 images. Contestants take turns at every step, so that their
times can be compared.

K-FAC's statistics are taken at every step, from labels drawn from the model, and its
inverses at every fifth. What is finished is kept in `runs/doubly_factored_study` and
not repeated. Writes `experiments/results/doubly_factored_study.json` and
`docs/figures/doubly_factored.png`; about 7 minutes on 2 cores.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import matplotlib.figure
import numpy as np
import optax

from experiments import figures
from experiments.archive.kfac_batch_study import (
    AVERAGED_IMAGES,
    KFAC_GRID,
    SGD_GRID,
    averaged,
    constant_rates,
    last_loss,
    row_of,
)
from experiments.classifier import build_program, open_data
from experiments.settings import Config
from experiments.side_by_side import Outcome, outcomes_in

BATCH_SIZE = 512
UPDATES = 80
SEEDS = (1, 2, 3)
"""Of the comparison; settings are chosen with seed 0."""

SGD, FULL, THREE = "SGD", "full factor", "three factors"
CURVATURES = {FULL: None, THREE: 512}
"""Beyond how many rows an input factor gives way to two."""
LABELS = {SGD: "SGD", FULL: "K-FAC, full factor", THREE: "K-FAC, three factors"}

RUNS = pathlib.Path("runs/doubly_factored_study")
ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "doubly_factored_study.json"
FIGURE = ROOT / "docs" / "figures" / "doubly_factored.png"


# === Contestants ======================================================================


def configure(seed: int) -> Config:
    """A run of the comparison, but for its optimizer."""
    return constant_rates(BATCH_SIZE, UPDATES, model="convnet_wide", seed=seed)


def contestants(seed: int) -> dict[str, Config]:
    """Every setting of all three, by a name that begins with whose it is."""
    base = configure(seed)
    named = {
        f"{SGD} rate {sgd.learning_rate:g}": dataclasses.replace(
            base, optimizer="sgd", sgd=sgd
        )
        for sgd in SGD_GRID
    }
    for kind, rows in CURVATURES.items():
        for kfac in KFAC_GRID:
            name = f"{kind} rate {kfac.learning_rate:g} damping {kfac.damping:g}"
            named[name] = dataclasses.replace(base, kfac=kfac, doubly_factored=rows)
    return named


def chosen(tried: Mapping[str, Outcome]) -> dict[str, str]:
    """The setting of each with the lowest training loss at the end."""

    def loss(name: str) -> float:
        return last_loss(tried[name], BATCH_SIZE)

    return {
        kind: min((name for name in tried if name.startswith(kind)), key=loss)
        for kind in (SGD, *CURVATURES)
    }


# === The record =======================================================================


def rows_of(
    outcomes: Mapping[str, Outcome], names: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Lines of the record, with the updates and the seconds to SGD's last loss.

    Args:
        outcomes: What was done on the same batches, by setting.
        names: The setting chosen of each, SGD's among them.

    Returns:
        A line for each outcome.
    """
    target = last_loss(outcomes[names[SGD]], BATCH_SIZE)
    return [row_of(name, x, BATCH_SIZE, target) for name, x in outcomes.items()]


def curvature_of(config: Config) -> dict[str, Any]:
    """Rows of each layer's factors, and bytes of all factors and inverses."""
    with contextlib.redirect_stdout(io.StringIO()):
        program = build_program(config, open_data(config))
    state = jax.eval_shape(program.init).opt_state
    factors, inverses = (optax.tree.get(state, x) for x in ("factors", "inverses"))
    return {
        "rows": {
            path: {
                name: inverse.shape[-1]
                for name, inverse in zip(layer._fields, inverses[path], strict=True)
            }
            for path, layer in factors.items()
        },
        "bytes": sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves((factors, inverses))
        ),
    }


# === The picture ======================================================================


def draw(by_seed: Mapping[str, list[Outcome]]) -> matplotlib.figure.Figure:
    """Draws training losses against updates: the mean of the seeds, and each, thin."""
    figure = matplotlib.figure.Figure(figsize=(5.4, 3.6), layout="constrained", dpi=160)
    panel = figure.subplots()
    for index, (kind, outcomes) in enumerate(by_seed.items()):
        losses = np.array([averaged(outcome, BATCH_SIZE) for outcome in outcomes])
        first = AVERAGED_IMAGES // BATCH_SIZE
        updates = range(first, first + losses.shape[1])
        mean = losses.mean(axis=0).tolist()
        figures.plot(panel, index, updates, mean, LABELS[kind], marked=False)
        colour = panel.lines[-1].get_color()
        panel.plot(updates, losses.T, color=colour, linewidth=0.6, alpha=0.5)
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("updates")
    panel.set_ylabel(f"training loss (nats), last {AVERAGED_IMAGES:,} images")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    panel.set_title(f"Mean of {len(SEEDS)} seeds; thin: each seed", fontsize=9)
    return figure


# === The study ========================================================================


def study() -> dict[str, Any]:
    """Carries out what is left of the study; writes its record and its picture."""
    tuned = contestants(seed=0)
    tried = outcomes_in(RUNS / "seed0.json", tuned)
    names = chosen(tried)
    by_seed = {
        seed: outcomes_in(
            RUNS / f"seed{seed}.json",
            {name: contestants(seed)[name] for name in names.values()},
        )
        for seed in SEEDS
    }
    record = {
        "command": "python -m experiments.doubly_factored_study",
        "updates": UPDATES,
        "curvature": {kind: curvature_of(tuned[names[kind]]) for kind in CURVATURES},
        "tried": rows_of(tried, names),
        "compared": [
            {"seed": seed} | row
            for seed, outcomes in by_seed.items()
            for row in rows_of(outcomes, names)
        ],
    }
    curves = {
        kind: [outcomes[name] for outcomes in by_seed.values()]
        for kind, name in names.items()
    }
    for path in (RESULTS, FIGURE):
        path.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(curves).savefig(FIGURE)
    return record


def main() -> None:
    """Runs the study and prints its record."""
    # Seeds share their programs.
    jax.config.update("jax_compilation_cache_dir", str(RUNS.resolve() / "compiled"))
    print(json.dumps(study(), indent=1))


if __name__ == "__main__":
    main()
