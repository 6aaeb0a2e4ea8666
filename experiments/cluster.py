"""Joins the processes of a run, and ends each of them soon after one has failed.

    cluster.start("auto", start_timeout=300.0, heartbeat_timeout=100)
    print(cluster.describe())
    with (
        cluster.fail_fast("start again with --resume"),
        preemption.Preemption() as preempted,
    ):
        for step in range(first, last):
            ...                                   # one training step
            if preempted.requested(step + 1):     # at every step, in every process
                save(step + 1)
                break
    # After the block, never inside it:
    sys.exit(cluster.ExitCode.PREEMPTED)

``start`` comes before anything that touches jax's devices.  jax finds the other
processes and watches over them; when one does not come or falls silent, it aborts the
rest by SIGABRT.
"""

import collections
import contextlib
import enum
import glob
import importlib.util
import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any, Literal

import jax


class ExitCode(enum.IntEnum):
    """Exit codes of a run, with the names of BSD's sysexits."""

    DONE = 0
    FAILED = 1
    """Refused settings, or an error of this process."""
    UNAVAILABLE = 69
    """Another process is lost: start again with --resume."""
    PREEMPTED = 75
    """Told to stop, and saved: start again with --resume."""


def start(
    mode: Literal["auto", "on", "off"],
    *,
    start_timeout: float,
    heartbeat_timeout: int,
) -> None:
    """Joins the other processes of the run.

    Args:
      mode: ``"off"`` never joins; ``"on"`` must; ``"auto"`` joins if a launcher has
        started more than one process, and never in a notebook.
      start_timeout: seconds to wait for the others.  jax then ends the process by
        SIGABRT.
      heartbeat_timeout: seconds after which a silent process counts as lost.

    Raises:
      ValueError: if no cluster is found with ``"on"``, or if the launcher's variables
        are incomplete.
    """
    if mode == "off" or (mode == "auto" and not _launched()):
        return
    try:
        place = _place()
        # jax's abort names nobody, so whoever is missing must be found by elimination.
        print(
            f"{socket.gethostname()}: waiting up to {start_timeout:g} s for the other "
            "processes; if jax aborts with DEADLINE_EXCEEDED, look for the process "
            "whose log lacks this line, or a closed port of process 0",
            file=sys.stderr,
            flush=True,
        )
        jax.distributed.initialize(
            **place,
            initialization_timeout=max(round(start_timeout), 1),
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except (IndexError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"distributed={mode!r} finds no other processes ({error}); start with srun "
            "or Open MPI's mpirun, on a TPU pod, as an indexed job of Kubernetes with "
            "jax[k8s] installed, or set JAX_COORDINATOR_ADDRESS=HOST:PORT, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def _launched() -> bool:
    """Returns whether a launcher has started more than one process."""
    if "ipykernel.kernelapp" in sys.modules:
        return False
    if "JAX_PROCESS_ID" in os.environ:
        return os.environ.get("JAX_NUM_PROCESSES") != "1"
    # A batch script and the shell of `salloc` have SLURM_NTASKS, too, but nobody has
    # started their other tasks; only `srun` sets this one.
    for count in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES"):
        if os.environ.get(count, "1") != "1":
            return True
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys():
        return importlib.util.find_spec("kubernetes") is not None
    tpus = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(tpus) and importlib.util.find_spec("libtpu") is not None


def _place() -> dict[str, Any]:
    """Returns the arguments of jax that it does not find by itself."""
    if not {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} & os.environ.keys():
        return {}
    return {
        "num_processes": _number("JAX_NUM_PROCESSES"),
        "process_id": _number("JAX_PROCESS_ID"),
        "cluster_detection_method": "deactivate",
    }


def _number(name: str) -> int:
    if not (value := os.environ.get(name, "")).isdecimal():
        raise ValueError(f"{name}={value!r} must be a whole number, ≥ 0")
    return int(value)


def describe() -> str:
    """Returns the numbers of processes and devices, on one line."""
    processes, devices = jax.process_count(), jax.devices()
    kinds = collections.Counter(device.device_kind for device in devices)
    return (
        f"{processes} process{'es' * (processes > 1)}; "
        f"{', '.join(f'{count} x {kind}' for kind, count in kinds.items())}"
    )


@contextlib.contextmanager
def fail_fast(resume_hint: str) -> Iterator[None]:
    """Ends a process of several at once if an exception leaves the block.

    Python's usual exit would wait in jax's shutdown for the other processes, while they
    wait in a collective for this one.  The message is one line for OSError and
    ValueError, else the traceback.  A collective that fails means that another process
    has ended; the exit code is then ``ExitCode.UNAVAILABLE``.

    Args:
      resume_hint: what to do about a lost process; ends the message.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        code, message = ExitCode.FAILED, traceback.format_exc()
        if re.search("Gloo|NCCL|coordination service|[Bb]arrier", str(error)):
            code = ExitCode.UNAVAILABLE
            message = (
                f"error: lost contact with another process ({error}); its log says "
                f"why; {resume_hint}\n"
            )
        elif isinstance(error, (OSError, ValueError)):
            message = f"error: {error}\n"
        with contextlib.suppress(OSError, ValueError):  # a closed or full stream
            sys.stdout.flush()
            print(message, end="", file=sys.stderr, flush=True)
        os._exit(code)
