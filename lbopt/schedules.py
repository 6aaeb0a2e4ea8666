"""Schedules in epochs, as the papers state them, for optax, which counts steps."""

import optax

from lbopt._typing import Scalar


def polynomial(
    init_value: Scalar,
    power: float | int,
    start: float | int,
    end: float | int,
    *,
    steps_per_epoch: float | int,
) -> optax.Schedule:
    r"""A polynomial decay between two epochs.

    .. math:: \eta(e) = \eta_0 \left(
              1 - \frac{e - e_{\text{start}}}{e_{\text{end}} - e_{\text{start}}}
              \right)^p, \qquad e = \frac{\text{step}}{\text{steps per epoch}}

    with η₀ before ``start`` and 0 from ``end`` on.  The epoch e is a fraction: the
    value changes at every step.  There is no warm-up in the paper, and none here.

    Args:
      init_value: η₀, the value until ``start``.
      power: p.
      start: e_start, in epochs; the decay begins there.
      end: e_end, in epochs; the paper's runs stop before it, so the last value is
        small but not 0.
      steps_per_epoch: steps of the optimizer in one epoch, examples / batch size; need
        not be a whole number.

    Returns:
      A function of the step.

    Raises:
      ValueError: for numbers out of range.

    Examples:
      >>> from lbopt import schedules
      >>> rate = schedules.polynomial(0.5, power=2.0, start=1, end=5, steps_per_epoch=8)
      >>> [float(rate(8 * epoch)) for epoch in (0, 1, 3, 5, 6)]
      [0.5, 0.5, 0.125, 0.0, 0.0]

    Source: Osawa et al. 2022 (SP-NGD), Eq. 21.  The equation is silent outside of its
    interval; the values there are those of the authors' released code.
    """
    _check(init_value, power, start, end, steps_per_epoch)
    # optax counts its transition in whole steps and clips at both ends.  Here the whole
    # transition is one of its steps and our count a fraction of it, so that start and
    # end need not fall on a step.
    decay = optax.polynomial_schedule(init_value, 0.0, power, transition_steps=1)
    return lambda step: decay((step / steps_per_epoch - start) / (end - start))


def _check(
    init_value: Scalar,
    power: float | int,
    start: float | int,
    end: float | int,
    steps_per_epoch: float | int,
) -> None:
    if isinstance(init_value, (int, float)) and not init_value >= 0:
        raise ValueError(
            f"init_value={init_value} must not be negative; an optimizer's learning "
            "rate is subtracted as it is"
        )
    if not power > 0:
        raise ValueError(
            f"power={power} must be positive; use a number, not a schedule, for a "
            "constant"
        )
    if not start >= 0:
        raise ValueError(
            f"start={start} must not be negative; 0 decays from the first step"
        )
    if not end > start:
        raise ValueError(
            f"end={end} must be larger than start={start}; both are epochs"
        )
    if not steps_per_epoch > 0:
        raise ValueError(
            f"steps_per_epoch={steps_per_epoch} must be positive; it is the number of "
            "examples divided by the batch size"
        )
