r"""The signals that are backpropagated from the outputs, for each Fisher matrix.

The empirical Fisher matrix is that of the loss's own signal.  Of the predictive
distribution, a signal is the gradient of :math:`-\log p(y \mid f)` for a label y that
is drawn from it, or a column of a root of its Fisher matrix.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lbopt._typing import Array
from lbopt.curvature.likelihood import Outputs


def sampled_signal(outputs: Outputs, rng: Array) -> Array:
    """Returns the gradient of −log p(y | outputs) for y drawn from the model."""
    f = jax.lax.stop_gradient(outputs.value)
    if outputs.distribution == "categorical":
        labels = jax.random.categorical(rng, f)
        return jax.nn.softmax(f) - jax.nn.one_hot(labels, f.shape[-1], dtype=f.dtype)
    if outputs.distribution == "bernoulli":
        p = jax.nn.sigmoid(f)
        return p - jax.random.bernoulli(rng, p).astype(f.dtype)
    return jax.random.normal(rng, f.shape, f.dtype)  # f − y with y ~ N(f, I)


def summed_exactly(
    outputs: Outputs, pull: Callable[[Array], Any], one_by_one: bool
) -> Any:
    r"""Computes the sums of the exact Fisher, one backward pass per output coordinate.

    The signal of coordinate c of an event is a column of a root of the distribution's
    Fisher matrix: :math:`\sqrt{p_c}(p - e_c)` for a categorical,
    :math:`\sqrt{p(1-p)}` for a Bernoulli, 1 for a normal.

    Args:
      outputs: the arguments of ``likelihood``.
      pull: maps a signal at the outputs to the layers' sums.
      one_by_one: whether to run a backward pass for each example separately.

    Returns:
      The sums over all coordinates.
    """
    f = jax.lax.stop_gradient(outputs.value)
    examples = f.shape[0] if one_by_one else 1
    event = f.reshape(f.shape[0], -1).shape[1]
    p = jax.nn.softmax(f)

    def signal(number: Array) -> Array:
        example, c = number // event, number % event
        hot = jax.nn.one_hot(c, event, dtype=f.dtype).reshape(f.shape[1:])
        hot = jnp.broadcast_to(hot, f.shape)
        if one_by_one:
            chosen = jax.nn.one_hot(example, examples, dtype=f.dtype)
            hot *= jnp.expand_dims(chosen, range(1, f.ndim))
        if outputs.distribution == "categorical":
            # One example may have several events (tokens): 1 at the coordinate's own.
            group = jnp.sum(hot, axis=-1, keepdims=True)
            root = jnp.sqrt(jnp.sum(p * hot, axis=-1, keepdims=True))
            return root * (p * group - hot)
        if outputs.distribution == "bernoulli":
            q = jax.nn.sigmoid(f)
            return jnp.sqrt(q * (1 - q)) * hot
        return hot

    def add(total: Any, number: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, pull(signal(number))), None

    # The scan's carry has the shapes of one result, so the first pass is outside.
    first = pull(signal(jnp.asarray(0)))
    total, _ = jax.lax.scan(add, first, jnp.arange(1, examples * event))
    return total
