"""Memory in use by a process and its devices, and a limit on its fragmentation."""

import ctypes
import os
import pathlib
import resource
import sys

import jax

_M_ARENA_MAX = -8  # of mallopt, in glibc's <malloc.h>


def share_arenas() -> bool:
    """Makes all threads of this process allocate from two arenas, with glibc.

    By default glibc opens up to eight arenas per core, and a training process has a
    hundred threads to use them. Each arena keeps the free pieces between its blocks, so
    the resident memory grows for thousands of steps although no more is in use: by 18
    to 100 kB a step in runs of the demo. It does not with two arenas, at equal speed.

    Call it before jax starts its threads; open arenas stay open.

    Returns:
      Whether the limit was set: not with another C library, nor if
      ``MALLOC_ARENA_MAX`` is in the environment.
    """
    if "MALLOC_ARENA_MAX" in os.environ or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_M_ARENA_MAX, 2))


def read() -> dict[str, float]:
    """Returns the memory in use now, in bytes.

    Returns:
      ``host_memory_bytes``, the resident set of this process (its peak if the system
      has no /proc), and, if the devices tell, ``device_memory_bytes``: the peak of the
      fullest device of this process.
    """
    used = {"host_memory_bytes": float(_resident())}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s.get("peak_bytes_in_use", s.get("bytes_in_use")) for s in stats]
    if known := [peak for peak in peaks if peak is not None]:
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
