"""The C library's arenas, counted by the C library."""

import os
import platform
import re
import subprocess
import sys

import pytest

from experiments import memory_use

COUNT = """
import ctypes, sys, threading
from experiments import memory_use

print(memory_use.share_arenas())
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
together = threading.Barrier(17)

def allocate():
    libc.malloc(1000)
    together.wait()  # a thread's arena is free for another when it ends

threads = [threading.Thread(target=allocate) for _ in range(16)]
for thread in threads:
    thread.start()
sys.stdout.flush()
to = libc.fdopen(1, b"w")
libc.malloc_info(0, ctypes.c_void_p(to))
libc.fflush(ctypes.c_void_p(to))
together.wait()
"""


def arenas(script):
    """What a script prints, and how many arenas the C library counts then."""
    env = {k: v for k, v in os.environ.items() if k != "MALLOC_ARENA_MAX"}
    said = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip
    return said.partition("\n")[0], len(re.findall("<heap ", said))


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="no other C library has such arenas"
)
def test_threads_share_arenas():
    assert arenas(COUNT) == ("True", 2)
    assert arenas(COUNT.replace("print(memory_use.share_arenas())", ""))[1] > 8


def test_the_environment_comes_first(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    assert not memory_use.share_arenas()


def test_another_c_library_has_no_arenas(monkeypatch):
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    monkeypatch.setattr(memory_use.ctypes, "CDLL", lambda name: object())
    assert not memory_use.share_arenas()
