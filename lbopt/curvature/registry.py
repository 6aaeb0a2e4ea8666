"""The table of a model's layers and their curvature blocks, by ``trace_layers``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbopt import checks
from lbopt._typing import Params
from lbopt.curvature import block as blocks
from lbopt.curvature import (
    capture,
    dependence,
    diagonal,
    discovery,
    feature_maps,
    kronecker,
    lifted_axes,
    loss_head,
    tap_rules,
    terms_search,
    unit_wise,
    verification,
)
from lbopt.curvature import locations as places
from lbopt.curvature.layer_table import Layer, Layers
from lbopt.curvature.loss import (
    CALL_KEYWORDS,
    name_of,
    refuse_shared_keywords,
    with_keywords,
    without_aux,
)
from lbopt.curvature.observation import Sighting, Traced

__all__ = ["Layer", "Layers", "Sharing", "trace_layers"]

_SHARINGS = get_args(kronecker.WeightSharing)
Sharing: TypeAlias = kronecker.WeightSharing | Callable[[str], kronecker.WeightSharing]


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
    **kwargs: Any,
) -> Layers:
    """Finds the layers of a model and chooses a curvature block for each.

    The loss is traced abstractly.  Beside that its head, what it does with the model's
    outputs, is evaluated on small arrays, to find the terms that it averages: without
    the model, unless ``verify`` is set.

    Args:
      loss_fn: ``loss_fn(params, *args) -> loss`` or ``(loss, aux)``, a mean over the
        batch; calls ``model.apply`` inside.
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.
      *args: the loss's other arguments, of which one holds a batch like those of
        training: a mark of padding or the weight of a class that it lacks is not found.
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
      batch_size: the number of terms that the loss averages (examples, tokens, pixels)
        in this batch, if it cannot be found.
      **kwargs: keyword arguments of the loss.  A loss that has an argument named like
        one of these options, or ``rng``, ``due`` or ``loss_scale``, gets it among
        ``args``: the keyword would be lbopt's.

    Returns:
      The layers; ``print`` shows them as a table.

    Raises:
      ValueError: if the loss does not depend on the parameters or applies raw JAX
        transforms around bound modules; if the terms that it averages are neither
        found nor stated; if it changes where lbopt has to add arrays to ``params``;
        if ``strict`` or ``verify`` finds a fault; for a feature map that a layer does
        not have; for a keyword that both lbopt and the loss would take.

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
    own_options = {
        "has_aux": has_aux,
        "strict": strict,
        "verify": verify,
        "weight_sharing": weight_sharing,
        "norm_blocks": norm_blocks,
        "doubly_factored": doubly_factored,
        "rules": rules,
        "batch_size": batch_size,
    }
    refuse_shared_keywords(loss_fn, args, own_options)
    # Passed on here, they would not be by the functions that evaluate the loss.
    kept_later = {name: kwargs.get(name) for name in CALL_KEYWORDS}
    refuse_shared_keywords(loss_fn, args, kept_later, idle=CALL_KEYWORDS)
    locations = places.find_locations(params)
    _check_params(params, locations)
    loss, own_args = with_keywords(without_aux(loss_fn, has_aux), args, kwargs)
    args = tuple(own_args)
    used = _used_arrays(loss, params, args, name_of(loss_fn))
    own = tap_rules.own_rules(rules or {})
    watched, head = loss_head.observe(loss)
    traced = Traced(watched, params, args, locations, own)
    found = discovery.discover(traced, used)
    terms, n = terms_search.terms_of(
        loss, params, args, head, batch_size, name_of(loss_fn)
    )
    maps, unexplained = feature_maps.find_feature_maps(
        doubly_factored, locations, found.sightings, n
    )
    layers: dict[str, Layer] = {}
    for number, location in enumerate(locations):
        if number in found.refused:
            rows = _diagonal_rows(location, params, (), found.refused[number])
        elif number in found.sightings:
            choice = tap_rules.Choice(
                _sharing_of(location.path, weight_sharing),
                norm_blocks,
                maps.get(location.path),
            )
            rows = _layer_rows(traced, found, number, choice, n)
        else:
            rows = _diagonal_rows(location, params, (), "no layer with a rule reads it")
        layers |= {row.path: _annotated(row, used, unexplained) for row in rows}
    run = verification.Run(loss, params, args, found.accepted)
    sighted = {locations[i].path: one for i, one in found.sightings.items()}
    reach = dependence.find_dependence(run, _tapped_layers(layers), sighted, n)
    layers = {
        row.path: _annotated(row, used, {})
        for layer in layers.values()
        for row in _with_dependence(layer, reach, params)
    }
    if strict:
        _require_unmarked(layers)
    tapped = _tapped_layers(layers)
    verification.require_same_loss(run, tapped)
    if verify:
        verification.verify(run, tapped, n)
    return Layers(layers, terms, found.accepted)


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


