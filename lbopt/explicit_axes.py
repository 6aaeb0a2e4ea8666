"""Work on meshes with axes of type Explicit, for which the compiler chooses layouts.

On an Explicit axis (``jax.make_mesh``'s default) the layout of an array is part of its
type, and each operation must say how its result is laid out.  Sums over examples and
the optimizer's linear algebra have results whose layout is known beforehand; in between
the compiler chooses, as it does on axes of type Auto.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def on_auto_axes(function: Callable[..., Any], args: tuple, specs: Any) -> Any:
    """Calls a function with axes of type Auto in place of Explicit ones.

    Args:
      function: takes ``args``.
      args: trees of arrays.
      specs: the partition specs of the results, or of a prefix of their tree.

    Returns:
      The results.  Where no array has an Explicit axis, as inside ``shard_map``, this
      is ``function(*args)``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> from lbopt.explicit_axes import on_auto_axes
      >>> rows = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
      >>> x = jax.device_put(jnp.ones((4, 3)), rows)
      >>> on_auto_axes(lambda x: x.T @ x, (x,), PartitionSpec())[0].tolist()
      [4.0, 4.0, 4.0]
    """
    mesh = _explicit_mesh(args)
    if mesh is None:
        return function(*args)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    # By name, because inside shard_map other axes of the mesh are of type Manual.
    axes = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=shardings)(*args)


def replicated(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function whose results are the same on all devices, as sums are.

    Args:
      function: takes ``args``.
      *args: trees of arrays, and of bools, which stay bools.

    Returns:
      The results.
    """
    leaves, tree = jax.tree.flatten(args)
    is_static = [isinstance(x, bool) for x in leaves]

    def with_bools(arrays: list[Any]) -> Any:
        left = iter(arrays)
        merged = [
            x if static else next(left)
            for x, static in zip(leaves, is_static, strict=True)
        ]
        return function(*jax.tree.unflatten(tree, merged))

    arrays = [x for x, static in zip(leaves, is_static, strict=True) if not static]
    return on_auto_axes(with_bools, (arrays,), PartitionSpec())


def specs_of(tree: Any) -> Any:
    """Returns the partition specs of arrays, as far as their types name them."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def _explicit_mesh(tree: Any) -> Any:
    """Returns the mesh of the arrays that have an Explicit axis; None if none has."""
    for x in jax.tree.leaves(tree):
        mesh = jax.typeof(x).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None
