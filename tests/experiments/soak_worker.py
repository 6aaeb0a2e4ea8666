"""A long run of the demo in a process of its own; test_soak.py starts it."""

import dataclasses
import gc
import json
import pathlib
import sys

import jax

from experiments import imagenet_resnet50, loop, memory_use

STEPS, PERIOD, IMAGES = 2_000, 50, 10_240
BATCH = 128


def main(folder: pathlib.Path) -> None:
    """SP-NGD as in `make demo`, with small batches and a checkpoint every 50 steps."""
    memory_use.share_arenas()
    jax.config.update("jax_num_cpu_devices", imagenet_resnet50.DEMO.devices)
    epochs = STEPS * BATCH / IMAGES
    config = dataclasses.replace(
        imagenet_resnet50.DEMO,
        optimizer="sp_ngd",
        batch_size=BATCH,
        epochs=epochs,
        eval_epochs=epochs / 10,
        checkpoint_epochs=epochs * PERIOD / STEPS,
        directory=folder / "run",
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
    accuracy = loop.train(loop.prepare(config), reached=reached)
    seen = {"accuracy": accuracy, "compiled": at_step, "held": held}
    (folder / "seen.json").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
