"""The settings of a run, checked before anything is compiled."""

import dataclasses
import math
import pathlib
from typing import Literal

from experiments.data.splits import Recipe
from experiments.models.registry import ModelName


@dataclasses.dataclass(frozen=True)
class Kfac:
    """Settings of K-FAC, in the words of `lbopt.kfac`."""

    learning_rate: float = 0.03
    momentum: float = 0.9
    damping: float = 1e-3
    weight_decay: float = 0.0
    kl_clip: float | None = 0.01
    kl_clip_decay: float = 1.0
    """What `kl_clip` is multiplied by after each half of an epoch."""
    factor_decay: float = 0.95
    stats_period: int = 1
    inverse_period: int = 5


@dataclasses.dataclass(frozen=True)
class SpNgd:
    """Settings of SP-NGD, in the words of `lbopt.sp_ngd` and its schedule."""

    learning_rate: float = 0.06
    momentum: float = 0.9
    damping: float = 1e-3
    norm_damping: float = 1.0
    fisher: Literal["empirical", "sampled"] = "empirical"
    """Labels of the curvature's gradients: the data's, or drawn from the model."""
    norm_blocks: Literal["unit_wise", "full"] = "unit_wise"
    """Curvature of BatchNorm: by channel, or of all channels together."""
    stale_threshold: float | None = 0.1
    power: float = 2.0
    """Exponent of the learning rate's decay, which takes the warm-up's place."""
    decay_start: float = 0.0
    """Epoch from which the learning rate decays."""
    decay_end: float = 1.1
    """Epoch at which it would be zero, as a multiple of the epochs of the run."""


@dataclasses.dataclass(frozen=True)
class Sgd:
    """Settings of SGD with momentum, in the words of `optax.sgd`."""

    learning_rate: float = 0.8
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class RmsProp:
    """Settings of RMSProp, in the words of `optax.rmsprop`."""

    learning_rate: float = 0.1
    momentum: float = 0.9
    decay: float = 0.9
    eps: float = 1.0


@dataclasses.dataclass(frozen=True)
class Lars:
    """Settings of LARS, in the words of `lbopt.lars`."""

    learning_rate: float = 10.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    trust_coefficient: float = 1e-3
    variant: Literal["paper", "mlperf", "optax"] = "paper"
    after_kfac: bool = False
    """Scale the natural gradient of `lbopt.scale_by_kfac`, with the settings `kfac`."""


