r"""From statistics to factors: reduce-scatter, running average, and similarity.

.. math:: X \leftarrow X + \frac{1 - \beta}{1 - \beta^k} (X_{\text{batch}} - X)

after k statistics (debiased: the first is taken whole).  Everything happens on each
device's share of the numbers; what is not due is neither read nor sent.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from lbopt import collectives
from lbopt._typing import Array, Scalar
from lbopt.collectives import Axis
from lbopt.curvature.factor import Factor
from lbopt.in_place import update_if


class Running(NamedTuple):
    """What one statistic leaves behind; every array on this device only.

    Attributes:
      factor: the running average, ``[copies, share]``.
      before: X₋₂ where refreshing is adaptive (X₋₁ is the factor), ``()`` otherwise.
      traces: the traces of the factor's copies, ``[copies]``, on every device.
    """

    factor: Any
    before: Any
    traces: Any


class Findings(NamedTuple):
    """What was found out about statistics that were due, ``[statistics]``.

    Attributes:
      accepted: due, and finite.
      similar: whether the new one is similar to the last, X ~ X₋₁.
      similar_before: whether it is similar to the one before, X ~ X₋₂.
    """

    accepted: Any
    similar: Any
    similar_before: Any


def fold(
    kinds: Sequence[Factor],
    running: Sequence[Running],
    packed: Sequence[Callable[[], Float[Array, "_ _"]]],
    due: Bool[Array, " statistics"],
    weights: Float[Array, " statistics"],
    stale_threshold: Scalar | None,
    axis: Axis,
) -> tuple[list[Running], Findings]:
    """Folds the statistics that are due and finite into the factors.

    Args:
      kinds: the kind of each factor.
      running: what each statistic left behind.
      packed: make this device's statistics, ``[copies, size]`` each; called where they
        are due, so that packing costs nothing where they are not.
      due: which are due, the same on all devices.
      weights: the weight of each new statistic in its average.
      stale_threshold: α of the similarity, None where refreshing is periodic; then
        all statistics travel in one collective, else each in its own.
      axis: the devices.

    Returns:
      What they leave behind now, and the findings, the same on all devices.
    """
    numbers = range(len(kinds))
    joint = stale_threshold is None
    groups = [list(numbers)] if joint else [[i] for i in numbers]
    after: list[Running] = []
    found: list[Findings] = []
    for group in groups:
        nothing = jnp.zeros(len(group), bool)

        def renew(old: Any, group: list[int] = group) -> Any:
            rows = [packed[i]() for i in group]
            shares = collectives.scatter_mean(rows, axis)
            sums = _sums([kinds[i] for i in group], old[0], shares, joint, axis)
            ids = jnp.asarray(group)
            findings = _findings(sums, due[ids], stale_threshold)
            folded = [
                _folded(*one, findings.accepted[k], weights[i])
                for k, (i, one) in enumerate(
                    zip(group, zip(old[0], shares, sums, strict=True), strict=True)
                )
            ]
            return folded, findings

        start = ([running[i] for i in group], Findings(nothing, nothing, nothing))
        folded, findings = update_if(jnp.any(due[jnp.asarray(group)]), renew, start)
        after += folded
        found.append(findings)
    return after, jax.tree.map(lambda *x: jnp.concatenate(x), *found)


class _Sums(NamedTuple):
    """Sums over all numbers of a statistic, the same on all devices.

    Attributes:
      bad: how many are not finite.
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
        often = collectives.own_share(kind.multiplicity()[None], axis)
        changes: Any = ()
        if not joint:
            last, before = old.factor, old.before
            pairs = (new - last, last, new - before, before)
            changes = jnp.stack([jnp.sum(often * x * x) for x in pairs])
        sums.append(
            _Sums(
                bad=jnp.sum(~jnp.isfinite(new)).astype(new.dtype),
                traces=jnp.sum(jnp.where(often == 1, new, 0), -1),
                changes=changes,
            )
        )
    return collectives.total(sums, axis)


def _findings(
    sums: Sequence[_Sums], due: Array, stale_threshold: Scalar | None
) -> Findings:
    accepted = due & (jnp.stack([s.bad for s in sums]) == 0)
    if stale_threshold is None:
        unknown = jnp.zeros_like(accepted)
        return Findings(accepted, unknown, unknown)
    changes = jnp.stack([s.changes for s in sums])

    def similar(change: Array, size: Array) -> Array:
        # Strict, so that α = 0 is never similar and a missing X₋₁ (zero) is not.
        return jnp.sqrt(change) < stale_threshold * jnp.sqrt(size)

    return Findings(
        accepted,
        accepted & similar(changes[:, 0], changes[:, 1]),
        accepted & similar(changes[:, 2], changes[:, 3]),
    )


def _folded(
    old: Running, new: Array, sums: _Sums, accepted: Array, weight: Array
) -> Running:
    def average(before: Array, now: Array) -> Array:
        change = (weight * (now - before)).astype(before.dtype)
        return jnp.where(accepted, before + change, before)

    before = old.before
    if not isinstance(before, tuple):
        before = jnp.where(accepted, old.factor, before)
    return Running(average(old.factor, new), before, average(old.traces, sums.traces))
