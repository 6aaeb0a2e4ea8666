"""The parts that all benchmarks share: command line, tables, races and workloads."""

import math
import os
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks import contestants, harness, timing, workloads


def test_a_number_below_one_is_refused_at_once(capsys):
    parser = harness.parser("x", "One line.\nMore.", batch_size=(8, "examples"))
    assert parser.description == "One line."
    assert vars(parser.parse_args([])) == {"output": None, "batch_size": 8}
    assert parser.parse_args(["--batch-size", "3"]).batch_size == 3
    with pytest.raises(SystemExit):
        parser.parse_args(["--batch-size", "0"])
    assert "--batch-size: 0 is not at least 1" in capsys.readouterr().err


def test_a_command_passes_its_options_and_sizes_on(run_command, capsys):
    main = harness.command(
        "some",
        None,
        lambda steps, **sizes: {"steps": steps, **sizes},
        lambda record: f"{record['steps']} of {record['width']}",
        {"rate": 0.5},
        steps=(7, "steps"),
    )
    record = run_command(main, "--steps", "2", width=5)
    assert (record["steps"], record["width"]) == (2, 5)
    assert record["settings"] == {"rate": 0.5}
    assert record["versions"]["jax"] == jax.__version__
    assert record["command"].startswith("python -m benchmarks.some --steps 2 --output")
    assert "2 of 5" in capsys.readouterr().out


def test_a_new_process_returns_what_the_function_does():
    pid = harness.in_new_process(os.getpid)
    assert pid != os.getpid()
    assert harness.in_new_process(math.hypot, 3, 4) == 5


def test_a_page_joins_lines_and_aligned_tables():
    page = harness.page("a title", [("", "x"), ("name", "10")])
    assert page == "\na title\n       x\nname  10\n"


def test_costs_say_whether_training_works():
    base = {"name": "x", "setup_seconds": 0.0, "compile_seconds": 2.0}
    base |= {"state_bytes": 10**6, "temporary_bytes": 0}
    courses = ([2.0, 1.0], [1.0, 2.0], [2.0, math.nan, 1.0])
    rows = timing.costs([base | {"losses": losses} for losses in courses])[1:]
    assert rows[0] == ("x", "0.0", "2.0 (1.0×)", "1.0", "0.0", "2.000 → 1.000")
    assert rows[1][-1].endswith("NOT FALLING")
    assert rows[2][-1].endswith("NOT FINITE")


def test_everybody_gets_the_same_batches_in_changing_order():
    seen, watched = [], []

    def step(state, batch, index):
        seen.append((state, batch, index))
        return state, jnp.asarray(batch)

    runners = [
        contestants.Contestant(name, step, name, 0.0, 1.0, 0, 0) for name in "ab"
    ]
    entries = timing.race(
        runners,
        lambda index: 10.0 * index,
        2,
        warm_up=1,
        watch=lambda *args: watched.append(args),
    )
    assert seen == [
        *(("a", 0.0, 0), ("b", 0.0, 0)),
        *(("b", 10.0, 1), ("a", 10.0, 1)),
        *(("a", 20.0, 2), ("b", 20.0, 2)),
    ]
    assert watched == [(name, index, name) for name, _, index in seen]
    for entry in entries:
        assert entry["losses"] == [0.0, 10.0, 20.0]
        assert len(entry["seconds"]) == 2
    rounds = timing.race(runners, lambda index: 0.0, 4, warm_up=2, cycle=2)
    assert [len(row) for row in rounds[0]["seconds"]] == [2, 2]


def test_ratios_of_given_times():
    # Every tenth step is ten times as long, on a machine that slows down.
    base = [1.0] * 50 + [3.0] * 50
    own = [2 * b * (10 if i % 10 == 0 else 1) for i, b in enumerate(base)]
    ratios = timing.stretched_ratios(own, base)
    assert ratios["total"] == {"median": 3.8, "low": 3.8, "high": 3.8}
    assert ratios["paired"] == {"median": 2, "low": 2, "high": 2}
    own[:10] = [5.0] * 10
    ratios = timing.stretched_ratios(own, base)
    assert ratios["total"] == {"median": 3.86, "low": 3.8, "high": 5}
    assert ratios["paired"] == {"median": 2, "low": 2, "high": 5}
    few = timing.stretched_ratios([4.0, 9.0], [2.0, 3.0])
    assert few["paired"] == {"median": 2.5, "low": 2, "high": 3}
    assert timing.stretched_rows({"x": few})[1] == (
        "x",
        "2.60 (2.00–3.00)",
        "2.50 (2.00–3.00)",
    )


@pytest.mark.parametrize(
    "workload",
    [workloads.tiny(16), workloads.autoencoder(sizes=(12, 6, 3), batch_size=5)],
    ids=lambda workload: workload.name,
)
def test_samples_are_like_the_batch_and_recur_with_the_key(workload):
    one, other, again = (workload.sample(jax.random.key(i)) for i in (7, 8, 7))
    shapes = jax.tree.map(jnp.shape, workload.batch)
    assert jax.tree.map(jnp.shape, one) == shapes
    assert not jnp.array_equal(one["inputs"], other["inputs"])
    assert jax.tree.all(jax.tree.map(jnp.array_equal, one, again))


def test_the_autoencoder_is_mirrored():
    workload = workloads.autoencoder(sizes=(12, 6, 3), batch_size=5)
    shapes = [layer["kernel"].shape for layer in workload.params.values()]
    assert shapes == [(12, 6), (6, 3), (3, 6), (6, 12)]
    assert re.fullmatch("MLP 12-6-3 mirrored, batch 5", workload.description)
