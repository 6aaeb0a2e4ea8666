"""Reads the text of a compiled program: what it holds, and what it is estimated to cost.

The text is optimised HLO, as ``jax.stages.Compiled.as_text`` returns it.  Counted is
what is scheduled: the instructions of the entry computation, of loop bodies, of the
branches of conditionals and of calls, but not those inside of fusions.

XLA:TPU's cost model writes ``estimated_cycles`` beside most instructions, but not
beside collectives; other compilers write none.  A loop costs its body as often as its
condition tells, or once where the bound is not a constant; a conditional costs the
dearest of its branches.

An instruction belongs to the part of the step whose source file stands innermost in
its stack frames (``PARTS``).
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
REST = "everything else"
PARTS: Mapping[str, str] = {
    # Before the rebuilt K-FAC package.
    "transforms/statistics.py": "averaging",
    "transforms/inversion.py": "inversion",
    "transforms/renewal.py": "inversion",
    "transforms/owner_buffers.py": "inversion",
    "transforms/unit_classes.py": "inversion",
    "transforms/eigen_moments.py": "inversion",
    "transforms/placement.py": "preconditioning",
    "transforms/natural_gradient.py": "preconditioning",
    "kfac/factors.py": "averaging",
    "kfac/inverses.py": "inversion",
    "kfac/eigenvalues.py": "inversion",
    "kfac/precondition.py": "preconditioning",
    "curvature/tap_rules.py": "statistics",
    "curvature/capture.py": "statistics",
    "patches.py": "statistics",
}
"""The part of a step that a source file of the library computes, by the path's end."""


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      opcode: what it does.
      type: its result's type.
      called: the computations that it calls: a fusion's or call's, a loop's body or a
        conditional's branches.
      condition: a loop's condition.
      reduction: the computation that a collective reduces by.
      cycles: estimated cycles; 0 if the compiler says nothing.
      frame: the number of its innermost stack frame; 0 for none.
      operands: the text between its brackets and all that follows.
    """

    opcode: str
    type: str
    called: tuple[str, ...]
    condition: str
    reduction: str
    cycles: int
    frame: int
    operands: str


class Frame(NamedTuple):
    """A place in the source: its file, its function, and the number of its caller."""

    file: str
    function: str
    caller: int


class Program(NamedTuple):
    """A program's computations by name, its entry, and the stack frames by number."""

    computations: dict[str, list[Instruction]]
    entry: str
    frames: dict[int, Frame]


class Figures(NamedTuple):
    """What a program holds.

    Attributes:
      instructions: the number of scheduled instructions of each opcode.
      collectives: for each kind its number, and the bytes that a device puts in.
      statistics_all_reduce: numbers in the largest all-reduce of factor statistics.
      cycles: estimated cycles by part; None if the compiler estimates none.
      open_loops: loops whose number of rounds is not known, and counted once.
    """

    instructions: dict[str, int]
    collectives: dict[str, tuple[int, int]]
    statistics_all_reduce: int
    cycles: dict[str, int] | None
    open_loops: int


# ------------------------------------------------------------------------- the parser

