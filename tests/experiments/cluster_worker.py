"""One process of a small run on a cluster; test_cluster.py and test_launch.py start it.

It adds up a number that each device holds, over and over, and says how it went in lines
`step 3`. The settings come from the environment, as the command line is the
experiment's.
"""

import faulthandler
import json
import os
import signal
import sys
import time

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments import cluster, preemption


def act(what: str, step: int) -> None:
    """What befalls a process: `WORKER_DIE=1@3` kills process 1 after step 3."""
    if (at := os.environ.get(what)) is None:
        return
    process, _, when = at.partition("@")
    if int(process) != jax.process_index() or int(when) != step:
        return
    if what == "WORKER_DIE":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "WORKER_TERM":
        os.kill(os.getpid(), signal.SIGTERM)
    if what == "WORKER_FAIL":
        raise RuntimeError("a worker's own error")


def run() -> int:
    """Does steps until it is told to stop; returns how it went."""
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    total = jax.jit(lambda x: x.sum(), out_shardings=whole)
    own = np.ones(len(jax.local_devices()), np.float32)
    hint = "start the job again with --resume"
    with cluster.fail_fast(hint), preemption.Preemption() as preempted:
        for step in range(1, int(os.environ.get("WORKER_STEPS", "5")) + 1):
            x = jax.make_array_from_process_local_data(split, own)
            assert float(total(x)) == mesh.size
            print(f"step {step}", flush=True)
            if os.environ.get("WORKER_REFUSE") == str(step):
                raise ValueError(f"refused in step {step}")
            for what in ("WORKER_DIE", "WORKER_TERM", "WORKER_FAIL"):
                act(what, step)
            if preempted.requested(step):
                print(f"saved at {step}", flush=True)
                return cluster.ExitCode.PREEMPTED
            time.sleep(0.02)
    return cluster.ExitCode.DONE


def main() -> None:
    # Should the test be killed, nobody else ends a process that waits for another.
    faulthandler.dump_traceback_later(240, exit=True)
    print(json.dumps(sys.argv[1:]), flush=True)
    start_timeout = float(os.environ.get("WORKER_START", "120"))
    cluster.start("on", start_timeout=start_timeout, heartbeat_timeout=10)
    print(cluster.describe(), flush=True)
    sys.exit(run())


if __name__ == "__main__":
    main()
