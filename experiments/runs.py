"""The directory of a run: whose it is, and with which settings it was begun."""

import dataclasses
import json
import os
import pathlib
from typing import Any

# Where things are, on how many devices, and how often it is looked at: none of it makes
# another run.
_MAY_CHANGE = {
    *("data_dir", "directory", "resume"),
    *(
        "devices",
        "parallel",
        "placement",
        "distributed",
        "start_timeout",
        "heartbeat_timeout",
    ),
    *("num_threads", "num_workers", "bad_images", "remat"),
    *("log_period", "eval_batch_size", "eval_epochs"),
    *("checkpoint_epochs", "keep_checkpoints", "keep_best"),
}


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
        OSError: If `directory` cannot be written.
        ValueError: If the run in `directory` has other settings, naming the first.
    """
    directory = pathlib.Path(directory)
    path = directory / "config.json"
    settings = _plain(config)
    if path.exists():
        if not resume:
            raise FileExistsError(
                f"directory: {directory} holds a run already; pass --resume to "
                "continue it, or choose another --directory"
            )
        # Settings that came later had their defaults.
        before = _plain(type(config)()) | json.loads(path.read_text(encoding="utf-8"))
        for name in sorted(settings.keys() - _MAY_CHANGE):
            if settings[name] != before[name]:
                raise ValueError(
                    f"{name}: the run in {directory} was begun with {before[name]!r}, "
                    f"so it cannot go on with {settings[name]!r}"
                )
        return
    aside = path.with_suffix(".partial")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise OSError(
            f"directory: {directory} cannot be written ({error.strerror}); choose "
            "another --directory"
        ) from error


def _plain(config: Any) -> dict[str, Any]:
    """Settings as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
