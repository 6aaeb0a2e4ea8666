"""Trains AlexNet or AlexNet-BN with LARS.

    python experiments/imagenet_alexnet.py                       AlexNet-BN on `strokes`
    python experiments/imagenet_alexnet.py --model alexnet       AlexNet likewise
    python experiments/imagenet_alexnet.py alexnet_bn --data-dir ~/tensorflow_datasets
    python experiments/imagenet_alexnet.py --help                every setting

The first two are eight steps on the embedded images, resized to 227 pixels. The names
`alexnet` and `alexnet_bn` are the settings for ImageNet in
`experiments/configs/alexnet.py`, with the published figures.
"""

import sys
from collections.abc import Sequence

from experiments import command_line
from experiments.configs import alexnet

CONFIGS = {
    "strokes": alexnet.STROKES,
    "alexnet_bn": alexnet.ALEXNET_BN,
    "alexnet": alexnet.ALEXNET,
}
"""Settings by name; the first are the default."""


def main(arguments: Sequence[str]) -> None:
    """Does what the command line, without the program's name, asks for."""
    command_line.run(arguments, __doc__, CONFIGS)


if __name__ == "__main__":
    main(sys.argv[1:])
