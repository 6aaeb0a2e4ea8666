"""Training steps compiled for TPUs and GPUs that are not there: time, size, cost.

    python -m benchmarks.aot --target v5e:4 h100:1 --model resnet20 --output aot.json
    python -m benchmarks.aot --acceptance --output aot.json

Nothing runs; XLA compiles on a CPU (``pip install 'lbopt[aot-tpu]'`` or ``aot-gpu``).
Each step is compiled in a process of its own and added to the record at once; what the
record holds already is left out, unless it failed or ``--again`` is given.

SGD's step is compiled before the others of a problem, in the same run, and ratios are
over that one.  On a busy machine those of CPU seconds are the ones to read.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax

from benchmarks import aot_steps, harness
from benchmarks.aot_figures import INVERSION, PART_NAMES
from benchmarks.aot_steps import CHIPS, MODELS, Case, Target

_KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all")


def main(argv: Sequence[str] | None = None) -> harness.Record:
    """Runs the command and returns its record."""
    parser = _parser()
    options = parser.parse_args(argv)
    wanted = acceptance(options) if options.acceptance else chosen(options)
    missing = {case.target: case.target.kind.missing() for case in wanted}
    notes = [f"{target} is left out: {why}" for target, why in missing.items() if why]
    wanted = [case for case in wanted if not missing[case.target]]
    if not wanted:
        parser.error("; ".join(notes))
    record = _begin(argv, options.output)
    # What failed is tried again: another process may have taken its memory.
    sound = [] if options.again else [r for r in record["rows"] if "error" not in r]
    done = set(map(case_of, sound))
    for case in with_baselines([case for case in wanted if case not in done]):
        harness.tell(f"compiling {case.problem()}: {case.step()}")
        row = case._asdict() | {"target": str(case.target), "run": record["date"]}
        row |= {"date": _now(), "versions": record["versions"]}
        row |= in_child(case, options.programs)
        # Read anew, for the other compiler's environment may write to the same file.
        record["rows"] = [*rows_of(options.output, record["rows"]), row]
        # Written as it grows: a run may take hours.
        harness.write(record, options.output)
    shown = {*wanted, *(case.baseline() for case in wanted)}
    print(table([row for row in record["rows"] if case_of(row) in shown]))
    print("\n".join(notes))
    return record


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser("aot", __doc__)

    def several(name: str, known: Sequence[str], *default: str) -> None:
        parser.add_argument(
            f"--{name}", nargs="+", choices=known, default=default, metavar="NAME"
        )

    parser.add_argument(
        "--target",
        nargs="+",
        type=aot_steps.parse_target,
        default=[Target("v5e", 4)],
        metavar="CHIP:DEVICES",
        help=f"chips: {', '.join(CHIPS)}",
    )
    several("model", tuple(MODELS), "resnet50")
    several("optimizer", aot_steps.OPTIMIZERS, "sp_ngd", "sp_ngd_adaptive")
    several("placement", ("comm", "memory"), "comm")
    several("due", aot_steps.DUES, "none", "statistics", "all")
    several("weight-sharing", ("expand", "reduce"), "expand")
    parser.add_argument("--batch", type=harness.positive, help="images on each device")
    parser.add_argument("--image", type=harness.positive, help="pixels along each side")
    parser.add_argument("--effort", choices=("low", "default"), default="low")
    parser.add_argument("--label", default="", help="a name for the code's version")
    parser.add_argument("--programs", type=pathlib.Path, help="folder for their text")
    parser.add_argument(
        "--acceptance", action="store_true", help="the programs that have bounds"
    )
    parser.add_argument(
        "--again", action="store_true", help="also what the record holds already"
    )
    return parser


def chosen(options: argparse.Namespace) -> list[Case]:
    """Returns the cases that a command line names."""
    cases = (
        Case(
            target=target,
            model=model,
            batch=options.batch or MODELS[model][2],
            image=options.image or MODELS[model][1],
            effort=options.effort,
            label=options.label,
            optimizer=optimizer,
            placement=placement,
            due=due,
            weight_sharing=sharing,
        )
        for target, model, optimizer, placement, sharing, due in itertools.product(
            options.target,
            options.model,
            options.optimizer,
            options.placement,
            options.weight_sharing,
            options.due,
        )
    )
    return list(dict.fromkeys(case.normal() for case in cases))


def acceptance(options: argparse.Namespace) -> list[Case]:
    """Returns the cases that have bounds, with the command line's other settings."""
    v5e, h100 = [Target("v5e", 4)], [Target("h100", 1), Target("h100", 8)]
    larger = [Target("v5e", n) for n in (16, 64, 256)]
    common = {
        "model": ["resnet50"],
        "optimizer": ["sp_ngd"],
        "placement": ["comm"],
        "due": ["none", "statistics", "all"],
        "weight_sharing": ["expand"],
    }
    scattered = {"placement": ["comm", "memory"], "due": ["all"]}
    cases = []
    for changes in (
        {"target": v5e, "optimizer": ["sp_ngd", "sp_ngd_adaptive"]},
        {"target": v5e, "due": ["all"], "weight_sharing": ["reduce"]},
        {"target": h100, "model": ["resnet20", "resnet50"]},
        {"target": [*v5e, *larger, h100[-1]], **scattered},
    ):
        settings = {**vars(options), **common, **changes}
        cases += chosen(argparse.Namespace(**settings))
    # Those of one problem together, for a single SGD before them.
    return sorted(set(cases), key=lambda case: (case[:3], cases.index(case)))


