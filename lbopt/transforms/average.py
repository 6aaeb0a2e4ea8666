r"""An exponential moving average of the parameters.

.. math:: \bar\theta \leftarrow \xi\, \bar\theta + (1 - \xi)\, \theta
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import SequenceKey

from lbopt import checks
from lbopt._typing import OptState, Params, Scalar, Updates


class AverageState(NamedTuple):
    """State of ``average_params``.

    Attributes:
      count: steps taken.
      average: θ̄, like the parameters.
    """

    count: Any
    average: Any


def average_params(
    decay: Scalar = 0.99, *, warm_up: bool = False
) -> optax.GradientTransformation:
    r"""Averages the parameters after each step, and passes the step on unchanged.

    .. math:: \bar\theta \leftarrow \xi_k\, \bar\theta + (1 - \xi_k)\, \theta

    with the parameters θ after the step.  It must be the last of a chain: it takes the
    updates that it is given for the step, and those before a preconditioner or a rate
    are none.  ``averaged_params`` returns the average, for evaluation, and raises an
    error if it is not the last, as ``training.init_state`` does.

    Args:
      decay: ξ, in [0, 1); the average is over about 1 / (1 − ξ) steps.
      warm_up: whether the decay starts small, ξ_k = min(ξ, (1 + k) / (10 + k)) after k
        steps, as in TensorFlow's ``ExponentialMovingAverage``.

    Returns:
      A transformation whose ``update`` takes ``params``.

    Raises:
      ValueError: for a decay out of range, and, at ``update``, without ``params``.

    Examples:
      >>> import jax.numpy as jnp, lbopt, optax
      >>> tx = optax.chain(optax.sgd(1.0), lbopt.average_params(0.5))
      >>> params = {"w": jnp.array([4.0])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([4.0])}, state, params)
      >>> lbopt.averaged_params(state)["w"].tolist()  # of 4 and 0
      [2.0]

    Source: Polyak & Juditsky 1992; with a decay, Martens & Grosse 2015 (ξ = 0.99, and
    the better of θ and θ̄ is reported) and Grosse & Martens 2016 (1 / (1 − ξ) steps
    are an epoch); Ba, Grosse & Martens 2017 average all their methods.
    """
    checks.below_one("decay", decay, "0.99 is usual")

    def init_fn(params: Params) -> AverageState:
        # A copy, because the caller may donate the parameters.
        return AverageState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.array, params))

    def update_fn(
        updates: Updates, state: Any, params: Params | None = None
    ) -> tuple[Updates, AverageState]:
        if params is None:
            raise ValueError(
                "average_params.update needs params, which it averages; call "
                "tx.update(grads, state, params)"
            )
        k = state.count
        # Small at first, so that the initial parameters are soon forgotten.
        kept = jnp.minimum(decay, (1 + k) / (10 + k)) if warm_up else decay
        after = optax.apply_updates(params, updates)
        average = optax.incremental_update(after, state.average, 1 - kept)
        return updates, AverageState(jnp.asarray(optax.safe_increment(k)), average)

    return optax.GradientTransformation(init_fn, update_fn)


def averaged_params(opt_state: OptState) -> Params:
    """Returns the average of the parameters from an optimizer's state.

    Args:
      opt_state: the state of any optax chain with ``average_params`` in it.

    Returns:
      θ̄, like the parameters.

    Raises:
      ValueError: unless the state holds exactly one average, of the last
        transformation of its chain.

    Examples:
      >>> import jax.numpy as jnp, lbopt
      >>> state = lbopt.average_params().init({"w": jnp.array([3.0])})
      >>> lbopt.averaged_params(state)["w"].tolist()
      [3.0]
    """

    def is_average(node: Any) -> bool:
        return isinstance(node, AverageState)

    nodes = jax.tree.leaves(opt_state, is_leaf=is_average)
    found = [node.average for node in nodes if is_average(node)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state={type(opt_state).__name__} must hold one average, not "
            f"{len(found)}; put lbopt.average_params(...) at the end of the chain"
        )
    require_last(opt_state)
    return found[0]


def require_last(opt_state: OptState) -> None:
    """Raises ValueError if a transformation follows ``average_params`` in its chain."""

    # The state of a transformation without numbers is a tuple, too, but an empty one.
    def is_node(node: Any) -> bool:
        return isinstance(node, AverageState) or (isinstance(node, tuple) and not node)

    nodes, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_node)
    # A chain's state is a plain tuple; those of wrappers name their parts.
    for path, node in nodes:
        steps = [i for i, k in enumerate(path) if isinstance(k, SequenceKey)]
        if not isinstance(node, AverageState):
            continue
        for i in steps:
            others = [p[i].idx for p, _ in nodes if p[:i] == path[:i]]
            if max(others) > path[i].idx:
                raise ValueError(
                    f"average_params is number {path[i].idx + 1} of a chain of "
                    f"{max(others) + 1}, so it averages other weights than those after "
                    "the step; put lbopt.average_params(...) at the end of the chain"
                )
