"""Memory that a process and its devices have in use."""

import pathlib
import resource
import sys

import jax


def read() -> dict[str, float]:
    """What is in use now, in bytes.

    Returns:
        `host_memory_bytes`, the resident set of this process (its peak where the system
        has no /proc), and, where the devices tell, `device_memory_bytes`: the peak of
        the fullest device of this process.
    """
    used = {"host_memory_bytes": float(_resident())}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s.get("peak_bytes_in_use", s.get("bytes_in_use")) for s in stats]
    known = [peak for peak in peaks if peak is not None]
    if known:
        used["device_memory_bytes"] = float(max(known))
    return used


def _resident() -> int:
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
