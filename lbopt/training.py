"""The one place that compiles: training state and the steps over it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lbopt._typing import Array, OptState, Params
from lbopt.curvature.fisher import Fisher, value_grad_and_curvature
from lbopt.curvature.refresh import refresh
from lbopt.curvature.registry import Layers
from lbopt.in_place import update_if

Batch: TypeAlias = Any
"""Any tree of arrays whose leading axis numbers the examples."""
LossFn = Callable[[Params, Any, Batch, Array], tuple[Array, tuple[Any, Mapping]]]
"""``(params, model_state, batch, rng) -> (loss, (model_state, metrics))``."""


class TrainState(NamedTuple):
    """All that a run carries from step to step.

    Attributes:
      step: steps taken.
      params: the parameters.
      model_state: the model's other collections, such as ``batch_stats``.
      opt_state: the optimizer's state.
      rng: the key that each step's keys are folded from.
      skipped: steps that changed nothing because a number was not finite.
    """

    step: Any
    params: Any
    model_state: Any
    opt_state: Any
    rng: Any
    skipped: Any


def init_state(
    tx: optax.GradientTransformation, params: Params, model_state: Any, rng: Array
) -> TrainState:
    """The state before the first step.

    Args:
      tx: the optimizer.
      params: the parameters.
      model_state: the model's other collections; ``{}`` if there are none.
      rng: a key.

    Returns:
      The state; no two of its arrays share a buffer, so that steps may donate it.
    """
    state = TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=tx.init(params),
        rng=rng,
        skipped=jnp.zeros([], jnp.int32),
    )
    return jax.tree.map(jnp.copy, state)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    layers: Layers | None = None,
    *,
    fisher: Fisher = "empirical",
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Compiles one training step.

    A step in which the loss or the norm of the gradient is not finite changes nothing
    but the counters ``step`` and ``skipped``.

    Args:
      loss_fn: ``(params, model_state, batch, rng) -> (loss, (model_state, metrics))``;
        the loss is a mean over the batch.
      tx: the optimizer.
      layers: what ``trace_layers`` found; None for an optimizer without curvature.
      fisher: which Fisher matrix the statistics are of.

    Returns:
      ``train_step(state, batch) -> (state, metrics)``, jitted; it donates ``state``.
      The metrics are those of the loss function, ``loss``, and ``skipped``.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> from lbopt import training
      >>> model, batch = nn.Sequential([nn.Dense(3)]), {"x": jnp.ones((8, 5))}
      >>> params = model.init(jax.random.key(0), batch["x"])["params"]
      >>> def loss_fn(params, model_state, batch, rng):
      ...     outputs = model.apply({"params": params}, batch["x"])
      ...     return jnp.mean(outputs**2), (model_state, {})
      >>> rng = jax.random.key(1)
      >>> layers = lbopt.trace_layers(loss_fn, params, {}, batch, rng, has_aux=True)
      >>> tx = lbopt.kfac(0.1, layers)
      >>> state = training.init_state(tx, params, {}, rng)
      >>> train_step = training.make_train_step(loss_fn, tx, layers)
      >>> state, metrics = train_step(state, batch)
      >>> int(state.step), sorted(metrics)
      (1, ['loss', 'skipped'])
    """
    tx = optax.with_extra_args_support(tx)
    if layers is not None:
        with_curvature = value_grad_and_curvature(
            loss_fn, layers, has_aux=True, fisher=fisher
        )
    else:
        with_gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def train_step(
        state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        loss_rng, label_rng = jax.random.split(
            jax.random.fold_in(state.rng, state.step)
        )
        args = (state.params, state.model_state, batch, loss_rng)
        extra: dict[str, Any] = {}
        if layers is None:
            (loss, (new_model_state, metrics)), grads = with_gradient(*args)
        else:
            (loss, (new_model_state, metrics)), grads, extra["curvature"] = (
                with_curvature(*args, rng=label_rng, due=refresh(state.opt_state))
            )

        def update(old):
            params, opt_state, _ = old
            updates, opt_state = tx.update(
                grads, opt_state, params, value=loss, **extra
            )
            return optax.apply_updates(params, updates), opt_state, new_model_state

        # The norm, not each entry: a gradient whose square overflows is no use either.
        sound = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        params, opt_state, model_state = update_if(
            sound, update, (state.params, state.opt_state, state.model_state)
        )
        skipped = state.skipped + ~sound
        state = TrainState(
            state.step + 1, params, model_state, opt_state, state.rng, skipped
        )
        return state, {**metrics, "loss": loss, "skipped": skipped}

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(
    eval_fn: Callable[[Params, Any, Batch], Mapping[str, Array]],
) -> Callable[[TrainState, Batch], Mapping[str, Array]]:
    """Compiles one evaluation step.

    Args:
      eval_fn: ``(params, model_state, batch) -> sums`` over the batch, so that batches
        of any size add up.

    Returns:
      ``eval_step(state, batch) -> sums``, jitted.
    """

    def eval_step(state: TrainState, batch: Batch) -> Mapping[str, Array]:
        return eval_fn(state.params, state.model_state, batch)

    return jax.jit(eval_step)


def opt_state_bytes(opt_state: OptState) -> int:
    """Bytes of an optimizer's state."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(opt_state))
