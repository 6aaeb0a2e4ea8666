"""Runs the notebooks and keeps their outputs, with a mark of what was run.

    python -m notebooks.execute                   all of them
    python -m notebooks.execute 01 03             those whose names begin so

Outputs are committed, so that the pages read well where they are not run. The mark is a
checksum of the cells' source: a test compares it with the cells that are there, runs
the notebook again, and compares what is printed. A notebook whose outputs differ from
the committed ones by rounding alone is left as it is.
"""

import base64
import hashlib
import io
import itertools
import math
import pathlib
import re
import sys
import time
from collections.abc import Sequence

import matplotlib.image
import nbclient
import nbformat
import numpy as np

FOLDER = pathlib.Path(__file__).parent
MARK = "source_when_run"
"""The field of a notebook's metadata that holds the checksum."""
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
_NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]?\d+)?")
TIMEOUT = 600
"""Seconds that a cell may take before it counts as hanging."""


def source_mark(notebook: nbformat.NotebookNode) -> str:
    """A checksum of all cells' source.

    Args:
        notebook: The notebook.

    Returns:
        The checksum.
    """
    sources = "\n".join(f"{cell.cell_type}\n{cell.source}" for cell in notebook.cells)
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def executed(path: pathlib.Path) -> nbformat.NotebookNode:
    """A notebook with the outputs of a run in a fresh kernel.

    Args:
        path: The notebook.

    Returns:
        The notebook; the file is left as it is.
    """
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        kernel_name=KERNEL["name"],
        timeout=TIMEOUT,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which differ at every run
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": KERNEL,
            "language_info": {"name": "python"},
            MARK: source_mark(notebook),
        }
    )
    return notebook


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each code cell prints; pictures and tables are left out."""
    return [
        "".join(x.text for x in cell.outputs if x.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def pictures(notebook: nbformat.NotebookNode) -> list[list[bytes]]:
    """The pictures of each code cell."""
    return [
        [
            base64.b64decode(output["data"]["image/png"])
            for output in cell.outputs
            if "image/png" in output.get("data", {})
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def prints_alike(a: nbformat.NotebookNode, b: nbformat.NotebookNode) -> bool:
    """Whether two runs print the same, but for what processors round differently.

    Args:
        a: A notebook that has run.
        b: Another one.

    Returns:
        Whether all texts are equal and all numbers within a tenth, or below 1e-4: those
        are differences that are zero but for rounding.
    """
    texts = list(itertools.zip_longest(printed(a), printed(b), fillvalue=""))
    return all(
        _NUMBER.sub("#", x) == _NUMBER.sub("#", y)
        and all(
            math.isclose(float(m), float(n), rel_tol=0.1, abs_tol=1e-4)
            for m, n in zip(_NUMBER.findall(x), _NUMBER.findall(y), strict=True)
        )
        for x, y in texts
    )


def shows_alike(a: nbformat.NotebookNode, b: nbformat.NotebookNode) -> bool:
    """Whether two runs show the same pictures, but for fonts and edges of lines.

    Args:
        a: A notebook that has run.
        b: Another one.

    Returns:
        Whether all pictures are of one size and differ by 0.5 % of black in the mean.
    """
    before, now = pictures(a), pictures(b)
    if list(map(len, before)) != list(map(len, now)):
        return False
    pairs = zip(itertools.chain(*before), itertools.chain(*now), strict=True)
    decoded = ([matplotlib.image.imread(io.BytesIO(x)) for x in pair] for pair in pairs)
    return all(x.shape == y.shape and np.abs(x - y).mean() < 0.005 for x, y in decoded)


def main(beginnings: Sequence[str] | None = None) -> None:
    """Runs notebooks, and writes their outputs into those that are not as committed.

    Args:
        beginnings: What their names begin with; none for all, `None` for those of the
            command line.

    Raises:
        SystemExit: If none is called so.
    """
    beginnings = tuple(sys.argv[1:] if beginnings is None else beginnings) or ("",)
    paths = [p for p in sorted(FOLDER.glob("*.ipynb")) if p.name.startswith(beginnings)]
    if not paths:
        raise SystemExit(f"error: no notebook begins with {' or '.join(beginnings)}")
    for path in paths:
        begin = time.perf_counter()
        kept, notebook = nbformat.read(path, as_version=4), executed(path)
        same = kept.metadata.get(MARK) == notebook.metadata[MARK]
        if same and prints_alike(kept, notebook) and shows_alike(kept, notebook):
            outcome = "as committed"
        else:
            nbformat.write(notebook, path)
            outcome = "written"
        print(
            f"{path.name}: {outcome}, {time.perf_counter() - begin:.0f} s", flush=True
        )


if __name__ == "__main__":
    main()
