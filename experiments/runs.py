"""The directory of a run: its settings, and the facts of its start.

``config.json`` holds the settings. ``run.json`` holds the facts of the latest start:
``started`` (ISO 8601), ``command``, ``platform``, ``device_kind``, ``processes``,
``cpu_cores`` (of the first host), the versions of Python and of the packages, and the
facts that the run adds (``loop``).
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "lbopt", "numpy")
# Paths, devices, and the periods of reports and checkpoints do not change the result.
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
    *("log_period", "eval_batch_size", "eval_epochs", "profile", "compilation_cache"),
    *("checkpoint_epochs", "keep_checkpoints", "keep_best"),
}


def claim(directory: str | os.PathLike, config: Any, *, resume: bool) -> None:
    """Creates the directory of a new run, or reopens that of the run to be resumed.

    Args:
      directory: the directory.
      config: settings of the run, a dataclass; kept in ``config.json``.
      resume: whether to resume the run in ``directory``, if there is one.

    Raises:
      FileExistsError: if ``directory`` holds a run and ``resume`` is false.
      OSError: if ``directory`` cannot be written.
      ValueError: if the run in ``directory`` has other settings, naming the first.
    """
    directory = pathlib.Path(directory)
    path = directory / "config.json"
    settings = _plain(config)
    if not path.exists():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(settings, indent=2) + "\n")
        except OSError as error:
            raise OSError(
                f"directory={directory} must be writable ({error.strerror}); choose "
                "another --directory"
            ) from error
        return
    if not resume:
        raise FileExistsError(
            f"directory={directory} must not hold a run; pass --resume to continue "
            "that run, or choose another --directory"
        )
    # A setting that did not exist when the run began had its default.
    before = _plain(type(config)()) | json.loads(path.read_text(encoding="utf-8"))
    for name in sorted(settings.keys() - _MAY_CHANGE):
        if settings[name] != before[name]:
            raise ValueError(
                f"{name}={settings[name]!r} must be {before[name]!r}, as when the run "
                f"in {directory} began; choose another --directory"
            )


def write_facts(directory: str | os.PathLike, **of_run: Any) -> None:
    """Writes ``run.json``, over that of an earlier start.

    Args:
      directory: the directory of the run.
      **of_run: further facts, by name.
    """
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    facts = {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: installed[name] for name in _PACKAGES if name in installed},
        **of_run,
    }
    text = json.dumps(facts, indent=2, default=str)
    write_text(pathlib.Path(directory, "run.json"), text + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a file by its new text, or, after an error, leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _plain(config: Any) -> dict[str, Any]:
    """Returns the settings as JSON represents them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
