r"""Refresh schedules of statistics and inverses.

Statistics are refreshed at a fixed period, or by the adaptive rule of SP-NGD: each
statistic X has its own interval Δ, which grows like the Fibonacci numbers while X stays
similar to its last two values and is halved otherwise,

.. math::
  \Delta = \begin{cases}
    \max(1, \lfloor \Delta_{-1} / 2 \rfloor) & X \not\sim X_{-1} \\
    \Delta_{-1}                              & X \not\sim X_{-2} \\
    \Delta_{-1} + \Delta_{-2}                & \text{otherwise}
  \end{cases}
  \qquad X \sim Y \iff \frac{\lVert X - Y \rVert_F}{\lVert Y \rVert_F} < \alpha
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from lbopt._typing import Array, Count, Flag, OptState
from lbopt.curvature.eigen_moments import CorrectedDue


class Due(NamedTuple):
    """What a step renews.

    A bool is resolved while a step is traced: what is not due is no part of the
    program.  An array decides when the program runs, at the price of conditionals.
    None leaves the decision to flags in the state, as the adaptive refresh needs it.

    Attributes:
      statistics: whether statistics are renewed.
      inverses: whether inverses are.

    Examples:
      >>> import lbopt
      >>> periods = lbopt.Periods(statistics=2, inverses=4)
      >>> [periods.due(step) for step in (0, 1, 2)]  # doctest: +NORMALIZE_WHITESPACE
      [Due(statistics=True, inverses=True),
       Due(statistics=False, inverses=False),
       Due(statistics=True, inverses=False)]
    """

    statistics: Flag | None = None
    inverses: Flag | None = None

    @property
    def is_static(self) -> bool:
        """Whether the program needs no conditionals."""
        return all(isinstance(flag, bool) for flag in self)


class Refresh(NamedTuple):
    """The refresh state of an optimizer's statistics and inverses.

    Statistics are numbered like the leaves of the factors; inverses by unit, one for
    each copy and each diagonal block of a factor.

    Attributes:
      due: whether a statistic is due at the next step, ``[statistics]``.
      renewals: number of refreshes so far, ``[statistics]``.
      statistic_step: step of the last refresh, −1 before the first, ``[statistics]``.
      interval: Δ, steps from the last refresh to the next, ``[statistics]``.
      previous_interval: Δ₋₁, the interval before, ``[statistics]``.
      inverse_step: step of a unit's last inversion, −1 before the first, ``[units]``.
      periods: steps between statistics and between inversions, where the host may
        count them: ``[2]``; 0 where flags decide, −1 for nothing after the first.
    """

    due: Any
    renewals: Any
    statistic_step: Any
    interval: Any
    previous_interval: Any
    inverse_step: Any
    periods: Any


def init_refresh(
    statistics: int, units: int, periods: tuple[int, int] = (0, 0)
) -> Refresh:
    """Returns the state before the first step, at which everything is due.

    Args:
      statistics: number of statistics.
      units: number of units of inversion work.
      periods: as in ``Refresh``.

    Returns:
      The refresh state.
    """
    return Refresh(
        due=jnp.ones(statistics, bool),
        renewals=jnp.zeros(statistics, jnp.int32),
        statistic_step=jnp.full(statistics, -1, jnp.int32),
        interval=jnp.ones(statistics, jnp.int32),
        previous_interval=jnp.ones(statistics, jnp.int32),
        inverse_step=jnp.full(units, -1, jnp.int32),
        periods=jnp.asarray(periods, jnp.int32),
    )


def is_due(count: Array, period: Count | int, phase: Any = 0) -> Array:
    """Tests whether a fixed schedule falls on step ``count``.

    Args:
      count: the step, from 0.
      period: steps from one refresh to the next.
      phase: the step of the first refresh, below the period; a number or an array.

    Returns:
      One flag for each phase.
    """
    return jnp.asarray((count - jnp.asarray(phase)) % period == 0)


def next_interval(
    similar: Bool[Array, "*s"],
    similar_before: Bool[Array, "*s"],
    interval: Int[Array, "*s"],
    previous: Int[Array, "*s"],
) -> Int[Array, "*s"]:
    """Returns the steps until the next refresh, by SP-NGD's rule.

    Args:
      similar: X ~ X₋₁.
      similar_before: X ~ X₋₂.
      interval: Δ₋₁.
      previous: Δ₋₂.

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

    Source: Osawa et al. 2022 (SP-NGD), Algorithm 2.  The paper leaves open the initial
    intervals (here Δ₋₁ = Δ₋₂ = 1) and the case of a missing X₋₁ or X₋₂ (here not
    similar).  A statistic that always stays similar is refreshed at steps 1, 2, 3, 5,
    8, 13, ….
    """
    grown = jnp.where(similar_before, interval + previous, interval)
    return jnp.where(similar, grown, jnp.maximum(1, interval // 2))


def refresh(opt_state: OptState, due: Due = Due()) -> dict[str, Any]:
    """Reads off an optimizer's state which statistics are due at the next step.

    Args:
      opt_state: the state of any optax chain that contains a curvature transform.
      due: what the step renews, if the host knows it (``Periods.due``); flags are then
        Python bools, which cost a program nothing.

    Returns:
      A mask to pass as ``due=`` to the function made by ``value_grad_and_curvature``.
      It maps each layer's path to its statistics' type with a flag in place of each
      array, and includes the eigenbases of layers with corrected eigenvalues.

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
      >>> bool(lbopt.refresh(state)["layers_0"].a)
      True
    """
    masks: dict[str, Any] = {}
    for node in _curvature_states(opt_state):
        # Distributed factors are wrapped in sharding.Sharded, the mark of split arrays.
        factors = getattr(node.factors, "shards", node.factors)
        tree = jax.tree.structure(factors)
        known = due.statistics
        flags = [
            node.refresh.due[i] if known is None else known
            for i in range(tree.num_leaves)
        ]
        masks.update(jax.tree.unflatten(tree, flags))
        for path, moments in node.moments.items():
            a, g = masks[path]
            bases = [basis.vectors for basis in node.inverses[path]]
            masks[path] = CorrectedDue(a, g, moments.due, *bases)
    return masks


def inverse_age(opt_state: OptState) -> dict[str, Any]:
    """Reads off an optimizer's state how old its inverses are.

    Args:
      opt_state: the state of any optax chain that contains a curvature transform.

    Returns:
      A mapping from each layer's path to its statistics' type, with a number in place
      of each array: the steps between the factors that the inverse was computed from
      and the last step, for the oldest of its copies.  Before the first inversion this
      is the number of steps taken.

    Raises:
      ValueError: if the state contains no curvature transform.

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
        # One trace per unit, in the order of inverse_step.
        leaves, tree = jax.tree.flatten(node.traces)
        ends = list(itertools.accumulate(x.size for x in leaves))
        parts = jnp.split(node.refresh.inverse_step, ends[:-1])
        # −1, the step before the first, gives the number of steps taken.
        oldest = [node.count - 1 - jnp.min(steps) for steps in parts]
        ages.update(jax.tree.unflatten(tree, oldest))
    return ages


