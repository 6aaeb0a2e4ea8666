"""The settings of a run, checked before anything is compiled."""

import dataclasses
import pathlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

from experiments.data import virtual_batch
from experiments.data.splits import Recipe
from experiments.models.registry import ModelName
from lbopt import checks


@dataclasses.dataclass(frozen=True)
class Kfac:
    """Settings of K-FAC, in the words of `lbopt.kfac`."""

    learning_rate: float = 0.03
    momentum: float = 0.9
    damping: float = 1e-3
    weight_decay: float = 0.0
    kl_clip: float | None = 0.01
    kl_clip_decay: float = 1.0
    """Factor on `kl_clip` after each half of an epoch."""
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
    kl_clip: float | None = None
    fisher: Literal["empirical", "sampled"] = "empirical"
    """Labels of the curvature's gradients: the data's, or drawn from the model."""
    norm_blocks: Literal["unit_wise", "full"] = "unit_wise"
    """Curvature of BatchNorm: by channel, or of all channels together."""
    stale_threshold: float | None = 0.1
    rescale: Literal["always", "shrink_only"] | None = "always"
    """When kernels get the norm of their initialisation; none: never."""
    velocity: Literal["paper", "code"] = "paper"
    """Whether momentum falls with the learning rate, or as in the authors' code."""
    power: float = 2.0
    """Exponent of the learning rate's decay, in the place of `schedule` and warm-up."""
    decay_start: float = 0.0
    """Epoch from which the learning rate decays."""
    decay_end: float | None = None
    """Epoch at which it would be zero, after the last; none: 1.1 times the last."""


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
    variant: Literal["floored", "paper", "mlperf", "optax"] = "paper"
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


_POSITIVE = (
    *("batch_size", "epochs", "eval_batch_size", "eval_epochs", "checkpoint_epochs"),
    *("log_period", "num_threads", "keep_checkpoints"),
    *("start_timeout", "heartbeat_timeout", "micro_batch_size", "doubly_factored"),
)
_NOT_NEGATIVE = ("l2", "warmup_start", "devices", "num_workers", "mixup_alpha")

# Settings that only one schedule reads, and the values that ask for nothing.
_OF_SCHEDULE = {
    "decay_epochs": ("staircase", ()),
    "decay_rate": ("exponential", 1.0),
    "decay_from": ("polynomial", "start"),
    "end_value": ("polynomial", 0.0),
}


