"""A run whose settings are published, and the list of such runs for `--help`."""

from collections.abc import Mapping
from typing import NamedTuple

from experiments.settings import Config


class Published(NamedTuple):
    """A run.

    Attributes:
        config: Its settings.
        reported: What its source reports of it, in a few words.
    """

    config: Config
    reported: str


def listing(runs: Mapping[str, Published]) -> str:
    """A line for each run: its name, batch size and length, and what was reported."""
    width = max(map(len, runs))

    def line(name: str, run: Published) -> str:
        batch, epochs = run.config.batch_size, run.config.epochs
        return f"    {name:{width}}  {batch:7,} × {epochs:3g} epochs  {run.reported}"

    return "\n".join(line(name, run) for name, run in runs.items())
