"""ResNet-32 on CIFAR-100 with NLCG and its baselines, by the recipe of Adya et al.

    python -m experiments.configs.resnet32                     NLCG on `strokes/100`
    python -m experiments.configs.resnet32 --optimizer lars    LARS on `strokes/100`
    python -m experiments.configs.resnet32 nlcg --data-dir ~/tensorflow_datasets
    python -m experiments.configs.resnet32 --help              every setting

`nlcg`, `momentum`, `rmsprop`, `sgd` and `lars` are the settings for CIFAR-100, batch
2,048, 200 epochs. Expected test accuracy (Adya, Palakkode & Tuzel 2018, the table of
the authors' code, single values without variance; all batch sizes are in
`lbopt.presets.ADYA_2018`): 63.9, 64.9, 64.5 and 63.1 %; LARS is not in the paper. Not
run here: CIFAR-100 was not at hand. `cifar100_study.py` compares all of them on
`strokes`.

The rate is 0.1 × batch / 256, as in both examples of the code, whose values for each
batch size are not published: pass `--nlcg.learning-rate` (or `--sgd...`) with
`--batch-size`. The optimizers' other settings are those of the code.
"""

import dataclasses
import sys

from experiments import command_line
from experiments.data.splits import Recipe
from experiments.settings import Config, Lars, Nlcg, RmsProp, Sgd
from lbopt.presets import ADYA_2018
from lbopt.presets.nlcg import boundaries

_PRESET = ADYA_2018[2_048]
RATE = _PRESET.learning_rate

NLCG = Config(
    optimizer="nlcg",
    nlcg=Nlcg(learning_rate=RATE),
    dataset="cifar100",
    recipe=Recipe(normalise="image", border="zero"),
    model="preact_resnet32",
    norm_momentum=0.99,
    l2=_PRESET.l2,
    weight_average=0.9999,
    batch_size=_PRESET.batch_size,
    epochs=float(_PRESET.epochs),
    schedule="staircase",
    decay_epochs=tuple(map(float, boundaries(_PRESET.epochs)[:2])),  # the third is late
    warmup_epochs=float(_PRESET.warmup_epochs),
    warmup_shape="sqrt",
    warmup_start=0.1,  # of the example on a single machine
    eval_epochs=5.0,
    checkpoint_epochs=10.0,
)
MOMENTUM = dataclasses.replace(
    NLCG, optimizer="sgd", sgd=Sgd(learning_rate=RATE, nesterov=False)
)
SGD = dataclasses.replace(
    MOMENTUM, sgd=Sgd(learning_rate=RATE, momentum=0.0, nesterov=False)
)
RMSPROP = dataclasses.replace(
    NLCG, optimizer="rmsprop", rmsprop=RmsProp(learning_rate=RATE)
)
LARS = dataclasses.replace(
    NLCG, optimizer="lars", lars=Lars(learning_rate=10.0, weight_decay=0.0)
)
STROKES = dataclasses.replace(
    NLCG,
    dataset="strokes/100",
    norm_momentum=0.9,
    epochs=2.0,
    decay_epochs=(1.02, 1.53),
    warmup_epochs=0.25,
    eval_epochs=0.5,
    checkpoint_epochs=0.5,
)
"""A hundredth of the epochs on the embedded images, with the schedule shortened too."""

CONFIGS = {
    "strokes": STROKES,
    "nlcg": NLCG,
    "momentum": MOMENTUM,
    "sgd": SGD,
    "rmsprop": RMSPROP,
    "lars": LARS,
}
"""Settings by name; the first are the default."""


if __name__ == "__main__":
    command_line.run(sys.argv[1:], __doc__, CONFIGS)
