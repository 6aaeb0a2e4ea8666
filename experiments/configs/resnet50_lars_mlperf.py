"""ResNet-50 v1.5 on ImageNet with LARS as in MLPerf's reference, batches to 67,840.

    python experiments/imagenet_resnet50.py lars_mlperf_4k --data-dir DIRECTORY

Meant for as many accelerators as the table says; here for however many divide them, as
a device evaluates as many images at a time as share BatchNorm's statistics there.

Expected: 75.9 % top-1 after the epochs of the last column, in the mean of many runs
(MLPerf training 4.0, reference convergence points):

    name    batch    rate  warm-up        m    decay  share BN  devices  to 75.9 %
    1632    1,632     7.4        2      0.9     5e-5       204        8      35.0
    2k      2,048     8.5        5      0.9     2e-4        64       32
    3264    3,264    10.5        2      0.9     5e-5       204       16      35.2
    4k      4,096    10.0        5      0.9     2e-4        64       64      40.0
    8k      8,192    17.0        5      0.9     2e-4        64      128      42.0
    13k    13,056    12.8        9      0.9   2.5e-5       204       64      45.4
    32k    32,768    21.2       16     0.94   2.5e-5       128      256      56.0
    49k    49,152  19.405       24 0.951807     1e-4       256      192      68.0
    58k    58,880  23.246       29 0.951807     1e-4       230      256      79.9
    65k    65,536  24.699       31 0.951807     1e-4       128      512      84.5
    67k    67,840  24.699       31 0.951807     1e-4       424      160      85.9

2,048 is a command of the reference's README, without a published mean; its share of
BatchNorm, 64, is ours. Times depend on the system: 13.2 minutes on 8 H100, 2.5 minutes
at 3,200 on 64, 11 seconds at 57,344 on 3,584 (round 4.0). Not run here: neither
ImageNet nor the devices were at hand.

The rate rises from 0 and falls to 1e-4 as a square, counted from the warm-up's end.
Biases and BatchNorm have the full rate and no decay. The runs' lengths are inferred
from the steps of the decay, see `lbopt/presets/lars.py`. Crops have at least 8 % of the
image. `--dtype bfloat16` is what most submissions compute in or near.
"""

from experiments.configs.published import Published
from experiments.data.splits import Recipe
from experiments.settings import Config, Lars

_ROWS = (
    # Name, batch, γ₀, warm-up, m, β, epochs, images that share BatchNorm's statistics,
    # evaluation batch (a multiple of the devices), epochs to 75.9 %.
    ("1632", 1_632, 7.4, 2, 0.9, 5e-5, 37, 204, 1_024, "35.0"),
    ("2k", 2_048, 8.5, 5, 0.9, 2e-4, 41, 64, 1_024, None),
    ("3264", 3_264, 10.5, 2, 0.9, 5e-5, 37, 204, 1_024, "35.2"),
    ("4k", 4_096, 10.0, 5, 0.9, 2e-4, 42, 64, 1_024, "40.0"),
    ("8k", 8_192, 17.0, 5, 0.9, 2e-4, 44, 64, 1_024, "42.0"),
    ("13k", 13_056, 12.8, 9, 0.9, 2.5e-5, 48, 204, 1_024, "45.4"),
    ("32k", 32_768, 21.2, 16, 0.94, 2.5e-5, 58, 128, 1_024, "56.0"),
    ("49k", 49_152, 19.405, 24, 0.951807, 1e-4, 71, 256, 1_536, "68.0"),
    ("58k", 58_880, 23.246, 29, 0.951807, 1e-4, 82, 230, 1_024, "79.9"),
    ("65k", 65_536, 24.699, 31, 0.951807, 1e-4, 89, 128, 1_024, "84.5"),
    ("67k", 67_840, 24.699, 31, 0.951807, 1e-4, 91, 424, 1_280, "85.9"),
)

RUNS = {
    f"lars_mlperf_{name}": Published(
        Config(
            optimizer="lars",
            lars=Lars(
                learning_rate=rate,
                momentum=momentum,
                weight_decay=decay,
                trust_coefficient=1e-3,
                variant="mlperf",
            ),
            dataset="imagenet2012",
            recipe=Recipe(crop="inception"),
            model="resnet50",
            norm_momentum=0.9,
            batch_size=batch,
            devices=0,
            micro_batch_size=share,
            epochs=float(epochs),
            schedule="polynomial",
            decay_from="warmup",
            end_value=1e-4,
            warmup_epochs=float(warmup),
            warmup_start=0.0,
            label_smoothing=0.1,
            eval_batch_size=eval_batch,
            eval_epochs=1.0,
            checkpoint_epochs=5.0,
        ),
        "LARS of MLPerf: "
        + (f"75.9 % after {to_target}" if to_target else "no figure"),
    )
    for (name, batch, rate, warmup, momentum, decay, *lengths, to_target) in _ROWS
    for epochs, share, eval_batch in [lengths]
}
"""By name."""
