"""AlexNet and AlexNet-BN on ImageNet with LARS, batch 8,192.

    python experiments/imagenet_alexnet.py alexnet_bn --devices 16 --data-dir DIRECTORY
    python experiments/imagenet_alexnet.py alexnet --devices 16 --data-dir DIRECTORY

Expected top-1 after 100 epochs (You, Gitman & Ginsburg, ICLR 2018 submission):

    batch    AlexNet: rate, top-1    AlexNet-BN: rate, top-1
      512           2   58.7 %               2   60.2 %
    4,096          10   58.5 %              10   60.4 %
    8,192          10   58.2 %              14   60.1 %
   16,384          14   55.0 %              23   59.3 %
   32,768          14   46.9 %              22   57.8 %

(without LARS at 8,192: 44.8 % and 58.0 %). Not run here: neither ImageNet nor the
devices were at hand. Every row is in `lbopt.presets.YOU_2017`. The rate is 1 at the
first step, as in the authors' solver files; images are 227x227 crops of 256x256 over
256, with the mean colour subtracted where they subtract a mean image.
"""

import dataclasses

from experiments.data.splits import Recipe
from experiments.settings import Config, Lars

ALEXNET_BN = Config(
    optimizer="lars",
    lars=Lars(learning_rate=14.0, weight_decay=5e-4),
    dataset="imagenet2012",
    recipe=Recipe(normalise="caffe", crop="plain", image_size=227),
    model="alexnet_bn",
    norm_momentum=0.9,
    batch_size=8_192,
    epochs=100.0,
    schedule="polynomial",
    warmup_epochs=5.0,
    warmup_start=1.0,
    eval_epochs=5.0,
    checkpoint_epochs=5.0,
)
ALEXNET = dataclasses.replace(
    ALEXNET_BN,
    lars=Lars(learning_rate=10.0, weight_decay=5e-4),
    model="alexnet",
    warmup_epochs=2.0,
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
"""Eight steps on the embedded images, resized: it shows that all of it runs."""
