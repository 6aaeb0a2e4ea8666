"""ResNet-50 on ImageNet with LARS, batch 8,192, minimal augmentation.

    python experiments/imagenet_resnet50.py lars --devices 64 --data-dir DIRECTORY

Expected: 73.5 % top-1 after 100 epochs (batch 256: 73.8 %; You, Gitman & Ginsburg,
ICLR 2018 submission, table of ResNet-50). Not run here: neither ImageNet nor that many
devices were at hand. Other batch sizes: `lbopt.presets.YOU_2017`.
"""

from experiments.data.splits import Recipe
from experiments.settings import Config, Lars

CONFIG = Config(
    optimizer="lars",
    lars=Lars(learning_rate=30.0, weight_decay=5e-4),
    dataset="imagenet2012",
    recipe=Recipe(crop="plain"),
    model="resnet50",
    norm_momentum=0.9,
    batch_size=8_192,
    epochs=100.0,
    schedule="polynomial",
    warmup_epochs=5.0,
    warmup_start=1.0,
    eval_epochs=5.0,
    checkpoint_epochs=5.0,
)
