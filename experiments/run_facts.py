"""What a run is: facts of its start, and settings that make it different.

`run.json` is a JSON object of what was known when the run began, or was last taken up:

- `started`: when, as ISO 8601; `command`: the command line;
- `platform`, `device_kind`, `devices` (those that shared each step), `processes` and
  `cpu_cores` (of the first process's host);
- `python` and `jax`, `jaxlib`, `flax`, `optax`, `lbopt`, `numpy`: versions;
- `parameters`: of the model; `steps` of the whole run, and `steps_per_epoch`;
- of the data, what is known of `train_images`, `test_images`, `classes` and
  `image_shape`;
- `memory_plan`: bytes a device is expected to need, by purpose; may be missing.
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
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from experiments import markdown, settings

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "lbopt", "numpy")
_OPTIMIZERS = ("kfac", "sp_ngd", "nlcg", "lars", "rmsprop", "sgd")
# Where things are; the rest of the settings makes the run.
_PLACES = {"data_dir", "directory", "resume"}


def start_facts(
    *,
    devices: int,
    parameters: int,
    steps: int,
    steps_per_epoch: float,
    data: Mapping[str, Any],
    memory_plan: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What is known when a run begins, as `run.json` holds it.

    Args:
        devices: Devices that share each step.
        parameters: Parameters of the model.
        steps: Steps of the whole run.
        steps_per_epoch: Steps of one epoch; need not be whole.
        data: Any of `train_images`, `test_images`, `classes` and `image_shape`.
        memory_plan: Bytes by purpose, of one device.

    Returns:
        JSON values by name.
    """
    facts = {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": devices,
        "processes": jax.process_count(),
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version for name in _PACKAGES if (version := _version(name))},
        "parameters": parameters,
        "steps": steps,
        "steps_per_epoch": steps_per_epoch,
        **data,
    }
    if memory_plan is not None:
        facts["memory_plan"] = dict(memory_plan)
    return json.loads(json.dumps(facts, default=str))


def write(directory: str | os.PathLike, facts: Mapping[str, Any]) -> None:
    """Writes `run.json`, over that of an earlier start.

    Args:
        directory: The directory of the run.
        facts: What `start_facts` returns.
    """
    text = json.dumps(facts, indent=2) + "\n"
    markdown.replace_text(pathlib.Path(directory, "run.json"), text)


def rows(config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A run's data, model, hardware and versions, as far as they are known.

    Args:
        config: Its settings, as `config.json` holds them.
        facts: What `run.json` holds.

    Returns:
        Names and texts.
    """
    found = [
        ("begun, or last taken up", facts.get("started")),
        ("data", _data(config, facts)),
        ("model", _model(config, facts)),
        ("optimizer", config.get("optimizer")),
        ("hardware", _hardware(facts)),
        ("versions", ", ".join(_known_versions(facts))),
    ]
    for purpose, needed in facts.get("memory_plan", {}).items():
        text = markdown.size(needed) if isinstance(needed, int | float) else needed
        found.append((f"memory plan: {purpose}", text))
    return [(name, text) for name, text in found if text]


def settings_changed(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The settings of a run that are not the defaults of `Config`.

    Args:
        config: The settings, as `config.json` holds them. Those of optimizers that the
            run does not have are left out.

    Returns:
        Name, value and default of each.
    """
    plain = json.dumps(dataclasses.asdict(settings.Config()), default=str)
    defaults = dict(_flat(json.loads(plain)))
    has = {config["optimizer"], "kfac" if _takes_kfac(config) else ""}
    others = tuple(f"{name}." for name in _OPTIMIZERS if name not in has)
    return [
        (f"`{name}`", _code(value), _code(defaults[name]) if name in defaults else "")
        for name, value in _flat(config)
        if value != defaults.get(name, ...)
        and name not in _PLACES
        and not name.startswith(others)
    ]


def _takes_kfac(config: Mapping[str, Any]) -> bool:
    """Whether another optimizer has the settings of K-FAC for its preconditioner."""
    chosen = config[config["optimizer"]]
    return bool(chosen.get("after_kfac")) or chosen.get("preconditioner") == "kfac"


def _flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _code(value: Any) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _data(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    parts = [config.get("dataset")]
    for key, name in (("train_images", "training"), ("test_images", "test")):
        if key in facts:
            parts.append(f"{facts[key]:,} {name} images")
    if "classes" in facts:
        parts.append(f"{facts['classes']:,} classes")
    if "image_shape" in facts:
        parts.append(" × ".join(map(str, facts["image_shape"])))
    return ", ".join(filter(None, parts))


def _model(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    parts = [config.get("model")]
    if "parameters" in facts:
        parts.append(f"{facts['parameters']:,} parameters")
    return ", ".join(filter(None, parts))


def _hardware(facts: Mapping[str, Any]) -> str:
    if "device_kind" not in facts:
        return ""
    return (
        f"{facts['devices']} × {facts['device_kind']} ({facts['platform']}), "
        f"{facts['processes']} process{'es' if facts['processes'] > 1 else ''}, "
        f"{facts['cpu_cores']} CPU cores on the first host"
    )


def _known_versions(facts: Mapping[str, Any]) -> list[str]:
    return [f"{name} {facts[name]}" for name in ("python", *_PACKAGES) if name in facts]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
