"""ResNet-50 on ImageNet with K-FAC in the manner of Ba et al., batch 2,048.

    python experiments/imagenet_resnet50.py kfac --data-dir DIRECTORY

Meant for 16 GPUs or more; any number that divides 64 parts of 32 images.

Expected: no figure. Ba, Grosse & Martens (ICLR 2017) train GoogLeNet with BatchNorm on
4 GPUs, where K-FAC needs about half of SGD's time to a given error, and progress per
step grows nearly in proportion to the batch, for 256, 1,024 and 2,048. Of ResNet-50
they say that the lead is large early and shrinks later. The text could not be had, and
this is recalled: neither their settings nor their accuracies are known here. Not run
here: neither ImageNet nor the devices were at hand.

Theirs are the parts: the Fisher matrix of sampled labels, running averages of the
factors, stale inverses, a step bounded in KL whose bound falls by a factor each half of
an epoch, momentum 0.9, an average of the iterates, BatchNorm over 32 images, and crops
of squashed images. Their statistics and inverses are made by other processors; here
every device makes them, at the steps below.

The numbers of the curvature are those with which K-FAC is known to bring ResNet-50 to
75.9 % (Pauloski et al., SC 2020 and 2021): factors every 10 steps, inverses every 100,
λ 1e-3, their decay 0.95, the bound 1e-3. The rest is ours: the length, the decay of the
bound, which shortens steps to a hundredth over the run, as two drops of a staircase
would, a rate too large to be felt after the first steps, the weight decay, and the
average's decay.
"""

from experiments.configs.published import Published
from experiments.data.splits import Recipe
from experiments.settings import Config, Kfac

CONFIG = Config(
    optimizer="kfac",
    kfac=Kfac(
        learning_rate=1.0,
        momentum=0.9,
        damping=1e-3,
        weight_decay=1e-4,
        kl_clip=1e-3,
        kl_clip_decay=0.926,
        factor_decay=0.95,
        stats_period=10,
        inverse_period=100,
    ),
    fisher="sampled",
    dataset="imagenet2012",
    recipe=Recipe(crop="plain"),
    model="resnet50",
    norm_momentum=0.9,
    weight_average=0.999,
    batch_size=2_048,
    devices=0,
    micro_batch_size=32,
    epochs=60.0,
    schedule="exponential",
    decay_rate=1.0,
    warmup_epochs=0.0,
    eval_batch_size=1_024,
    eval_epochs=1.0,
    checkpoint_epochs=5.0,
)

RUNS = {"kfac": Published(CONFIG, "K-FAC as of Ba et al.: no figure")}
"""By name."""
