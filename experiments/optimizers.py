"""Builds the optimizer of a run and its learning rate from the settings."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

import lbopt
from experiments.data import pipeline
from experiments.settings import Config
from lbopt.curvature import registry


def build_schedule(
    config: Config, data: pipeline.Data, peak_value: float
) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    Args:
        config: Settings of the run.
        data: The data, whose epochs the schedule counts.
        peak_value: Learning rate before it falls.

    Returns:
        The schedule.
    """
    if config.optimizer == "sp_ngd":
        return _schedule_of_sp_ngd(config, data, peak_value)
    rising = round(config.warmup_epochs * data.steps_per_epoch)
    steps = data.steps(config.epochs)
    if config.schedule == "cosine":
        cosine = optax.cosine_decay_schedule(peak_value, max(1, steps - rising))
        after = optax.join_schedules([optax.constant_schedule(0.0), cosine], [rising])
    elif config.schedule == "polynomial":
        begin, length = 0, steps
        if config.decay_from == "warmup":
            # MLPerf's decay has one step more than the run has left.
            begin, length = rising, steps - rising + 1
        after = optax.polynomial_schedule(
            peak_value, config.end_value, 2, length, transition_begin=begin
        )
    elif config.schedule == "exponential":
        after = _by_half_epochs(peak_value, config.decay_rate, data)
    else:
        after = lbopt.schedules.staircase(
            peak_value, config.decay_epochs, steps_per_epoch=data.steps_per_epoch
        )
    return lbopt.schedules.warmup(
        peak_value,
        rising,
        after,
        init_value=config.warmup_start,
        shape=config.warmup_shape,
    )


def _schedule_of_sp_ngd(
    config: Config, data: pipeline.Data, init_value: float
) -> optax.Schedule:
    settings = config.sp_ngd
    end = settings.decay_end
    return lbopt.schedules.polynomial(
        init_value,
        settings.power,
        settings.decay_start,
        1.1 * config.epochs if end is None else end,
        steps_per_epoch=data.steps_per_epoch,
    )


def _by_half_epochs(value: float, factor: float, data: pipeline.Data) -> optax.Schedule:
    """Returns a value multiplied by a factor after each half of an epoch."""
    return optax.exponential_decay(value, data.steps(0.5), factor, staircase=True)


def build_optimizer(
    config: Config,
    data: pipeline.Data,
    loss_fn: Callable,
    arguments: tuple,
    devices: int,
) -> tuple[optax.GradientTransformation, registry.Layers | None]:
    """Builds the optimizer, and traces the layers whose curvature it needs.

    Args:
        config: Settings of the run.
        data: The data, whose epochs the schedule counts.
        loss_fn: The loss.
        arguments: Arguments of the loss, or their shapes.
        devices: Devices that share a step.

    Returns:
        The optimizer; the layers, or `None` for one without curvature.
    """
    settings = dataclasses.asdict(getattr(config, config.optimizer))
    peak_value = settings.pop("learning_rate")
    layers: Any = None
    placement = lbopt.Placement()
    if config.has_curvature:
        norm_blocks = settings.pop("norm_blocks", "unit_wise")
        layers = lbopt.trace_layers(
            loss_fn,
            *arguments,
            has_aux=True,
            norm_blocks=norm_blocks,
            doubly_factored=config.doubly_factored,
        )
    if devices > 1:
        placement = lbopt.Placement("data", devices, config.placement)
    rate = build_schedule(config, data, peak_value)
    if config.optimizer == "sp_ngd":
        for name in ("power", "decay_start", "decay_end"):  # of the schedule
            settings.pop(name)
        settings.pop("fisher")  # of the step
        return lbopt.sp_ngd(rate, layers, **settings, placement=placement), layers
    if config.optimizer == "kfac":
        decay = settings.pop("kl_clip_decay")
        if settings["kl_clip"] is not None and decay < 1:
            settings["kl_clip"] = _by_half_epochs(settings["kl_clip"], decay, data)
        settings["periods"] = lbopt.Periods(
            settings.pop("stats_period"), settings.pop("inverse_period")
        )
        return lbopt.kfac(rate, layers, **settings, placement=placement), layers
    if config.optimizer == "lars":
        after_kfac = settings.pop("after_kfac")
        lars = lbopt.lars(rate, **settings)
        if not after_kfac:
            return lars, None
        return optax.chain(_natural_gradient(config, layers, placement), lars), layers
    if config.optimizer == "nlcg":
        if layers is None:
            return lbopt.nlcg(rate, **settings), None
        settings["preconditioner"] = _natural_gradient(config, layers, placement)
        return lbopt.nlcg(rate, **settings, axis_name=placement.axis_name), layers
    if config.optimizer == "rmsprop":
        # The slots of TensorFlow's start at 1, as the baselines of Adya et al. did.
        return optax.rmsprop(rate, **settings, initial_scale=1.0), None
    decay = optax.add_decayed_weights(settings.pop("weight_decay"))
    return optax.chain(decay, optax.sgd(rate, **settings)), None


def _natural_gradient(
    config: Config, layers: Any, placement: lbopt.Placement
) -> optax.GradientTransformation:
    """Builds K-FAC as a preconditioner of another optimizer."""
    kfac = config.kfac
    return lbopt.scale_by_kfac(
        layers,
        damping=kfac.damping,
        factor_decay=kfac.factor_decay,
        periods=lbopt.Periods(kfac.stats_period, kfac.inverse_period),
        placement=placement,
    )
