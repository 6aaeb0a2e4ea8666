"""The name of the processor, for records of times."""

import pathlib
import platform


def name() -> str:
    """Returns the processor's name as the system has it, such as ``AMD EPYC``."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
