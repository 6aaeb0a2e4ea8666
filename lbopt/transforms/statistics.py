r"""From statistics to factors: reduce-scatter, running average, and similarity.

.. math:: X \leftarrow (1 - w_k) X + w_k X_{\text{batch}}, \qquad
          w_k = \frac{1 - \beta}{1 - \beta^k}

after k statistics (debiased: the first is taken whole).  Each device computes its own
share of the numbers; a statistic that is not due is neither read nor sent.  One that is
all zeros is of no row, as of a layer under ``nn.switch`` that did not run: it is left
out, and stays due.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from lbopt import collectives
from lbopt._typing import Array, Scalar
from lbopt.collectives import Axis
from lbopt.curvature.factor import Factor
from lbopt.in_place import update_if


class Running(NamedTuple):
    """The running average of one statistic, on this device.

    Attributes:
      factor: this device's share of it, ``[copies, share]``.
      before: X₋₂ if the refresh is adaptive (X₋₁ is the factor), ``()`` otherwise.
      traces: the traces of the factor's copies, ``[copies]``, on every device.
    """

    factor: Any
    before: Any
    traces: Any


class Findings(NamedTuple):
    """Flags of the statistics, ``[statistics]``; False for those that were not due.

    Attributes:
      accepted: whether it was due, finite, and not empty.
      empty: whether it was due and all zeros: it is of no row, and counts as none.
      similar: whether it is similar to the last, X ~ X₋₁.
      similar_before: whether it is similar to the one before, X ~ X₋₂.
    """

    accepted: Any
    empty: Any
    similar: Any
    similar_before: Any


def fold(
    kinds: Sequence[Factor],
    running: Sequence[Running],
    packed: Sequence[Callable[[], Float[Array, "_ _"]]],
    due: Bool[Array, " statistics"] | bool,
    weights: Float[Array, " statistics"],
    stale_threshold: Scalar | None,
    axis: Axis,
) -> tuple[list[Running], Findings]:
    """Folds the statistics that are due, finite and not empty into the factors.

    Args:
      kinds: the kind of each factor.
      running: the averages.
      packed: functions that return this device's statistics, ``[copies, size]``;
        called only for those that are due, so that packing the others costs nothing.
      due: which are due, the same on all devices; a bool, of all, is resolved while
        the step is traced.
      weights: the weight of each new statistic in its average.
      stale_threshold: α of the similarity; None for a periodic refresh, in which all
        statistics share one collective instead of having one each.
      axis: the devices.

    Returns:
      The averages, and the flags, the same on all devices.
    """
    numbers = range(len(kinds))
    if due is False:
        return list(running), nothing_found(len(kinds))
    always = due is True
    due = jnp.broadcast_to(jnp.asarray(due), (len(kinds),))
    # Periodic statistics are all due at the same steps, adaptive ones each at its own.
    joint = stale_threshold is None
    groups = [list(numbers)] if joint else [[i] for i in numbers]
    after: list[Running] = []
    found: list[Findings] = []
    for group in groups:

        def renew(old: Any, group: list[int] = group) -> Any:
            rows = [packed[i]() for i in group]  # [copies, size]
            shares = collectives.scatter_mean(rows, axis)  # [copies, share]
            sums = _sums([kinds[i] for i in group], old[0], shares, joint, axis)
            ids = jnp.asarray(group)
            findings = _findings(sums, due[ids], weights[ids], stale_threshold)
            folded = [
                _folded(*one, findings.accepted[k], weights[i])
                for k, (i, one) in enumerate(
                    zip(group, zip(old[0], shares, sums, strict=True), strict=True)
                )
            ]
            return folded, findings

        start = ([running[i] for i in group], nothing_found(len(group)))
        some = jnp.any(due[jnp.asarray(group)])
        folded, findings = renew(start) if always else update_if(some, renew, start)
        after += folded
        found.append(findings)
    return after, jax.tree.map(lambda *x: jnp.concatenate(x), *found)


def weight(decay: Scalar, seen: Int[Array, "*s"]) -> Float[Array, "*s"]:
    r"""Returns the weight of a new statistic, :math:`(1 - \beta) / (1 - \beta^k)`.

    Args:
      decay: β.
      seen: k − 1, the number of statistics before it.

    Returns:
      The weight; 0 if β does not lie in [0, 1), and then no statistic is accepted.
    """
    # A traced decay cannot be refused at the door; what is averaged with it can.
    sound = (jnp.asarray(decay) >= 0) & (jnp.asarray(decay) < 1)
    decay = jnp.where(sound, decay, 0)
    # The first weight by name: (1 − β) / (1 − β¹) is 1 only up to rounding.
    weight = jnp.where(seen == 0, 1, (1 - decay) / (1 - decay ** (seen + 1.0)))
    return jnp.where(sound, weight, 0)


def averaged(
    before: Array, now: Array, weight: Array, accepted: Bool[Array, ""]
) -> Array:
    """Returns the running average with a new statistic, if that is accepted.

    Args:
      before: the average.
      now: the statistic.
      weight: its weight; 1 replaces the average by it, whatever their sizes.
      accepted: whether it counts.

    Returns:
      The average, in its own dtype.
    """
    # Not before + w (now − before), which for w = 1 keeps the rounding of a larger
    # average: after a statistic 1e8 times larger nothing of the new one is left.
    new = (1 - weight) * before + weight * now
    return jnp.where(accepted, new.astype(before.dtype), before)


def nothing_found(statistics: int) -> Findings:
    """Returns the flags of a step at which no statistic is due."""
    return Findings(*[jnp.zeros(statistics, bool)] * len(Findings._fields))


class _Sums(NamedTuple):
    """Sums over all numbers of a statistic, the same on all devices.

    Attributes:
      bad: the number of those that are not finite.
      traces: the traces of its copies.
      changes: ‖X − X₋₁‖², ‖X₋₁‖², ‖X − X₋₂‖², ‖X₋₂‖².
    """

    bad: Any
    traces: Any
    changes: Any


def _sums(
    kinds: Sequence[Factor],
    running: Sequence[Running],
    shares: Sequence[Array],
    joint: bool,
    axis: Axis,
) -> list[_Sums]:
    sums = []
    for kind, old, new in zip(kinds, running, shares, strict=True):
        # How often each packed number stands in the matrix: 2 off the diagonal.
        often = collectives.own_share(kind.multiplicity()[None], axis)
        changes: Any = ()
        if not joint:
            last, before = old.factor, old.before
            pairs = (new - last, last, new - before, before)
            changes = jnp.stack([jnp.sum(often * x * x) for x in pairs])
        sums.append(
            _Sums(
                # As a float, because all sums share one collective.
                bad=jnp.sum(~jnp.isfinite(new)).astype(new.dtype),
                traces=jnp.sum(jnp.where(often == 1, new, 0), -1),
                changes=changes,
            )
        )
    return collectives.total(sums, axis)


def _findings(
    sums: Sequence[_Sums], due: Array, weights: Array, stale_threshold: Scalar | None
) -> Findings:
    finite = due & (jnp.stack([s.bad for s in sums]) == 0)
    # The trace of a positive semi-definite matrix is zero only if all of it is.
    empty = finite & (jnp.stack([jnp.sum(s.traces) for s in sums]) == 0)
    accepted = finite & ~empty & (weights > 0)
    if stale_threshold is None:
        unknown = jnp.zeros_like(accepted)
        return Findings(accepted, empty, unknown, unknown)
    changes = jnp.stack([s.changes for s in sums])

    def similar(change: Array, size: Array) -> Array:
        # Strict, so that nothing is similar for α = 0 or to a missing X₋₁ of zeros.
        return jnp.sqrt(change) < stale_threshold * jnp.sqrt(size)

    return Findings(
        accepted,
        empty,
        accepted & similar(changes[:, 0], changes[:, 1]),
        accepted & similar(changes[:, 2], changes[:, 3]),
    )


def _folded(
    old: Running, new: Array, sums: _Sums, accepted: Array, weight: Array
) -> Running:
    before = old.before
    if not isinstance(before, tuple):  # () if the refresh is periodic
        before = jnp.where(accepted, old.factor, before)
    factor, traces = (
        averaged(*pair, weight, accepted)
        for pair in ((old.factor, new), (old.traces, sums.traces))
    )
    return Running(factor, before, traces)
