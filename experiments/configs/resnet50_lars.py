"""ResNet-50 on ImageNet with LARS as in its paper, batches of 256 to 32,768.

    python experiments/imagenet_resnet50.py lars_8k --data-dir DIRECTORY       (or 256,
                                                                    1k, 16k, 32k)

Meant for 8 GPUs at 256, and as many more as the batch is larger; here on however many
devices there are, which evaluate 32 images at a time. The authors had one NVIDIA DGX-1
of 8 P100 and accumulated from 16,384 on; how many images shared BatchNorm's statistics
is not known. No times are reported.

Expected top-1 after 100 epochs, of one crop (You, Gitman & Ginsburg, ICLR 2018
submission, table of ResNet-50, minimal augmentation):

     batch  rate  warm-up   top-1
       256     4     none  73.8 %
     1,024     9        5  73.3 %
     8,192    30        5  73.5 %
    16,384    33       12  72.9 %
    32,768    40       12  72.5 %

Not run here: neither ImageNet nor the devices were at hand. With `--recipe.crop
inception` it is their extended augmentation: 75.8, 75.4, 75.2, 74.4 and 72.5 %. The
warm-up starts at 1 and the decay counts from the first step, as in the authors' solver
files; more of what is open is in `lbopt/presets/lars.py`.
"""

from experiments.configs.published import Published
from experiments.data.splits import Recipe
from experiments.settings import Config, Lars

_ROWS = (
    # Name, batch, γ₀, epochs of the warm-up, reported.
    ("256", 256, 4.0, 0.0, "73.8 %"),
    ("1k", 1_024, 9.0, 5.0, "73.3 %"),
    ("8k", 8_192, 30.0, 5.0, "73.5 %"),
    ("16k", 16_384, 33.0, 12.0, "72.9 %"),
    ("32k", 32_768, 40.0, 12.0, "72.5 %"),
)

RUNS = {
    f"lars_{name}": Published(
        Config(
            optimizer="lars",
            lars=Lars(
                learning_rate=rate,
                momentum=0.9,
                weight_decay=5e-4,
                trust_coefficient=1e-3,
                variant="paper",
            ),
            dataset="imagenet2012",
            recipe=Recipe(crop="plain"),
            model="resnet50",
            norm_momentum=0.9,
            batch_size=batch,
            devices=0,
            micro_batch_size=32,
            epochs=100.0,
            schedule="polynomial",
            decay_from="start",
            end_value=0.0,
            warmup_epochs=warmup,
            warmup_start=1.0,
            eval_batch_size=1_024,
            eval_epochs=1.0,
            checkpoint_epochs=5.0,
        ),
        f"LARS: {reported}",
    )
    for name, batch, rate, warmup, reported in _ROWS
}
"""By name."""
