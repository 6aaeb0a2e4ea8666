r"""What a step tells about itself, and the curvature's state by the paths of layers.

**In the step** ``metrics`` returns scalars for every step's record, among them the
index of the first layer whose numbers are not finite.  It costs no pass over arrays of
its own: the sum of the squares of a gradient is part of the norm, and a second moment
that is not finite is so on its diagonal.

**Between steps** ``layer_report`` and ``layer_factors`` read an optimizer's state.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from lbopt import linalg, mesh_step, tables
from lbopt._typing import Array, Flag, OptState, Updates
from lbopt.collectives import Axis
from lbopt.curvature import locations, refresh
from lbopt.curvature.factor import Factor
from lbopt.curvature.registry import Layers
from lbopt.norms import squared_norm
from lbopt.sharding import Sharded
from lbopt.transforms import kfac_state
from lbopt.transforms.kfac_state import KfacState, plain
from lbopt.transforms.norm_constraint import ClipByKlState
from lbopt.transforms.quadratic_model import QuadraticModelState

__all__ = [
    "layer_factors",
    "layer_report",
    "metrics",
    "path_of",
]

# Statistics of a layer's inputs: A, and its parts in doubly factored blocks.
_OF_INPUTS = ("a", "k", "c")


class Found(NamedTuple):
    """What a step has evaluated.

    Attributes:
      grads: the gradients that the optimizer is given.
      curvature: the statistics by path; ``{}`` without curvature.
      square: the sum over devices of the squared norms of ``grads``.
      sound: whether the loss and ``square`` are finite; if not, the step is skipped.
    """

    grads: Updates
    curvature: Mapping[str, Any]
    square: Any
    sound: Flag


def metrics(
    layers: Layers | None,
    found: Found,
    before: OptState,
    after: OptState,
    axis: Axis,
) -> dict[str, Array]:
    r"""Returns a step's scalars on its gradient, its settings and its layers.

    Args:
      layers: the layers; None without curvature.
      found: what the step has evaluated.
      before: the optimizer's state before the step.
      after: its state after the step; the same if the step was skipped.
      axis: the devices.

    Returns:
      As far as they are known:

      - ``grad_norm``: the norm of the mean gradient.  An optimizer with ``placement``
        averages gradients itself; instead there is then ``device_grad_norm``, the
        root mean square over devices of the norm of each one's own gradient,
        which is larger by the noise of their examples.
      - ``learning_rate`` and ``damping`` of ``optax.inject_hyperparams``, and the
        damping of ``scale_by_quadratic_model``.  Other schedules are functions of
        ``state.step``.
      - ``kl_scale``: the factor by which ``clip_by_kl`` shortened the step; 1 if it was
        within the bound.
      - ``first_not_finite``: the position in ``layers`` of the first layer whose
        statistics of inputs are not finite; if there is none, of the first with any
        other statistic, gradient or inverse that is not; −1 if all are.  ``path_of``
        returns its path.  Only statistics that were due are known.

      ``make_train_step`` adds ``skipped``, the number of steps so far that changed
      nothing because the loss or the norm of the gradient was not finite.
    """
    # Where nothing is split, every device has added the same square.
    norm = jnp.sqrt(found.square / axis.size)
    split = bool(mesh_step.split_layers(before))
    scalars = {"device_grad_norm" if split else "grad_norm": norm}
    known = {
        "learning_rate": _injected(after, "learning_rate"),
        "damping": _injected(after, "damping")
        # Of this step; the state after it holds that of the next.
        + [node.damping for node in _nodes(before, QuadraticModelState)],
        "kl_scale": [node.scale for node in _nodes(after, ClipByKlState)],
    }
    # Of several transformations none is the optimizer's own.
    scalars |= {name: jnp.asarray(x[0]) for name, x in known.items() if len(x) == 1}
    if layers is not None:
        broken = _not_finite(layers, found, axis)
        rejected = _newly_rejected(layers, before, after)
        scalars["first_not_finite"] = jnp.where(found.sound, rejected, broken)
    return scalars


def path_of(index: Array | int, layers: Layers) -> str | None:
    """Returns the path at a position of ``layers``, None for −1.

    Args:
      index: the metric ``first_not_finite``.
      layers: the layers that ``make_train_step`` was given.

    Returns:
      The path, or None if all numbers were finite.

    Raises:
      ValueError: if there is no such position.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Sequential([nn.Dense(3), nn.Dense(2)]), jnp.ones((8, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> layers = lbopt.trace_layers(loss_fn, params, x)
      >>> lbopt.health.path_of(1, layers)
      'layers_1'
    """
    index = int(index)
    if not -1 <= index < len(layers):
        raise ValueError(
            f"index={index} must lie in [-1, {len(layers)}), the positions of layers; "
            "pass the layers of the step that returned it"
        )
    return None if index == -1 else list(layers)[index]


class LayerState(NamedTuple):
    """What the optimizer's state holds about one layer.

    The last four have the type of the layer's statistics, such as ``(a, g)``, with one
    number for each; of several copies or diagonal blocks it is the largest.

    Attributes:
      rejected: the number of statistics and inverses that were not finite.
      boost: the factor on its damping; 1 unless its last inverse failed.
      damping: the number added to the diagonal of each factor.
      statistic_age: steps since the last statistic that was accepted.
      inverse_age: steps since the statistics that the inverse is of.
      eigenvalue: the mean eigenvalue of each factor.
    """

    rejected: int
    boost: float
    damping: Any
    statistic_age: Any
    inverse_age: Any
    eigenvalue: Any


class LayerReport(Mapping[str, LayerState]):
    """The state of each layer by its path; ``print`` shows a table."""

    def __init__(self, rows: Mapping[str, LayerState]) -> None:
        self._rows = dict(rows)

    def __getitem__(self, path: str) -> LayerState:
        """Returns the state of the layer at a path."""
        return self._rows[path]

    def __iter__(self) -> Iterator[str]:
        """Iterates over the paths, in the order of the layer table."""
        return iter(self._rows)

    def __len__(self) -> int:
        """Returns the number of layers with curvature."""
        return len(self._rows)

    def __repr__(self) -> str:
        """Returns the table, a row for each layer."""
        lines = [("path", *(name.replace("_", " ") for name in LayerState._fields))]
        for path, row in self.items():
            numbers = [_by_name(value) for value in row[2:]]
            lines.append((path, str(row.rejected), f"{row.boost:g}", *numbers))
        return "\n".join(tables.aligned(lines, right=[1, 2]))


def layer_report(opt_state: OptState, layers: Layers) -> LayerReport:
    """Returns what an optimizer's state holds about each layer, by path.

    Each layer has a ``LayerState``, and the table a column for each of its attributes:
    ``rejected``, ``boost``, ``damping``, ``statistic_age``, ``inverse_age`` and
    ``eigenvalue``; the last four have a number for each factor.  The arrays of
    ``KfacState`` number the layers alphabetically; here they are in the order of
    ``layers``, hence of the printed table.  Waits for the state's numbers.

    Args:
      opt_state: the state of any optax chain with curvature, or a training state.
      layers: the result of ``trace_layers``.

    Returns:
      The report: ``report[path]`` is a ``LayerState``; ``print`` shows a table.

    Raises:
      ValueError: if the state contains no curvature transform.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Sequential([nn.Dense(3), nn.LayerNorm()]), jnp.ones((8, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> layers = lbopt.trace_layers(loss_fn, params, x)
      >>> print(lbopt.layer_report(lbopt.kfac(0.1, layers).init(params), layers))
      path      rejected  boost  damping   statistic age  inverse age  eigenvalue
      layers_0         0      1  a 0, g 0  a 0, g 0       a 0, g 0     a 0, g 0
      layers_1         0      1  f 0       f 0            f 0          f 0
    """
    rows: dict[str, LayerState] = {}
    for state in _curvature_states(opt_state):
        rows |= _rows(state, layers)
    return LayerReport({path: rows[path] for path in layers if path in rows})


def layer_factors(opt_state: OptState, layers: Layers) -> dict[str, Any]:
    """Returns the running averages of each layer's statistics as whole matrices.

    The state holds packed triangles, on a mesh in shares; here they are unpacked and
    joined, the factors that ``block_size`` cut into diagonal blocks with zeros beside
    these.  Every device gets all of them, so this is for looking at, not for a step.

    Args:
      opt_state: the state of any optax chain with curvature, or a training state.
      layers: the result of ``trace_layers``.

    Returns:
      ``{path: statistics}`` in the order of ``layers``, in the types that
      ``value_grad_and_curvature`` returns: ``[path].a`` and ``.g`` of a dense layer.
      Zeros before the first statistic.

    Raises:
      ValueError: if the state contains no curvature transform.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Sequential([nn.Dense(3)]), jnp.ones((8, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> layers = lbopt.trace_layers(loss_fn, params, x)
      >>> state = lbopt.kfac(0.1, layers).init(params)
      >>> lbopt.layer_factors(state, layers)["layers_0"].a.shape
      (6, 6)
    """
    found: dict[str, Any] = {}
    for state in _curvature_states(opt_state):
        split = isinstance(state.factors, Sharded)
        for path, packed in plain(state.factors).items():
            layer = layers[path]
            whole = jax.eval_shape(layer.block.statistics, layer.block.sums)
            found[path] = type(whole)(
                *(
                    _unpacked(jnp.asarray(x), layer.tapped.copies, s.shape, f, split)
                    for x, s, f in zip(packed, whole, layer.block.factors, strict=True)
                )
            )
    return {path: found[path] for path in layers if path in found}


# === In the step ======================================================================


def _newly_rejected(layers: Layers, before: OptState, after: OptState) -> Array:
    """Returns the first layer with a statistic or an inverse rejected in this step."""
    states = map(kfac_state.curvature_states, (before, after))
    changed, paths = [jnp.zeros(1, bool)], [""]
    for old, new in zip(*states, strict=True):
        changed.append(new.rejected > old.rejected)
        paths += sorted(plain(new.factors))
    # The first flag, False, is that of layers without curvature.
    places = {path: place for place, path in enumerate(paths)}
    flags = jnp.concatenate(changed)[np.asarray([places.get(p, 0) for p in layers])]
    return jnp.where(jnp.any(flags), jnp.argmax(flags), -1).astype(jnp.int32)


def _not_finite(layers: Layers, found: Found, axis: Axis) -> Array:
    """Returns the first layer with inputs, else with any array, that are not finite."""

    def bad(sums: Iterable[Array]) -> Array:
        return ~jnp.isfinite(jnp.stack([*sums, jnp.zeros([])]).sum())

    def diagonals(statistics: Any) -> Iterator[Array]:
        for x in jax.tree.leaves(statistics):
            square = x.ndim > 1 and x.shape[-1] == x.shape[-2]
            yield jnp.sum(jnp.diagonal(x, axis1=-2, axis2=-1) if square else x)

    of_inputs, at_all = [], []
    for path, layer in layers.items():
        location, statistics = layer.tapped.location, found.curvature.get(path)
        grads = locations.lookup(found.grads, location)
        # A step is also skipped where the square of a gradient is not finite.
        squares = [squared_norm(grads[n]) for n in location.names]
        at_all.append(bad([*squares, *diagonals(statistics)]))
        inputs = [getattr(statistics, name, None) for name in _OF_INPUTS]
        of_inputs.append(bad(diagonals(inputs)))
    flags = jnp.stack([*of_inputs, *at_all])
    first = jnp.where(jnp.any(flags), jnp.argmax(flags), len(flags))
    # Each device sees its own examples, but the answer is one.
    first = first if axis.name is None else jax.lax.pmin(first, axis.name)
    return jnp.where(first < len(flags), first % len(layers), -1).astype(jnp.int32)


def _injected(opt_state: OptState, name: str) -> list[Array]:
    """Returns the values of a hyper-parameter of ``optax.inject_hyperparams``."""
    kinds = optax.InjectStatefulHyperparamsState, optax.InjectHyperparamsState
    nodes = (node.hyperparams for node in _nodes(opt_state, kinds))
    return [values[name] for values in nodes if name in values]


def _nodes(tree: Any, kinds: Any) -> Iterator[Any]:
    """Yields the nodes of some types, also those inside of others."""
    for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(node, kinds):
            yield node
            yield from _nodes(tuple(node), kinds)


# === Between steps ====================================================================


def _curvature_states(opt_state: OptState) -> list[KfacState]:
    found = kfac_state.curvature_states(opt_state)
    if not found:
        raise ValueError(
            f"opt_state={type(opt_state).__name__} holds no curvature transform; pass "
            "the state of a chain that contains lbopt.scale_by_kfac"
        )
    return found


def _rows(state: KfacState, layers: Layers) -> dict[str, LayerState]:
    """Returns the rows of the layers in one state."""
    tree = jax.tree.structure(state.traces)
    numbers = state.damping, state.boost, state.rejected, state.traces
    damping, boost, rejected, traces = jax.device_get(numbers)
    count, taken = jax.device_get((state.count, state.refresh.statistic_step))
    # A number for each unit, in the order of the leaves of the traces.
    ends = np.cumsum([x.size for x in jax.tree.leaves(traces)])[:-1]
    largest = [float(x.max()) for x in np.split(damping, ends)]
    # −1, the step before the first, gives the number of steps taken.
    since = [int(count - 1 - step) for step in taken]
    ages = jax.device_get(refresh.inverse_age(state))
    found = {}
    for number, path in enumerate(sorted(traces)):
        layer = layers[path]
        # Cut factors have several traces for each copy, which add up.
        means = [
            float(t.reshape(shape.size // f.size, -1).sum(1).max()) / f.order
            for t, shape, f in zip(
                traces[path], layer.factor_shapes(), layer.block.factors, strict=True
            )
        ]
        found[path] = LayerState(
            rejected=int(rejected[number]),
            boost=float(boost[number]),
            damping=jax.tree.unflatten(tree, largest)[path],
            statistic_age=jax.tree.unflatten(tree, since)[path],
            inverse_age=jax.tree.map(int, ages[path]),
            eigenvalue=type(traces[path])(*means),
        )
    return found


def _unpacked(
    x: Array, copies: tuple[int, ...], shape: tuple[int, ...], kind: Factor, split: bool
) -> Array:
    """Returns a factor as ``[*copies, *shape]``."""
    if split:  # [devices, ..., share] to [..., devices × share]
        x = jnp.moveaxis(x, 0, -2)
        x = x.reshape(*x.shape[:-2], -1)
    dense = len(shape) == len(kind.shape)  # a diagonal is not packed
    stack = (*copies, *shape[: len(shape) - len(kind.shape) - (not dense)])
    if x.ndim == len(stack) + (1 if split else len(kind.shape)):
        # The last of the shares are padded.
        rows = x.reshape(*stack, -1)[..., : kind.size].reshape(*stack, *kind.shape)
        if dense:
            return rows
        # The 2×2 matrices of channels are packed as (11, 12, 22), not as triangles are.
        pairs = kind.shape[1:] == (3,)
        return _symmetric_pairs(rows) if pairs else linalg.unpack(rows)
    parts, n = x.shape[len(stack)], shape[-1]
    blocks = linalg.unpack(x[..., : linalg.packed_size(-(-n // parts))])
    eye = jnp.broadcast_to(jnp.eye(n, dtype=x.dtype), (*stack, n, n))
    return linalg.block_matmul(blocks, eye)


def _symmetric_pairs(rows: Float[Array, "*stack 3"]) -> Float[Array, "*stack 2 2"]:
    a, b, d = jnp.moveaxis(rows, -1, 0)
    return jnp.stack([jnp.stack([a, b], -1), jnp.stack([b, d], -1)], -2)


def _by_name(values: Any) -> str:
    return ", ".join(
        f"{name} {value:.3g}"
        for name, value in zip(values._fields, values, strict=True)
    )
