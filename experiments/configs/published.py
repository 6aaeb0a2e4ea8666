"""Published runs: the parts that their settings share, and their list for `--help`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.settings import Config, Lars
from lbopt.presets import LarsPreset


class Published(NamedTuple):
    """A run and its published result.

    Attributes:
        config: The settings.
        reported: The result that the source reports, in a few words.
    """

    config: Config
    reported: str


def listing(runs: Mapping[str, Published]) -> str:
    """Returns a line for each run: name, batch size, length and published result."""
    width = max(map(len, runs))

    def line(name: str, run: Published) -> str:
        batch, epochs = run.config.batch_size, run.config.epochs
        return f"    {name:{width}}  {batch:7,} × {epochs:3g} epochs  {run.reported}"

    return "\n".join(line(name, run) for name, run in runs.items())


def lars_settings(preset: LarsPreset) -> dict[str, Any]:
    """Returns the settings of `Config` that a preset of LARS determines.

    Raises:
        ValueError: For a preset without LARS.
    """
    if preset.variant == "momentum":
        raise ValueError("preset.variant='momentum' must be one of LARS; use Sgd")
    return {
        "optimizer": "lars",
        "lars": Lars(
            learning_rate=preset.learning_rate,
            momentum=preset.momentum,
            weight_decay=preset.weight_decay,
            variant=preset.variant,
        ),
        "batch_size": preset.batch_size,
        "epochs": float(preset.epochs),
        "schedule": "polynomial",
        "decay_from": preset.decay_from,
        "end_value": preset.end_value,
        "warmup_epochs": float(preset.warmup_epochs),
        "warmup_start": preset.init_value,
    }
