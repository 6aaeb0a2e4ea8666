"""Parses the text of a compiled program.

The text is optimised HLO, as ``jax.stages.Compiled.as_text`` returns it.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple


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


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"[\w\-]+")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|body|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_REDUCTION = re.compile(r"\bto_apply=%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
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
    reduction = first(_REDUCTION, attributes)
    if opcode[0] == "call":  # it has the keyword of a reduction
        called.append(reduction)
    return Instruction(
        name=name,
        opcode=opcode[0],
        type=kind,
        operands=tuple(_NAME.findall(operands)),
        called=tuple(called),
        reduction=reduction,
        cycles=int(first(_CYCLES, attributes) or 0),
        frame=int(first(_FRAME, attributes) or 0),
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


def first(pattern: re.Pattern[str], text: str) -> str:
    """Returns the group of the first match, "" if there is none."""
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
