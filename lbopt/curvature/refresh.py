r"""When statistics are renewed, and what the state says of it.

Either at a fixed period, or by the adaptive rule of SP-NGD: each statistic X has its
own clock, whose interval grows like the Fibonacci numbers while X stays similar to its
last two values and is halved when it does not,

.. math::
  \Delta = \begin{cases}
    \max(1, \lfloor \Delta_{-1} / 2 \rfloor) & X \not\sim X_{-1} \\
    \Delta_{-1}                              & X \not\sim X_{-2} \\
    \Delta_{-1} + \Delta_{-2}                & \text{otherwise}
  \end{cases}
  \qquad X \sim Y \iff \frac{\lVert X - Y \rVert_F}{\lVert Y \rVert_F} < \alpha
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from lbopt._typing import Array, Count, OptState
from lbopt.curvature.eigen_moments import CorrectedDue


class Refresh(NamedTuple):
    """The clocks of an optimizer's statistics and inverses.

    Statistics are numbered as the leaves of the factors; inverses as their units, a
    number for each copy and each diagonal block of a factor.

    Attributes:
      due: whether a statistic is wanted at the coming step, ``[statistics]``.
      renewals: how often it was renewed, ``[statistics]``.
      statistic_step: the step at which it was last renewed, −1 before the first.
      interval: steps from its last renewal to the next, where that is adaptive.
      previous_interval: the interval before.
      inverse_step: the step at which a unit was last inverted, ``[units]``, −1 before.
    """

    due: Any
    renewals: Any
    statistic_step: Any
    interval: Any
    previous_interval: Any
    inverse_step: Any


def init_refresh(statistics: int, units: int) -> Refresh:
    """Clocks before the first step, at which everything is due."""
    return Refresh(
        due=jnp.ones(statistics, bool),
        renewals=jnp.zeros(statistics, jnp.int32),
        statistic_step=jnp.full(statistics, -1, jnp.int32),
        interval=jnp.ones(statistics, jnp.int32),
        previous_interval=jnp.ones(statistics, jnp.int32),
        inverse_step=jnp.full(units, -1, jnp.int32),
    )


def is_due(count: Array, period: Count | int, phase: Any = 0) -> Array:
    """Whether something with this period and phase is renewed at step ``count``.

    Args:
      count: the step, from 0.
      period: steps from one renewal to the next.
      phase: the first step, below the period; one or an array of them.

    Returns:
      A flag for each phase.
    """
    return jnp.asarray((count - jnp.asarray(phase)) % period == 0)


def next_interval(
    similar: Bool[Array, "*s"],
    similar_before: Bool[Array, "*s"],
    interval: Int[Array, "*s"],
    previous: Int[Array, "*s"],
) -> Int[Array, "*s"]:
    """The steps until the next renewal, by SP-NGD's rule.

    Args:
      similar: whether the new statistic is similar to the last, X ~ X₋₁.
      similar_before: whether it is similar to the one before, X ~ X₋₂.
      interval: Δ₋₁, the last interval.
      previous: Δ₋₂, the one before.

    Returns:
      Δ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lbopt.curvature.refresh import next_interval
      >>> yes, no = jnp.asarray(True), jnp.asarray(False)
      >>> last, before = jnp.asarray(5), jnp.asarray(3)
      >>> kinds = [(yes, yes), (yes, no), (no, no)]
      >>> [int(next_interval(*kind, last, before)) for kind in kinds]
      [8, 5, 2]

    Source: Osawa et al. 2022 (SP-NGD), Algorithm 2.  The paper leaves open the start
    (we take Δ₋₁ = Δ₋₂ = 1) and what a missing X₋₁ or X₋₂ counts as (not similar); a
    statistic that always stays similar is then renewed at steps 1, 2, 3, 5, 8, 13, ….
    """
    grown = jnp.where(similar_before, interval + previous, interval)
    return jnp.where(similar, grown, jnp.maximum(1, interval // 2))


def refresh(opt_state: OptState) -> dict[str, Any]:
    """Which statistics the optimizer wants at the coming step.

    Args:
      opt_state: the state of any optax chain that holds a curvature transform.

    Returns:
      For each layer's path its statistics' type with a flag in the place of each
      array, to pass as ``due=`` to the function that ``value_grad_and_curvature``
      makes; and, for layers whose eigenvalues are corrected, the bases in which it is
      to evaluate them.

    Raises:
      ValueError: if no curvature transform is in the state.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Sequential([nn.Dense(3)]), jnp.ones((8, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> layers = lbopt.trace_layers(loss_fn, params, x)
      >>> state = lbopt.kfac(0.1, layers).init(params)
      >>> bool(lbopt.refresh(state)["layers_0"].a)
      True
    """
    masks: dict[str, Any] = {}
    for node in _curvature_states(opt_state):
        # Without the mark that says how they lie on devices, if there is one.
        factors = getattr(node.factors, "shards", node.factors)
        tree = jax.tree.structure(factors)
        due = node.refresh.due
        masks.update(jax.tree.unflatten(tree, [due[i] for i in range(tree.num_leaves)]))
        for path, moments in node.moments.items():
            a, g = masks[path]
            bases = [basis.vectors for basis in node.inverses[path]]
            masks[path] = CorrectedDue(a, g, moments.due, *bases)
    return masks


def inverse_age(opt_state: OptState) -> dict[str, Any]:
    """How old the inverses in a state are.

    Args:
      opt_state: the state of any optax chain that holds a curvature transform.

    Returns:
      For each layer's path its statistics' type with a number in the place of each
      array: the steps from that whose factor the inverse was made from to the last, of
      its oldest copy; where there is no inverse yet the steps taken.

    Raises:
      ValueError: if no curvature transform is in the state.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Sequential([nn.Dense(3)]), jnp.ones((8, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> layers = lbopt.trace_layers(loss_fn, params, x)
      >>> tx = lbopt.scale_by_kfac(layers, periods=lbopt.Periods(inverses=5))
      >>> _, grads, curvature = lbopt.value_grad_and_curvature(loss_fn, layers)(
      ...     params, x)
      >>> state = tx.init(params)
      >>> for step in range(4):  # inverses are made at step 0; the last step is 3
      ...     _, state = tx.update(grads, state, curvature=curvature)
      >>> int(lbopt.inverse_age(state)["layers_0"].a)
      3
    """
    ages: dict[str, Any] = {}
    for node in _curvature_states(opt_state):
        leaves, tree = jax.tree.flatten(node.traces)
        ends = list(itertools.accumulate(x.size for x in leaves))
        parts = jnp.split(node.refresh.inverse_step, ends[:-1])
        oldest = [node.count - 1 - jnp.min(steps) for steps in parts]
        ages.update(jax.tree.unflatten(tree, oldest))
    return ages


def _curvature_states(opt_state: OptState) -> list[Any]:
    """The states of the curvature transforms in a chain's."""

    def has_refresh(node: Any) -> bool:
        return isinstance(getattr(node, "refresh", None), Refresh)

    nodes = jax.tree.leaves(opt_state, is_leaf=has_refresh)
    found = [node for node in nodes if has_refresh(node)]
    if not found:
        raise ValueError(
            f"opt_state={type(opt_state).__name__} holds no curvature transform; pass "
            "the state of a chain with lbopt.scale_by_kfac in it; without one leave "
            "due= out"
        )
    return found
