"""Real processes of the real command, on few small images; and how runs end."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import checkpoints, metrics

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = "experiments/imagenet_resnet50.py"
TIMEOUT = 600.0  # seconds for any one of them, on a busy machine
# Eight steps an epoch, a checkpoint every two steps.
SETTINGS = {
    "dataset": "strokes/tiny",
    "model": "convnet",
    "recipe.image-size": 8,
    "batch-size": 32,
    "devices": 1,
    "optimizer": "kfac",
    "eval-batch-size": 100,
    "eval-epochs": 3,
    "checkpoint-epochs": 0.25,
}
ALL_AT_ONCE = {
    "optimizer": "sp_ngd",
    "devices": 2,
    "micro-batch-size": 8,
    "placement": "memory",
    "mixup-alpha": 0.4,
}
"""Whatever a state may hold: shares, buffers, refresh times, and a virtual batch."""


class Place:
    """Where the runs of a test are, and how they are started."""

    def __init__(self, root, epochs, **settings):
        self.root, self.settings = root, {"epochs": epochs, **settings}

    def start(self, name, process=0, processes=1, port=0, **settings):
        """The command, which begins the run or goes on with it.

        Devices are virtual; several processes have each its share of them.
        """
        values = SETTINGS | {
            "data-dir": self.root / "data",
            "directory": self.root / name,
        }
        settings = self.settings | settings
        values |= {key.replace("_", "-"): value for key, value in settings.items()}
        flags = [part for key, x in values.items() for part in (f"--{key}", str(x))]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            # Starting again is what these tests do most.
            "JAX_COMPILATION_CACHE_DIR": str(self.root / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(process),
                "JAX_NUM_CPU_DEVICES": str(values["devices"] // processes),
            }
        with (self.root / f"{name}.log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, SCRIPT, *flags, "--resume"],
                cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def start_several(self, name, processes, **settings):
        """The command on several processes of this machine."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return [
            self.start(name, process, processes, port, **settings)
            for process in range(processes)
        ]

    def finish(self, name, processes=1, **settings):
        """Carries the run on until it ends by itself."""
        if processes == 1:
            running = [self.start(name, **settings)]
        else:
            running = self.start_several(name, processes, **settings)
        self.expect({0}, name, running)

    def expect(self, codes, name, running, timeout=TIMEOUT):
        """Waits until processes end with one of some codes, and leaves none behind."""
        try:
            for process in running:
                assert process.wait(timeout) in codes, self.log(name)
        finally:
            for process in running:
                process.kill()

    def log(self, name):
        return (self.root / f"{name}.log").read_text()[-4000:]

    def records(self, name, *kinds):
        """What the run has left of records."""
        path = self.root / name / "metrics.jsonl"
        records = metrics.read_json_lines(path) if path.exists() else []
        return [r for r in records if r["kind"] in kinds]

    def steps(self, name):
        """Steps that were recorded."""
        return [r["step"] for r in self.records(name, "train")]

    def times(self, name):
        """The same with the time; a step that is done again has another."""
        return {(r["step"], r["seconds"]) for r in self.records(name, "train")}

    def losses(self, name):
        """What must not depend on interruptions."""
        return [
            {key: r[key] for key in ("kind", "step", "loss", "accuracy")}
            for r in self.records(name, "train", "test")
        ]

    def state(self, name):
        """The arrays of the last checkpoint."""
        last = max(
            (self.root / name / "checkpoints").iterdir(), key=lambda p: int(p.name)
        )
        return arrays(ocp.StandardCheckpointer().restore(last / "state"))


def until(condition, process, log):
    """Waits for a condition, as long as the process runs."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, log()
        assert process.poll() is None, log()
        time.sleep(0.001)


def arrays(state):
    """The arrays of a state; of keys their data."""
    return [
        np.asarray(jax.random.key_data(x) if is_key(x) else x)
        for x in jax.tree.leaves(state)
    ]


def is_key(x):
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def assert_same_end(one, other, like, step):
    """Two runs have the same records, but for their times, and the same end."""
    records, ends = [], []
    for directory in (one, other):
        found = metrics.read_json_lines(directory / "metrics.jsonl")
        timed = [k for r in found for k in r if re.search("second|memory", k)]
        records.append(
            [r | dict.fromkeys(timed) for r in found if r["kind"] != "event"]
        )
        with checkpoints.Checkpoints(directory / "checkpoints") as store:
            ends.append(store.restore_latest(lambda place: like))
    assert records[0] == records[1]
    assert records[0][-1]["step"] == ends[0].step == ends[1].step == step
    assert ends[0].place == ends[1].place
    assert ends[0].place.batches_taken == step
    for a, b in zip(*(arrays(end.state) for end in ends), strict=True):
        np.testing.assert_array_equal(a, b)
