"""Schedules in epochs, as the papers state them, for optax, which counts steps."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import jax.numpy as jnp
import optax

from lbopt._typing import Scalar, ScalarOrSchedule


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


def warmup(
    peak_value: Scalar,
    steps: int,
    after: ScalarOrSchedule,
    *,
    init_value: Scalar = 0.0,
    shape: Literal["linear", "quadratic", "sqrt"] = "linear",
) -> optax.Schedule:
    r"""A rise to the peak, then another schedule, whose count does not begin anew.

    .. math:: \eta(k) = \begin{cases}
              \eta_0 + (\eta_{\max} - \eta_0)\, r(k / K) & k < K \\
              \text{after}(k) & k \geq K \end{cases}

    with r(a) = a (``"linear"``), a² (``"quadratic"``), or 1 − √(1 − a) (``"sqrt"``,
    which is steep at the end).

    ``after`` counts from the start of the run: a decay that has gone on since then is
    below the peak at K, and the rate jumps down (Caffe).  For one that begins at K give
    it to optax as ``transition_begin`` (MLPerf).

    Args:
      peak_value: η_max, what the rise leads to.
      steps: K, steps of the optimizer; 0 for no warm-up.
      after: the schedule of the step, or a number, from K on.
      init_value: η₀, the value of step 0.
      shape: r.

    Returns:
      A function of the step.

    Raises:
      ValueError: for numbers out of range and unknown shapes.

    Examples:
      >>> import optax
      >>> from lbopt import schedules
      >>> decay = optax.polynomial_schedule(10.0, 0.0, 2, transition_steps=15_600)
      >>> rate = schedules.warmup(10.0, 600, decay, init_value=1.0)
      >>> [round(float(rate(step)), 4) for step in (0, 300, 600)]
      [1.0, 5.5, 9.2456]

    Source: NVIDIA Caffe, the code of You et al. 2017 (linear; quadratic since November
    2017); MLPerf's ResNet-50 (linear); the released code of Adya et al. 2018 (sqrt).
    """
    _check_rate("peak_value", peak_value)
    _check_rate("init_value", init_value)
    _check_rate("after", after)
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(
            f"steps={steps} must be a whole number, at least 0; for epochs use "
            "round(epochs * steps_per_epoch)"
        )
    if shape not in _RISES:
        raise ValueError(f"shape={shape!r} must be one of {', '.join(_RISES)}")
    rise = _RISES[shape]
    rest: Callable[[Any], Any] = (
        after if callable(after) else optax.constant_schedule(after)
    )
    if steps == 0:
        return rest

    def schedule(step: Any) -> Any:
        # The branch that is not taken is computed too: the root needs the minimum.
        part = rise(jnp.minimum(step / steps, 1.0))
        ramp = init_value + (peak_value - init_value) * part
        return jnp.where(step < steps, ramp, rest(step))

    return schedule


def staircase(
    init_value: Scalar,
    epochs: Sequence[float | int],
    factor: float | int = 0.1,
    *,
    steps_per_epoch: float | int,
) -> optax.Schedule:
    r"""A constant that is multiplied by a factor after each of some epochs.

    .. math:: \eta(k) = \eta_0\, f^{\,\lvert \{ e \,:\, k > \lfloor e\, s \rfloor \}
              \rvert}

    with s steps in an epoch.  The boundary step itself still has the old value.

    Args:
      init_value: η₀.
      epochs: e, ascending; none for a constant.
      factor: f.
      steps_per_epoch: s, examples / batch size; need not be a whole number.

    Returns:
      A function of the step.

    Raises:
      ValueError: for numbers out of range and epochs out of order.

    Examples:
      >>> from lbopt import schedules
      >>> rate = schedules.staircase(0.8, (2, 3), 0.5, steps_per_epoch=10)
      >>> [round(float(rate(step)), 3) for step in (0, 20, 21, 30, 31)]
      [0.8, 0.8, 0.4, 0.4, 0.2]

    Source: the released code of Adya et al. 2018, with TensorFlow's piecewise constant,
    which drops after its boundary; optax's drops at it.
    """
    _check_rate("init_value", init_value)
    _check_steps_per_epoch(steps_per_epoch)
    if not factor > 0:
        raise ValueError(f"factor={factor} must be positive; 0.1 is the usual one")
    if not all(before < epoch for before, epoch in pairwise((0, *epochs))):
        raise ValueError(f"epochs={tuple(epochs)} must be positive and ascend")
    drops: dict[int, float] = {}
    for epoch in epochs:
        step = int(steps_per_epoch * epoch) + 1
        drops[step] = drops.get(step, 1.0) * factor  # short runs: two in one step
    return optax.piecewise_constant_schedule(init_value, drops)


_RISES: dict[str, Callable[[Any], Any]] = {
    "linear": lambda a: a,
    "quadratic": lambda a: a**2,
    "sqrt": lambda a: a / (1 + (1 - a) ** 0.5),  # 1 − √(1 − a) would cancel
}


def _check(
    init_value: Scalar,
    power: float | int,
    start: float | int,
    end: float | int,
    steps_per_epoch: float | int,
) -> None:
    _check_rate("init_value", init_value)
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
    _check_steps_per_epoch(steps_per_epoch)


def _check_rate(name: str, value: ScalarOrSchedule) -> None:
    if isinstance(value, (int, float)) and not value >= 0:
        raise ValueError(
            f"{name}={value} must not be negative; an optimizer's learning rate is "
            "subtracted as it is"
        )


def _check_steps_per_epoch(steps_per_epoch: float | int) -> None:
    if not steps_per_epoch > 0:
        raise ValueError(
            f"steps_per_epoch={steps_per_epoch} must be positive; it is the number of "
            "examples divided by the batch size"
        )
