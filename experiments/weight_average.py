"""An average of the weights over the run, which evaluation may use in their place."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from lbopt import training


class WeightAverageState(NamedTuple):
    """State of `track`.

    Attributes:
        count: Steps taken.
        weight_average: The averages, of the structure of the parameters.
    """

    count: Any
    weight_average: Any


def track(decay: float) -> optax.GradientTransformation:
    """Averages the weights after each step and leaves the step as it is.

    With k the steps taken before, the average keeps `min(decay, (1 + k) / (10 + k))` of
    itself, as TensorFlow's `ExponentialMovingAverage` with `num_updates`.

    Args:
        decay: The largest share, in (0, 1).

    Returns:
        A transformation for the end of a chain; its `update` takes `params`.
    """

    def init(params: Any) -> WeightAverageState:
        return WeightAverageState(jnp.zeros([], jnp.int32), params)

    def update(
        updates: Any, state: Any, params: Any = None
    ) -> tuple[Any, WeightAverageState]:
        k = state.count
        kept = jnp.minimum(decay, (1 + k) / (10 + k))
        weights = optax.apply_updates(params, updates)
        average = optax.incremental_update(weights, state.weight_average, 1 - kept)
        count = jnp.asarray(optax.safe_increment(k))
        return updates, WeightAverageState(count, average)

    return optax.GradientTransformation(init, update)


def averaged(state: training.TrainState) -> training.TrainState:
    """The training state with the averages as parameters, for evaluation."""
    return state._replace(params=optax.tree.get(state.opt_state, "weight_average"))
