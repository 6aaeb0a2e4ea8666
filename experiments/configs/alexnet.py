"""AlexNet and AlexNet-BN on ImageNet with LARS, batch 8,192.

    python -m experiments.configs.alexnet                      AlexNet-BN on `strokes`
    python -m experiments.configs.alexnet --model alexnet      AlexNet on `strokes`
    python -m experiments.configs.alexnet alexnet_bn --data-dir ~/tensorflow_datasets
    python -m experiments.configs.alexnet --help               every setting

The first two are eight steps on the embedded images, resized to 227 pixels. `alexnet`
and `alexnet_bn` are the settings for ImageNet of You, Gitman & Ginsburg (ICLR 2018
submission), for as many devices as `--devices` says. Expected top-1 after 100 epochs:
58.2 and 60.1 % (without LARS 44.8 and 58.0 %). Not run here: neither ImageNet nor the
devices were at hand. The other batch sizes are in `lbopt.presets.YOU_2017`. The rate is
1 at the first step, as in the authors' solver files; images are 227x227 crops of
256x256 over 256, minus the mean colour where the authors subtract a mean image.
"""

import dataclasses
import sys

from experiments import command_line
from experiments.configs.published import lars_settings
from experiments.data.splits import Recipe
from experiments.settings import Config, Lars
from lbopt.presets import YOU_2017

ALEXNET_BN = Config(
    **lars_settings(YOU_2017["alexnet_bn", 8_192]),
    dataset="imagenet2012",
    recipe=Recipe(normalise="caffe", crop="plain", image_size=227),
    model="alexnet_bn",
    norm_momentum=0.9,
    eval_epochs=5.0,
    checkpoint_epochs=5.0,
)
ALEXNET = dataclasses.replace(
    ALEXNET_BN, **lars_settings(YOU_2017["alexnet", 8_192]), model="alexnet"
)
STROKES = dataclasses.replace(
    ALEXNET_BN,
    lars=Lars(learning_rate=2.0, weight_decay=5e-4),
    dataset="strokes/20",
    batch_size=128,
    epochs=0.1,
    warmup_epochs=0.01,
    eval_batch_size=128,
    eval_epochs=0.1,
    checkpoint_epochs=0.1,
)
"""Eight steps on the embedded images, to show that all of it runs."""

CONFIGS = {"strokes": STROKES, "alexnet_bn": ALEXNET_BN, "alexnet": ALEXNET}
"""Settings by name; the first are the default."""


if __name__ == "__main__":
    command_line.run(sys.argv[1:], __doc__, CONFIGS)
