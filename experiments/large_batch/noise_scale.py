r"""The gradient noise scale: the batch at which noise and gradient are of one size.

.. math::
  |\bar g|^2 \approx \frac{B |g_B|^2 - b |g_b|^2}{B - b}, \qquad
  \operatorname{tr} \Sigma \approx \frac{|g_b|^2 - |g_B|^2}{1/b - 1/B}, \qquad
  B_{\text{noise}} = \operatorname{tr} \Sigma / |\bar g|^2

with the gradients of batches of b, whose squared norms are averaged, and of their mean,
a batch of B. Below it a larger batch saves nearly as many steps as it is larger; above
it saves little for an optimizer that follows the gradient.

Source: McCandlish, Kaplan, Amodei et al., An Empirical Model of Large-Batch Training,
2018, appendix A.1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def simple_noise_scale(
    gradient: Callable[[Any], Any], batch: Any, parts: int
) -> tuple[jax.Array, jax.Array]:
    """Estimates the noise scale from the parts of a batch.

    Args:
        gradient: Computes the mean gradient of a batch.
        batch: Arrays of B examples each.
        parts: Number of parts of b = B / parts examples.

    Returns:
        The trace of the noise and the square of the gradient, whose quotient is the
        noise scale; both may be averaged over batches first, and be negative by chance.

    Raises:
        ValueError: If the batch cannot be divided so.
    """
    examples = len(jax.tree.leaves(batch)[0])
    if parts < 2 or examples % parts:
        raise ValueError(
            f"parts={parts} must be at least 2 and divide the {examples} examples; "
            "pass one of their divisors"
        )
    small = examples // parts
    cut = jax.tree.map(lambda x: x.reshape(parts, small, *x.shape[1:]), batch)

    def add(total: Any, part: Any) -> tuple[Any, jax.Array]:
        g = gradient(part)
        return jax.tree.map(jnp.add, total, g), _square(g)

    first = jax.tree.map(lambda x: x[0], cut)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, first)
    )
    total, squares = jax.lax.scan(add, zeros, cut)
    of_parts = jnp.mean(squares)
    of_all = _square(jax.tree.map(lambda x: x / parts, total))
    noise = (of_parts - of_all) / (1 / small - 1 / examples)
    signal = (examples * of_all - small * of_parts) / (examples - small)
    return noise, signal


def _square(tree: Any) -> jax.Array:
    return sum((jnp.sum(x**2) for x in jax.tree.leaves(tree)), jnp.float32(0))