def _tapped_layers(layers: Mapping[str, Layer]) -> dict[str, capture.Tapped]:
    """The layers with a tap that run; diagonal blocks are autodiff's own."""
    return {p: x.tapped for p, x in layers.items() if x.has_tap and x.used}


def _with_dependence(
    row: Layer, reach: dependence.Dependence, params: Params
) -> list[Layer]:
    """Returns the rows of a layer, of which it is known what depends on the batch."""
    if row.path in reach.outside:
        reason = "the loss also uses its parameters outside of the layer"
        return _diagonal_rows(row.tapped.location, params, (), reason)
    if row.path in reach.shared:
        # The signals of examples arrive summed, as those of any other parameter.
        reason = "its input is the same for all examples"
        rows = _diagonal_rows(row.tapped.location, params, (), reason)
        return [one._replace(module=row.module, fallback=False) for one in rows]
    return [row]


def _sharing_of(path: str, weight_sharing: Sharing) -> kronecker.WeightSharing:
    """Returns the weight sharing of one layer."""
    if not callable(weight_sharing):
        return weight_sharing
    sharing = weight_sharing(path)
    checks.one_of(f"weight_sharing({path!r})", sharing, _SHARINGS)
    return sharing


def _layer_rows(
    traced: Traced,
    found: discovery.Discovery,
    number: int,
    choice: tap_rules.Choice,
    n: int | None,
) -> list[Layer]:
    """Returns the rows of a location whose arrays a layer with a rule uses."""
    location, sighting = traced.locations[number], found.sightings[number]
    route = found.routes[number]
    try:
        axes = lifted_axes.lifted_axes(traced, number, sighting, route)
        # Inside a vmap over n lanes the layer sees one example, without a batch axis.
        batched = n not in sighting.lanes
        row = _tapped_row(traced, location, sighting, axes, batched, choice)
    except tap_rules.Refusal as reason:
        return _diagonal_rows(location, traced.params, (), str(reason))
    row = row._replace(tapped=row.tapped._replace(route=route, batched=batched))
    rest = _diagonal_rows(location, traced.params, row.shapes, "beside a layer")
    return [row, *rest]


def _tapped_row(
    traced: Traced,
    location: places.Location,
    sighting: Sighting,
    axes: tuple[int, ...],
    batched: bool,
    choice: tap_rules.Choice,
) -> Layer:
    """Returns the row of a layer with a rule."""
    own = traced.rules
    block = sighting.rule.block(sighting.seen, batched, choice)
    # Probes have lifted axes where the layer's arrays have them; a sum of lower rank,
    # such as a vector, has no such place.
    if any(max(axes, default=0) > len(x.shape) for x in block.sums):
        raise tap_rules.Refusal("its lifted axis lies too far back; use axis 0")
    arrays = places.lookup(traced.params, location)
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
        assert choice.feature_map is not None
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
    arrays = places.lookup(params, location)
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


def _check_params(params: Params, locations: Sequence[places.Location]) -> None:
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
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise ValueError(
                f"params{where} is {leaf.dtype}; lbopt has no curvature of complex "
                "parameters: pass their real and imaginary parts, or leave them to "
                "another optimizer by optax.partition"
            )
        if discovery.keys_of(path) not in named:
            at, found = _first_other(params, path)
            raise ValueError(
                f"params{at} is a {found}, not a dictionary: params{where} is no "
                "array in nested dictionaries; pass parameters as Flax makes them, "
                "those of several models in one dictionary"
            )
    paths = [at.path for at in locations]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(
            f"params has several dictionaries of the path {twice[0]!r}, because a key "
            "contains a slash; rename the key"
        )
    if not locations:
        raise ValueError(
            f"params={type(params).__name__} holds no arrays; pass parameters as Flax "
            "makes them, for example model.init(...)['params']"
        )


def _first_other(params: Params, path: tuple[Any, ...]) -> tuple[str, str]:
    """The first container on a path that is no mapping: where it is, and its type."""
    node = params
    for i, entry in enumerate(path):
        if not isinstance(node, Mapping):
            return jax.tree_util.keystr(path[:i]), type(node).__name__
        node = node[getattr(entry, "key", None)]
    return jax.tree_util.keystr(path), type(node).__name__


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
