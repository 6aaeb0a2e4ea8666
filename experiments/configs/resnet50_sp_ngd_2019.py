"""ResNet-50 on ImageNet with SP-NGD as in its earlier version's released code.

    python experiments/imagenet_resnet50.py sp_ngd_2019_4k --data-dir DIRECTORY (or 8k,
                                                            16k, 32k, 65k, 131k)

Meant for NVIDIA V100, 32 images on each (from 65,536 on accumulated on 1,024); here on
however many devices there are. Expected top-1:

      batch  epochs   steps   released code, of ResNet-50-D
      4,096      35  10,948   75.9 %
      8,192      35   5,478   76.4 %
     16,384      35   2,737   76.6 %
     32,768      45   1,760   76.9 %
     65,536      60   1,173   76.3 %
    131,072      80     782   75.0 %

The network here is not ResNet-50-D, so less is to be expected. The paper itself (Osawa
et al., CVPR 2019) reports 75 % in 35 epochs up to 16,384, and 75.0 % at 131,072 in 978
steps; its own table of settings could not be had. Not run here: neither ImageNet nor
the devices were at hand.

The settings are those of `sp_ngd_4k` and so on, but every step renews all statistics,
BatchNorm has one block of all channels, damped by 16 λ, kernels are rescaled only where
they are longer, momentum falls with the ratio of two steps' rates, and mixup draws a
weight for each image, at least 1/2. The code's erased parts return in the next step's
mixup, by accident; here they do not.
"""

import dataclasses

from experiments.configs import resnet50_sp_ngd
from experiments.configs.published import Published

_TOP1 = {
    "4k": 75.9,
    "8k": 76.4,
    "16k": 76.6,
    "32k": 76.9,
    "65k": 76.3,
    "131k": 75.0,
}


def _as_released(name: str) -> Published:
    config = resnet50_sp_ngd.RUNS[f"sp_ngd_{name}"].config
    sp_ngd = dataclasses.replace(
        config.sp_ngd,
        norm_damping=16.0,
        norm_blocks="full",
        stale_threshold=None,
        rescale="shrink_only",
        velocity="code",
    )
    config = dataclasses.replace(config, sp_ngd=sp_ngd, mixup_form="code")
    if name == "131k":
        sp_ngd = dataclasses.replace(sp_ngd, power=3.0, decay_start=1.0, decay_end=95.0)
        config = dataclasses.replace(config, sp_ngd=sp_ngd, epochs=80.0)
    return Published(config, f"SP-NGD of 2019: {_TOP1[name]} % (ResNet-50-D)")


RUNS = {f"sp_ngd_2019_{name}": _as_released(name) for name in _TOP1}
"""By name."""
