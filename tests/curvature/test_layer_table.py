"""The table of a model's layers."""

import jax
import jax.numpy as jnp
import pytest

from lbopt.curvature import capture
from lbopt.curvature.diagonal import diagonal_block
from lbopt.curvature.layer_table import Layer, Layers
from lbopt.curvature.locations import Location
from lbopt.curvature.terms import Terms


def row(path, name, shape, copies=(), **changes):
    tapped = capture.Tapped(
        Location(tuple(path.split("/")), (name,)),
        diagonal_block(name, shape, jnp.float32),
        copies,
        tuple(range(len(copies))),
    )
    shapes = {name: (*copies, *shape)}
    one = Layer(path, "Gate", tapped, False, shapes, f"why {name}", False, True)
    return one._replace(**changes)


ROWS = {
    "b/gate": row("b/gate", "gate", (100, 10)),
    "a": row("a", "scale", (5,), copies=(3, 2), fallback=True),
    "unused": row("unused", "bias", (7,), used=False),
}
TERMS = Terms(((0, 0),), (0,), (0,), None, 8, 8, "8, mean over axis 0 of the outputs")


def test_it_is_a_mapping_in_the_order_of_the_parameters():
    layers = Layers(ROWS)
    assert list(layers) == ["b/gate", "a", "unused"]
    assert layers["a"] is ROWS["a"]
    assert len(layers) == 3
    assert "c" not in layers
    assert list(layers.preconditioned) == ["b/gate", "a"]


def test_it_is_a_constant_of_the_program():
    rows = dict(ROWS)
    layers = Layers(rows)
    rows.clear()
    assert len(layers) == 3
    assert jax.tree.leaves(layers) == [layers]
    with pytest.raises(TypeError):
        layers["a"] = ROWS["a"]


def test_bytes_are_those_of_factors_and_inverses_of_all_copies():
    # A number for each entry of the diagonal and one for its inverse, of four bytes.
    assert ROWS["b/gate"].state_bytes() == 4 * 2 * 1000
    assert ROWS["a"].state_bytes() == 4 * 2 * (3 * 2 * 5)
    (shape,) = jax.tree.leaves(ROWS["a"].factor_shapes())
    assert (shape.shape, shape.dtype) == ((3, 2, 5), jnp.float32)


def test_the_text_has_a_row_for_each_layer():
    lines = str(Layers(ROWS, TERMS)).splitlines()
    cells = [[x for x in line.split("  ") if x] for line in lines]
    cells = [[x.strip() for x in row] for row in cells]
    assert cells == [
        ["path", "module", "block", "sizes", "state", "why"],
        ["b/gate", "Gate", "diagonal", "100×10", "8 kB", "why gate"],
        ["!", "a", "Gate", "diagonal", "5 (× 3×2)", "240 B", "why scale"],
        ["!", "unused", "Gate", "none", "0 B", "why bias"],
        ["3 layers", "8.24 kB"],
        ["terms: 8, mean over axis 0 of the outputs"],
        ["! 2 without a block of their own (see why)"],
    ]
    # Columns are aligned.
    starts = {line.index("Gate") for line in lines[1:4]}
    assert starts == {lines[0].index("module")}
    assert "!" not in str(Layers({"b/gate": ROWS["b/gate"]}))
