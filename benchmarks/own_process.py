"""A part of a benchmark in a process of its own: its memory, its cores, its start."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def result_of(
    module: str, arguments: Mapping[str, Any], *, core: int | None = None
) -> dict[str, Any]:
    """Runs a benchmark's command line and reads the JSON in its last line.

    Args:
      module: the benchmark, as ``python -m`` takes it.
      arguments: its flags, without dashes, and their values.
      core: the only CPU core that it may use; None for any.

    Returns:
      What it printed last.

    Raises:
      CalledProcessError: if it fails.
    """
    command = [sys.executable, "-m", module]
    if core is not None:
        # The core is chosen before JAX starts, which makes a thread for each it sees.
        command[1:] = [
            "-c",
            f"import os, runpy; os.sched_setaffinity(0, {{{core}}}); "
            f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)",
        ]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])
