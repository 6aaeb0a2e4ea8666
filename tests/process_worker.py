"""One process of a training run; ``test_processes.py`` starts several."""

import argparse
import faulthandler
import functools
import os
import signal
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import lbopt
from lbopt import sharding, training
from tests.problems import CLASSES, cross_entropy

AXIS, DEVICES, BATCH, STEPS = "data", 4, 32, 6
RUNS = {
    "SP-NGD, comm": (lbopt.sp_ngd, "comm", {"stale_threshold": 0.5}),
    "SP-NGD, memory": (lbopt.sp_ngd, "memory", {"stale_threshold": 0.5}),
    "K-FAC": (lbopt.kfac, 0.5, {"periods": lbopt.Periods(inverses=2, stagger=True)}),
}


class Net(nn.Module):
    """A convolution, a normalisation, two dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2, name="conv")(x)
        x = nn.relu(nn.GroupNorm(num_groups=2, name="norm")(x))
        x = nn.relu(nn.Dense(6, name="dense")(x.reshape(len(x), -1)))
        return nn.Dense(CLASSES, name="head")(x)


MODEL = Net()


def loss_fn(params, model_state, batch, rng):
    logits = lbopt.likelihood(
        MODEL.apply({"params": params}, batch["x"]), "categorical"
    )
    noise = jax.random.normal(rng)
    return cross_entropy(logits, batch["y"]), (model_state, {"noise": noise})


def batch_of(step):
    """One global batch, the same wherever it is made."""
    rng = np.random.default_rng(step)
    y = rng.integers(CLASSES, size=BATCH)
    x = rng.normal(size=(BATCH, 4, 4, 2)) + y[:, None, None, None]
    return {"x": x.astype(np.float32), "y": y.astype(np.int32)}


@functools.cache
def start():
    """Parameters, a key, and the layers that are preconditioned."""
    batch, rng = batch_of(0), jax.random.key(1)
    params = jax.jit(MODEL.init)(jax.random.key(0), batch["x"])["params"]
    layers = lbopt.trace_layers(
        loss_fn, params, {}, batch, rng, has_aux=True, strict=True
    )
    return params, rng, layers


def copies(x):
    """What each device of this process holds of an array that all hold whole."""
    assert x.is_fully_replicated
    return np.stack([shard.data for shard in x.addressable_shards])


def train(name, mesh, before_step):
    """Parameters, metrics and refresh decisions of a run, by name."""
    optimizer, inverses, options = RUNS[name]
    params, rng, layers = start()
    placement = lbopt.Placement(AXIS, mesh.size, inverses)
    tx = optimizer(0.02, layers, damping=1e-2, placement=placement, **options)
    state = training.init_state(tx, params, {}, rng, mesh)
    train_step = training.make_train_step(loss_fn, tx, layers, mesh)
    lies = NamedSharding(mesh, PartitionSpec(AXIS))
    # The devices of a process, and so its examples, are neighbours in the mesh.
    own = np.split(np.arange(BATCH), jax.process_count())[jax.process_index()]
    due, seen = [jax.tree.leaves(lbopt.refresh(state.opt_state))], []
    for step in range(STEPS):
        before_step(step)
        batch = jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(lies, x[own]),
            batch_of(step),
        )
        state, metrics = train_step(state, batch)
        seen.append((metrics["loss"], metrics["noise"]))
        due.append(jax.tree.leaves(lbopt.refresh(state.opt_state)))
    assert int(state.step) == STEPS
    assert int(state.skipped) == 0
    found = {"due": np.asarray(due), "metrics": np.asarray(seen)}
    for at, x in jax.tree_util.tree_leaves_with_path(state.params):
        found[jax.tree_util.keystr(at, simple=True, separator="/")] = copies(x)
    return found


def file_of(name, processes, process):
    """Where a process leaves what it found."""
    return f"{name}, process {process} of {processes}.npz"


def join(args):
    """Waits for the other processes."""
    address = f"127.0.0.1:{args.port}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address,
        args.processes,
        args.process,
        # What Slurm or MPI say of the machine that runs the tests is not meant for us.
        cluster_detection_method="deactivate",
        coordinator_bind_address=address,
        initialization_timeout=int(args.seconds),
        heartbeat_timeout_seconds=args.heartbeat,
        shutdown_timeout_seconds=args.heartbeat,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="at most so long")
    parser.add_argument("--heartbeat", type=int, default=60, help="seconds")
    parser.add_argument("--runs", nargs="+", default=list(RUNS))
    parser.add_argument("--die-at", type=int, help="step before which the last dies")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the results"
    )
    args = parser.parse_args()
    # Should the test be killed, nobody else ends a process that waits for another.
    faulthandler.dump_traceback_later(args.seconds, exit=True)
    jax.config.update("jax_num_cpu_devices", DEVICES // args.processes)
    if args.processes > 1:
        join(args)
    assert jax.process_count() == args.processes
    assert jax.device_count() == DEVICES

    def before_step(step):
        print(f"{time.perf_counter():.1f} step {step}", flush=True)
        if step == args.die_at and args.process == args.processes - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in args.runs:
        print(name, flush=True)
        found = train(name, sharding.make_mesh(), before_step=before_step)
        np.savez(args.out / file_of(name, args.processes, args.process), **found)
    if args.processes > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
