"""Work on meshes with axes of type Explicit, for which the compiler chooses layouts.

On an Explicit axis (``jax.make_mesh``'s default) the layout of an array is part of its
type, and each operation must say how its result is laid out.  Sums over examples and
the optimizer's linear algebra have results whose layout is known beforehand; in between
the compiler chooses, as it does on axes of type Auto.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Float

from lbopt._typing import Array, Updates


def with_layouts_of(function: Callable[..., Any], args: tuple, like: Any) -> Any:
    """Calls a function whose results have the layouts of given arrays.

    Args:
      function: takes ``args``.
      args: trees of arrays.
      like: arrays in the structure of the results, or of a prefix of it; None where a
        result is replicated.

    Returns:
      The results.  Without an Explicit axis among the arrays, or inside ``shard_map``
      over all of them, this is ``function(*args)``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> from lbopt.explicit_axes import with_layouts_of
      >>> mesh = jax.make_mesh((2,), ("data",))
      >>> rows = NamedSharding(mesh, PartitionSpec("data"))
      >>> x = jax.device_put(jnp.ones((4, 3)), rows)
      >>> with_layouts_of(lambda x: x.T @ x, (x,), None)[0].tolist()
      [4.0, 4.0, 4.0]
    """
    mesh = _explicit_mesh(args)
    if mesh is None:
        return function(*args)

    def layout(x: Any) -> NamedSharding:
        spec = PartitionSpec() if x is None else jax.typeof(x).sharding.spec
        return NamedSharding(mesh, spec)

    shardings = jax.tree.map(layout, like, is_leaf=lambda x: x is None)
    # By name, because inside shard_map other axes of the mesh are of type Manual.
    axes = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=shardings)(*args)


def inner(x: Updates, y: Updates) -> Float[Array, ""]:
    """Returns the inner product of two trees of real arrays, replicated."""
    return with_layouts_of(optax.tree.vdot, (x, y), None)


def _explicit_mesh(tree: Any) -> Any:
    """Returns the mesh of the arrays that have an Explicit axis; None if none has."""
    for x in jax.tree.leaves(tree):
        mesh = jax.typeof(x).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None
