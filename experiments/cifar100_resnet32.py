"""Trains the pre-activation ResNet-32 of Adya et al. with NLCG or a baseline.

    python experiments/cifar100_resnet32.py                      NLCG on `strokes/100`
    python experiments/cifar100_resnet32.py --optimizer lars     LARS likewise
    python experiments/cifar100_resnet32.py nlcg --data-dir ~/tensorflow_datasets
    python experiments/cifar100_resnet32.py --help               every setting

The names `nlcg`, `momentum`, `sgd`, `rmsprop` and `lars` are the settings for CIFAR-100
in `experiments/configs/resnet32.py`, with the published figures; `cifar100_study.py`
compares all optimizers on `strokes`.
"""

import sys
from collections.abc import Sequence

from experiments import command_line
from experiments.configs import resnet32

CONFIGS = {
    "strokes": resnet32.STROKES,
    "nlcg": resnet32.NLCG,
    "momentum": resnet32.MOMENTUM,
    "sgd": resnet32.SGD,
    "rmsprop": resnet32.RMSPROP,
    "lars": resnet32.LARS,
}
"""Settings by name; the first are the default."""


def main(arguments: Sequence[str]) -> None:
    """Does what the command line, without the program's name, asks for."""
    command_line.run(arguments, __doc__, CONFIGS)


if __name__ == "__main__":
    main(sys.argv[1:])