_OPTIMIZERS = ("kfac", "sp_ngd", "nlcg", "lars", "rmsprop", "sgd")
# The settings of K-FAC that it has as the preconditioner of another optimizer.
_OF_PRECONDITIONER = ("damping", "factor_decay", "stats_period", "inverse_period")
_OF_CURVATURE = ("fisher", "doubly_factored", "statistics_fraction", "placement")
# SP-NGD has a schedule of its own. The length of a warm-up is not among these: it may
# have to be shortened with the run.
_OF_COMMON_SCHEDULE = ("schedule", "warmup_start", "warmup_shape", *_OF_SCHEDULE)


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
    """Devices that share each step, those of all processes together; 0: all there are.
    On a CPU virtual ones are made."""
    micro_batch_size: int | None = None
    """Images that a device evaluates at a time, whose BatchNorm is their own; of more
    the gradients and statistics are accumulated. None: its whole share of the batch."""
    sync_norm: bool = False
    """Let BatchNorm see the images that all devices evaluate at a time."""
    remat: bool = False
    """Evaluate residual blocks anew in the backward pass, to save memory."""
    distributed: Literal["auto", "on", "off"] = "auto"
    """Whether to wait for other processes, as Slurm, MPI, Kubernetes, a TPU pod or
    JAX_COORDINATOR_ADDRESS describe them; auto: if they say that there are any."""
    start_timeout: float = 300.0
    """Seconds in which all processes must have come."""
    heartbeat_timeout: int = 100
    """Seconds without a sign of life after which a process counts as lost."""
    fisher: Literal["empirical", "sampled"] = "empirical"
    """Labels of the curvature's gradients: the data's, or drawn from the model; SP-NGD
    has a setting of its own."""
    doubly_factored: int | None = None
    """Rows of the input factor beyond which a dense layer on a flattened map has three
    factors, as for `lbopt.trace_layers`; none: never."""
    statistics_fraction: float = 1.0
    """Share of the batch that the curvature's statistics are of, in the words of
    `lbopt.training.make_train_step`."""
    parallel: Literal["shard_map", "pmap"] = "shard_map"
    """How a step runs on several devices, in the words of `make_train_step`."""
    placement: Literal["comm", "memory"] = "comm"
    """Where inverses live on several devices, in the words of `lbopt.kfac`."""
    epochs: float = 8.0
    schedule: Literal["cosine", "polynomial", "staircase", "exponential"] = "cosine"
    """How the learning rate falls: over the run, as (1 - step/steps)^2, or by steps: a
    few, or one each half of an epoch. SP-NGD has a schedule of its own."""
    decay_from: Literal["start", "warmup"] = "start"
    """Where the steps of schedule=polynomial count from: the run's start, so that the
    rate jumps down after the warm-up, or the warm-up's end."""
    end_value: float = 0.0
    """Learning rate that schedule=polynomial falls to."""
    decay_epochs: tuple[float, ...] = ()
    """Epochs after which a staircase falls to a tenth."""
    decay_rate: float = 1.0
    """Factor of schedule=exponential after each half of an epoch."""
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
    mixup_form: virtual_batch.Form = "paper"
    """One mixing weight a step, or one an image and at least 1/2, as in the code."""
    random_erasing: float = 0.0
    """Probability that a rectangle of a training image is erased; 0 for never."""
    num_threads: int = 16
    """Threads that read and decode images which are not in memory."""
    num_workers: int = 0
    """Processes that do so in their stead; 0: none."""
    bad_images: Literal["stop", "blank"] = "stop"
    """What to do about an image that cannot be decoded: save and stop, or train on an
    empty one in its place."""
    seed: int = 0
    """Seed of the initial parameters, the order of images and their augmentation."""
    eval_batch_size: int = 512
    eval_epochs: float = 1.0
    """Epochs between two evaluations."""
    checkpoint_epochs: float = 4.0
    """Epochs between two checkpoints; the last step always has one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = True
    """Keep the checkpoint of the best test accuracy, too, among those made at an
    evaluation."""
    log_period: int = 1
    """Steps between two records of the training metrics."""
    profile: bool = False
    """Trace the third to the fifth step of this start with jax.profiler, into the
    directory `profile` of the run."""
    compilation_cache: bool = True
    """Keep compiled programs in the directory `compiled` beside that of the run, for
    runs that resume; JAX_COMPILATION_CACHE_DIR sets another place."""
    directory: pathlib.Path | None = None
    """Directory of the run; by default runs/DATASET-MODEL-OPTIMIZER."""
    resume: bool = False
    """Continue the run in the directory from its newest checkpoint."""

    def __post_init__(self):
        """Raises ValueError for settings that no run could use."""
        self._check_ranges()
        self._check_choices()
        self._check_schedule(getattr(self, self.optimizer).learning_rate)

    def _check_ranges(self) -> None:
        """Raises ValueError for numbers out of range."""
        own, chosen = self.optimizer, getattr(self, self.optimizer)
        values = vars(self) | {f"{own}.{k}": v for k, v in vars(chosen).items()}
        defaults = vars(type(self)) | {
            f"{own}.{k}": v for k, v in vars(type(chosen)()).items()
        }

        def check(test: Callable[[str, Any, str], None], *names: str) -> None:
            for name in names:
                if (value := values.get(name)) is not None:
                    test(name, value, f"the default is {defaults[name]}")

        of_optimizer = ("learning_rate", "stats_period", "inverse_period")
        check(checks.positive, *_POSITIVE, *(f"{own}.{name}" for name in of_optimizer))
        check(checks.not_negative, *_NOT_NEGATIVE)
        check(checks.below_one, "label_smoothing", "weight_average", f"{own}.momentum")
        check(checks.share, "decay_rate", f"{own}.kl_clip_decay", "weight_average")
        check(checks.share, "statistics_fraction")
        if self.random_erasing:
            check(checks.share, "random_erasing")
        for name, bound in {"warmup_epochs": self.epochs, "seed": 2**32}.items():
            if not 0 <= values[name] < bound:
                raise ValueError(
                    f"{name}={values[name]} must lie in [0, {bound}); "
                    f"the default is {defaults[name]}"
                )

    def _check_choices(self) -> None:
        """Raises ValueError for settings that contradict each other."""
        if self.schedule == "staircase" and not self.decay_epochs:
            raise ValueError(
                "decay_epochs=() must name the epochs of schedule=staircase; "
                "pass some, or another schedule"
            )
        if self.doubly_factored is not None and not self.has_curvature:
            raise ValueError(
                f"doubly_factored={self.doubly_factored} needs an optimizer with "
                f"curvature, got optimizer={self.optimizer}; pass optimizer=kfac, or "
                "doubly_factored=None"
            )

    def _check_schedule(self, peak_value: float) -> None:
        """Raises ValueError for impossible schedules and settings that are ignored."""
        falls = tuple(self.decay_epochs)
        if not all(before < epoch for before, epoch in pairwise((0, *falls))):
            raise ValueError(
                f"decay_epochs={falls} must be positive and ascend; sort them"
            )
        if not 0 <= self.end_value < peak_value:
            raise ValueError(
                f"end_value={self.end_value} must lie in [0, {self.optimizer}."
                f"learning_rate={peak_value}); pass a smaller one"
            )
        for name, (schedule, off) in _OF_SCHEDULE.items():
            if self.schedule != schedule and (value := getattr(self, name)) != off:
                raise ValueError(
                    f"{name}={value} needs schedule={schedule}, got "
                    f"schedule={self.schedule}; pass either that or {name}={off}"
                )
        decay = self.kfac.kl_clip_decay
        if self.optimizer == "kfac" and self.kfac.kl_clip is None and decay < 1:
            raise ValueError(
                f"kfac.kl_clip_decay={decay} needs a bound that decays, got "
                "kfac.kl_clip=None; pass either a number or kfac.kl_clip_decay=1"
            )
        if self.optimizer == "sp_ngd":
            self._check_sp_ngd()

    def _check_sp_ngd(self) -> None:
        """Raises ValueError for settings that SP-NGD would ignore."""
        start, end = self.sp_ngd.decay_start, self.sp_ngd.decay_end
        if not 0 <= start < self.epochs:
            raise ValueError(
                f"sp_ngd.decay_start={start} must lie in [0, epochs={self.epochs}); "
                "pass an earlier epoch"
            )
        if end is not None and end < self.epochs:
            raise ValueError(
                f"sp_ngd.decay_end={end} must be at least epochs={self.epochs}, as the "
                "learning rate is zero after it; pass a later epoch, or none"
            )
        if self.fisher == "sampled" and self.sp_ngd.fisher == "empirical":
            raise ValueError(
                "fisher=sampled is not read by optimizer=sp_ngd, whose sp_ngd.fisher "
                "is empirical; pass sp_ngd.fisher=sampled, or fisher=empirical"
            )

    def accumulate(self, devices: int) -> int:
        """Returns the number of micro-batches that each device evaluates in turn.

        Args:
            devices: The number of devices that share a batch.

        Returns:
            The number; all micro-batches together are the batch.

        Raises:
            ValueError: If the batch cannot be divided so.
        """
        share = devices * (self.micro_batch_size or 1)
        if self.batch_size % share:
            of = f"{devices} devices"
            if self.micro_batch_size:
                of += f" × micro_batch_size={self.micro_batch_size}"
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of {of}; pass "
                "another of them"
            )
        return self.batch_size // share if self.micro_batch_size else 1

    def ignores(self, name: str) -> bool:
        """Whether the run's optimizer does not read a setting.

        Args:
            name: Name of the setting, such as `kfac.damping`.

        Returns:
            Whether another value of it would change nothing.
        """
        group, dot, field = name.partition(".")
        if dot and group in _OPTIMIZERS and group != self.optimizer:
            preconditions = group == "kfac" and self.optimizer != "sp_ngd"
            read = _OF_PRECONDITIONER if preconditions and self.has_curvature else ()
            return field not in read
        if self.optimizer == "sp_ngd" and name in _OF_COMMON_SCHEDULE:
            return True
        return name in _OF_CURVATURE and not self.has_curvature

    @property
    def has_curvature(self) -> bool:
        """Whether the optimizer needs curvature statistics."""
        if self.optimizer == "lars":
            return self.lars.after_kfac
        if self.optimizer == "nlcg":
            return self.nlcg.preconditioner == "kfac"
        return self.optimizer in ("kfac", "sp_ngd")
