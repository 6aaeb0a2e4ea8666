"""Each notebook runs, prints what is committed, and its outputs are of its cells."""

import itertools
import pathlib
import re

import nbformat
import pytest

from notebooks import execute

PATHS = sorted(execute.FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]?\d+)?")
LARGEST = 1 << 20
"""Bytes of a notebook: pages with heavier ones are slow to open."""

of_each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def printed(notebook):
    """What the cells print, each a text; pictures are left out."""
    return [
        "".join(x.text for x in cell.outputs if x.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def pictures(notebook):
    """How many pictures each cell shows."""
    return [
        sum("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_there_are_notebooks():
    assert len(PATHS) >= 4


@of_each
def test_outputs_are_those_of_the_cells(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.get(execute.MARK) == execute.source_mark(notebook), (
        f"{path.name} was changed after it ran: python -m notebooks.execute {path.stem}"
    )
    numbers = [c.execution_count for c in notebook.cells if c.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))
    assert sum(pictures(notebook)) >= 2
    assert path.stat().st_size < LARGEST


@of_each
def test_links_lead_somewhere(path):
    text = "\n".join(
        cell.source
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
    )
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (path.parent / pathlib.Path(target)).exists(), target


@of_each
def test_it_runs_and_prints_what_is_committed(path, monkeypatch):
    """Numbers may differ by what other processors round differently."""
    # As in this process: most of the time goes into compiling.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    kept, new = nbformat.read(path, as_version=4), execute.executed(path)
    assert pictures(new) == pictures(kept)
    for before, now in zip(printed(kept), printed(new), strict=True):
        assert NUMBER.sub("#", now) == NUMBER.sub("#", before)
        for a, b in itertools.zip_longest(NUMBER.findall(before), NUMBER.findall(now)):
            # Below 1e-4 are differences that are zero but for rounding.
            assert float(b) == pytest.approx(float(a), rel=0.1, abs=1e-4)
