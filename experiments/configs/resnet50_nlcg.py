"""ResNet-50 on ImageNet with preconditioned NLCG, batch 65,536.

    python experiments/imagenet_resnet50.py nlcg --devices 512 --data-dir DIRECTORY

Expected: more than 10 points of top-1 above the SGD baseline after 90 epochs (Adya,
Palakkode & Tuzel 2018, abstract: batches above 65k). The paper's settings for ImageNet
were not to be had, and its code has none: these are ours, after the usual recipe of 90
epochs. Not run here: neither ImageNet nor that many devices were at hand.
"""

from experiments.settings import Config, Nlcg

BATCH_SIZE = 65_536

CONFIG = Config(
    optimizer="nlcg",
    nlcg=Nlcg(learning_rate=0.1 * BATCH_SIZE / 256),
    dataset="imagenet2012",
    model="resnet50",
    norm_momentum=0.9,
    l2=1e-4,
    batch_size=BATCH_SIZE,
    epochs=90.0,
    schedule="staircase",
    decay_epochs=(30.0, 60.0, 80.0),
    warmup_epochs=11.25,
    warmup_shape="sqrt",
    warmup_start=0.1,
    eval_epochs=5.0,
    checkpoint_epochs=5.0,
)
