"""ResNet-50 on ImageNet: the published runs of `imagenet_resnet50.py`, by name.

None of them was run here: neither ImageNet nor the devices were at hand. They run on
any number of devices that divides the micro-batches, of which a device evaluates one at
a time; BatchNorm's statistics are those of one micro-batch. `--help` lists every run
with the top-1 accuracy that its source reports for one crop.

- `sp_ngd_*`: Osawa et al., IEEE TPAMI 2022, on 128 to 1,024 NVIDIA V100, 32 images on
  each. A device holds its share of the batch twice, as mixup keeps the last one: 0.6 MB
  an image each, which limits how few devices there may be. There is neither weight
  decay nor label smoothing nor a warm-up: weights are rescaled, labels are mixed, and
  the rate stays until e_start. Different from the paper: the mean colour is subtracted,
  not a mean image, pixels are divided by 256, not 255, and blocks stride in their 3x3
  convolution (v1.5).
- `sp_ngd_2019_*`: the released code of its earlier version, whose results are those of
  ResNet-50-D, so less is to be expected. The paper itself (Osawa et al., CVPR 2019)
  reports 75 % in 35 epochs up to 16,384, and 75.0 % at 131,072 in 978 steps. The code's
  erased parts return in the next step's mixup, by accident; here they do not.
- `lars_*`: You, Gitman & Ginsburg, ICLR 2018 submission, minimal augmentation; with
  `--recipe.crop inception` it is their extended one. The authors had one NVIDIA DGX-1
  and accumulated from 16,384 on; how many images shared BatchNorm's statistics is not
  known.
- `lars_mlperf_*`: the reference convergence points of MLPerf 4.0, v1.5 of the network.
  The target is 75.9 %, reached in the mean of many runs after the epochs listed.
  `--dtype bfloat16` is close to the precision of most submissions, which took 13.2
  minutes on 8 H100 and 11 seconds at 57,344 on 3,584.
- `kfac`: in the manner of Ba, Grosse & Martens (ICLR 2017), who trained GoogLeNet; no
  figure. Their text could not be obtained, and neither settings nor accuracies are
  known here. Theirs are the parts: sampled labels, running averages of the factors,
  stale inverses, a step bounded in KL whose bound falls by a factor each half of an
  epoch, momentum 0.9, an average of the iterates, BatchNorm over 32 images, and crops
  of squashed images. The periods, λ, the factors' decay and the bound are those with
  which K-FAC brings ResNet-50 to 75.9 % (Pauloski et al., SC 2020 and 2021). The rest
  is ours: the length, the decay of the bound, which shortens steps to a hundredth over
  the run, a rate too large to be felt after the first steps, the weight decay, and the
  average's decay.
- `nlcg`: Adya, Palakkode & Tuzel 2018 claim more than 10 points above SGD after 90
  epochs for batches above 65k, but publish neither settings nor accuracies; these
  settings are ours. Meant for 512 devices.
- `sgd`: the baseline of Goyal et al., Accurate, Large Minibatch SGD, 2017, on 256
  NVIDIA P100; 76.4 % at batch 256. The rate is 0.1 × batch / 256, reached from 0.1 in 5
  epochs: pass `--sgd.learning-rate` with `--batch-size`. The paper draws the last
  layer's weights with standard deviation 0.01; here they have the layer's own scale.

What the sources leave open is in the modules of `lbopt.presets`.
"""

import dataclasses
import functools

from experiments.configs.published import Published, lars_settings
from experiments.data.splits import Recipe
from experiments.settings import Config, Kfac, Nlcg, Sgd, SpNgd
from lbopt import presets

_IMAGENET = Config(
    dataset="imagenet2012",
    model="resnet50",
    norm_momentum=0.9,
    devices=0,
    micro_batch_size=32,
    warmup_epochs=0.0,
    eval_batch_size=1_024,
    eval_epochs=1.0,
    checkpoint_epochs=5.0,
)
_run = functools.partial(dataclasses.replace, _IMAGENET)
_PLAIN, _INCEPTION = Recipe(crop="plain"), Recipe(crop="inception")


def _short(batch_size: int) -> str:
    """Returns the batch size as names have it: `256`, `4k`, `131k`."""
    whole = batch_size >= 4_096 or batch_size % 1_024 == 0
    return f"{batch_size // 1_000}k" if whole else str(batch_size)


