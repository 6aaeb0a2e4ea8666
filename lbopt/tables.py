"""Tables of text."""

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Pads the cells of rows to the widths of their columns.

    Args:
      rows: the cells of each row, the same number in all.
      right: the columns that are aligned to the right, by number.

    Returns:
      A line for each row.

    Examples:
      >>> from lbopt import tables
      >>> tables.aligned([("path", "rows"), ("dense", "5")], right=[1])
      ['path   rows', 'dense     5']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
