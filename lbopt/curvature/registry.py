"""The table of a model's layers and their curvature blocks, by ``trace_layers``."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbopt import checks, sizes
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

_SHARINGS = get_args(kronecker.WeightSharing)
Sharing: TypeAlias = kronecker.WeightSharing | Callable[[str], kronecker.WeightSharing]


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

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._layers = dict(layers)

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
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(w) if i == 5 else cell.ljust(w)  # bytes to the right
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
    """Finds the layers of a model and chooses a curvature block for each.

    The loss is traced abstractly; nothing is computed unless ``verify`` is set.

    Args:
      loss_fn: ``loss_fn(params, *args) -> loss`` or ``(loss, aux)``, a mean over the
        batch; calls ``model.apply`` inside.
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.
      *args: the loss's other arguments, of which one holds the batch.
      has_aux: whether the loss returns ``(loss, aux)``.
      strict: whether to raise an error for parameters that have no block of their own
        or that the loss does not use; if False, the table marks them.
      verify: whether to run one batch and check the statistics against autodiff (see
        ``curvature.verification``); needs arrays.
      weight_sharing: the treatment of locations that share a kernel: ``"expand"`` (KFC
        for convolutions), ``"reduce"``, or a function from a layer's path to either.
      norm_blocks: the blocks of normalisation layers: ``"unit_wise"`` (2×2 for each
        channel's scale and bias) or ``"full"`` (one matrix of 2 × channels rows).
      doubly_factored: the ``nn.Dense`` layers on a flattened feature map that get one
        factor for its locations and one for its channels (see
        ``curvature.doubly_factored``): a mapping ``{path: (locations, channels)}``, or
        a number of rows above which an input factor is replaced, if the preceding layer
        with a kernel is a convolution whose channels divide the inputs; None for none.
      rules: tap rules for layers of your own, or replacing Flax's, by method:
        ``{MyLayer.__call__: Rule(block, residual, names)}``; see ``tap_rules.Rule``.
      batch_size: number of examples, if it cannot be inferred from the arguments.

    Returns:
      The layers; ``print`` shows them as a table.

    Raises:
      ValueError: if the loss does not depend on the parameters or applies raw JAX
        transforms around bound modules; if ``strict`` or ``verify`` finds a fault; for
        a feature map that a layer does not have.

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
    _check_choices(weight_sharing, norm_blocks, batch_size)
    n = discovery.infer_batch_size(args) if batch_size is None else batch_size
    locations = capture.find_locations(params)
    _check_params(params, locations)
    loss = without_aux(loss_fn, has_aux)
    used = _used_arrays(loss, params, args, name_of(loss_fn))
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
        layers |= {row.path: _annotated(row, used, unexplained) for row in rows}
    if strict:
        _require_unmarked(layers)
    if verify:
        # Unused layers do not run, and diagonal blocks are autodiff's own.
        tapped = {p: x.tapped for p, x in layers.items() if x.has_tap and x.used}
        verification.verify(loss, params, args, tapped, n)
    return Layers(layers)


def _check_choices(weight_sharing: Any, norm_blocks: Any, batch_size: Any) -> None:
    if not callable(weight_sharing):
        checks.one_of("weight_sharing", weight_sharing, _SHARINGS)
    checks.one_of("norm_blocks", norm_blocks, unit_wise.BLOCKS)
    if batch_size is not None:
        checks.whole("batch_size", batch_size, "None reads it off the arguments")


def _used_arrays(
    loss: Callable[..., Any], params: Params, args: Sequence[Any], loss_name: str
) -> set[tuple[Any, ...]]:
    """Returns the key paths of the used parameters; raises if there are none."""
    used = discovery.used_arrays(loss, params, args)
    if not used:
        raise ValueError(
            f"loss_fn={loss_name} does not depend on params, for no gradient flows to "
            "them; apply the model to the function's argument params, not to others "
            "from outside"
        )
    return used


def _annotated(
    row: Layer, used: set[tuple[Any, ...]], unexplained: Mapping[str, str]
) -> Layer:
    """Adds to a row why it has no feature map, or that the loss does not use it."""
    if row.path in unexplained:
        row = row._replace(why=f"{row.why}; {unexplained[row.path]}")
    # One used array is enough: the block's statistics are those of the whole layer.
    keys = row.tapped.location.keys
    if not any((*keys, name) in used for name in row.shapes):
        row = row._replace(used=False, why="the loss does not use it")
    return row


def without_aux(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """Returns the scalar loss function behind a jitted loss or one with aux."""
    loss_fn = unjitted(loss_fn)

    def loss(*args: Any) -> Array:
        return split_aux(loss_fn(*args), has_aux, loss_fn)[0]

    return loss


def unjitted(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function inside ``jax.jit``, or ``loss_fn`` itself."""
    # likelihood cannot hand outputs out of an inner jit.
    while isinstance(loss_fn, jax.stages.Wrapped):
        # inspect.unwrap would also remove other decorators, which belong to the loss.
        loss_fn = vars(loss_fn)["__wrapped__"]
    return loss_fn


def split_aux(
    result: Any, has_aux: bool, loss_fn: Callable[..., Any]
) -> tuple[Array, Any]:
    """Checks a loss function's result and returns it as ``(loss, aux)``.

    Args:
      result: the loss, or ``(loss, aux)``.
      has_aux: whether it is ``(loss, aux)``.
      loss_fn: the function, for the message.

    Returns:
      The loss as an array, and aux or None.

    Raises:
      ValueError: if the result has another form or the loss is not one real number.
    """
    # As in jax.value_and_grad, but said before autodiff fails on it.
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
    """Returns the weight sharing of one layer."""
    if not callable(weight_sharing):
        return weight_sharing
    sharing = weight_sharing(path)
    checks.one_of(f"weight_sharing({path!r})", sharing, _SHARINGS)
    return sharing


def _layer_rows(loss, params, args, location, sighting, choice, own, n):
    """Returns the rows of a location whose arrays a layer with a rule uses."""
    try:
        axes = discovery.lifted_axes(loss, params, args, location, sighting)
        # Inside a vmap over n lanes the layer sees one example, without a batch axis.
        batched = n not in sighting.lanes
        row = _tapped_row(location, sighting, axes, batched, choice, params, own)
    except tap_rules.Refusal as reason:
        return _diagonal_rows(location, params, (), str(reason))
    return [row, *_diagonal_rows(location, params, row.shapes, "beside a layer")]


def _tapped_row(location, sighting, axes, batched, choice, params, own) -> Layer:
    """Returns the row of a layer with a rule."""
    block = sighting.rule.block(sighting.seen, batched, choice)
    # Probes have lifted axes where the layer's arrays have them; a sum of lower rank,
    # such as a vector, has no such place.
    if any(max(axes, default=0) > len(x.shape) for x in block.sums):
        raise tap_rules.Refusal("its lifted axis lies too far back; use axis 0")
    arrays = capture.lookup(params, location)
    names = tuple(sighting.seen.params)
    copies = tuple(arrays[names[0]].shape[a] for a in axes)
    # nn.remat and nn.jit make classes of their own; the table shows the name they have.
    module = type(sighting.seen.module).__name__
    why = "norm layer"
    # A rule of the user's may return a block of any kind, so it is named first.
    if sighting.rule in own.values():
        why = "by a rule of your own"
    elif block.kind == "kronecker":
        why = f"{choice.sharing} over locations"
    elif block.kind == "doubly_factored":
        locations, channels = choice.feature_map
        why = f"{locations} locations × {channels} channels, rank one per example"
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
    """Returns the rows of the arrays at a location that no rule covers."""
    arrays = capture.lookup(params, location)
    rows = []
    # One block per array: they share nothing that a diagonal could use.
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


def _check_params(params: Params, locations: Sequence[capture.Location]) -> None:
    """Raises ValueError for arrays outside nested dictionaries, or for no arrays."""
    named = {(*at.keys, name) for at in locations for name in at.names}

    def boxed(x: Any) -> bool:
        return isinstance(x, nn.meta.AxisMetadata)

    # Arrays elsewhere would get no probe and no row, and nobody would notice.
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=boxed):
        where = jax.tree_util.keystr(path)
        if boxed(leaf):
            raise ValueError(
                f"params{where} is a boxed {type(leaf).__name__}; pass "
                "flax.linen.meta.unbox(params), and box again in loss_fn if needed"
            )
        if discovery.keys_of(path) not in named:
            raise ValueError(
                f"params{where} is {type(leaf).__name__}, not an array in nested "
                "dictionaries; pass parameters as Flax makes them, those of several "
                "models in one dictionary"
            )
    if not locations:
        raise ValueError(
            f"params={type(params).__name__} holds no arrays; pass parameters as Flax "
            "makes them, for example model.init(...)['params']"
        )


def _require_unmarked(layers: Mapping[str, Layer]) -> None:
    unknown = [
        f"{x.path!r} ({x.why})" for x in layers.values() if x.fallback or not x.used
    ]
    if unknown:
        raise ValueError(
            f"strict=True, but these parameters have no block of their own: "
            f"{', '.join(unknown)}; build the model from layers that lbopt knows, drop "
            "parameters that the loss does not use, or pass strict=False to accept "
            "diagonal blocks"
        )


def name_of(function: Callable[..., Any]) -> str:
    """Returns a function's name, for messages."""
    return getattr(function, "__name__", repr(function))


def _sizes(layer: Layer) -> str:
    copies = "×".join(map(str, layer.tapped.copies))
    # (1, 1) is the number of rows, which is no statistic.
    shapes = [
        "×".join(map(str, s.shape)) for s in layer.block.sums if s.shape != (1, 1)
    ]
    return " + ".join(shapes) + (f" (× {copies})" if copies else "")
