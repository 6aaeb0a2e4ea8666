"""Runs the notebooks and keeps their outputs, with a mark of what was run.

    python -m notebooks.execute                   all of them
    python -m notebooks.execute 01 03             those whose names begin so

Outputs are committed, so that the pages read well where they are not run. The mark is a
checksum of the cells' source: a test compares it with the cells that are there, runs
the notebook again, and compares what is printed.
"""

import hashlib
import pathlib
import sys
import time
from collections.abc import Sequence

import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).parent
MARK = "source_when_run"
"""The field of a notebook's metadata that holds the checksum."""
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
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


def main(beginnings: Sequence[str] | None = None) -> None:
    """Runs notebooks and writes their outputs into them.

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
        notebook = executed(path)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
