"""ResNet-32 on CIFAR-100: the recipe that all optimizers of Adya et al. share.

    python experiments/cifar100_resnet32.py nlcg --data-dir DIRECTORY      (or momentum,
                                                                    rmsprop, sgd, lars)

Expected test accuracy after 200 epochs (Adya, Palakkode & Tuzel 2018, the table of the
authors' code, single values without variance):

    batch     NLCG  RMSProp  momentum   SGD
      128     66.2     64.9      64.6  63.7
      256     68.4     65.1      64.9  63.8
      512     67.4     64.8      65.0  63.5
    1,024     65.4     64.7      65.0  63.5
    2,048     63.9     64.5      64.9  63.1
    4,096     64.5     65.3      65.2  61.8
    8,192     67.0     66.0      66.0  55.0
   16,384     56.0     37.0      37.0  35.0

Not run here: CIFAR-100 was not at hand. LARS is not in the paper. What was run, on
`strokes`, is in `experiments/README.md`.

The rate is 0.1 × batch / 256, as in both examples of the code, whose values for each
batch size are not published: pass `--nlcg.learning-rate` (or `--sgd...`) with
`--batch-size`. The optimizers' other settings are those of the code.
"""

import dataclasses

from experiments.data.splits import Recipe
from experiments.settings import Config, Lars, Nlcg, RmsProp, Sgd

BATCH_SIZE = 2_048
RATE = 0.1 * BATCH_SIZE / 256

NLCG = Config(
    optimizer="nlcg",
    nlcg=Nlcg(learning_rate=RATE),
    dataset="cifar100",
    recipe=Recipe(normalise="image", border="zero"),
    model="preact_resnet32",
    norm_momentum=0.99,
    l2=2e-4,
    weight_average=0.9999,
    batch_size=BATCH_SIZE,
    epochs=200.0,
    schedule="staircase",
    decay_epochs=(102.0, 153.0),
    warmup_epochs=25.0,
    warmup_shape="sqrt",
    warmup_start=0.1,
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
