"""The published settings of NLCG for ResNet-32 on CIFAR-100.

``ADYA_2018`` holds a preset for each row of the table in the authors' released code
(Adya, Palakkode & Tuzel 2018; apple/ml-ncg, commit 563b5e5) by batch size, with the
accuracies of NLCG and of its rivals.

What is open, and what we chose:

1. the paper's body was unavailable: of the paper itself only the abstract and a part of
   the introduction could be read, and the algorithm, the recipe and the table are taken
   from the authors' release;
2. the release's step control reads its variables in an order that is not fixed, so that
   its runs differ; the order is resolved by us (``scale_by_nlcg``);
3. the table does not favour NLCG at 2,048 and 4,096, where momentum and RMSProp are
   ahead; its numbers are single values without variance;
4. the learning rates of the table are not published: the rule 0.1 × batch / 256 is that
   of the examples of the release's README, whose batches are 2,048 and 4,096;
5. the warm-up starts at 0.001, as in its distributed example; the one for a single
   machine starts at 0.1, which is above the peak at batch 128;
6. the warm-up takes 25 epochs, the default of the code; its help text says 5;
7. the L2 penalty is part of the loss, gradient and value alike: add
   ``l2 / 2 * ‖w‖²`` over all but the scales and biases of norm layers to the loss, and
   hand ``value=`` to ``update``;
8. accuracies are those of an exponential average of the weights, with decay
   min(0.9999, (1 + k) / (10 + k));
9. ImageNet: the abstract claims over 10 points for ResNet-50 in 90 epochs above 65K;
   neither code nor settings were released.  ``NLCG_RESNET50`` is ours: the usual recipe
   of 90 epochs with the warm-up in the same proportion.
"""

from typing import Any, NamedTuple

import optax

from lbopt import schedules
from lbopt.optimizers.nlcg import nlcg


def boundaries(epochs: float | int) -> tuple[int, int, int]:
    """Returns the epochs after which the released code divides the rate by ten.

    Args:
      epochs: the length of the run.

    Returns:
      Three epochs, of which the last may lie beyond the end of the run.

    Examples:
      >>> from lbopt.presets import nlcg
      >>> nlcg.boundaries(200)
      (102, 153, 204)

    Source: the code of Adya et al. 2018.
    """
    if epochs <= 200:
        return 102, 153, 204
    if epochs <= 300:
        return 153, 229, 306
    return 204, 306, 408


class NlcgPreset(NamedTuple):
    """Settings of one run, and the published accuracies.

    Attributes:
      model: ``"resnet32"`` or ``"resnet50"``.
      batch_size: examples in a step.
      learning_rate: the rate at the end of the warm-up.
      accuracy: top-1 of NLCG in percent; None, as the next three, if not published.
      rmsprop: top-1 of RMSProp.
      momentum: top-1 of momentum SGD.
      sgd: top-1 of SGD without momentum.
      epochs: the length of the run.
      warmup_epochs: the length of the warm-up, of shape ``"sqrt"``.
      init_value: the rate of step 0.
      drops: the epochs after which the rate is divided by ten; None for those that
        ``boundaries`` returns.
      l2: the coefficient of ½‖w‖² in the loss.
    """

    model: str
    batch_size: int
    learning_rate: float
    accuracy: float | None = None
    rmsprop: float | None = None
    momentum: float | None = None
    sgd: float | None = None
    epochs: int = 200
    warmup_epochs: float = 25
    init_value: float = 1e-3
    drops: tuple[int, ...] | None = None
    l2: float = 2e-4

    def schedule(self, steps_per_epoch: float | int) -> optax.Schedule:
        """Returns the learning rate as a function of the step."""
        drops = boundaries(self.epochs) if self.drops is None else self.drops
        stairs = schedules.staircase(
            self.learning_rate, drops, steps_per_epoch=steps_per_epoch
        )
        return schedules.warmup(
            self.learning_rate,
            int(self.warmup_epochs * steps_per_epoch),
            stairs,
            init_value=self.init_value,
            shape="sqrt",
        )

    def optimizer(
        self, steps_per_epoch: float | int, **options: Any
    ) -> optax.GradientTransformationExtraArgs:
        """Builds NLCG with these settings.

        Args:
          steps_per_epoch: steps of ``batch_size`` in an epoch.
          **options: as for ``lbopt.nlcg``.

        Returns:
          The optimizer, whose ``update`` takes ``value=``.
        """
        return nlcg(self.schedule(steps_per_epoch), **options)


ADYA_2018 = {
    size: NlcgPreset("resnet32", size, 0.1 * size / 256, own, rmsprop, momentum, sgd)
    for size, own, rmsprop, momentum, sgd in (
        (128, 66.2, 64.9, 64.6, 63.7),
        (256, 68.4, 65.1, 64.9, 63.8),
        (512, 67.4, 64.8, 65.0, 63.5),
        (1_024, 65.4, 64.7, 65.0, 63.5),
        (2_048, 63.9, 64.5, 64.9, 63.1),
        (4_096, 64.5, 65.3, 65.2, 61.8),
        (8_192, 67.0, 66.0, 66.0, 55.0),
        (16_384, 56.0, 37.0, 37.0, 35.0),
    )
}
"""The rows of the table of the authors' release by batch size."""

NLCG_RESNET50 = NlcgPreset(
    "resnet50",
    65_536,
    0.1 * 65_536 / 256,
    epochs=90,
    warmup_epochs=90 * 25 / 200,
    drops=(30, 60, 80),
    l2=1e-4,
)
"""Our settings for ImageNet, where none were released."""
