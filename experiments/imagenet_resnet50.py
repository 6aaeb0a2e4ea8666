"""Trains a residual network with K-FAC, SP-NGD, NLCG, LARS or SGD.

    python experiments/imagenet_resnet50.py                      a run of K-FAC
    python experiments/imagenet_resnet50.py --optimizer sgd      a run of SGD
    python experiments/imagenet_resnet50.py --devices 4          on several devices
    python experiments/imagenet_resnet50.py demo                 SP-NGD beside SGD
    python experiments/imagenet_resnet50.py --help               every setting

The defaults are the demo's: a ResNet-8 of 78,692 parameters on the embedded data set
`strokes` (20 classes, 10,240 images), 40 steps of batch 2,048. For ImageNet, prepared
by tensorflow_datasets, there are published settings of ResNet-50, by name and for all
devices there are (`experiments/configs/resnet50.py`):

    python experiments/imagenet_resnet50.py sp_ngd_4k --data-dir ~/tensorflow_datasets

Their names, batches × lengths, and the top-1 and time that their sources report:
"""

import dataclasses
import datetime
import pathlib
import sys
from collections.abc import Sequence

import jax

from experiments import command_line, memory_use
from experiments.configs import published, resnet50
from experiments.settings import Config

PUBLISHED = resnet50.RUNS
"""Runs on ImageNet by name."""

CONFIGS = {"strokes": Config()} | {name: run.config for name, run in PUBLISHED.items()}
"""Settings by name; the first are the default."""

DESCRIPTION = f"{__doc__}\n{published.listing(PUBLISHED)}\n"

DEMO = Config(devices=4)


def demo_configs(config: Config) -> list[Config]:
    """The same run with SGD and with SP-NGD, in a new directory for both."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    root = (config.directory or pathlib.Path("runs")) / f"demo-{now}"
    devices = min(config.devices, len(jax.devices()))
    return [
        dataclasses.replace(
            config, optimizer=name, directory=root / name, devices=devices
        )
        for name in ("sgd", "sp_ngd")
    ]


def main(arguments: Sequence[str]) -> None:
    """Does what the command line, without the program's name, asks for."""
    memory_use.share_arenas()
    if arguments[:1] == ["demo"]:
        command_line.run(arguments, DESCRIPTION, {"demo": DEMO}, expand=demo_configs)
    else:
        command_line.run(arguments, DESCRIPTION, CONFIGS)


if __name__ == "__main__":
    main(sys.argv[1:])
