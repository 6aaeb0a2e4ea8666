"""What a compiled program holds, and what its compiler estimates it to cost.

Counted is what is scheduled: the instructions of the entry computation, of loop bodies,
of the branches of conditionals and of calls, but not those inside of fusions.

XLA:TPU writes the ``estimated_cycles`` of its cost model beside most instructions, but
not beside collectives; other compilers write none.  A loop costs its body as often as
its condition tells, or once where the bound is not a constant; a conditional costs the
dearest of its branches.

An instruction belongs to the part of the step whose source file is the innermost of its
stack frames that ``PARTS`` lists.  Where none is, as for copies that the compiler adds,
it belongs to the part of the loop or conditional around it.
"""

import collections
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from benchmarks.aot_program import Computation, Instruction, Program, first

COLLECTIVES = (
    "all-reduce",
    "reduce-scatter",
    "all-gather",
    "all-to-all",
    "collective-permute",
)
STATISTICS, AVERAGING, INVERSION, PRECONDITIONING, REST = PART_NAMES = (
    "statistics",
    "averaging",
    "inversion",
    "preconditioning",
    "everything else",
)
PARTS: Mapping[str, str] = {
    # JAX gives a backward rule the place at which its function was called.
    "curvature/capture.py:tap": STATISTICS,
    "curvature/evaluation.py:finish.<locals>.statistics": STATISTICS,
    "transforms/statistics.py": AVERAGING,
    "transforms/renewal.py": INVERSION,
    "transforms/inversion.py": INVERSION,
    "transforms/scheduled_inversion.py": INVERSION,
    "transforms/owner_buffers.py": INVERSION,
    "transforms/unit_classes.py": INVERSION,
    "transforms/eigen_moments.py": INVERSION,
    "transforms/placement.py": PRECONDITIONING,
    "transforms/natural_gradient.py": PRECONDITIONING,
    "kfac/factors.py": AVERAGING,
    "kfac/inverses.py": INVERSION,
    "kfac/eigenvalues.py": INVERSION,
    "kfac/precondition.py": PRECONDITIONING,
}
"""The part of a step that a file of the library, or a function in it, computes."""
_CONDITION = re.compile(r"\bcondition=%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(?:[a-z]+(\d+)\w*|pred)\[([\d,]*)\]")
_PASSING = {
    "parameter",
    "constant",
    "broadcast",
    "get-tuple-element",
    "bitcast",
    "copy",
}


class Collective(NamedTuple):
    """The collectives of one kind for one part of a step.

    Attributes:
      kind: the kind.
      part: the part of the step.
      count: how many the program holds; one that serves several parts counts for that
        with the most bytes.
      bytes: the bytes that a device puts in, as if each ran once.
      largest: the numbers that a device puts into the largest of them.
    """

    kind: str
    part: str
    count: int
    bytes: int
    largest: int


class Figures(NamedTuple):
    """What a program holds.

    Attributes:
      instructions: the number of scheduled instructions of each opcode.
      collectives: the collectives by kind and part.
      cycles: estimated cycles by part; empty if the compiler estimates none.
      open_loops: loops whose number of rounds is not known, and counted once.
    """

    instructions: dict[str, int]
    collectives: list[Collective]
    cycles: dict[str, int]
    open_loops: int

    @property
    def statistics_all_reduce(self) -> int:
        """The numbers in the largest all-reduce of factor statistics."""
        of_statistics = (
            one.largest
            for one in self.collectives
            if one.kind == "all-reduce" and one.part in (STATISTICS, AVERAGING)
        )
        return max(of_statistics, default=0)


def figures(program: Program) -> Figures:
    """Counts what a program holds."""
    opcodes: collections.Counter[str] = collections.Counter()
    found: dict[tuple[str, str], Collective] = {}
    open_loops = 0
    for computation, one, around in scheduled(program):
        opcodes[one.opcode] += 1
        open_loops += (
            one.opcode == "while" and rounds(program, computation, one) is None
        )
        for kind, inner, home in _collectives(program, computation, one):
            by_part = _by_part(program, inner, home, around)
            most = max(by_part, key=lambda part: by_part[part][1], default=REST)
            for part, (numbers, size) in by_part.items():
                old = found.get((kind, part), Collective(kind, part, 0, 0, 0))
                found[kind, part] = old._replace(
                    count=old.count + (part == most),
                    bytes=old.bytes + size,
                    largest=max(old.largest, numbers),
                )
    return Figures(
        instructions=dict(opcodes.most_common()),
        collectives=[found[key] for key in sorted(found)],
        cycles=dict(estimated_cycles(program)),
        open_loops=open_loops,
    )


def scheduled(
    program: Program, name: str | None = None, around: str = REST
) -> Iterator[tuple[Computation, Instruction, str]]:
    """Yields the instructions outside of fusions.

    Args:
      program: the program.
      name: the computation; None for the entry.
      around: the part of the loop or conditional around the computation.

    Yields:
      An instruction's computation, the instruction, and the part around it.
    """
    computation = program.computations[program.entry if name is None else name]
    for one in computation.values():
        yield computation, one, around
        if one.opcode != "fusion":
            part = part_of(program, one, around)
            for other in one.called:
                yield from scheduled(program, other, part)


