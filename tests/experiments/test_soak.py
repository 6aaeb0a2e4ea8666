"""Two thousand steps: memory stays flat, nothing compiles again, all is finite."""

import json
import os
import sys

import numpy as np
import pytest

from experiments import imagenet_resnet50, metrics
from tests.experiments.soak_worker import PERIOD, STEPS
from tests.test_processes import run_together


@pytest.mark.slow
def test_two_thousand_steps_of_the_demo(tmp_path, capsys):
    worker = [sys.executable, "-m", "tests.experiments.soak_worker", str(tmp_path)]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    run_together([worker], tmp_path, timeout=3600, env=env | {"JAX_PLATFORMS": "cpu"})
    seen = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    compiled = seen["compiled"]
    assert len(compiled) == STEPS
    # After the first evaluation and the first checkpoints there is nothing left.
    assert compiled[-1] == compiled[STEPS // 10 + 2 * PERIOD]

    records = metrics.read_json_lines(tmp_path / "run" / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train] == list(range(1, STEPS + 1))
    for record in records:
        numbers = [x for x in record.values() if not isinstance(x, str)]
        assert all(x is not None and np.isfinite(x) for x in numbers), record
    assert train[-1]["skipped"] == 0

    # What the program itself holds on to does not grow at all.
    held = [reading for reading in seen["held"] if reading[0] > STEPS // 4]
    steps, arrays, objects = np.transpose(held)
    assert len(set(arrays)) == 1
    assert np.polyfit(steps, objects, 1)[0] * STEPS < 0.01 * objects.mean()
    steps, memory = np.transpose(
        [(r["step"], r["host_memory_bytes"]) for r in train if r["step"] > STEPS // 4]
    )
    slope = np.polyfit(steps, memory, 1)[0]  # bytes a step
    growth = slope * len(steps) / memory.mean()
    with capsys.disabled():
        print(
            f"\n{STEPS} steps: accuracy {seen['accuracy']:.1%}, {arrays[0] / 1e6:.1f} "
            f"MB of arrays, {objects[0]:,} to {objects[-1]:,} objects; the process has "
            f"{memory.mean() / 1e6:.0f} MB, {slope / 1e3:+.1f} kB a step, "
            f"{growth:+.2%} in all; {compiled[-1]} programs compiled"
        )
    assert growth < 0.02
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert str(STEPS) in [path.name for path in newest]
    assert len(newest) <= imagenet_resnet50.DEMO.keep_checkpoints + 1