def with_baselines(cases: Sequence[Case]) -> Iterator[Case]:
    """Yields the cases, with SGD's before those of each problem."""
    for baseline, group in itertools.groupby(cases, Case.baseline):
        yield baseline
        yield from (case for case in group if case != baseline)


def in_child(case: Case, programs: pathlib.Path | None) -> harness.Record:
    """Compiles a case in a process with the environment that its compiler needs."""
    if programs is not None:
        programs.mkdir(parents=True, exist_ok=True)
    with _environment({"JAX_PLATFORMS": "cpu", **case.target.kind.variables}):
        try:
            return harness.in_new_process(aot_steps.compile_case, case, programs)
        except BrokenProcessPool:
            return {"error": "the process died, as it does when memory runs out"}


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    if flags := before.get("XLA_FLAGS"):
        os.environ["XLA_FLAGS"] = f"{flags} {variables.get('XLA_FLAGS', '')}"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _begin(argv: Sequence[str] | None, path: pathlib.Path | None) -> harness.Record:
    """Starts a record with the rows that its file holds already."""
    # An accelerator that the machine has is of no use here.
    jax.config.update("jax_platforms", "cpu")
    record = harness.begin("aot", argv, {"dtype": "bfloat16"})
    packages = {chip.package for chip in CHIPS.values() if chip.package}
    for package in sorted(packages):
        if version := aot_steps.version(package):
            record["versions"][package] = version
    record["rows"] = rows_of(path, [])
    return record


def rows_of(
    path: pathlib.Path | None, known: Sequence[harness.Record]
) -> list[harness.Record]:
    """Returns the rows of a record's file, those known where there is no file."""
    if path is None or not path.exists():
        return list(known)
    return json.loads(path.read_text("utf-8"))["rows"]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def case_of(row: harness.Record) -> Case:
    """Returns the case of a row."""
    case = Case._make(row[field] for field in Case._fields)
    return case._replace(target=aot_steps.parse_target(row["target"]))


# -------------------------------------------------------------------------- the table


def table(rows: Sequence[harness.Record]) -> str:
    """Formats the latest row of each case in Markdown, beside SGD's of its run."""
    latest = {case_of(row): row for row in rows}
    by_run = {(row["run"], case_of(row)): row for row in rows}
    parts = []
    for problem, group in itertools.groupby(latest, Case.problem):
        pairs = []
        for case in group:
            base = by_run.get((latest[case]["run"], case.baseline()), {})
            pairs.append((case, latest[case], base))
        parts.append(f"\n**{problem}**")
        parts.append(_markdown([_sizes(*pair) for pair in pairs]))
        costs = [_costs(*pair) for pair in pairs if pair[1].get("cycles")]
        parts += [_markdown(costs)] if costs else []
    return "\n\n".join(parts)


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    heads = max(rows, key=len)  # a step that failed has fewer cells
    lines = [list(heads), ["---"] * len(heads)]
    lines += [[row.get(head, "") for head in heads] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _sizes(case: Case, row: harness.Record, base: harness.Record) -> dict[str, str]:
    """The cells of a step: compiling, memory, and what the program holds."""
    cells = {"step": case.step()}
    if "error" in row:
        return {**cells, "lower s": f"FAILED {row['error'].splitlines()[0][:150]}"}
    memory, opcodes = row["memory"], row["instructions"]
    cells |= {
        "lower s": _over(row["lower_seconds"], base.get("lower_seconds")),
        "compile s": _over(row["compile_seconds"], base.get("compile_seconds")),
        "CPU s": _over(row["compile_cpu_seconds"], base.get("compile_cpu_seconds")),
        "text MB": _over(row["text_bytes"] / 1e6, base.get("text_bytes", 0) / 1e6),
    }
    for kind in ("code", "arguments", "temporaries"):
        # XLA:GPU does not count the code.
        cells[f"{kind} MB"] = f"{memory[kind] / 1e6:,.0f}" if memory[kind] else "–"
    cells["fits"] = "yes" if memory["fits"] else "NO"
    for opcode in ("while", "conditional", "fusion", "copy"):
        cells[opcode] = f"{opcodes.get(opcode, 0):,}"
    for kind in _KINDS:
        found = [one for one in row["collectives"] if one["kind"] == kind]
        count, size = (sum(one[key] for one in found) for key in ("count", "bytes"))
        cells[f"{kind} (MB)"] = f"{count} ({size / 1e6:.1f})" if count else "0"
    cells["statistics' all-reduce"] = f"{row['statistics_all_reduce']:,}"
    return cells


def _costs(case: Case, row: harness.Record, base: harness.Record) -> dict[str, str]:
    """The cells of a step's estimated cycles."""
    cycles: dict[str, Any] = row["cycles"]
    million = {part: cycles.get(part, 0) / 1e6 for part in PART_NAMES}
    total, sgd = sum(million.values()), sum(base.get("cycles", {}).values()) / 1e6
    return {
        "estimated cycles, millions": case.step(),
        "in all": _over(total, sgd),
        "all but inversion": _over(total - million[INVERSION], sgd),
        **{part: f"{cost:.2f}" for part, cost in million.items()},
        "loops counted once": str(row["open_loops"]),
    }


def _over(value: float, base: float | None) -> str:
    """Formats a number and its ratio over SGD's."""
    return f"{value:.1f} ({value / base:.2f}×)" if base else f"{value:.1f}"


if __name__ == "__main__":
    main()
