"""Reads a compiled program: what it holds, and what its compiler estimates it to cost.

The text is optimised HLO, as ``jax.stages.Compiled.as_text`` returns it.  Counted is
what is scheduled: the instructions of the entry computation, of loop bodies, of the
branches of conditionals and of calls, but not those inside of fusions.

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


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      name: its name, unique in its computation.
      opcode: what it does.
      type: its result's type.
      operands: the names of the instructions that it takes.
      called: the computations that it runs: a fusion's or a call's, a loop's body or a
        conditional's branches.
      reduction: the computation that a collective reduces by.
      cycles: estimated cycles; 0 if the compiler says nothing.
      frame: the number of its innermost stack frame; 0 for none.
      text: its opcode and all that follows.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    reduction: str
    cycles: int
    frame: int
    text: str


Computation = dict[str, Instruction]
"""Instructions by name, in the order of the schedule."""


class Frame(NamedTuple):
    """A place in the source: its file, its function, and the number of its caller."""

    file: str
    function: str
    caller: int


class Program(NamedTuple):
    """A program's computations by name, its entry, and the stack frames by number."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, Frame]


class Collective(NamedTuple):
    """All collectives of one kind that belong to one part of a step.

    Attributes:
      kind: the kind.
      part: the part of the step.
      count: how many the program holds.
      bytes: the bytes that a device puts in, each counted once.
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


# ------------------------------------------------------------------------- the parser

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"[\w\-]+")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|body|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"\bcondition=%([\w.\-]+)")
_REDUCTION = re.compile(r"\bto_apply=%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
_ARRAY = re.compile(r"\b(?:[a-z]+(\d+)\w*|pred)\[([\d,]*)\]")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


def parse(text: str) -> Program:
    """Parses a program's text."""
    computations: dict[str, Computation] = {}
    entry = ""
    tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    table: dict[int, str] = {}
    body: Computation | None = None
    for line in text.splitlines():
        if body is not None:
            if line.startswith("}"):
                body = None
            elif found := _INSTRUCTION.match(line):
                body[found[1]] = _instruction(found[1], line[found.end() :])
        elif line in tables:
            table = tables[line]
        elif found := _HEAD.match(line):
            body = computations.setdefault(found[2], {})
            entry = found[2] if found[1] else entry
        elif line[:1].isdigit():
            number, _, rest = line.partition(" ")
            table[int(number)] = rest
    return Program(computations, entry, _frames(tables))


def _instruction(name: str, text: str) -> Instruction:
    """Parses what stands right of the equals sign."""
    kind, text = _split(text, " ")
    opcode = _OPCODE.match(text)
    assert opcode is not None, text
    operands, attributes = _split(text, ",")
    called = _CALLED.findall(attributes)
    if branches := _BRANCHES.search(attributes):
        called += _NAME.findall(branches[1])
    reduction = _first(_REDUCTION, attributes)
    if opcode[0] == "call":  # it has the keyword of a reduction
        called.append(reduction)
    return Instruction(
        name=name,
        opcode=opcode[0],
        type=kind,
        operands=tuple(_NAME.findall(operands)),
        called=tuple(called),
        reduction=reduction,
        cycles=int(_first(_CYCLES, attributes) or 0),
        frame=int(_first(_FRAME, attributes) or 0),
        text=text,
    )


def _split(text: str, mark: str) -> tuple[str, str]:
    """Splits at the first mark outside of brackets."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == mark and not depth:
            return text[:i], text[i + 1 :]
    return text, ""


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""


def _frames(tables: Mapping[str, Mapping[int, str]]) -> dict[int, Frame]:
    def fields(text: str) -> dict[str, int]:
        return {key: int(n) for key, n in re.findall(r"(\w+)=(\d+)", text)}

    places = {n: fields(text) for n, text in tables["FileLocations"].items()}
    frames = {}
    for number, text in tables["StackFrames"].items():
        one = fields(text)
        place = places[one["file_location_id"]]
        frames[number] = Frame(
            tables["FileNames"][place["file_name_id"]].strip('"'),
            tables["FunctionNames"][place["function_name_id"]].strip('"'),
            # XLA prints the number of the caller plus one, and 1 for none.
            one.get("parent_frame_id", 1) - 1,
        )
    return frames


# ------------------------------------------------------------------------ the figures


def figures(program: Program) -> Figures:
    """Counts what a program holds."""
    opcodes: collections.Counter[str] = collections.Counter()
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    open_loops = 0
    for computation, one, around in scheduled(program):
        opcodes[one.opcode] += 1
        open_loops += (
            one.opcode == "while" and rounds(program, computation, one) is None
        )
        for kind, inner, home in _collectives(program, computation, one):
            key = kind, _part_of_collective(program, inner, around)
            found.setdefault(key, []).append(_extent(inner, home))
    return Figures(
        instructions=dict(opcodes.most_common()),
        collectives=[
            Collective(
                kind,
                part,
                len(extents),
                sum(size for _, size in extents),
                max(numbers for numbers, _ in extents),
            )
            for (kind, part), extents in sorted(found.items())
        ],
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
    if trips := _first(_TRIPS, loop.text):
        return int(trips)
    condition = program.computations[_first(_CONDITION, loop.text)]
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
        index = int(_first(re.compile(r"\bindex=(\d+)"), one.text))
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
    homes = [{one.name: one}]
    if fused := one.opcode == "fusion":
        homes = [program.computations[name] for name in one.called]
    for home in homes:
        for inner in home.values():
            kind = inner.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                # XLA:TPU's reduce-scatter is an all-reduce and a slice, fused.
                scatter = fused and kind == "all-reduce"
                yield (
                    "reduce-scatter" if scatter else kind,
                    inner,
                    home if fused else computation,
                )


def _part_of_collective(program: Program, one: Instruction, around: str) -> str:
    """Where the compiler drops a collective's place, its reduction still has it."""
    reduction = program.computations.get(one.reduction, {})
    places = [one, *reduction.values()]
    parts = (part_of(program, place) for place in places)
    return next((part for part in parts if part != REST), around)


def _extent(collective: Instruction, home: Computation) -> tuple[int, int]:
    """Returns the numbers that a device puts in, and their bytes."""
    numbers = size = 0
    for name in collective.operands:
        for bits, dims in _ARRAY.findall(home[name].type):
            count = math.prod(int(d) for d in dims.split(",") if d)
            numbers += count
            size += count * int(bits or 8) // 8
    return numbers, size
