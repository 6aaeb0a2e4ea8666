"""The collectives of a compiled program and their bytes, read from its text."""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

KINDS = ("reduce-scatter", "all-to-all", "all-gather", "all-reduce")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of ``KINDS``.
      bytes: what each device puts in, whenever it runs.
      loops: how many loops are around it.
    """

    kind: str
    bytes: int
    loops: int


Counts = Mapping[Collective, int]


def operand_bytes(shapes: str, kind: str, devices: int) -> int:
    """What each device puts into a collective.

    Args:
      shapes: the type of its result in HLO text, an array's or a tuple's.
      kind: one of ``KINDS``.
      devices: how many take part.

    Returns:
      Bytes.
    """
    total = 0
    for bits, dims in re.findall(r"\b(?:[a-z]+(\d+)\w*|pred)\[([\d,]*)\]", shapes):
        size = math.prod(int(d) for d in dims.split(",") if d)
        total += size * int(bits or 8) // 8
    if kind == "reduce-scatter":
        return total * devices
    return total // devices if kind == "all-gather" else total


def collectives_of(text: str, devices: int) -> Counts:
    """The collectives of a compiled program and how often each stands in it.

    Args:
      text: the program as HLO text.
      devices: its devices, all of which take part in each collective.

    Returns:
      Numbers of equal collectives.

    Raises:
      ValueError: for a collective that starts and ends apart (those of CPU do not), or
        without the name that tells its loops.
    """
    counts: collections.Counter[Collective] = collections.Counter()
    for line in text.splitlines():
        found = re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if found is None:
            continue
        name = re.search(r'op_name="([^"]*)"', line)
        if found[3] or name is None:
            raise ValueError(f"cannot read the collective {line.strip()[:200]}")
        size = operand_bytes(found[1], found[2], devices)
        counts[Collective(found[2], size, name[1].count("while/body"))] += 1
    return counts


def step_bytes(
    counts: Counts, turns: Mapping[tuple[int, int], Sequence[int]], due: bool
) -> dict[str, tuple[int, int]]:
    """How often collectives run in a step, and with how many bytes.

    Args:
      counts: a program's collectives.
      turns: by loops and bytes, how often the collectives of each class of units run.
      due: whether everything is due, or nothing.

    Returns:
      ``{kind: (runs, bytes)}``.

    Raises:
      ValueError: for a collective in a loop that belongs to no class of units.
    """
    result = {}
    for kind in KINDS:
        runs = size = 0
        for one, number in counts.items():
            if one.kind != kind or (one.loops > 1 and not due):
                continue
            times = number
            if one.loops > 2:
                classes = turns.get((one.loops, one.bytes), ())
                if not classes or number % len(classes):
                    raise ValueError(f"{number} × {one} for turns {classes}")
                times = number // len(classes) * sum(classes)
            runs, size = runs + times, size + times * one.bytes
        result[kind] = (runs, size)
    return result


def sent(kind: str, size: int, devices: int) -> float:
    """Bytes that leave a device in the ring algorithm.

    Args:
      kind: one of ``KINDS``.
      size: what the device puts in.
      devices: how many take part.

    Returns:
      Bytes.
    """
    others = devices - 1
    ways = {"all-gather": others, "all-reduce": 2 * others / devices}
    return size * ways.get(kind, others / devices)