@dataclasses.dataclass(frozen=True)
class Nlcg:
    """Settings of NLCG, in the words of `lbopt.nlcg`."""

    learning_rate: float = 0.1
    beta: Literal[
        "fletcher_reeves",
        "polak_ribiere",
        "hestenes_stiefel",
        "dai_yuan",
        "hybrid",
        "hager_zhang",
    ] = "fletcher_reeves"
    preconditioner: Literal["bfgs", "kfac"] | None = "bfgs"
    """`kfac` is `lbopt.scale_by_kfac` with the settings `kfac`."""
    step_control: Literal["step", "online"] | None = "step"
    control_period: int = 5


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    optimizer: Literal["kfac", "sp_ngd", "nlcg", "lars", "rmsprop", "sgd"] = "kfac"
    kfac: Kfac = Kfac()
    sp_ngd: SpNgd = SpNgd()
    nlcg: Nlcg = Nlcg()
    lars: Lars = Lars()
    rmsprop: RmsProp = RmsProp()
    sgd: Sgd = Sgd()
    dataset: str = "strokes/20"
    """Name in tensorflow_datasets; strokes/... is made where it is missing."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Directory that holds prepared data sets."""
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    """How images are cropped, padded and normalised."""
    model: ModelName = "resnet8"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations."""
    zero_init_residual: bool = False
    """Start each residual block as the identity."""
    norm_momentum: float = 0.7
    """Decay of BatchNorm's running statistics; 0.9 suits runs of thousands of steps."""
    batch_size: int = 2048
    """Images in a step."""
    devices: int = 1
    """Devices that share each step; on a CPU virtual ones are made."""
    accumulate: int = 1
    """Parts that a device evaluates one after the other."""
    fisher: Literal["empirical", "sampled"] = "empirical"
    """Labels of the curvature's gradients: the data's, or drawn from the model; SP-NGD
    has a setting of its own."""
    doubly_factored: int | None = None
    """Rows of the input factor beyond which a dense layer on a flattened map has three
    factors, as for `lbopt.trace_layers`; none: never."""
    placement: Literal["comm", "memory"] = "comm"
    """Where inverses live on several devices, in the words of `lbopt.kfac`."""
    epochs: float = 8.0
    schedule: Literal["cosine", "polynomial", "staircase", "exponential"] = "cosine"
    """How the learning rate falls: over the run, as (1 - step/steps)^2, or by steps: a
    few, or one each half of an epoch."""
    decay_epochs: tuple[float, ...] = ()
    """Epochs after which a staircase falls to a tenth."""
    decay_rate: float = 1.0
    """What schedule=exponential multiplies by after each half of an epoch."""
    warmup_epochs: float = 0.8
    """Epochs in which the learning rate rises."""
    warmup_start: float = 0.0
    """Learning rate of the first step, if it rises."""
    warmup_shape: Literal["linear", "quadratic", "sqrt"] = "linear"
    """How it rises, in the words of `lbopt.schedules.warmup`."""
    label_smoothing: float = 0.0
    l2: float = 0.0
    """Weight of half the squared norm of all parameters but BatchNorm's in the loss."""
    weight_average: float | None = None
    """Evaluate an average of the weights with this decay; none: the weights."""
    augment: bool = True
    """Crop and mirror training images at random, as suits the data set."""
    mixup_alpha: float = 0.0
    """Parameter of running mixup's Beta distribution; 0 for no mixup."""
    random_erasing: float = 0.0
    """Probability that a rectangle of a training image is erased; 0 for never."""
    seed: int = 0
    """Seed of the initial parameters, the order of images and their augmentation."""
    eval_batch_size: int = 512
    eval_epochs: float = 1.0
    """Epochs between two evaluations."""
    checkpoint_epochs: float = 4.0
    """Epochs between two checkpoints; the last step always has one."""
    log_period: int = 1
    """Steps between two records of the training metrics."""
    directory: pathlib.Path | None = None
    """Directory of the run; by default runs/DATASET-MODEL-OPTIMIZER."""
    resume: bool = False
    """Continue the run in the directory from its newest checkpoint."""

    def __post_init__(self):
        """Refuses what no run could use, naming the argument."""
        chosen = dataclasses.asdict(getattr(self, self.optimizer))
        values = vars(self) | {f"{self.optimizer}.{k}": v for k, v in chosen.items()}
        values.setdefault(f"{self.optimizer}.momentum", 0.0)
        positive = "batch_size epochs eval_batch_size eval_epochs checkpoint_epochs"
        rate, momentum = f"{self.optimizer}.learning_rate", f"{self.optimizer}.momentum"
        for name in (*positive.split(), "log_period", "devices", "accumulate", rate):
            if not values[name] > 0:
                raise ValueError(f"{name} must be positive, got {values[name]}")
        below = {"warmup_epochs": self.epochs, "label_smoothing": 1, "seed": 2**32}
        below |= {"l2": math.inf, "warmup_start": math.inf}
        for name, bound in {**below, momentum: 1}.items():
            if not 0 <= values[name] < bound:
                raise ValueError(f"{name} must be in [0, {bound}), got {values[name]}")
        if not 0 < (self.weight_average or 0.5) < 1:
            raise ValueError(
                f"weight_average must be in (0, 1) or none, got {self.weight_average}"
            )
        if (rows := self.doubly_factored) is not None and not rows > 0:
            raise ValueError(f"doubly_factored must be positive or none, got {rows}")
        if self.schedule == "staircase" and not self.decay_epochs:
            raise ValueError("decay_epochs must name the epochs of schedule=staircase")
        for name in ("decay_rate", f"{self.optimizer}.kl_clip_decay"):
            if not 0 < values.get(name, 1.0) <= 1:
                raise ValueError(
                    f"{name} must be in (0, 1] (1: off), got {values[name]}"
                )
        if not 0 <= (p := self.random_erasing) <= 1:
            raise ValueError(f"random_erasing must be in [0, 1] (0: off), got {p}")
        if not 0 <= (alpha := self.mixup_alpha) < math.inf:
            raise ValueError(f"mixup_alpha must be in [0, inf) (0: off), got {alpha}")
        if alpha and self.accumulate > 1:
            raise ValueError(
                f"mixup_alpha={alpha} mixes whole batches; it needs accumulate=1, got "
                f"{self.accumulate}"
            )
        if self.batch_size % (parts := self.devices * self.accumulate):
            raise ValueError(
                f"batch_size must be a multiple of devices × accumulate = {parts}, got "
                f"{self.batch_size}"
            )

    @property
    def has_curvature(self) -> bool:
        """Whether the optimizer takes curvature statistics."""
        if self.optimizer == "lars":
            return self.lars.after_kfac
        if self.optimizer == "nlcg":
            return self.nlcg.preconditioner == "kfac"
        return self.optimizer in ("kfac", "sp_ngd")
