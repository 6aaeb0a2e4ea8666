"""Tables and numbers of a page in Markdown."""

import datetime
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from lbopt import sizes


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of Markdown.

    Args:
        head: Names of the columns.
        rows: Their values.

    Returns:
        Lines of text; the first column is set to the left, the others to the right in
        tables of three columns and more.
    """
    align = ["---"] + ["--:" if len(head) > 2 else "---"] * (len(head) - 1)
    lines = [head, align, *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def number(value: float | None, decimals: int) -> str | None:
    """A number with thousands marked; None stays None."""
    return None if value is None else f"{value:,.{decimals}f}"


def percent(value: float | None) -> str | None:
    """A share; None stays None."""
    return None if value is None else f"{value:.1%}"


def size(number_of_bytes: float | None) -> str | None:
    """Bytes in the unit that suits them; None stays None."""
    return None if number_of_bytes is None else sizes.text_of(number_of_bytes)


def duration(seconds: float) -> str:
    """Seconds as people say them.

    Args:
        seconds: The seconds.

    Returns:
        Such as `1:02:03`, or `12.3 s` below a minute.
    """
    if seconds < 60:
        return f"{seconds:.3g} s"
    return str(datetime.timedelta(seconds=round(seconds)))


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file as a whole, or leaves the old one."""
    aside = path.with_suffix(".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
