"""Two thousand steps: memory stays flat, nothing compiles again, all is finite."""

import dataclasses
import gc

import jax
import numpy as np
import pytest

from experiments import imagenet_resnet50, loop, metrics

STEPS, PERIOD, IMAGES = 2_000, 50, 10_240
BATCH = 128


@pytest.mark.slow
def test_two_thousand_steps_of_the_demo(tmp_path, capsys):
    """SP-NGD as in `make demo`, with small batches and a checkpoint every 50 steps."""
    epochs = STEPS * BATCH / IMAGES
    config = dataclasses.replace(
        imagenet_resnet50.DEMO,
        optimizer="sp_ngd",
        batch_size=BATCH,
        epochs=epochs,
        eval_epochs=epochs / 10,
        checkpoint_epochs=epochs * PERIOD / STEPS,
        directory=tmp_path / "run",
    )
    compiled, at_step, held = [], [], []

    def reached(step):
        at_step.append(len(compiled))
        if step % PERIOD == PERIOD // 2:  # between two checkpoints
            gc.collect()
            arrays = sum(x.nbytes for x in jax.live_arrays())
            held.append((step, arrays, len(gc.get_objects())))

    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *arguments, **named: (
            compiled.append(event) if "backend_compile" in event else None
        )
    )
    run = loop.prepare(config)
    accuracy = loop.train(run, reached=reached)
    assert len(at_step) == STEPS
    # After the first evaluation and the first checkpoints there is nothing left.
    assert at_step[-1] == at_step[STEPS // 10 + 2 * PERIOD]

    records = metrics.read_json_lines(tmp_path / "run" / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train] == list(range(1, STEPS + 1))
    for record in records:
        numbers = [x for x in record.values() if not isinstance(x, str)]
        assert all(x is not None and np.isfinite(x) for x in numbers), record
    assert train[-1]["skipped"] == 0

    # What the program itself holds on to does not grow at all.
    steps, arrays, objects = np.transpose([x for x in held if x[0] > STEPS // 4])
    assert len(set(arrays)) == 1
    assert np.polyfit(steps, objects, 1)[0] * STEPS < 0.01 * objects.mean()
    steps, memory = np.transpose(
        [(r["step"], r["host_memory_bytes"]) for r in train if r["step"] > STEPS // 4]
    )
    slope = np.polyfit(steps, memory, 1)[0]  # bytes a step
    growth = slope * len(steps) / memory.mean()
    with capsys.disabled():
        print(
            f"\n{STEPS} steps: accuracy {accuracy:.1%}, {arrays[0] / 1e6:.1f} MB of "
            f"arrays, {objects[0]:,} to {objects[-1]:,} objects; the process has "
            f"{memory.mean() / 1e6:.0f} MB, {slope / 1e3:+.1f} kB a step; "
            f"{at_step[-1]} programs compiled"
        )
    assert growth < 0.02
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert str(STEPS) in [path.name for path in newest]
    assert len(newest) <= config.keep_checkpoints + 1
