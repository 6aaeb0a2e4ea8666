"""The large-batch study: its rules, its search, its record, and it in miniature."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lbopt
from experiments import large_batch_study as study
from experiments import processor
from experiments.large_batch import (
    cells,
    contestants,
    curves,
    findings,
    noise_scale,
    problems,
)
from experiments.large_batch.cells import Cell, Outcome
from experiments.large_batch.contestants import CONTESTANTS, EVERYONE, VARIANTS
from experiments.large_batch.problems import PROBLEMS
from experiments.large_batch.runs import Run, Runner
from experiments.study import ROOT

# ------------------------------------------------------------------ problems


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=lambda p: p.name)
def test_budgets_are_as_stated(problem):
    assert len(problem.batch_sizes) >= 5
    assert problem.batch_sizes[-1] == problem.examples // 2
    for size in problem.batch_sizes:
        # The error is read at the end of the fixed budget and of the run.
        assert problem.steps_in_epochs(size) % problem.period(size) == 0
        assert problem.steps(size) % problem.period(size) == 0
        assert problem.steps(size) >= problem.least_steps


# ------------------------------------------------------------------ contestants


def test_settings_are_drawn_alike():
    for problem in PROBLEMS.values():
        for contestant in CONTESTANTS.values():
            drawn = contestant.draw(problem, cells.TRIALS)
            assert len(drawn) == cells.TRIALS
            assert len({tuple(x.values()) for x in drawn}) == cells.TRIALS
            positions = {}
            for name, ranges in (
                ("step_size", contestant.step_sizes),
                ("other", contestant.others),
            ):
                if ranges is None:
                    assert {x[name] for x in drawn} == {1.0}
                    continue
                low, high = ranges[problem.name]
                at = [math.log(x[name] / low, high / low) for x in drawn]
                assert np.allclose(sorted(at), (np.arange(8) + 0.5) / 8, atol=2e-3)
                positions[name] = at
            assert positions
            if contestant.step_sizes:  # two decades for everyone
                low, high = contestant.step_sizes[problem.name]
                assert high / low == pytest.approx(100)
            if len(positions) == 2:
                assert abs(np.corrcoef(*positions.values())[0, 1]) < 0.3
    assert sum(not c.curvature for c in CONTESTANTS.values()) == 6


def test_muon_sees_kernels_as_matrices():
    problem = PROBLEMS["digits"]
    tx = contestants._muon(0.1, 0.05, None, problem)
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 2, 4))},
        "norm": {"scale": jnp.ones(4)},
    }
    grads = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(0), x.shape), params
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    values = np.linalg.svd(updates["conv"]["kernel"].reshape(18, 4), compute_uv=False)
    # Newton-Schulz brings all singular values near one another.
    assert values[0] < 2 * values[-1]


# ------------------------------------------------------------------ the small problem


def small_task():
    x = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    y = x @ np.arange(18, dtype=np.float32).reshape(6, 3) / 10

    def loss_fn(params, model_state, batch, rng):
        del rng
        outputs = lbopt.likelihood(
            model.apply({"params": params}, batch["x"]), "normal"
        )
        return 0.5 * jnp.mean(jnp.sum((outputs - batch["y"]) ** 2, -1)), (
            model_state,
            {},
        )

    model = problems.Autoencoder((8, 4))

    def variables(key):
        return model.init(key, x[:1])["params"], {}

    y = np.concatenate([y, y], 1)  # as many outputs as inputs
    batch = {"x": x, "y": y}

    def error(params, model_state):
        return loss_fn(params, model_state, batch, None)[0]

    return problems.Task(variables, loss_fn, batch, error)


SMALL = dataclasses.replace(
    PROBLEMS["digits"],
    target=0.5,
    batch_sizes=(16, 32),
    examples=64,
    epochs=2,
    least_steps=6,
    readings=2,
    task=small_task,
)


def test_a_run_reads_its_error_and_repeats_itself():
    runner = Runner(SMALL, CONTESTANTS["kfac"], 32, small_task())
    settings = {"step_size": 0.1, "other": 0.1}
    seen = []
    run = runner.run(settings, 0, lambda step, error, state: seen.append(step))
    again = runner.run(settings, 0)
    other = runner.run(settings, 1)
    assert [step for step, _ in run.errors] == seen == [2, 4, 6]
    assert run.errors == again.errors != other.errors
    assert run.last_error() < run.errors[0][1]
    assert run.settings == settings


def test_a_run_is_that_of_the_optimizer_by_hand():
    task, settings = small_task(), {"step_size": 0.05, "other": 0.1}
    run = Runner(SMALL, CONTESTANTS["sgd"], 32, task).run(settings, 3)
    params, _ = task.variables(jax.random.key(3))

    def rate(count):
        return 0.05 * min(1.0, (count + 1) / contestants.WARM_UP)

    def loss(params, batch):
        return task.loss_fn(params, {}, batch, None)[0]

    order = np.random.default_rng(3)
    velocity = jax.tree.map(np.zeros_like, params)
    average, errors = None, []
    for step in range(6):
        if step % 2 == 0:
            shuffled = order.permutation(64)
        chosen = shuffled[32 * (step % 2) : 32 * (step % 2) + 32]
        batch = {k: v[chosen] for k, v in task.train.items()}
        g = jax.grad(loss)(params, batch)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, g)
        params = jax.tree.map(
            lambda p, v, g, step=step: p - rate(step) * (0.9 * v + g),
            params,
            velocity,
            g,
        )
        decay = min(contestants.AVERAGE, (1 + step) / (10 + step))
        average = params if average is None else average
        average = jax.tree.map(
            lambda a, p, d=decay: d * a + (1 - d) * p, average, params
        )
        errors.append(float(task.error(average, {})))
    np.testing.assert_allclose([e for _, e in run.errors], errors[1::2], rtol=2e-3)


def test_a_run_ends_with_its_target_and_its_budget():
    settings = {"step_size": 0.05, "other": 0.1}
    easy = dataclasses.replace(SMALL, target=1e3)
    run = Runner(easy, CONTESTANTS["sgd"], 32, small_task()).run(settings, 3)
    assert [step for step, _ in run.errors] == [2, 4]
    assert run.steps_to(easy.target) == 2
    hard = dataclasses.replace(SMALL, target=0.0)
    run = Runner(hard, CONTESTANTS["sgd"], 32, small_task()).run(settings, 3)
    assert [step for step, _ in run.errors] == [2, 4, 6]


WITH_CURVATURE = [name for name, line in CONTESTANTS.items() if line.curvature]


@pytest.mark.parametrize(
    "name",
    [
        name if name == "kfac" else pytest.param(name, marks=pytest.mark.slow)
        for name in WITH_CURVATURE
    ],
)
def test_curvature_is_used(name):
    """Every contestant with curvature learns, and not as without it."""
    runner = Runner(SMALL, CONTESTANTS[name], 32, small_task())
    drawn = CONTESTANTS[name].draw(PROBLEMS["digits"], 8)[3]
    run = runner.run(drawn, 0)
    assert run.last_error() < run.errors[0][1]
    other = runner.run(drawn | {"other": 10 * drawn["other"]}, 0)  # the damping
    assert run.errors != other.errors


def test_a_run_that_diverges_ends():
    run = Runner(SMALL, CONTESTANTS["sgd"], 32, small_task()).run(
        {"step_size": 1e30, "other": 0.1}, 0
    )
    assert run.steps_to(0.5) is None
    assert run.error_at(4) == math.inf
    assert len(run.errors) < 3


# ------------------------------------------------------------------ cells and findings


def run_of(errors, rate=0.1, seed=0):
    return Run({"step_size": rate, "other": 0.1}, seed, errors, 0.5)


def test_the_best_reaches_the_target_first_or_comes_closest():
    problem = dataclasses.replace(SMALL, target=0.5)
    fast = run_of([[2, 0.6], [4, 0.5], [6, 0.49]])
    slow = run_of([[2, 0.7], [4, 0.6], [6, 0.1]])
    never = run_of([[2, 0.9], [4, 0.8], [6, 0.7]])
    worse = run_of([[2, 0.9], [4, 0.9], [6, 0.9]])
    gone = run_of([])
    ranked = sorted(
        [gone, worse, never, slow, fast], key=lambda r: cells.order(r, problem)
    )
    assert ranked == [fast, slow, never, worse, gone]


def outcome_of(name, steps, size):
    problem = PROBLEMS["digits"]
    period = problem.period(size)
    readings = range(period, problem.steps(size) + 1, period)
    errors = [[s, 2.0 if s >= steps else 5.0] for s in readings]
    best = [run_of(errors, seed=seed) for seed in cells.SEEDS]
    return Cell("digits", name, size), Outcome(best[:1], best, "a processor")


def test_rows_tables_and_savings():
    size = 750
    known = dict(
        [
            outcome_of("sgd", 200, size),
            outcome_of("adamw", 100, size),
            outcome_of("kfac", 40, size),
            outcome_of("sp_ngd", 10_000, size),
        ]
    )
    rows = [findings.row_of(cell, outcome) for cell, outcome in known.items()]
    by_name = {row["optimizer"]: row for row in rows}
    assert by_name["kfac"]["steps"] == [40, 40, 40]
    assert by_name["kfac"]["epochs"] == [20.0] * 3
    assert by_name["kfac"]["seconds"] == [20.0] * 3
    assert by_name["kfac"]["error_at_budget"] == [2.0] * 3
    assert by_name["sp_ngd"]["steps"] == [None] * 3
    saved = {
        "problem": "digits",
        "batch_size": size,
        "first_order": "adamw",
        "second_order": "kfac",
        "steps": [100.0, 40.0],
        "saved": 0.6,
    }
    assert findings.savings(rows) == [saved]  # where both kinds are known
    assert (
        "| digits | 750 | AdamW, 100 | K-FAC, 40 | 60 % |"
        in findings.table_of_savings([saved])
    )
    table = findings.table(rows, PROBLEMS["digits"])
    assert "| K-FAC |  |  |  |  | 40, 20.0 s |" in table
    assert "| SP-NGD |  |  |  |  | – |" in table
    figure = findings.draw(rows, {"digits": [[4, 100.0], [8, 300.0]]})
    steps, errors = figure.axes
    assert steps.get_ylabel() == "steps to training loss (nats) 3"
    assert errors.get_xlabel() == "batch size"
    lines = {line.get_label(): line.get_xydata().tolist() for line in steps.lines}
    assert lines["K-FAC"] == [[750, 40]]
    assert lines["SP-NGD"] == []


def test_variants_stand_beside_kfac():
    rows, variants = (
        [findings.row_of(*outcome_of(name, steps, 750))]
        for name, steps in (("kfac", 40), ("kfac_data_labels", 56))
    )
    lines = findings.table_of_variants(rows, variants).splitlines()
    assert "| K-FAC |  | 40, 20.0 s |" in lines
    assert "| labels of the data |  | 56, 28.0 s |" in lines
    assert not any("Muon" in line for line in lines)


def test_variants_are_kfac_with_what_they_say_changed(monkeypatch):
    made = []
    monkeypatch.setattr(lbopt, "kfac", lambda *args, **kwargs: made.append(kwargs))
    kfac = CONTESTANTS["kfac"]
    for contestant in (kfac, *VARIANTS.values()):
        contestant.make(0.1, 0.2, None, PROBLEMS["digits"])
        assert (contestant.step_sizes, contestant.others) == (
            kfac.step_sizes,
            kfac.others,
        )
    as_it_is, *changed = made
    changes = [kwargs.items() - as_it_is.items() for kwargs in changed]
    assert dict(zip(VARIANTS, changes, strict=True)) == {
        "kfac_stale_inverses": {("periods", lbopt.Periods(inverses=5))},
        "kfac_stale_statistics": {("periods", lbopt.Periods(5, 5))},
        "kfac_one_batch": {("factor_decay", 0.0)},
        "kfac_data_labels": set(),
        "kfac_no_momentum": {("momentum", None)},
        "kfac_short_memory": {("momentum", 0.7), ("factor_decay", 0.8)},
    }
    fishers = {name: variant.fisher for name, variant in VARIANTS.items()}
    assert fishers.pop("kfac_data_labels") == "empirical"
    assert set(fishers.values()) == {kfac.fisher} == {"sampled"}


def test_curves_are_drawn_by_training_loss():
    curve = [[1, 2.0, 0.9], [2, 1.0, 0.5]]
    figure = curves.draw(
        {"muon": curve, "kfac": curve}, {"640": curve}, PROBLEMS["strokes"]
    )
    losses, errors, momenta = figure.axes
    assert losses.get_xlabel() == "steps of 2,560 examples"
    assert errors.get_ylabel() == "test error"
    assert [line.get_xydata().tolist() for line in losses.lines] == [
        [[1, 2.0], [2, 1.0]]
    ] * 2
    assert errors.lines[0].get_xydata().tolist() == [[2.0, 0.9], [1.0, 0.5]]
    (momentum,) = momenta.lines
    assert momentum.get_label() == "batch 640"
    assert momentum.get_xydata().tolist() == [[1, 0.9], [2, 0.5]]


def test_a_repetition_is_compared_with_the_spread():
    size = 750
    period = PROBLEMS["digits"].period(size)
    row = findings.row_of(*outcome_of("kfac", 40, size)) | {"steps": [40, 48, 44]}
    assert findings.spread(row) == (40 - period, 48 + period)
    near = row | {"steps": [48, 52, 52]}
    far = row | {"steps": [48, 52, 60]}
    gone = row | {"steps": [40, 44, None]}
    assert "the mean is within the spread, 36 to 52" in findings.compare(row, near)
    assert "NOT within" in findings.compare(row, far)
    assert "NOT within" in findings.compare(row, gone)
    assert findings.spread(gone) is None
    assert findings.compare(gone, gone).endswith("reach the target: yes")
    assert findings.compare(gone, row).endswith("reach the target: no")


def test_cells_are_kept_whole_and_found_by_name(tmp_path):
    cell, outcome = outcome_of("kfac", 40, 750)
    assert cells.kept(cell, tmp_path / "new") is None
    cells.keep(cell, outcome, tmp_path / "new")
    assert cells.kept(cell, tmp_path / "new") == outcome
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["digits-kfac-750.json"]
    assert cells.parse(str(cell)) == cell == cells.parse("digits/kfac/750")
    with pytest.raises(ValueError, match=r"cell='digits/kfac/7' must be PROBLEM/"):
        cells.parse("digits/kfac/7")
    count = sum(len(p.batch_sizes) for p in PROBLEMS.values()) * len(CONTESTANTS)
    count += len(PROBLEMS) * len(VARIANTS)  # at the largest batch alone
    assert cells.parse("digits/kfac_no_momentum/750") == (
        "digits",
        "kfac_no_momentum",
        750,
    )
    with pytest.raises(ValueError, match=r"at the largest also \['kfac_stale_inverses"):
        cells.parse("digits/kfac_no_momentum/50")
    assert len(set(cells.all_cells())) == count


# ------------------------------------------------------------------ noise scale


def test_the_noise_scale_of_noise_that_is_known():
    """Gradients w − x of mean w and of noise of variance σ² in each of d directions."""
    d, sigma, w = 50, 3.0, 0.5

    def gradient(batch):
        return jnp.full(d, w) - batch["x"].mean(0)

    noise, signal = 0.0, 0.0
    for seed in range(40):
        x = sigma * jax.random.normal(jax.random.key(seed), (400, d))
        found = noise_scale.simple_noise_scale(gradient, {"x": x}, parts=8)
        noise, signal = noise + float(found[0]), signal + float(found[1])
    assert noise / 40 == pytest.approx(d * sigma**2, rel=0.05)
    assert signal / 40 == pytest.approx(d * w**2, rel=0.1)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_batch_that_cannot_be_cut_is_refused(parts):
    with pytest.raises(ValueError, match=rf"parts={parts} must be at least 2 and div"):
        noise_scale.simple_noise_scale(lambda b: b, jnp.ones(64), parts)


# ------------------------------------------------------------------ the study


@pytest.mark.slow
def test_the_study_in_miniature(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "CELLS", tmp_path / "cells")
    monkeypatch.setattr(study, "RESULTS", tmp_path / "record.json")
    monkeypatch.setattr(study, "FIGURE", tmp_path / "figure.png")
    monkeypatch.setattr(study, "CURVES_FIGURE", tmp_path / "curves.png")
    monkeypatch.setattr(study, "CURVES_PROBLEM", "digits")
    monkeypatch.setattr(study, "LOSSES_OF", ("sgd", "kfac", "muon"))
    monkeypatch.setattr(study, "LENGTHS_AT", (16, 32))
    monkeypatch.setattr(study, "task_of", lambda name: small_task())
    monkeypatch.setattr(cells, "TRIALS", 2)
    small = {"digits": SMALL}
    for module in (study, cells, findings):
        monkeypatch.setattr(module, "PROBLEMS", small)
    ran = ("sgd", "kfac", "kfac_quadratic", "kfac_no_momentum")
    for name in ran:
        assert study.run_cell(Cell("digits", name, 32), deadline=0) is None
        assert study.run_cell(Cell("digits", name, 32), math.inf) > 0
    study.main(["--processes", "1", "--minutes", "-1"])  # too late for the others
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "record.json").read_text())
    assert [row["optimizer"] for row in record["rows"]] == list(ran[:3])
    assert [row["optimizer"] for row in record["variants"]] == ["kfac_no_momentum"]
    assert len(record["missing"]) == 2 * len(CONTESTANTS) + len(VARIANTS) - 4
    assert list(record["losses"]) == ["sgd", "kfac"]  # Muon's cell is not run
    best = cells.kept(Cell("digits", "kfac", 32), tmp_path / "cells").best[0]
    for (step, loss, error), kept in zip(
        record["losses"]["kfac"], best.errors, strict=True
    ):
        assert [step, error] == kept
        assert 0 < loss < math.inf
    (lengths,) = record["lengths"].values()
    assert [step for step, _, _ in lengths] == [step for step, _ in best.errors]
    assert all(alpha > 0 for _, alpha, _ in lengths)
    assert record["budget"]["trials"] == 2
    assert record["processors"] == [processor.name()]
    assert record["noise_scale"]["digits"]
    assert (tmp_path / "figure.png").exists()
    assert (tmp_path / "curves.png").exists()
    assert "2 settings and 3 seeds of each" in out
    # What was read of a run is kept as long as its settings are the best.
    mark = [[2, 1.0]]
    for along, noise in (
        (record["read_along"], {"digits": mark}),
        ({}, record["noise_scale"]),
    ):
        changed = record | {"read_along": along, "noise_scale": {"digits": mark}}
        study.RESULTS.write_text(json.dumps(changed))
        assert study.write_record()["noise_scale"] == noise
    study.main(["--again", "digits/sgd/32"])
    before, again, verdict = capsys.readouterr().out.splitlines()[-3:]
    assert verdict.endswith("as many seeds reach the target: yes")
    assert (
        before.removeprefix("record ").split("'seconds'")[0]
        == (again.removeprefix("again ").split("'seconds'")[0])
    )
    with pytest.raises(SystemExit, match=r"^error: cell='x' must be PROBLEM"):
        study.main(["--again", "x"])


# ------------------------------------------------------------------ what is committed

KNOWN = study.known_cells()


def test_the_record_is_of_the_cells_and_the_pages_are_of_the_record():
    record = json.loads(study.RESULTS.read_text("utf-8"))
    rows = [findings.row_of(*x) for x in KNOWN.items()]
    for kind, who in (("rows", CONTESTANTS), ("variants", VARIANTS)):
        assert record[kind] == [row for row in rows if row["optimizer"] in who]
    assert record["savings"] == findings.savings(record["rows"])
    everything = {str(cell) for cell in cells.all_cells()}
    assert set(record["missing"]) == everything - {str(cell) for cell in KNOWN}
    page = (ROOT / "experiments" / "README.md").read_text("utf-8")
    for problem in PROBLEMS.values():
        assert findings.table(record["rows"], problem) in page
        assert record["noise_scale"][problem.name]
    assert findings.table_of_savings(record["savings"]) in page
    assert findings.table_of_variants(record["rows"], record["variants"]) in page
    assert record["read_along"] == study.read_along(KNOWN)
    for cell in study.losses_cells():  # the same runs, which went on there
        errors = [[step, error] for step, _, error in record["losses"][cell.contestant]]
        best = KNOWN[cell].best[0].errors
        assert errors[: len(best)] == best
    assert tuple(record["lengths"]) == tuple(map(str, study.LENGTHS_AT))
    front = (ROOT / "README.md").read_text("utf-8")
    assert findings.table_of_largest(record["rows"]) in front
    assert record["command"] in page
    assert record["date"] in page


@pytest.mark.parametrize("cell", KNOWN, ids=str)
def test_a_cell_is_of_the_settings_that_are_drawn_now(cell):
    problem, outcome = PROBLEMS[cell.problem], KNOWN[cell]
    drawn = EVERYONE[cell.contestant].draw(problem, cells.TRIALS)
    assert [run.settings for run in outcome.tried] == drawn
    assert [run.seed for run in outcome.best] == list(cells.SEEDS)
    first = min(outcome.tried, key=lambda run: cells.order(run, problem))
    assert outcome.best[0] == first
    budget = problem.steps_in_epochs(cell.batch_size)
    for run in outcome.best:
        if (steps := run.steps_to(problem.target)) is not None:
            assert run.errors[-1][0] == max(steps, budget)
