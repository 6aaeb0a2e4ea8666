"""Type aliases that signatures share, and the axis names that shapes use.

Axis names in shape annotations:

* ``batch``: examples; ``shared``: locations, tokens or uses that share one kernel;
* ``in``, ``out``: rows and columns of a layer's kernel matrix (``in`` includes the
  homogeneous coordinate if the layer has a bias);
* ``stack``: independent copies of a layer (convolution groups, scanned layers);
* ``c``: channels of a normalisation layer.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, PyTree

Array: TypeAlias = jax.Array
Params: TypeAlias = PyTree
"""A tree of parameters as Flax makes it: nested mappings with arrays as leaves."""

Updates: TypeAlias = PyTree
"""A tree shaped like the parameters: gradients or parameter updates."""

OptState: TypeAlias = Any  # optax gives the states of its chains no type
"""The state of any optax transformation."""

# NumPy scalars are accepted everywhere, but optax's annotations, to which these values
# are passed on, leave them out.
if TYPE_CHECKING:
    Number: TypeAlias = float | int
    Whole: TypeAlias = int
else:
    Number = float | int | np.floating | np.integer
    Whole = int | np.integer

AxisName: TypeAlias = str | tuple[str, ...]
"""A mesh axis, or several that count as one, the first the slowest."""

Scalar: TypeAlias = Float[Array, ""] | Number
Count: TypeAlias = Int[Array, ""] | Whole
Flag: TypeAlias = Bool[Array, ""] | bool
"""Whether a statistic is wanted: a traced flag, or a bool fixed at trace time."""

ScalarOrSchedule: TypeAlias = Scalar | Callable[[Any], Any]
"""A number, or a function of the step count that returns one."""
