"""The benchmark of inversion in the background; whole, on narrow layers, if slow."""

import os

import pytest

from benchmarks import background


def test_the_table_compares_with_the_synchronous_run():
    def run(seconds, age, loss):
        return {"seconds": [seconds] * 4, "ages": [age] * 4, "losses": [9, 9, 9, loss]}

    runs = {
        "synchronous": [run(0.2, 1.5, 0.5), run(0.4, 1.5, 0.6)],
        "background": [run(0.1, 3.0, 0.7), run(0.1, 5.0, 0.8)],
    }
    text = background.table({"width": 16, "period": 3, "steps": 4, "runs": runs})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "synchronous 300 1.00 (1.00–1.00) 1.5 0.500, 0.600" in lines
    # A half and a quarter of the time of the same seeds.
    assert "background 100 0.38 (0.25–0.50) 4.0 0.700, 0.800" in lines
    assert "dense layers of 16, batch 256, inverses every 3 steps; 4 steps on" in text


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="cores are pinned, only on Linux"
)
def test_every_mode_trains(run_command):
    arguments = ["--steps", "8", "--period", "4"]
    record = run_command(background.main, *arguments, width=16, seeds=1)
    assert list(record["runs"]) == list(background.MODES)
    for [one] in record["runs"].values():
        assert len(one["seconds"]) == len(one["losses"]) == len(one["ages"]) == 8
        assert one["losses"][-1] < one["losses"][0]
    synchronous, beside, never = (runs[0]["ages"] for runs in record["runs"].values())
    assert max(synchronous) < record["period"]
    assert never == [5.0 + step for step in range(8)]
    assert min(beside) < max(never)  # new inverses came
