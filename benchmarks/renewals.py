"""What a step of the curvature transform renewed, by kind of statistic.

Kinds are those of its reports: A, G, and F for all others.  Renewals are counted, and
weighed: a statistic by its numbers, which are what devices would send of it, and an
inversion by its multiplications (``Factor.work``).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lbopt.curvature.refresh import Refresh
from lbopt.sharding import Unit
from lbopt.transforms.kfac_state import KINDS

ALL = "all"
"""The name of all kinds together."""


class Renewed(NamedTuple):
    """What was renewed, by kind, ``[3]`` each.

    Attributes:
      statistics: statistics.
      numbers: the numbers in them.
      inversions: units inverted.
      work: multiplications of their inversions, up to a constant.
    """

    statistics: np.ndarray
    numbers: np.ndarray
    inversions: np.ndarray
    work: np.ndarray


def everything(units: Sequence[Unit]) -> Renewed:
    """A step at which all is renewed.

    Args:
      units: the transform's units, ``sharding.units_of``.

    Returns:
      The amounts.
    """
    return _amounts(units, np.ones(len(units), bool), np.ones(len(units), bool))


def at_step(units: Sequence[Unit], refresh: Refresh, step: int) -> Renewed:
    """What the last step renewed.

    Args:
      units: the transform's units, ``sharding.units_of``.
      refresh: its clocks after the step.
      step: the step's number.

    Returns:
      The amounts.
    """
    new = np.asarray(refresh.statistic_step) == step
    statistic_of = [unit.statistic for unit in units]
    return _amounts(units, new[statistic_of], np.asarray(refresh.inverse_step) == step)


def shares(
    units: Sequence[Unit], steps: Sequence[Renewed]
) -> dict[str, dict[str, float]]:
    """The share of what could have been renewed that was.

    Args:
      units: the transform's units.
      steps: what each step renewed.

    Returns:
      For each field of ``Renewed`` the share by kind and of all; kinds that the model
      does not have are left out.
    """
    result: dict[str, dict[str, float]] = {}
    for name, whole in everything(units)._asdict().items():
        mean = np.mean([getattr(step, name) for step in steps], axis=0)
        there = {kind: i for i, kind in enumerate(KINDS) if whole[i]}
        result[name] = {
            **{kind: float(mean[i] / whole[i]) for kind, i in there.items()},
            ALL: float(mean.sum() / whole.sum()),
        }
    return result


def _amounts(
    units: Sequence[Unit], measured: np.ndarray, inverted: np.ndarray
) -> Renewed:
    """The sums over units whose statistic was measured, and that were inverted."""
    kinds = [KINDS.index({"a": "A", "g": "G"}.get(unit.kind, "F")) for unit in units]

    def by_kind(values: Any) -> np.ndarray:
        return np.bincount(kinds, weights=values, minlength=len(KINDS)).astype(np.int64)

    first = np.asarray([unit.row == 0 for unit in units])
    return Renewed(
        statistics=by_kind(measured & first),
        numbers=by_kind(measured * [unit.factor.size for unit in units]),
        inversions=by_kind(inverted),
        work=by_kind(inverted * [unit.factor.work for unit in units]),
    )
