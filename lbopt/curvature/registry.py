"""Which layer gets which curvature block: ``trace_layers`` and the table it returns."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbopt import sizes
from lbopt._typing import Array, Params
from lbopt.curvature import block as blocks
from lbopt.curvature import (
    capture,
    diagonal,
    discovery,
    kronecker,
    tap_rules,
    unit_wise,
    verification,
)

Sharing: TypeAlias = kronecker.WeightSharing | Callable[[str], kronecker.WeightSharing]


class Layer(NamedTuple):
    """One row of the table: arrays of the parameters that share a block.

    Attributes:
      path: its name, the keys of the parameters joined by slashes.
      module: the Flax class, or ``parameter``.
      tapped: location, block and lifted axes.
      has_tap: whether the statistics come from a tap, else from the gradient.
      shapes: the arrays' shapes by name, lifted axes included.
      why: why it has this block.
      fallback: whether no rule knew it.
      used: whether the loss depends on it; if not it has no curvature.
    """

    path: str
    module: str
    tapped: capture.Tapped
    has_tap: bool
    shapes: Mapping[str, tuple[int, ...]]
    why: str
    fallback: bool
    used: bool

    @property
    def block(self) -> blocks.CurvatureBlock:
        """The layer's curvature block."""
        return self.tapped.block

    def factor_shapes(self) -> Any:
        """Shapes and dtypes of its packed factors."""
        return self.block.factor_shapes(self.tapped.copies)

    def state_bytes(self) -> int:
        """Bytes of the factors and inverses kept for it."""
        state = jax.eval_shape(lambda: self.block.init(self.tapped.copies))
        return sum(
            math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state)
        )


