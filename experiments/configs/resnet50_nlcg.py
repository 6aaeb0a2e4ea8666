"""ResNet-50 on ImageNet with preconditioned NLCG, batch 65,536.

    python experiments/imagenet_resnet50.py nlcg --data-dir DIRECTORY

Meant for 512 devices, 128 images on each; here for any number that divides them, which
evaluate 128 images at a time.

Expected: more than 10 points of top-1 above the SGD baseline after 90 epochs (Adya,
Palakkode & Tuzel 2018, abstract: batches above 65k); neither accuracies nor times could
be had. The paper's settings for ImageNet were not to be had either, and its code has
none: these are ours, after the usual recipe of 90 epochs, with the warm-up of the code
in the same proportion (11.2 epochs are the same whole steps as 11.25). Not run here:
neither ImageNet nor that many devices were at hand.
"""

from experiments.configs.published import Published
from experiments.data.splits import Recipe
from experiments.settings import Config, Nlcg

BATCH_SIZE = 65_536

CONFIG = Config(
    optimizer="nlcg",
    nlcg=Nlcg(
        learning_rate=0.1 * BATCH_SIZE / 256,
        beta="fletcher_reeves",
        preconditioner="bfgs",
        step_control="step",
        control_period=5,
    ),
    dataset="imagenet2012",
    recipe=Recipe(crop="inception"),
    model="resnet50",
    norm_momentum=0.9,
    l2=1e-4,
    batch_size=BATCH_SIZE,
    devices=0,
    micro_batch_size=128,
    epochs=90.0,
    schedule="staircase",
    decay_epochs=(30.0, 60.0, 80.0),
    warmup_epochs=11.2,
    warmup_shape="sqrt",
    warmup_start=1e-3,
    eval_batch_size=1_024,
    eval_epochs=1.0,
    checkpoint_epochs=5.0,
)

RUNS = {"nlcg": Published(CONFIG, "NLCG, settings ours: no figure")}
"""By name."""
