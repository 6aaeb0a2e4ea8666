"""The Markdown page of the accelerator's record."""

from collections.abc import Mapping
from typing import Any

from benchmarks import harness, timing
from benchmarks.harness import Record

_KINDS = {
    "none": "nothing due",
    "stats": "statistics",
    "full": "+ inverses",
    "some": "some due",
    "step": "every step",
}
_MIXED = {"1/10": "1/10", "10/10": "10/10"}


def table(record: Record) -> str:
    """Returns the whole page."""
    device = record["device"]
    memory = record["device_bytes"]
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    lines = [
        f"# {device}",
        "",
        f"`{record['command']}`, {record['date']}; {record['processor']}, "
        f"{record['cores']} cores; {versions}; commit {record['commit']}, code "
        f"{record['digest']}."
        + ("" if memory is None else f" {memory / 1e9:.1f} GB for programs."),
        "",
        *_outcomes(record["parts"]),
    ]
    for name, entry in record["parts"].items():
        rows = entry["rows"]
        if rows:
            format_part = _FORMATS[name.partition(",")[0]]
            lines += ["", f"## {name[0].upper()}{name[1:]}", "", *format_part(rows)]
            if name.startswith("shares"):
                steps = record["parts"].get(name.replace("shares", "curvature"), {})
                lines += _beside_whole(rows, steps.get("rows", {}))
    return "\n".join(lines) + "\n"


def _outcomes(entries: Mapping[str, Record]) -> list[str]:
    rows = [
        (name, e["status"], f"{e['seconds']:.0f}", e["why"])
        for name, e in entries.items()
    ]
    return [harness.markdown(("part", "", "seconds", "why"), rows)]


def _agreement(rows: Mapping[str, Record]) -> list[str]:
    quantities = list(next(iter(rows.values()))["errors"])

    def cell(row: Record, key: str) -> str:
        found, allowed = row["errors"][key], row["tolerances"][key]
        text = "not finite" if found is None else f"{found:.0e}"
        within = found is not None and found <= allowed
        return f"{text} of {allowed:.0e}" if within else f"**{text}** of {allowed:.0e}"

    wrong = [name for name, row in rows.items() if not row["agrees"]]
    return [
        "Largest relative error against the host's CPU, of what is allowed. "
        + (f"**Not within: {'; '.join(wrong)}.**" if wrong else "All are within."),
        "",
        harness.markdown(
            ("model", *quantities),
            [(name, *(cell(r, key) for key in quantities)) for name, r in rows.items()],
        ),
    ]


def _inverses(rows: Mapping[str, Record]) -> list[str]:
    methods = list(next(iter(rows.values())))

    def cells(row: Record, method: str) -> tuple[str, str, str]:
        found = row.get(method)
        if found is None:
            return "", "", ""
        milliseconds = found["milliseconds"]["median"]
        error = "not finite" if found["error"] is None else f"{found['error']:.0e}"
        return f"{milliseconds:.2f}", f"{found['compile_seconds']:.1f}", error

    heads = [
        f"{m}{what}" for m in methods for what in (", ms", ", compile s", ", error")
    ]
    body = [
        (name, *(cell for m in methods for cell in cells(row, m)))
        for name, row in rows.items()
    ]
    return [harness.markdown(("rows", *heads), body)]


def _steps(rows: Mapping[str, Record]) -> list[str]:
    body = []
    for name, row in rows.items():
        if "error" in row:
            body.append((name, row["error"], "", "", "", "", "", "", ""))
            continue
        skipped = row["skipped"]  # steps with numbers that were not finite
        body.append(
            (
                name,
                _spreads(row["milliseconds"], _KINDS),
                _spreads(row["ratios"], _KINDS),
                _spreads(row["ratios"], _MIXED),
                f"{row['queued_milliseconds']:.1f} ({row['queued_ratio']:.2f}×)",
                _megabytes(row["state_bytes"]),
                _megabytes(max(b["total"] for b in row["bytes"].values())),
                _megabytes(row["peak_bytes_so_far"]),
                row["course"] + (f", {skipped} SKIPPED" if skipped else ""),
            )
        )
    batch = next(iter(rows.values()))["batch_size"]
    heads = "ms a step", "over SGD", "amortised", "queued, ms", "state MB"
    counts = "program MB", "peak so far MB", "loss"
    return [
        f"Batch {batch}; medians (smallest–largest). Queued steps are those of the "
        "whole cycle, none waited for. Program: state, batch and temporaries, by the "
        "compiler; peak: of the process until then, with SGD's state.",
        "",
        harness.markdown(("", *heads, *counts), body),
    ]


def _spreads(values: Mapping[str, Any], names: Mapping[str, str]) -> str:
    return "; ".join(
        f"{name} {timing.Spread(**values[key])}"
        for key, name in names.items()
        if key in values
    )


def _largest(rows: Mapping[str, Record]) -> list[str]:
    body = [
        (
            size,
            "yes" if row["fits"] else "no",
            _megabytes(row["bytes"] and row["bytes"]["total"]),
            _megabytes(row.get("peak_bytes_so_far")),
        )
        for size, row in rows.items()
    ]
    heads = "batch", "fits", "program MB", "peak so far MB"
    return [harness.markdown(heads, body)]


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def parts_of_step(rows: Mapping[str, Record]) -> dict[str, float]:
    """Returns the milliseconds of the parts of a step in which everything is due.

    Args:
      rows: what ``accelerator_shares.measure`` reported.

    Returns:
      Differences of the programs' times, in the order of the step; a part that takes
      less time than the noise may be negative.
    """
    gradient, both = (rows[k]["median"] for k in ("gradient", "with statistics"))
    update = rows["update"]
    return {
        "loss and gradient": gradient,
        "statistics": both - gradient,
        "averaging": update["stats"] - update["none"],
        "inversion": update["full"] - update["stats"],
        "update": update["none"],
    }


def _shares(rows: Mapping[str, Record]) -> list[str]:
    if "update" not in rows:
        return ["Incomplete."]
    found = parts_of_step(rows)
    total = sum(found.values())
    body = [
        (name, f"{ms:.1f}", f"{100 * ms / total:.0f} %") for name, ms in found.items()
    ]
    return [harness.markdown(("K-FAC, everything due", "ms", "share"), body)]


def _beside_whole(rows: Mapping[str, Record], steps: Mapping[str, Record]) -> list[str]:
    """Compares the sum of the parts with the step's own time."""
    whole = steps.get("K-FAC", {}).get("milliseconds", {}).get("full")
    if whole is None or "update" not in rows:
        return []
    total = sum(parts_of_step(rows).values())
    return [
        "",
        f"Programs apart: {total:.1f} ms; the whole step: {whole['median']:.1f} ms.",
    ]


_FORMATS = {
    "agreement": _agreement,
    "inverses": _inverses,
    "curvature": _steps,
    "first order": _steps,
    "EKFAC": _steps,
    "largest batch": _largest,
    "shares": _shares,
}