class Layers(Mapping[str, Layer]):
    """The layers of a model by path, in the order of its parameters.

    ``print(layers)`` is a table.  Made by :func:`trace_layers`; it holds no arrays and
    is used as a constant of the program.

    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._layers = dict(layers)

    def __getitem__(self, path: str) -> Layer:
        """The layer at a path."""
        return self._layers[path]

    def __iter__(self) -> Iterator[str]:
        """The paths, in the order of the parameters."""
        return iter(self._layers)

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self._layers)

    @property
    def preconditioned(self) -> dict[str, Layer]:
        """The layers that the loss depends on."""
        return {path: layer for path, layer in self.items() if layer.used}

    def __repr__(self) -> str:
        """The table: path, module, block, why, sizes, bytes, and the total."""
        rows = [("", "path", "module", "block", "sizes", "state", "why")]
        total = 0
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
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(w) if i == 5 else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        if marked:
            lines.append(f"! {marked} without a block of their own (see why)")
        return "\n".join(lines)


def trace_layers(
    loss_fn: Callable[..., Any],
    params: Params,
    *args: Any,
    has_aux: bool = False,
    strict: bool = False,
    verify: bool = False,
    weight_sharing: Sharing = "expand",
    norm_blocks: unit_wise.NormBlocks = "unit_wise",
    doubly_factored: int | Mapping[str, tuple[int, int]] | None = None,
    rules: Mapping[Any, Any] | None = None,
    batch_size: int | None = None,
) -> Layers:
    """Finds the layers of a model and gives each a curvature block.

    The loss is traced abstractly; nothing is computed, unless ``verify`` is set.

    Args:
      loss_fn: ``loss_fn(params, *args) -> loss`` or ``(loss, aux)``; calls
        ``model.apply`` inside.  The loss is a mean over the batch.
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.
      *args: the other arguments, likewise; one of them holds the batch.
      has_aux: whether the loss returns ``(loss, aux)``.
      strict: refuse parameters that no rule knows or that the loss does not use,
        instead of marking them in the table.
      verify: run one batch and check that the statistics are truly the layers' (see
        ``curvature.verification``); needs arrays.
      weight_sharing: how locations that share a kernel are treated: ``"expand"``
        (KFC), ``"reduce"``, or a function from a layer's path to one of them.
      norm_blocks: the blocks of normalisation layers: ``"unit_wise"``, for each channel
        the 2×2 matrix of its own scale and bias, or ``"full"``, the whole matrix of
        all scales and biases of a layer, of 2 × channels rows.
      doubly_factored: which ``nn.Dense`` layers on a flattened feature map (channels
        last) get a factor of its locations and one of its channels in the place of one
        of all inputs (see ``curvature.doubly_factored``): those whose input factor
        would have more rows than this number, if the last layer with a kernel before
        them is a convolution whose channels explain the map; or these,
        ``{path: (locations, channels)}``; or none.
      rules: how layers of your own are tapped, or those of Flax otherwise, by method:
        ``{MyLayer.__call__: Rule(block, residual, names)}``; see ``tap_rules.Rule``.
      batch_size: examples in the batch, where it cannot be read off the arguments.

    Returns:
      The layers; ``print`` shows them as a table.

    Raises:
      ValueError: if the loss does not depend on the parameters, applies raw JAX
        transforms around bound modules, or, when strict, leaves parameters without a
        block of their own; or if ``doubly_factored`` names one without such a
        map.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Dense(3), jnp.ones((8, 5))
      >>> params = {"top": model.init(jax.random.key(0), x)["params"]}
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params["top"]}, x) ** 2)
      >>> layers = lbopt.trace_layers(loss_fn, params, x)
      >>> layers["top"].block.kind
      'kronecker'
    """
    if weight_sharing not in ("expand", "reduce") and not callable(weight_sharing):
        raise ValueError(
            f"weight_sharing={weight_sharing!r} must be 'expand', 'reduce' or a "
            "function from a layer's path to one of them"
        )
    if norm_blocks not in unit_wise.BLOCKS:
        raise ValueError(
            f"norm_blocks={norm_blocks!r} must be one of {sorted(unit_wise.BLOCKS)}"
        )
    n = discovery.infer_batch_size(args) if batch_size is None else batch_size
    locations = capture.find_locations(params)
    _refuse_unnamed(params, locations)
    if not locations:
        raise ValueError(
            f"params={type(params).__name__} holds no arrays; pass the parameters as "
            "Flax makes them, for example model.init(...)['params']"
        )
    loss = without_aux(loss_fn, has_aux)
    used = discovery.used_arrays(loss, params, args)
    if not used:
        raise ValueError(
            f"loss_fn={name_of(loss_fn)} does not depend on params: no gradient flows "
            "to any of them. Inside it, apply the model to its argument params, not to "
            "parameters from outside."
        )
    own = tap_rules.own_rules(rules or {})
    sightings = discovery.find_sightings(loss, params, args, locations, own)
    maps, unexplained = discovery.find_feature_maps(
        doubly_factored, locations, sightings, n
    )
    layers: dict[str, Layer] = {}
    for number, location in enumerate(locations):
        if number in sightings:
            choice = tap_rules.Choice(
                _sharing_of(location.path, weight_sharing),
                norm_blocks,
                maps.get(location.path),
            )
            rows = _layer_rows(
                loss, params, args, location, sightings[number], choice, own, n
            )
        else:
            rows = _diagonal_rows(location, params, (), "no layer with a rule reads it")
        for row in rows:
            if row.path in unexplained:
                row = row._replace(why=f"{row.why}; {unexplained[row.path]}")
            needed = any((*location.keys, name) in used for name in row.shapes)
            if not needed:
                row = row._replace(used=False, why="the loss does not use it")
            layers[row.path] = row
    if strict:
        _refuse_marked(layers)
    if verify:
        tapped = {p: x.tapped for p, x in layers.items() if x.has_tap and x.used}
        verification.verify(loss, params, args, tapped, n)
    return Layers(layers)


def without_aux(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """The loss alone, as a scalar function; a jitted loss is unwrapped."""
    loss_fn = unjitted(loss_fn)

    def loss(*args: Any) -> Array:
        return split_aux(loss_fn(*args), has_aux, loss_fn)[0]

    return loss


def unjitted(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function that ``jax.jit`` wrapped; other decorators belong to the loss."""
    while isinstance(loss_fn, jax.stages.Wrapped):
        # Not inspect.unwrap, which would go on through other decorators.
        loss_fn = vars(loss_fn)["__wrapped__"]
    return loss_fn


def split_aux(
    result: Any, has_aux: bool, loss_fn: Callable[..., Any]
) -> tuple[Array, Any]:
    """What a loss function returned, as ``(loss, aux)``.

    Args:
      result: the loss, or ``(loss, aux)``.
      has_aux: which of the two.
      loss_fn: the function, for the message.

    Returns:
      The loss and the rest, None if there is none.

    Raises:
      ValueError: if it is something else.
    """
    is_pair = isinstance(result, (tuple, list)) and len(result) == 2
    if has_aux is not is_pair:
        kind = "a pair" if is_pair else f"a {type(result).__name__}"
        raise ValueError(
            f"loss_fn={name_of(loss_fn)} returns {kind}, but has_aux={has_aux}; "
            "return (loss, aux) with has_aux=True, the loss alone otherwise"
        )
    pair: Any = result if has_aux else (result, None)
    loss, aux = pair
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(
            f"loss_fn={name_of(loss_fn)} returns "
            f"{jnp.result_type(loss)}{list(jnp.shape(loss))}; the loss is one real "
            "number, a mean over the batch"
        )
    return jnp.asarray(loss), aux


