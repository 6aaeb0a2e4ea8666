"""ResNet-50 on ImageNet with SP-NGD, batches of 4,096 to 131,072.

    python experiments/imagenet_resnet50.py sp_ngd_4k --data-dir DIRECTORY      (or 8k,
                                                            16k, 32k, 65k, 131k)

Meant for NVIDIA V100, 32 images on each, as in the last columns. A device evaluates 32
images at a time, whose BatchNorm is their own, on however many devices there are: of
fewer, gradients and statistics are accumulated, as the paper did for the last two rows.
A device holds its share of the batch twice, as mixup keeps the last one: 0.6 MB an
image each, which limits how few devices there may be.

Expected top-1 of a single crop (Osawa et al., IEEE TPAMI 2022, Tables 1 and 2):

      batch  epochs   steps   stale    fresh statistics    GPUs        time
      4,096      35  10,948  74.8 %              75.2 %     128    32.5 min
      8,192      35   5,434  75.3 %              75.5 %     256    16.9 min
     16,384      35   2,737  75.2 %              75.3 %     512     6.8 min
     32,768      45   1,760  75.4 %              75.6 %   1,024     5.5 min
     65,536      60   1,173                      75.6 %   1,024  not stated
    131,072      90     873                      74.9 %   1,024  not stated

The times are those with stale statistics. Not run here: neither ImageNet nor the
devices were at hand.

There is neither weight decay nor label smoothing nor a warm-up: weights are rescaled,
labels are mixed, and the rate stays until e_start. Different from the paper: the mean
colour is subtracted, not a mean image, and pixels are divided by 256, not 255; blocks
stride in their 3x3 convolution (v1.5). What the paper leaves open, and what was chosen,
is in `lbopt/presets/sp_ngd.py`; figures of its earlier version show rates of a
thousandth of these, so try the rate in a few epochs first.
"""

from experiments.configs.published import Published
from experiments.data.splits import Recipe
from experiments.settings import Config, SpNgd

_ROWS = (
    # Name, batch, α of mixup, p, e_start, e_end, η₀, m₀, λ, epochs, reported.
    ("4k", 4_096, 0.4, 11.0, 1, 53, 8.18e-3, 0.997, 2.5e-4, 35, "74.8 %, 32.5 min"),
    ("8k", 8_192, 0.4, 8.0, 1, 53.5, 1.25e-2, 0.993, 2.5e-4, 35, "75.3 %, 16.9 min"),
    ("16k", 16_384, 0.4, 8.0, 1, 53.5, 2.5e-2, 0.985, 2.5e-4, 35, "75.2 %, 6.8 min"),
    ("32k", 32_768, 0.6, 3.5, 1.5, 49.5, 3.0e-2, 0.97, 2.0e-4, 45, "75.4 %, 5.5 min"),
    ("65k", 65_536, 0.6, 2.9, 2, 64.5, 4.0e-2, 0.95, 1.5e-4, 60, "75.6 %"),
    ("131k", 131_072, 1.0, 2.9, 3, 100, 7.0e-2, 0.93, 1.0e-4, 90, "74.9 %"),
)
STALE_THRESHOLD = 0.1
"""α of the adaptive refresh, which the paper left off above 32,768."""

RUNS = {
    f"sp_ngd_{name}": Published(
        Config(
            optimizer="sp_ngd",
            sp_ngd=SpNgd(
                learning_rate=rate,
                momentum=momentum,
                damping=damping,
                norm_damping=1.0,
                fisher="empirical",
                norm_blocks="unit_wise",
                stale_threshold=STALE_THRESHOLD if batch <= 32_768 else None,
                rescale="always",
                velocity="paper",
                power=power,
                decay_start=float(start),
                decay_end=float(end),
            ),
            dataset="imagenet2012",
            recipe=Recipe(normalise="caffe", crop="plain"),
            model="resnet50",
            norm_momentum=0.9,
            batch_size=batch,
            devices=0,
            micro_batch_size=32,
            epochs=float(epochs),
            warmup_epochs=0.0,
            label_smoothing=0.0,
            l2=0.0,
            mixup_alpha=alpha,
            mixup_form="paper",
            random_erasing=0.5,
            eval_batch_size=1_024,
            eval_epochs=1.0,
            checkpoint_epochs=5.0,
        ),
        f"SP-NGD: {reported}",
    )
    for (name, batch, alpha, power, start, end, *numbers, epochs, reported) in _ROWS
    for rate, momentum, damping in [numbers]
}
"""By name."""
