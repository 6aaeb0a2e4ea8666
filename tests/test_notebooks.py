"""Each notebook runs, prints what is committed, and its outputs are of its cells."""

import base64
import io
import pathlib
import re

import matplotlib.image
import nbformat
import numpy as np
import pytest

from notebooks import execute

PATHS = sorted(execute.FOLDER.glob("*.ipynb"))
LARGEST = 1 << 20
"""Bytes of a notebook: pages with heavier ones are slow to open."""

of_each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


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
    assert sum(map(len, execute.pictures(notebook))) >= 2
    # A warning names a file of the machine that it ran on.
    streams = [x.get("name") for c in notebook.cells for x in c.get("outputs", ())]
    assert "stderr" not in streams
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


# These take a minute; the others show the same functions in the quick run.
LONG = ("03_sp_ngd_sharded", "04_large_batch")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.slow if path.stem in LONG else ())
        for path in PATHS
    ],
    ids=lambda path: path.stem,
)
def test_it_runs_and_prints_what_is_committed(path, monkeypatch):
    """Numbers may differ by what other processors round differently."""
    # As in this process: most of the time goes into compiling.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    kept, new = nbformat.read(path, as_version=4), execute.executed(path)
    assert execute.prints_alike(new, kept), list(
        zip(execute.printed(kept), execute.printed(new), strict=True)
    )
    counts = [list(map(len, execute.pictures(x))) for x in (new, kept)]
    assert counts[0] == counts[1]


def notebook_of(source, text):
    """A notebook of one cell that prints a text, as it is after a run."""
    output = nbformat.v4.new_output("stream", text=text)
    cell = nbformat.v4.new_code_cell(source, outputs=[output], id="a")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata[execute.MARK] = execute.source_mark(notebook)
    return notebook


@pytest.mark.parametrize(
    ("committed", "written"),
    [
        ("loss 1.01, off 2e-06\n", False),  # rounding
        ("loss 1.5, off 1e-06\n", True),
        ("Loss 1.00, off 1e-06\n", True),
        ("loss 1.00, off 1e-06\nand more\n", True),
    ],
)
def test_only_what_changed_is_written(monkeypatch, tmp_path, committed, written):
    monkeypatch.setattr(execute, "FOLDER", tmp_path)
    new = notebook_of("run()", "loss 1.00, off 1e-06\n")
    monkeypatch.setattr(execute, "executed", lambda path: new)
    path = tmp_path / "01.ipynb"
    nbformat.write(notebook_of("run()", committed), path)
    before = path.read_bytes()
    execute.main([])
    assert (path.read_bytes() != before) == written
    if written:
        assert nbformat.read(path, as_version=4).cells[0].outputs == (
            new.cells[0].outputs
        )
    # Whatever is printed, a cell that changed is written.
    nbformat.write(notebook_of("old()", "loss 1.00, off 1e-06\n"), path)
    execute.main([])
    assert nbformat.read(path, as_version=4).cells[0].source == "run()"


def test_pictures_are_compared_by_what_they_show():
    def shown(size, height):
        picture = np.ones((*size, 3))
        picture[height : height + 4] = 0
        file = io.BytesIO()
        matplotlib.image.imsave(file, picture)
        data = {"image/png": base64.b64encode(file.getvalue()).decode()}
        cell = nbformat.v4.new_code_cell(
            outputs=[nbformat.v4.new_output("display_data", data=data)]
        )
        return nbformat.v4.new_notebook(cells=[cell])

    picture = shown((400, 300), 100)
    assert execute.shows_alike(picture, shown((400, 300), 101))
    assert not execute.shows_alike(picture, shown((400, 300), 200))
    assert not execute.shows_alike(picture, shown((401, 300), 100))
    assert not execute.shows_alike(picture, notebook_of("", ""))