def _sharing_of(path: str, weight_sharing: Sharing) -> kronecker.WeightSharing:
    """The choice for one layer."""
    sharing = weight_sharing(path) if callable(weight_sharing) else weight_sharing
    if sharing not in ("expand", "reduce"):
        raise ValueError(
            f"weight_sharing({path!r}) returned {sharing!r}; it must be 'expand' or "
            "'reduce'"
        )
    return sharing


def _layer_rows(loss, params, args, location, sighting, choice, own, n):
    """The rows of a location that a known layer reads."""
    try:
        axes = discovery.lifted_axes(loss, params, args, location, sighting)
        batched = n not in sighting.lanes
        row = _tapped_row(location, sighting, axes, batched, choice, params, own)
    except tap_rules.Refusal as reason:
        return _diagonal_rows(location, params, (), str(reason))
    return [row, *_diagonal_rows(location, params, row.shapes, "beside a layer")]


def _tapped_row(location, sighting, axes, batched, choice, params, own) -> Layer:
    """The row of a layer with a rule."""
    block = sighting.rule.block(sighting.seen, batched, choice)
    if any(max(axes, default=0) > len(x.shape) for x in block.sums):
        raise tap_rules.Refusal("its lifted axis lies too far back; use axis 0")
    arrays = capture.lookup(params, location)
    names = tuple(sighting.seen.params)
    copies = tuple(arrays[names[0]].shape[a] for a in axes)
    module = type(sighting.seen.module).__name__
    why = "norm layer"
    if sighting.rule in own.values():
        why = "by a rule of your own"
    elif block.kind == "kronecker":
        why = f"{choice.sharing} over locations"
    elif block.kind == "doubly_factored":
        why = "{} locations × {} channels, rank one an example".format(
            *choice.feature_map
        )
    if copies:
        why += f", {'×'.join(map(str, copies))} copies"
    return Layer(
        path=location.path,
        module=module,
        tapped=capture.Tapped(location._replace(names=names), block, copies, axes, own),
        has_tap=True,
        shapes={name: tuple(arrays[name].shape) for name in names},
        why=why,
        fallback=False,
        used=True,
    )


def _diagonal_rows(location, params, covered, why: str) -> list[Layer]:
    """The rows of the arrays at a location that no rule covers."""
    arrays = capture.lookup(params, location)
    rows = []
    for name in location.names:
        if name in covered:
            continue
        shape = tuple(arrays[name].shape)
        dtype = blocks.statistics_dtype(arrays[name].dtype)
        rows.append(
            Layer(
                path="/".join(map(str, (*location.keys, name))),
                module="parameter",
                tapped=capture.Tapped(
                    location._replace(names=(name,)),
                    diagonal.diagonal_block(name, shape, dtype),
                ),
                has_tap=False,
                shapes={name: shape},
                why=why,
                fallback=True,
                used=True,
            )
        )
    return rows


def _refuse_unnamed(params: Params, locations: Sequence[capture.Location]) -> None:
    """Refuses arrays that do not lie in nested dictionaries, which nobody would see."""
    named = {(*at.keys, name) for at in locations for name in at.names}
    boxed = lambda x: isinstance(x, nn.meta.AxisMetadata)  # noqa: E731
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=boxed):
        where = jax.tree_util.keystr(path)
        if boxed(leaf):
            raise ValueError(
                f"params{where} is a boxed {type(leaf).__name__}; pass "
                "flax.linen.meta.unbox(params) and box again, if needed, in loss_fn"
            )
        if discovery.keys_of(path) not in named:
            raise ValueError(
                f"params{where} is {type(leaf).__name__}, not an array in nested "
                "dictionaries; pass the parameters as Flax makes them, several models' "
                "in one dictionary"
            )


def _refuse_marked(layers: Mapping[str, Layer]) -> None:
    unknown = [
        f"{x.path!r} ({x.why})" for x in layers.values() if x.fallback or not x.used
    ]
    if unknown:
        raise ValueError(
            f"strict=True, but these parameters have no block of their own: "
            f"{', '.join(unknown)}. Build the model from layers that lbopt knows, drop "
            "parameters that the loss does not use, or pass strict=False to accept the "
            "diagonal block for them."
        )


def name_of(function: Callable[..., Any]) -> str:
    """A function's name, for messages."""
    return getattr(function, "__name__", repr(function))


def _sizes(layer: Layer) -> str:
    copies = "×".join(map(str, layer.tapped.copies))
    shapes = [
        "×".join(map(str, s.shape)) for s in layer.block.sums if s.shape != (1, 1)
    ]
    return " + ".join(shapes) + (f" (× {copies})" if copies else "")
