"""Memory that a process and its devices have in use, and how little it may be."""

import ctypes
import os
import pathlib
import resource
import sys

import jax

_M_ARENA_MAX = -8
"""Of `mallopt` in glibc's <malloc.h>."""


def share_arenas(arenas: int = 2) -> bool:
    """Has all threads of this process allocate from a few arenas, with glibc.

    By itself glibc opens up to eight arenas for each core, and a training process has a
    hundred threads to use them. Each keeps the free pieces between what is held, so the
    resident memory grows for thousands of steps while nothing more is in use: by 18 to
    100 kB a step in runs of the demo, and not with two arenas, at the same speed.

    Call it before jax starts its threads; arenas that are open stay.

    Args:
        arenas: How many; `MALLOC_ARENA_MAX` in the environment comes first.

    Returns:
        Whether it is so; not with another C library, nor with that variable.
    """
    if "MALLOC_ARENA_MAX" in os.environ or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_M_ARENA_MAX, arenas))


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
