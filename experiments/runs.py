"""The directory of a run: whose it is, and with which settings it was begun."""

import dataclasses
import json
import os
import pathlib
from typing import Any

# Where things are and whether to continue; moved files make no other run.
_MAY_CHANGE = {"data_dir", "directory", "resume"}


def claim(
    directory: str | os.PathLike,
    config: Any,
    *,
    resume: bool,
) -> None:
    """Makes the directory of a new run, or reopens that of the run to be continued.

    The settings are kept in `config.json`: a run continued under others would be
    neither.

    Args:
        directory: The directory.
        config: Settings of the run, a dataclass.
        resume: Whether to continue the run in `directory`, if there is one.

    Raises:
        FileExistsError: If `directory` holds a run and `resume` is off.
        ValueError: If the run in `directory` has other settings, naming the first.
    """
    directory = pathlib.Path(directory)
    path = directory / "config.json"
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    if path.exists():
        if not resume:
            raise FileExistsError(
                f"directory: {directory} holds a run already; pass --resume to "
                "continue it, or choose another --directory"
            )
        before = json.loads(path.read_text(encoding="utf-8"))
        for name in sorted(settings.keys() - _MAY_CHANGE):
            if settings[name] != before.get(name):
                raise ValueError(
                    f"{name}: the run in {directory} was begun with "
                    f"{before.get(name)!r}, so it cannot go on with {settings[name]!r}"
                )
        return
    directory.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)
