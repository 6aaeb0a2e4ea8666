"""Published settings by source; the modules say what the sources leave open."""

from lbopt.presets.lars import (
    CAFFE_2017,
    CLOUD_TPU,
    MLPERF,
    YOU_2017,
    YOU_2017_LONGER,
    YOU_2017_MOMENTUM,
    LarsPreset,
)
from lbopt.presets.nlcg import ADYA_2018, NLCG_RESNET50, NlcgPreset
from lbopt.presets.sp_ngd import OSAWA_2019, OSAWA_2022, SpNgdPreset, SpNgdResult

__all__ = [
    "ADYA_2018",
    "CAFFE_2017",
    "CLOUD_TPU",
    "MLPERF",
    "NLCG_RESNET50",
    "OSAWA_2019",
    "OSAWA_2022",
    "YOU_2017",
    "YOU_2017_LONGER",
    "YOU_2017_MOMENTUM",
    "LarsPreset",
    "NlcgPreset",
    "SpNgdPreset",
    "SpNgdResult",
]