def _curvature_states(opt_state: OptState) -> list[Any]:
    """Finds the states of the curvature transforms in a chain's state."""

    # By a field, not by type: KfacState is defined above this package.
    def has_refresh(node: Any) -> bool:
        return isinstance(getattr(node, "refresh", None), Refresh)

    nodes = jax.tree.leaves(opt_state, is_leaf=has_refresh)
    found = [node for node in nodes if has_refresh(node)]
    if not found:
        way_out = (
            "pass the state of a chain that contains lbopt.scale_by_kfac; for "
            "another optimizer leave out due=, or layers= of make_train_step"
        )
        raise ValueError(
            f"opt_state={type(opt_state).__name__} holds no curvature transform; "
            f"{lost_types(opt_state) or way_out}"
        )
    return found


def lost_types(opt_state: OptState) -> str:
    """Returns the way out for a state of lists and dictionaries; "" for any other."""

    def is_lost(node: Any) -> bool:
        fields = isinstance(node, Mapping) and {"refresh", "inner_state"} & set(node)
        return isinstance(node, list) or bool(fields)

    if not any(map(is_lost, jax.tree.leaves(opt_state, is_leaf=is_lost))):
        return ""
    return (
        "it has lists or dictionaries where optax has tuples, as after a checkpoint is "
        "restored without a target: restore it into the structure of "
        "jax.eval_shape(tx.init, params), for example by orbax's restore(path, target)"
    )
