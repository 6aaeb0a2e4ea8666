"""ResNet-50 on ImageNet with momentum SGD, batch 8,192: the baseline.

    python experiments/imagenet_resnet50.py sgd --data-dir DIRECTORY

Meant for 256 GPUs, 32 images on each; here for any number that divides them, which
evaluate 32 images at a time.

Expected: 76.26 % top-1 of one crop after 90 epochs, as at batch 256 (76.40 %), in one
hour on 256 NVIDIA P100 (Goyal et al., Accurate, Large Minibatch SGD, 2017). Not run
here: neither ImageNet nor the devices were at hand.

The rate is 0.1 × batch / 256, to which it rises from 0.1 in 5 epochs, as at any other
batch: pass `--sgd.learning-rate` with `--batch-size`. The weight decay is in the loss
and leaves BatchNorm out; the last BatchNorm of each block starts at scale 0. Momentum
multiplies gradients without the rate, so that no correction is needed where it changes.
The paper draws the last layer's weights with standard deviation 0.01; here they have
the layer's own scale.
"""

from experiments.configs.published import Published
from experiments.data.splits import Recipe
from experiments.settings import Config, Sgd

BATCH_SIZE = 8_192

CONFIG = Config(
    optimizer="sgd",
    sgd=Sgd(
        learning_rate=0.1 * BATCH_SIZE / 256,
        momentum=0.9,
        nesterov=True,
        weight_decay=0.0,
    ),
    dataset="imagenet2012",
    recipe=Recipe(crop="inception"),
    model="resnet50",
    zero_init_residual=True,
    norm_momentum=0.9,
    l2=1e-4,
    batch_size=BATCH_SIZE,
    devices=0,
    micro_batch_size=32,
    epochs=90.0,
    schedule="staircase",
    decay_epochs=(30.0, 60.0, 80.0),
    warmup_epochs=5.0,
    warmup_start=0.1,
    warmup_shape="linear",
    eval_batch_size=1_024,
    eval_epochs=1.0,
    checkpoint_epochs=5.0,
)

RUNS = {"sgd": Published(CONFIG, "momentum SGD: 76.3 %, 1 hour")}
"""By name."""
