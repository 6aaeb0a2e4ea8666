"""Cost of a wide head: SGD, K-FAC with three factors, K-FAC with the full factor.

    python -m benchmarks.wide_head

The head of AlexNet on a map of 6×6 locations: its first layer has 36·256 = 9,216 inputs
and 4,096 outputs.  K-FAC renews its statistics at every step and its inverses at every
second one.  Each contestant trains in a process of its own, one after the other, so
that the peak of the resident memory is its own.
"""

import resource
import statistics
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lbopt
from benchmarks import harness
from lbopt import training

MODES = ("SGD", "three factors", "full factor")
BATCH, CLASSES, SIDE, COLOURS = 64, 10, 13, 32
STEPS = 6  # the first two compile and are not timed
_SETTINGS = {
    "batch": BATCH,
    "damping": 1e-2,
    "inverse_period": 2,
    "learning_rate": {"SGD": 0.001, "K-FAC": 0.1},
    "kl_clip": 1e-2,
}


class Head(nn.Module):
    """AlexNet from its last convolution on, with few classes."""

    channels: int
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of maps ``[batch, 13, 13, colours]``."""
        x = nn.relu(nn.Conv(self.channels, (3, 3), name="conv")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        x = nn.relu(nn.Dense(self.outputs, name="wide")(x.reshape(len(x), -1)))
        return nn.Dense(CLASSES, name="head")(x)


def measure(channels: int = 256, outputs: int = 4096) -> harness.Record:
    """Trains in every mode, each in a process of its own."""
    runs = {}
    for mode in MODES:
        harness.tell(mode)
        runs[mode] = harness.in_new_process(train, mode, channels, outputs)
    return {"channels": channels, "outputs": outputs, "steps": STEPS, "runs": runs}


def train(mode: str, channels: int, outputs: int) -> dict[str, Any]:
    """Trains a ``Head`` for ``STEPS`` steps.

    Args:
      mode: one of ``MODES``.
      channels: output channels of the convolution.
      outputs: units of the wide layer.

    Returns:
      ``losses`` before each step; ``seconds`` of the steps after the first two;
      ``factors``, the orders of the wide layer's; ``state_bytes`` of the optimizer;
      ``peak_bytes``, the peak of the process's resident memory.
    """
    model, key = Head(channels, outputs), jax.random.key(0)
    maps = jax.random.normal(key, (BATCH, SIDE, SIDE, COLOURS))
    batch = {"x": jax.nn.relu(maps), "y": jnp.arange(BATCH) % CLASSES}

    def loss_fn(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        del rng
        logits: Any = model.apply({"params": params}, batch["x"])
        logits = lbopt.likelihood(logits, "categorical")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses.mean(), (model_state, {})

    params = jax.jit(model.init)(key, batch["x"][:1])["params"]
    rates: Any = _SETTINGS["learning_rate"]
    layers, orders = None, []
    tx = optax.sgd(rates["SGD"], 0.9)
    if mode != "SGD":
        limit = (SIDE // 2) ** 2 * channels if mode == "three factors" else None
        arguments = (params, {}, batch, key)
        layers = lbopt.trace_layers(
            loss_fn, *arguments, has_aux=True, doubly_factored=limit
        )
        orders = [kind.order for kind in layers["wide"].block.factors]
        settings = {k: _SETTINGS[k] for k in ("damping", "kl_clip")}
        periods = lbopt.Periods(inverses=_SETTINGS["inverse_period"])
        tx = lbopt.kfac(
            rates["K-FAC"],
            layers,
            momentum=0.9,
            factor_decay=0.95,
            periods=periods,
            **settings,
        )
    step = training.make_train_step(loss_fn, tx, layers)
    state = training.init_state(tx, params, {}, key)
    state_bytes = training.opt_state_bytes(state.opt_state)
    del params
    losses, seconds = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "losses": losses,
        "seconds": seconds[2:],
        "factors": orders,
        "state_bytes": state_bytes,
        # Linux counts it in KiB, macOS in bytes.
        "peak_bytes": peak if sys.platform == "darwin" else 1024 * peak,
    }


def table(record: harness.Record) -> str:
    """Formats a record."""
    rows: list[tuple[str, ...]] = [
        ("", "factors of the layer", "state MB", "peak MB", "ms a step", "loss")
    ]
    for mode, run in record["runs"].items():
        # Steps that invert and steps that do not, in turn.
        pairs = zip(run["seconds"][::2], run["seconds"][1::2], strict=True)
        rows.append(
            (
                mode,
                " ".join(f"{order:,}" for order in run["factors"]),
                f"{run['state_bytes'] / 1e6:,.0f}",
                f"{run['peak_bytes'] / 1e6:,.0f}",
                f"{1e3 * statistics.median(sum(pair) / 2 for pair in pairs):,.0f}",
                harness.course(run["losses"]),
            )
        )
    inputs = (SIDE // 2) ** 2 * record["channels"]
    return harness.page(
        f"a dense layer of {inputs:,} inputs and {record['outputs']:,} outputs, "
        f"batch {BATCH}, inverses at every second step",
        rows,
    )


main = harness.command(
    "wide_head",
    __doc__,
    measure,
    table,
    _SETTINGS,
)

if __name__ == "__main__":
    main()
