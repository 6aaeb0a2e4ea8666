"""Schedules of the step: learning rates in epochs, as papers state them; damping."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import jax.numpy as jnp
import optax

from lbopt import checks
from lbopt._typing import Scalar, ScalarOrSchedule

__all__ = [
    "first_damping",
    "polynomial",
    "staircase",
    "warmup",
]


def polynomial(
    init_value: Scalar,
    power: float | int,
    start: float | int,
    end: float | int,
    *,
    steps_per_epoch: float | int,
) -> optax.Schedule:
    r"""A polynomial decay from one epoch to another.

    .. math:: \eta(e) = \eta_0 \left(
              1 - \frac{e - e_{\text{start}}}{e_{\text{end}} - e_{\text{start}}}
              \right)^p, \qquad e = \frac{\text{step}}{\text{steps per epoch}}

    with η₀ before ``start`` and 0 from ``end`` on.  The epoch e is a fraction: the
    value changes at every step.  As in the paper, there is no warm-up.

    Args:
      init_value: η₀, the value until ``start``.
      power: p.
      start: e_start, in epochs; the decay begins there.
      end: e_end, in epochs; the paper's runs stop before it, at a small but positive
        value.
      steps_per_epoch: examples / batch size; need not be a whole number.

    Returns:
      A function of the step.

    Raises:
      ValueError: for numbers out of range.

    Examples:
      >>> from lbopt import schedules
      >>> rate = schedules.polynomial(0.5, power=2.0, start=1, end=5, steps_per_epoch=8)
      >>> [float(rate(8 * epoch)) for epoch in (0, 1, 3, 5, 6)]
      [0.5, 0.5, 0.125, 0.0, 0.0]

    Source: Osawa et al. 2022 (SP-NGD), Eq. 21; outside of the equation's interval, the
    values are those of the authors' released code.
    """
    _check_rate("init_value", init_value)
    checks.positive("power", power, "1 is a linear decay")
    checks.not_negative("start", start, "0 decays from the first step")
    checks.positive("end", end, "it is the epoch from which the value is 0")
    if not end > start:
        raise ValueError(
            f"end={end} must be larger than start={start}; both are epochs"
        )
    _check_steps_per_epoch(steps_per_epoch)
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
    r"""A rise to the peak, followed by another schedule that counts from step 0.

    .. math:: \eta(k) = \begin{cases}
              \eta_0 + (\eta_{\max} - \eta_0)\, r(k / K) & k < K \\
              \text{after}(k) & k \geq K \end{cases}

    with r(a) = a (``"linear"``), a² (``"quadratic"``), or 1 − √(1 − a) (``"sqrt"``,
    which is steep at the end).

    Since ``after`` counts from the start of the run, a decay from step 0 is already
    below the peak at step K, and the rate jumps down (Caffe).  For a decay from step K,
    pass K to optax as ``transition_begin`` (MLPerf).

    Args:
      peak_value: η_max, which the rise approaches.
      steps: K; 0 for no warm-up.
      after: a schedule, or a number, from step K on.
      init_value: η₀, the value at step 0.
      shape: r.

    Returns:
      A function of the step.

    Raises:
      ValueError: for numbers out of range or an unknown shape.

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
    _check_rate("after", after, schedule=True)
    way_out = "for epochs use round(epochs * steps_per_epoch)"
    checks.whole("steps", steps, way_out, least=0)
    checks.one_of("shape", shape, _RISES)
    rise = _RISES[shape]
    rest: Callable[[Any], Any] = (
        after if callable(after) else optax.constant_schedule(after)
    )
    if steps == 0:  # 0 / 0 below
        return rest

    def schedule(step: Any) -> Any:
        # `where` evaluates both branches: after K the root would be NaN, or, of a step
        # that is a Python number, complex.
        part = rise(jnp.minimum(step / steps, 1.0))
        ramp = init_value + (peak_value - init_value) * part
        return jnp.where(step < steps, ramp, rest(step))

    return schedule


def staircase(
    init_value: Scalar,
    epochs: Sequence[float | int],
    *,
    steps_per_epoch: float | int,
) -> optax.Schedule:
    r"""A constant that is divided by 10 after certain epochs.

    .. math:: \eta(k) = \eta_0\, 10^{-\lvert \{ e \,:\, k > \lfloor e\, s \rfloor \}
              \rvert}

    with s steps in an epoch.  The boundary step itself still has the old value.

    Args:
      init_value: η₀.
      epochs: e, in ascending order; ``()`` for a constant.
      steps_per_epoch: s, examples / batch size; need not be a whole number.

    Returns:
      A function of the step.

    Raises:
      ValueError: for numbers out of range or epochs out of order.

    Examples:
      >>> from lbopt import schedules
      >>> rate = schedules.staircase(0.8, (2, 3), steps_per_epoch=10)
      >>> [round(float(rate(step)), 4) for step in (0, 20, 21, 30, 31)]
      [0.8, 0.8, 0.08, 0.08, 0.008]

    Source: the released code of Adya et al. 2018.
    """
    _check_rate("init_value", init_value)
    _check_steps_per_epoch(steps_per_epoch)
    for epoch in epochs:
        checks.positive("epochs", epoch, "pass () for a constant")
    if not all(before < epoch for before, epoch in pairwise((0, *epochs))):
        raise ValueError(f"epochs={tuple(epochs)} must be positive and ascending")
    drops: dict[int, float] = {}
    for epoch in epochs:
        # TensorFlow's piecewise constant, used there, drops after its boundary; optax's
        # drops at it.
        step = int(steps_per_epoch * epoch) + 1
        drops[step] = drops.get(step, 1.0) * 0.1  # short runs: two in one step
    return optax.piecewise_constant_schedule(init_value, drops)


def first_damping(step: Any) -> Any:
    r"""The damping of a first try: high at the start, 3e-3 from step 34 on.

    .. math:: \lambda_k = \max(0.1 \cdot 0.9^k,\; 0.003)

    In the first steps the curvature is an average over few batches, and the gradients
    of layers below a head that starts at zero grow faster than it follows: a high
    damping keeps these steps close to the gradient's.

    Args:
      step: k.

    Returns:
      λ, in units of the curvature of a mean cross entropy.

    Examples:
      >>> from lbopt import schedules
      >>> [round(float(schedules.first_damping(k)), 4) for k in (0, 10, 33, 34)]
      [0.1, 0.0349, 0.0031, 0.003]

    Source: our choice, from ``experiments/first_settings.py``.
    """
    return jnp.maximum(0.1 * 0.9**step, 3e-3)


_RISES: dict[str, Callable[[Any], Any]] = {
    "linear": lambda a: a,
    "quadratic": lambda a: a**2,
    "sqrt": lambda a: a / (1 + (1 - a) ** 0.5),  # 1 − √(1 − a) would cancel
}


def _check_rate(name: str, value: ScalarOrSchedule, schedule: bool = False) -> None:
    way_out = "an optimizer subtracts the learning rate times its direction"
    checks.not_negative(name, value, way_out, schedule=schedule)


def _check_steps_per_epoch(steps_per_epoch: float | int) -> None:
    way_out = "it is the number of examples divided by the batch size"
    checks.positive("steps_per_epoch", steps_per_epoch, way_out)