def _sp_ngd(preset: presets.SpNgdPreset) -> Config:
    settings = SpNgd(
        learning_rate=preset.learning_rate,
        momentum=preset.momentum,
        damping=preset.damping,
        norm_damping=preset.norm_damping,
        norm_blocks=preset.norm_blocks,
        stale_threshold=preset.stale_threshold,
        rescale=preset.rescale,
        velocity=preset.variant,
        power=preset.power,
        decay_start=float(preset.start),
        decay_end=float(preset.end),
    )
    return _run(
        optimizer="sp_ngd",
        sp_ngd=settings,
        recipe=Recipe(normalise="caffe", crop="plain"),
        batch_size=preset.batch_size,
        epochs=float(preset.epochs),
        mixup_alpha=preset.mixup_alpha,
        mixup_form=preset.variant,
        random_erasing=preset.random_erasing,
    )


def _reported(result: presets.SpNgdResult) -> str:
    minutes = f", {result.minutes} min" if result.minutes else ""
    return f"{result.accuracy} %{minutes}"


_SP_NGD = {
    f"sp_ngd_{_short(size)}": Published(
        _sp_ngd(preset), f"SP-NGD: {_reported(preset.result)}"
    )
    for size, preset in presets.OSAWA_2022.items()
}
_SP_NGD_2019 = {
    f"sp_ngd_2019_{_short(size)}": Published(
        _sp_ngd(preset), f"SP-NGD of 2019: {_reported(preset.result)} (ResNet-50-D)"
    )
    for size, preset in presets.OSAWA_2019.items()
}

_LARS = {
    f"lars_{_short(size)}": Published(
        _run(**lars_settings(preset), recipe=_PLAIN), f"LARS: {preset.accuracy} %"
    )
    for (model, size), preset in presets.YOU_2017.items()
    if model == "resnet50"
}

# Evaluation batches that the devices meant for a run share evenly.
_MLPERF_EVALUATION = {49_152: 1_536, 67_840: 1_280}


def _mlperf(preset: presets.LarsPreset) -> Published:
    config = _run(
        **lars_settings(preset),
        recipe=_INCEPTION,
        micro_batch_size=preset.bn_span or 64,  # ours where none is published
        label_smoothing=0.1,
        eval_batch_size=_MLPERF_EVALUATION.get(preset.batch_size, 1_024),
    )
    mean = preset.epochs_to_target
    return Published(
        config, f"LARS of MLPerf: {f'75.9 % after {mean}' if mean else 'no figure'}"
    )


_LARS_MLPERF = {
    f"lars_mlperf_{_short(size)}": _mlperf(preset)
    for size, preset in presets.MLPERF.items()
}

_KFAC = _run(
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
    recipe=_PLAIN,
    weight_average=0.999,
    batch_size=2_048,
    epochs=60.0,
    schedule="exponential",
)

_NLCG_PRESET = presets.NLCG_RESNET50
_NLCG = _run(
    optimizer="nlcg",
    nlcg=Nlcg(learning_rate=_NLCG_PRESET.learning_rate),
    recipe=_INCEPTION,
    l2=_NLCG_PRESET.l2,
    batch_size=_NLCG_PRESET.batch_size,
    micro_batch_size=128,
    epochs=float(_NLCG_PRESET.epochs),
    schedule="staircase",
    decay_epochs=tuple(map(float, _NLCG_PRESET.drops or ())),
    warmup_epochs=11.2,  # the same whole steps as the preset's 11.25, rounded down
    warmup_shape="sqrt",
    warmup_start=_NLCG_PRESET.init_value,
)

_SGD = _run(
    optimizer="sgd",
    sgd=Sgd(learning_rate=0.1 * 8_192 / 256),
    recipe=_INCEPTION,
    zero_init_residual=True,
    l2=1e-4,
    batch_size=8_192,
    epochs=90.0,
    schedule="staircase",
    decay_epochs=(30.0, 60.0, 80.0),
    warmup_epochs=5.0,
    warmup_start=0.1,
)

RUNS = {
    **_SP_NGD,
    **_SP_NGD_2019,
    "kfac": Published(_KFAC, "K-FAC as of Ba et al.: no figure"),
    **_LARS,
    **_LARS_MLPERF,
    "nlcg": Published(_NLCG, "NLCG, settings ours: no figure"),
    "sgd": Published(_SGD, "momentum SGD: 76.3 %, 1 hour"),
}
"""The runs by name."""
