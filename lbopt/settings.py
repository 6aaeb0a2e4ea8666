"""Groups of optimizer settings that belong together, checked when constructed."""

from dataclasses import dataclass

import jax
import jax.core

from lbopt import checks
from lbopt._typing import AxisName, Count, Number, Whole
from lbopt.curvature.refresh import Due


@dataclass(frozen=True)
class Periods:
    """Steps between statistics and between inversions, and when inverses take effect.

    Attributes:
      statistics: steps from one statistic to the next.
      inverses: steps from one inversion to the next; None if the step computes only
        the first inverses, and ``BackgroundInversion`` all later ones.
      stagger: whether each device spreads its inversions evenly over the steps of
        their period, instead of inverting everything at once.  The first step inverts
        everything.
      delay: s, steps until an inverse takes effect: the inverse of the factors of step
        t at step t + s, at most one period later.  No step then waits for an
        inversion, and the compiler may overlap it with other work, at the price of a
        second buffer of inverses, split over the devices.  The first inverses take
        effect at once; with None or 0 all do.

    Raises:
      ValueError: if a period is not a positive whole number, if the delay is longer
        than the period of the inverses, or if there is no period to delay or stagger.

    Examples:
      >>> import lbopt
      >>> lbopt.Periods(statistics=2, inverses=20, stagger=True)
      Periods(statistics=2, inverses=20, stagger=True, delay=None)
    """

    statistics: Count = 1
    inverses: Count | None = 1
    stagger: bool = False
    delay: Whole | None = None

    def __post_init__(self) -> None:
        checks.whole("statistics", self.statistics, "1 renews them at every step")
        if not isinstance(self.stagger, bool):
            raise ValueError(
                f"stagger={self.stagger!r} must be a bool; True spreads inversions "
                "over their period"
            )
        if self.delay is not None:
            at_once = "None lets inverses take effect at once"
            checks.whole("delay", self.delay, at_once, least=0, static=True)
        # Only the first inversion is in the step, and that is not delayed.
        if self.inverses is None:
            if self.delay or self.stagger:
                name = "delay" if self.delay else "stagger"
                raise ValueError(
                    f"{name}={getattr(self, name)} must not be set with inverses=None, "
                    "because lbopt.BackgroundInversion(delay=) decides when to invert; "
                    "leave it out, or give a period"
                )
            return
        checks.whole(
            "inverses", self.inverses, "None leaves them to lbopt.BackgroundInversion"
        )
        # The value of a period that optax.inject_hyperparams traces is unknown here.
        if isinstance(self.inverses, jax.core.Tracer):
            return
        if self.delay is not None and self.delay > self.inverses:
            raise ValueError(
                f"delay={self.delay} must be at most inverses={self.inverses}, the "
                "steps after which the next inversion begins; lengthen the period, or "
                "shorten the delay"
            )

    def counted(self) -> tuple[int, int]:
        """Returns the periods that the host may count.

        Returns:
          Steps between statistics and between inversions; 0 where flags in the state
          decide (staggered or delayed inversions, and numbers that are traced), −1
          where only the first step inverts.
        """
        statistics, inverses = (
            0 if isinstance(period, jax.Array) else int(period)
            for period in (
                self.statistics,
                -1 if self.inverses is None else self.inverses,
            )
        )
        return statistics, 0 if self.stagger or self.delay else inverses

    def due(self, step: int) -> Due:
        """Returns what a step renews, for programs that are chosen on the host.

        Args:
          step: the step's number, from 0.

        Returns:
          The argument ``due=`` of an optimizer's ``update`` and of ``lbopt.refresh``; a
          static argument of a function that is jitted.

        Examples:
          >>> import lbopt
          >>> lbopt.Periods(inverses=10).due(5)
          Due(statistics=True, inverses=False)
        """
        return due_at(step, *self.counted())


def due_at(step: int, statistics: int, inverses: int) -> Due:
    """Returns what a step renews, given the periods of ``Periods.counted``."""
    return Due(*(_is_due(step, period) for period in (statistics, inverses)))


def _is_due(step: int, period: int) -> bool | None:
    if period == 0:
        return None
    return step == 0 if period < 0 else step % period == 0


@dataclass(frozen=True)
class Placement:
    """The devices over which examples are spread, and where inverses live.

    Attributes:
      axis_name: the mesh axis over which examples are spread, under ``jax.shard_map``
        or ``jax.pmap``, or a tuple of axes that count as one; None for one device, or
        where ``jit`` alone places the work.
      axis_size: the number of devices along it, or along all of them together.
      inverses: ``"comm"``: every device gets all inverses, and gradients are
        all-reduced.  ``"memory"``: a layer's inverses stay on the device that computed
        them; gradients are reduce-scattered to it, and natural gradients gathered from
        it.  A number in [0, 1]: the share of the bytes of all inverses that every
        device gets, smallest layers first.

    Raises:
      ValueError: if ``axis_size`` is not a positive whole number or has no
        ``axis_name``, or if ``inverses`` is none of the above.

    Examples:
      >>> import lbopt
      >>> lbopt.Placement("data", 8, inverses="memory")
      Placement(axis_name='data', axis_size=8, inverses='memory')

    Source: both extremes and the shares between them are those of Osawa et al. 2022
    and of Pauloski et al. 2021 (KAISA).
    """

    axis_name: AxisName | None = None
    axis_size: Whole = 1
    inverses: Number | str = "comm"

    def __post_init__(self) -> None:
        of_mesh = "pass mesh.shape[axis_name]"
        checks.whole("axis_size", self.axis_size, of_mesh, static=True)
        # Without a name there is no collective, and a size would be ignored.
        if self.axis_name is None and self.axis_size != 1:
            raise ValueError(
                f"axis_size={self.axis_size} must have axis_name, the mesh axis of "
                "these devices; name it, or leave axis_size out"
            )
        names = (self.axis_name,) if isinstance(self.axis_name, str) else self.axis_name
        if names is not None and not (
            isinstance(names, tuple)
            and names
            and all(isinstance(name, str) for name in names)
            and len(set(names)) == len(names)
        ):
            raise ValueError(
                f"axis_name={self.axis_name!r} must be a string, a tuple of different "
                "strings, or None; the number of devices is axis_size"
            )
        way_out = "'comm', 'memory', or the share of inverses that every device gets"
        if isinstance(self.inverses, str):
            if self.inverses not in ("comm", "memory"):
                raise ValueError(
                    f"inverses={self.inverses!r} must be 'comm', 'memory' or a number; "
                    "0.5 replicates half of their bytes"
                )
        else:
            checks.share("inverses", self.inverses, way_out, zero=True)
        if self.axis_name is None and self.inverses not in ("comm", 1):
            raise ValueError(
                f"inverses={self.inverses!r} must have axis_name, the mesh axis over "
                "whose devices inverses are spread; name it, or leave inverses out"
            )
