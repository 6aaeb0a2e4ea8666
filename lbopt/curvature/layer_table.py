"""The table of a model's layers and their curvature blocks."""

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from lbopt import sizes, tables
from lbopt.curvature import block as blocks
from lbopt.curvature import capture, eigen_moments
from lbopt.curvature.terms import UNKNOWN, Terms


class Layer(NamedTuple):
    """A row of the table: arrays of the parameters that share a block.

    Attributes:
      path: the keys of the parameters joined by slashes.
      module: the Flax class, or ``parameter``.
      tapped: location, block and lifted axes.
      has_tap: whether the statistics come from a tap; if not, from the gradient.
      shapes: the arrays' shapes by name, lifted axes included.
      why: the reason for this block.
      fallback: whether no rule matched and the block is the diagonal one.
      used: whether the loss depends on it; if not, it has no curvature.
    """

    path: str
    module: str
    tapped: capture.Tapped
    has_tap: bool
    shapes: Mapping[str, tuple[int, ...]]
    why: str
    fallback: bool
    used: bool

    def __repr__(self) -> str:
        """Returns one line, in place of the functions of the block."""
        mark = "!" if self.fallback or not self.used else ""
        kind = f"{self.block.kind} {_sizes(self)}" if self.used else "unused"
        size = sizes.text_of(self.state_bytes() if self.used else 0)
        return f"{mark}Layer({self.path!r}, {self.module}, {kind}, {size}, {self.why})"

    @property
    def block(self) -> blocks.CurvatureBlock:
        """The layer's curvature block."""
        return self.tapped.block

    def factor_shapes(self) -> Any:
        """Returns the shapes and dtypes of the layer's packed factors."""
        return self.block.factor_shapes(self.tapped.copies)

    def state_bytes(self) -> int:
        """Returns the bytes of the layer's factors and inverses."""
        # Abstractly: nothing of this size is allocated for a table.
        state = jax.eval_shape(lambda: self.block.init(self.tapped.copies))
        return sum(
            math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state)
        )


# A Mapping, not a dict: immutable, and no pytree, hence a constant of the program.
class Layers(Mapping[str, Layer]):
    """The layers of a model by path, in the order of its parameters.

    Made by :func:`trace_layers`; ``print(layers)`` shows a table.  It holds no arrays
    and is a constant of the compiled program.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        terms: Terms = UNKNOWN,
        accepted: capture.Accepted = MappingProxyType({}),
    ) -> None:
        """Makes the table.

        Args:
          layers: the layers by path.
          terms: the terms that the loss averages.
          accepted: the trees that the loss maps from its parameters, and that count as
            the parameters.
        """
        self._layers = dict(layers)
        self.terms = terms
        self.accepted = accepted

    def __getitem__(self, path: str) -> Layer:
        """Returns the layer at a path."""
        return self._layers[path]

    def __iter__(self) -> Iterator[str]:
        """Iterates over the paths, in the order of the parameters."""
        return iter(self._layers)

    def __len__(self) -> int:
        """Returns the number of layers."""
        return len(self._layers)

    @property
    def preconditioned(self) -> dict[str, Layer]:
        """The layers that the loss depends on."""
        return {path: layer for path, layer in self.items() if layer.used}

    def __repr__(self) -> str:
        """Returns the table: path, module, block, sizes, bytes of state and reason."""
        rows = [("", "path", "module", "block", "sizes", "state", "why")]
        total = 0
        # "!" marks the rows that strict=True refuses.
        for path, layer in self.items():
            size = layer.state_bytes() if layer.used else 0
            total += size
            rows.append(
                (
                    "!" if layer.fallback or not layer.used else "",
                    path,
                    layer.module,
                    layer.block.kind if layer.used else "none",
                    _sizes(layer) if layer.used else "",
                    sizes.text_of(size),
                    layer.why,
                )
            )
        marked = sum(row[0] == "!" for row in rows)
        rows.append(("", f"{len(self)} layers", "", "", "", sizes.text_of(total), ""))
        lines = tables.aligned(rows, right=[5])  # bytes
        lines.append(f"terms: {self.terms.text}")
        if marked:
            lines.append(f"! {marked} without a block of their own (see why)")
        return "\n".join(lines)


def configured(
    layers: Mapping[str, Layer],
    *,
    block_size: int | None = None,
    corrected: bool = False,
) -> dict[str, Layer]:
    """Replaces the blocks of layers by the variants that an optimizer needs.

    Args:
      layers: layers by path.
      block_size: as for ``scale_by_kfac``.
      corrected: whether blocks with ``moments`` have eigenbases instead of inverses.

    Returns:
      The layers by path.
    """

    def one(layer: Layer) -> Layer:
        block = layer.block
        if block.cut is not None:
            block = block.cut(block_size)
        if corrected and block.moments is not None:
            block = eigen_moments.in_eigenbases(block)
        return layer._replace(tapped=layer.tapped._replace(block=block))

    return {path: one(layer) for path, layer in layers.items()}


def _sizes(layer: Layer) -> str:
    copies = "×".join(map(str, layer.tapped.copies))
    # (1, 1) is the number of rows, which is no statistic.
    shapes = [
        "×".join(map(str, s.shape)) for s in layer.block.sums if s.shape != (1, 1)
    ]
    return " + ".join(shapes) + (f" (× {copies})" if copies else "")
