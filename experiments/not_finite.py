"""The layer in which numbers that are not finite first appear, in words."""

from collections.abc import Iterator, Mapping, Sequence

METRIC = "first_not_finite"
"""The metric of ``lbopt.health`` that holds a layer's position."""


def first(positions: Sequence[float]) -> float:
    """Returns the first layer's position of several steps, −1 for none."""
    # A position, of which there is no mean.
    return next((position for position in positions if position >= 0), -1.0)


class Watch:
    """Reads the metrics of steps for numbers that are not finite.

    Args:
      layers: the paths of the layers with curvature; empty without curvature.
      resumed: whether steps were taken before, of which some may have been skipped.
    """

    def __init__(self, layers: Sequence[str], *, resumed: bool):
        self._layers, self._finite = layers, True
        self._skipped = None if resumed else 0.0

    def path(self, values: Mapping[str, float]) -> str | None:
        """Returns the path of the layer that a step's metrics name, None for none."""
        position = int(values.get(METRIC, -1))
        return self._layers[position] if position >= 0 else None

    def named(self, values: Mapping[str, float]) -> dict[str, float | str]:
        """Adds the path of that layer, if there is one, as ``layer_not_finite``."""
        path = self.path(values)
        return {**values, **({"layer_not_finite": path} if path else {})}

    def messages(
        self, step: int, of_steps: Sequence[Mapping[str, float]]
    ) -> Iterator[tuple[int, str]]:
        """Yields a message for the first of any steps in a row that are not finite.

        Args:
          step: the number of the last of these steps.
          of_steps: their metrics.

        Yields:
          The number of a step, and the message.
        """
        for number, values in enumerate(of_steps, start=step - len(of_steps) + 1):
            skipped, before = values.get("skipped", 0.0), self._skipped
            skips = before is not None and skipped > before
            path, was_finite = self.path(values), self._finite
            self._skipped, self._finite = skipped, not (path or skips)
            if self._finite or not was_finite:
                continue
            where = f"in layer {path}" if path else "in the loss or a gradient"
            skip = "; the step is skipped" if skips else ""
            yield number, f"numbers that are not finite {where}{skip}"
