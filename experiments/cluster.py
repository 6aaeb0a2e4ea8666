"""Starting on a cluster, and ending well when it fails.

    from experiments import cluster, preemption

    joined = cluster.start("auto", start_timeout=300.0, heartbeat_timeout=100)
    print(joined.describe())                      # names the devices, so after `start`
    with (
        cluster.others_may_die(joined, "start the job again with --resume") as reached,
        preemption.Preemption() as preempted,
    ):
        for step in range(first, last):
            ...                                   # one training step
            reached(step + 1)                     # steps done, for the message
            if preempted.requested(step + 1):     # at every step, in every process
                save(step + 1)
                break
    # After the block, never inside it:
    sys.exit(cluster.ExitCode.PREEMPTED)

`start` comes before anything that touches jax's devices. It raises ValueError for what
the person must mend, and ends the process with `ExitCode.UNAVAILABLE` (SystemExit) if
others do not come. Only `joined.is_first()` writes logs and files of the run.
"""

import collections
import contextlib
import dataclasses
import enum
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Literal

import jax

from experiments import membership, roll_call


class ExitCode(enum.IntEnum):
    """How a process ended, for whoever started it; names of BSD's sysexits."""

    DONE = 0
    FAILED = 1
    """Refused settings, or an error of this process."""
    UNAVAILABLE = 69
    """Another process did not come or is lost: start again with --resume."""
    PREEMPTED = 75
    """Told to stop, and saved: start again with --resume."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run.

    Attributes:
        launcher: What started them; none for a process on its own.
        process: Index of this one.
        processes: How many there are.
        links: Connections to the others, where the launcher told their places.
    """

    launcher: str | None = None
    process: int = 0
    processes: int = 1
    links: roll_call.Links | None = None

    def is_first(self) -> bool:
        """Whether this is the process that writes the run's logs and files."""
        return self.process == 0

    def describe(self) -> str:
        """The processes, their devices and hosts, on one line."""
        devices = jax.devices()
        kinds = collections.Counter(device.device_kind for device in devices)
        held = collections.Counter(device.process_index for device in devices)
        least, most = min(held.values()), max(held.values())
        parts = [
            f"{self.processes} process{'es' * (self.processes > 1)}"
            + (f" started by {self.launcher}" if self.launcher else ""),
            f"{least if least == most else f'{least} to {most}'} devices each",
            ", ".join(f"{count} x {kind}" for kind, count in kinds.items()),
        ]
        if self.links:
            hosts = collections.Counter(self.links.hosts)
            parts.append("hosts " + " ".join(hosts))
        return "; ".join(parts)


def start(
    mode: Literal["auto", "on", "off"],
    *,
    start_timeout: float,
    heartbeat_timeout: int,
) -> Cluster:
    """Joins the other processes of the run, before anything touches a device.

    Args:
        mode: `off` never joins; `on` must; `auto` joins where a launcher started more
            than one process, and never in a notebook.
        start_timeout: Seconds to wait for the others.
        heartbeat_timeout: Seconds after which a host that fell silent counts as lost.

    Returns:
        The processes, all of them there.

    Raises:
        ValueError: If no cluster is found with `on`, or if the launcher's variables
            are incomplete.
        SystemExit: With `ExitCode.UNAVAILABLE` if a process did not come, after naming
            it.
    """
    if mode == "off":
        return Cluster()
    if "ipykernel.kernelapp" in sys.modules:
        if mode == "on":
            raise ValueError("distributed=on is not for notebooks; use off or auto")
        return Cluster()
    member = membership.find(os.environ)
    if member is None:
        return _ask_jax(mode, start_timeout, heartbeat_timeout)
    if mode == "auto" and member.processes == 1:
        return Cluster()
    try:
        links = roll_call.hold(
            member.process,
            member.processes,
            member.coordinator,
            timeout=start_timeout,
            keepalive=heartbeat_timeout,
            hosts=member.hosts,
        )
    except roll_call.AbsentError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(ExitCode.UNAVAILABLE) from None
    _pass_by_proxies(member.coordinator)
    jax.distributed.initialize(
        member.coordinator,
        member.processes,
        member.process,
        member.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=max(round(start_timeout), 1),
        heartbeat_timeout_seconds=heartbeat_timeout,
    )
    return Cluster(member.launcher, member.process, member.processes, links)


def _ask_jax(mode: str, start_timeout: float, heartbeat_timeout: int) -> Cluster:
    launcher = membership.only_jax_can_ask(os.environ)
    if launcher is None:
        if mode == "on":
            looked_for = membership.LOOKED_FOR
            raise ValueError(f"distributed=on, but no cluster is here: {looked_for}")
        return Cluster()
    try:
        jax.distributed.initialize(
            initialization_timeout=max(round(start_timeout), 1),
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except RuntimeError as error:  # no right to ask Kubernetes, say
        raise ValueError(f"jax could not join the {launcher}: {error}") from error
    return Cluster(launcher, jax.process_index(), jax.process_count())


def _pass_by_proxies(coordinator: str) -> None:
    """Keeps gRPC from asking a proxy for the coordinator, which hangs."""
    proxies = {"http_proxy", "https_proxy", "grpc_proxy"}
    if proxies.isdisjoint(map(str.lower, os.environ)):
        return
    host = coordinator.rpartition(":")[0].strip("[]")
    names = ("no_grpc_proxy", "no_proxy", "NO_PROXY")
    spared = next((os.environ[name] for name in names if name in os.environ), "")
    os.environ.update(no_grpc_proxy=f"{spared},{host}".lstrip(","))


@contextlib.contextmanager
def others_may_die(
    cluster: Cluster, resume_hint: str
) -> Iterator[Callable[[int], None]]:
    """Ends this process with a clear message once another one is lost.

    A survivor would wait in a collective for ever, or in jax's shutdown for its
    timeout. It ends seconds after another's end, however that came about, and within
    `heartbeat_timeout` if a host vanished from the network.

    For the same reason an exception that leaves the block ends the process, if there
    are several: OSError and ValueError with one line, the others with their traceback.
    So leave the block before `sys.exit`.

    Args:
        cluster: The processes.
        resume_hint: What the person shall do.

    Yields:
        A function to tell the number of steps done.
    """
    steps = [0]

    def reached(step: int) -> None:
        steps[0] = step

    def lost(process: int, why: str) -> None:
        who = roll_call.name(process, cluster.links.hosts if cluster.links else ())
        message = f"lost contact with {who} after step {steps[0]}; {resume_hint}"
        if why:
            message = f"{who} failed after step {steps[0]}: {why}"
        _end(ExitCode.UNAVAILABLE, f"error: {message}\n")

    if cluster.processes == 1:
        yield reached
        return
    watch = cluster.links.watched(lost) if cluster.links else contextlib.nullcontext()
    try:
        with watch:
            yield reached
    except BaseException as error:
        if cluster.links:
            cluster.links.fail(f"{type(error).__name__}: {error}".partition("\n")[0])
        refused = isinstance(error, (OSError, ValueError))
        message = f"error: {error}\n" if refused else traceback.format_exc()
        _end(ExitCode.FAILED, message)


def _end(code: ExitCode, message: str) -> None:
    """Ends at once: the usual way out waits for the other processes."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(message, end="", file=sys.stderr, flush=True)
    os._exit(code)