def estimated_cycles(
    program: Program, name: str | None = None, around: str = REST
) -> collections.Counter[str]:
    """Returns the estimated cycles of a computation by part.

    Args:
      program: the program.
      name: the computation; None for the entry.
      around: the part of the loop or conditional around the computation.

    Returns:
      The cycles, empty if the compiler estimates none.
    """
    total: collections.Counter[str] = collections.Counter()
    computation = program.computations[program.entry if name is None else name]
    for one in computation.values():
        part = part_of(program, one, around)
        if one.cycles:
            total[part] += one.cycles
        elif one.opcode != "fusion" and one.called:
            inner = [estimated_cycles(program, other, part) for other in one.called]
            loop = one.opcode == "while"
            times = (rounds(program, computation, one) if loop else None) or 1
            for each, cycles in max(inner, key=lambda c: c.total()).items():
                total[each] += times * cycles
    return total


def rounds(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """Returns how often a loop that counts upwards by one runs.

    Args:
      program: the program.
      computation: the computation of the loop.
      loop: the loop.

    Returns:
      The number; None if it is not known.
    """
    if trips := first(_TRIPS, loop.text):
        return int(trips)
    condition = program.computations[first(_CONDITION, loop.text)]
    compared = [one for one in condition.values() if "direction=LT" in one.text]
    if len(compared) != 1:
        return None
    ends = [
        _constant(condition, name, computation, loop) for name in compared[0].operands
    ]
    start, bound = ends
    # A start that cannot be read is taken for 0.
    return None if bound is None else bound - (start or 0)


def _constant(
    condition: Computation, name: str, computation: Computation, loop: Instruction
) -> int | None:
    """Returns the value of a number that a loop's condition reads, at its start."""
    one = condition.get(name)
    if one is not None and one.opcode == "get-tuple-element":
        index = int(first(re.compile(r"\bindex=(\d+)"), one.text))
        state = computation[loop.operands[0]]
        if state.opcode != "tuple":
            return None
        one = computation[state.operands[index]]
    if one is not None and one.opcode == "copy":
        one = computation.get(one.operands[0])
    if one is None or one.opcode != "constant":
        return None
    value = re.match(r"constant\((-?\d+)\)", one.text)
    return int(value[1]) if value else None


def part_of(program: Program, instruction: Instruction, around: str = REST) -> str:
    """Returns the part of the step that an instruction belongs to.

    Args:
      program: the program.
      instruction: the instruction.
      around: the part of the loop or conditional around it.

    Returns:
      The part.
    """
    frame = program.frames.get(instruction.frame)
    while frame is not None:
        end = "/".join(pathlib.PurePath(frame.file).parts[-2:])
        part = PARTS.get(f"{end}:{frame.function}") or PARTS.get(end)
        if part is not None:
            return part
        frame = program.frames.get(frame.caller)
    return around


def _collectives(
    program: Program, computation: Computation, one: Instruction
) -> Iterator[tuple[str, Instruction, Computation]]:
    """Yields the kind of each collective in an instruction, and where it stands."""
    homes = [(one, computation)]
    if fused := one.opcode == "fusion":
        bodies = [program.computations[name] for name in one.called]
        homes = [(inner, body) for body in bodies for inner in body.values()]
    for inner, home in homes:
        kind = inner.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            # XLA:TPU's reduce-scatter is an all-reduce and a slice, fused.
            scatter = fused and kind == "all-reduce"
            yield "reduce-scatter" if scatter else kind, inner, home


def _by_part(
    program: Program, one: Instruction, home: Computation, around: str
) -> dict[str, tuple[int, int]]:
    """Returns the numbers that a device puts into a collective, and bytes, by part.

    Compilers combine collectives, and drop or confuse the places of those that they
    combined: the operands of averages and inversions are told by what made them.
    """
    own = _place(program, one, around)
    found: dict[str, tuple[int, int]] = {}
    for operand in _joined(program, one, home):
        origin = _origin(program, operand, home, around)
        part = origin if origin in (AVERAGING, INVERSION) else own or origin
        if not part:
            reduction = program.computations.get(one.reduction, {}).values()
            places = (_place(program, inner, around) for inner in reduction)
            part = next(filter(None, places), around)
        numbers, size = found.get(part, (0, 0))
        more = _extent(operand.type)
        found[part] = numbers + more[0], size + more[1]
    return found


def _place(program: Program, one: Instruction, around: str) -> str:
    """Returns the part that an instruction's frames tell, "" if it has none."""
    return part_of(program, one, around) if one.frame else ""


def _origin(program: Program, one: Instruction, home: Computation, around: str) -> str:
    """Returns the part of what an instruction's numbers come from, "" if none tells."""
    seen: set[str] = set()
    waiting, unlisted = [one.name], ""
    while waiting:
        one = home[waiting.pop(0)]
        place = _place(program, one, around)
        if place and place != around:
            return place
        # Compilers give the place of the whole step to those that pass numbers on.
        if place and one.opcode not in _PASSING:
            unlisted = around
        else:
            waiting += [name for name in one.operands if name not in seen]
            seen |= {*one.operands}
    return unlisted


def _joined(
    program: Program, one: Instruction, home: Computation
) -> Iterator[Instruction]:
    """Yields a collective's operands; XLA:GPU concatenates what it combines."""
    for name in one.operands:
        operand = home[name]
        bodies = [program.computations[x] for x in operand.called]
        last = [list(body.values())[-1].opcode for body in bodies]
        if "concatenate" in (operand.opcode, *last) and not operand.frame:
            parts = [home[x] for x in operand.operands]
            if sum(_extent(x.type)[0] for x in parts) == _extent(operand.type)[0]:
                yield from parts
                continue
        yield operand


def _extent(shapes: str) -> tuple[int, int]:
    """Returns the numbers in a type, and their bytes."""
    numbers = size = 0
    for bits, dims in _ARRAY.findall(shapes):
        count = math.prod(int(d) for d in dims.split(",") if d)
        numbers += count
        size += count * int(bits or 8) // 8
    return numbers, size
