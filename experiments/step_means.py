"""The metrics of several steps as numbers: of a record, and of an epoch."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

# Of several steps the largest is reported, not the mean.
_LARGEST = frozenset({"skipped", "rejected", "boosted", "inverse_age_max"})


def read(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Waits for metrics.

    Args:
        metrics: Scalars of each step, on the device or not.

    Returns:
        Their numbers.
    """
    return [
        {key: float(value) for key, value in of_step.items()}
        for of_step in jax.device_get([dict(m) for m in metrics])
    ]


def joined(of_steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of several steps as those of one: means, of counters the largest.

    Args:
        of_steps: The metrics of each.

    Returns:
        Those of all, by the names of the last step's.
    """
    joined = {}
    for key in of_steps[-1]:
        values = [metrics[key] for metrics in of_steps]
        joined[key] = max(values) if key in _LARGEST else sum(values) / len(values)
    return joined


class EpochMeans:
    """Means of the training metrics since the last evaluation, and the speed."""

    def __init__(self):
        # The first call of a process ends a step that was compiled; it is not a speed.
        self._last: float | None = None
        self.start(None)

    def start(self, seconds: float | None) -> None:
        """Forgets what was noted, at the evaluation's time."""
        self._metrics: list[tuple[dict[str, float], float]] = []
        self._images, self._busy = 0, 0.0
        if seconds is not None:
            self._last = seconds

    def add(
        self, of_steps: Sequence[dict[str, float]], images: int, seconds: float
    ) -> float | None:
        """Notes the metrics of images that took until now.

        Args:
            of_steps: The metrics of each step since the last call.
            images: Images in all these steps.
            seconds: Training time now.

        Returns:
            Images/s since the last call; None for the first.
        """
        share = images / len(of_steps)
        self._metrics += [(metrics, share) for metrics in of_steps]
        last, self._last = self._last, seconds
        if last is None or seconds <= last:
            return None
        self._images += images
        self._busy += seconds - last
        return images / (seconds - last)

    def means(self) -> dict[str, float]:
        """The means of what epoch lines show; 0 for what is not reported."""
        total = sum(images for _, images in self._metrics)
        return {
            key: sum(m.get(key, 0.0) * i for m, i in self._metrics) / max(total, 1)
            for key in ("loss", "accuracy", "refreshed")
        }

    def speed(self) -> str:
        """Images/s, or a dash where nothing was timed."""
        rate = f"{self._images / self._busy:,.0f}" if self._busy else "-"
        return f"{rate} images/s"