_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%[\w.\-]+ = ")
_OPCODE = re.compile(r"([\w\-]+)\(")
_CALLED = re.compile(r"\b(?:calls|body|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"\bcondition=%([\w.\-]+)")
_REDUCTION = re.compile(r"\bto_apply=%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


def parse(text: str) -> Program:
    """Parses a program's text."""
    computations: dict[str, list[Instruction]] = {}
    entry = ""
    tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    table: dict[int, str] | None = None
    body: list[Instruction] | None = None
    for line in text.splitlines():
        if body is not None:
            if line.startswith("}"):
                body = None
            elif found := _INSTRUCTION.match(line):
                body.append(_instruction(line[found.end() :]))
        elif line in tables:
            table = tables[line]
        elif found := _HEAD.match(line):
            body = computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif table is not None and line[:1].isdigit():
            number, _, rest = line.partition(" ")
            table[int(number)] = rest
    return Program(computations, entry, _frames(tables))


def _instruction(text: str) -> Instruction:
    """Parses what stands right of the equals sign."""
    kind, rest = _split_type(text)
    opcode = found[1] if (found := _OPCODE.match(rest)) else ""
    called = _CALLED.findall(rest)
    if branches := _BRANCHES.search(rest):
        called += [name.strip().lstrip("%") for name in branches[1].split(",")]
    reduction = _first(_REDUCTION, rest)
    if opcode == "call":
        called.append(reduction)
    return Instruction(
        opcode=opcode,
        type=kind,
        called=tuple(called),
        condition=_first(_CONDITION, rest),
        reduction=reduction,
        cycles=int(_first(_CYCLES, rest) or 0),
        frame=int(_first(_FRAME, rest) or 0),
        operands=rest[len(opcode) :],
    )


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""


def _split_type(text: str) -> tuple[str, str]:
    """Splits a type, which may be a tuple in brackets, from what follows."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == " " and not depth:
            return text[:i], text[i + 1 :]
    return text, ""


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
    found = list(scheduled(program))
    counts = collections.Counter(one.opcode for one in found)
    sent: dict[str, tuple[int, int]] = {}
    largest = 0
    for kind, size, numbers, part in _collectives(program):
        number, total = sent.get(kind, (0, 0))
        sent[kind] = (number + 1, total + size)
        if kind == "all-reduce" and part in ("statistics", "averaging"):
            largest = max(largest, numbers)
    cycles = estimated_cycles(program, program.entry)
    loops = [one for one in found if one.opcode == "while"]
    return Figures(
        instructions=dict(counts.most_common()),
        collectives=sent,
        statistics_all_reduce=largest,
        cycles=dict(cycles) or None,
        open_loops=sum(rounds(program, one) is None for one in loops),
    )


def scheduled(program: Program, computation: str | None = None) -> Iterator[Instruction]:
    """Yields the instructions outside of fusions, each as often as it is called."""
    name = program.entry if computation is None else computation
    for one in program.computations.get(name, ()):
        yield one
        if one.opcode != "fusion":
            for other in one.called:
                yield from scheduled(program, other)


def estimated_cycles(program: Program, computation: str) -> collections.Counter[str]:
    """Returns the estimated cycles of a computation by part."""
    total: collections.Counter[str] = collections.Counter()
    for one in program.computations.get(computation, ()):
        if one.cycles:
            total[part_of(program, one)] += one.cycles
        elif one.opcode != "fusion" and one.called:
            inner = [estimated_cycles(program, other) for other in one.called]
            times = rounds(program, one) or 1 if one.opcode == "while" else 1
            for part, cycles in max(inner, key=lambda c: c.total()).items():
                total[part] += times * cycles
    return total


def rounds(program: Program, loop: Instruction) -> int | None:
    """Returns how often a loop from 0 in steps of 1 runs; None if that is not known."""
    condition = program.computations.get(loop.condition, [])
    constants = [one for one in condition if one.opcode == "constant"]
    compared = any("direction=LT" in one.operands for one in condition)
    if not compared or len(constants) != 1:
        return None
    bound = re.match(r"\((\d+)\)", constants[0].operands)
    return int(bound[1]) if bound else None


def part_of(program: Program, instruction: Instruction) -> str:
    """Returns the part of the step that an instruction belongs to."""
    number = instruction.frame
    while frame := program.frames.get(number):
        path = pathlib.PurePath(frame.file)
        for depth in (2, 1):
            part = PARTS.get("/".join(path.parts[-depth:]))
            if part is not None:
                return part
        number = frame.caller
    return REST


def _collectives(program: Program) -> Iterator[tuple[str, int, int, str]]:
    """Yields kind, bytes, numbers and part of each collective."""
    for one in scheduled(program):
        inner = [one]
        fused = one.opcode == "fusion"
        if fused:
            inner = [x for name in one.called for x in program.computations[name]]
        for each in inner:
            kind = each.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if fused and kind == "all-reduce":
                # XLA:TPU's reduce-scatter: an all-reduce and a slice, fused.
                kind = "reduce-scatter"
            numbers, size = _extent(each)
            yield kind, size, numbers, _part_of_collective(program, each)


def _part_of_collective(program: Program, instruction: Instruction) -> str:
    part = part_of(program, instruction)
    # Where compilers drop the place of a collective, its reduction still has it.
    for inner in program.computations.get(instruction.reduction, ()):
        if part == REST:
            part = part_of(program, inner)
    return part


def _extent(collective: Instruction) -> tuple[int, int]:
    """Returns the numbers that a device puts into a collective, and their bytes."""
    numbers = size = 0
    for bits, dims in re.findall(
        r"\b(?:[a-z]+(\d+)\w*|pred)\[([\d,]*)\]", collective.type
    ):
        count = math.prod(int(d) for d in dims.split(",") if d)
        numbers += count
        size += count * int(bits or 8) // 8
    return numbers, size
