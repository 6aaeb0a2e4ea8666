"""What a wide head costs: SGD, K-FAC with three factors, K-FAC with the full factor.

    python -m benchmarks.wide_head [--channels 256] [--outputs 4096] [--steps 6]

The head of AlexNet, of a map of 6×6 locations: its first layer has 36·256 = 9,216
inputs and 4,096 outputs.  K-FAC renews its statistics at every step and its inverses
at every second one.  Contestants train in processes of their own, one after the other,
so that the peak of the resident memory is that of one alone.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lbopt
from benchmarks import own_process, reporting
from lbopt import training

MODES = ("SGD", "three factors", "full factor")
BATCH, CLASSES, SIDE, COLOURS = 64, 10, 13, 32
_SIZES = {
    "channels": (256, "of the map"),
    "outputs": (4096, "of the wide layer"),
    "steps": (6, "steps of each run; the first two compile and are not timed"),
}
_SETTINGS = {
    "batch": BATCH,
    "damping": 1e-2,
    "inverse_period": 2,
    "learning_rate": {"SGD": 0.001, "K-FAC": 0.1},
    "kl_clip": 1e-2,
}


class Head(nn.Module):
    """AlexNet from its last convolution on, with few classes.

    Attributes:
      channels: of the convolution.
      outputs: of the wide layer.
    """

    channels: int
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of maps ``[batch, 13, 13, colours]``."""
        x = nn.relu(nn.Conv(self.channels, (3, 3), name="conv")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        x = nn.relu(nn.Dense(self.outputs, name="wide")(x.reshape(len(x), -1)))
        return nn.Dense(CLASSES, name="head")(x)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what the command line asks for, prints a table, writes the record.

    Args:
      argv: arguments of the command line; those of the process by default.

    Returns:
      The record, as it is written to ``--output``; of a single run what it measured.
    """
    options = _parse(argv)
    sizes = reporting.sizes(options, _SIZES)
    if options.mode:
        result = train(options.mode, **sizes)
        print(json.dumps(result))
        return result
    record = reporting.begin("wide_head", argv, _SETTINGS) | sizes
    runs = record["runs"] = {}
    for mode in MODES:
        reporting.tell(mode)
        part = {"mode": mode} | sizes
        runs[mode] = own_process.result_of("benchmarks.wide_head", part)
    reporting.write(record, options.output)
    print(table(record))
    return record


def train(mode: str, *, channels: int, outputs: int, steps: int) -> dict[str, Any]:
    """Trains for some steps.

    Args:
      mode: one of ``MODES``.
      channels: of the map.
      outputs: of the wide layer.
      steps: how many.

    Returns:
      ``losses`` before each step; ``seconds`` of the steps after the first two;
      ``factors``, the orders of the wide layer's; ``state_bytes`` of the optimizer;
      ``peak_bytes``, the most that the process held in memory.
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
            rates["K-FAC"], layers, momentum=0.9, periods=periods, **settings
        )
    step = training.make_train_step(loss_fn, tx, layers)
    state = training.init_state(tx, params, {}, key)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
    del params
    losses, seconds = [], []
    for _ in range(steps):
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


def table(record: Mapping[str, Any]) -> str:
    """The table of a record.

    Args:
      record: what ``main`` returned.

    Returns:
      Text of several lines.
    """
    rows: list[tuple[str, ...]] = [
        ("", "factors of the layer", "state MB", "peak MB", "ms a step", "loss")
    ]
    for mode, run in record["runs"].items():
        # Steps that invert and steps that do not, in turn.
        pairs = zip(run["seconds"][::2], run["seconds"][1::2], strict=False)
        rows.append(
            (
                mode,
                " ".join(f"{order:,}" for order in run["factors"]),
                f"{run['state_bytes'] / 1e6:,.0f}",
                f"{run['peak_bytes'] / 1e6:,.0f}",
                f"{1e3 * statistics.median(sum(pair) / 2 for pair in pairs):,.0f}",
                reporting.course(run["losses"]),
            )
        )
    inputs = (SIDE // 2) ** 2 * record["channels"]
    return "\n".join(
        [
            "",
            f"a dense layer of {inputs:,} inputs and {record['outputs']:,} outputs, "
            f"batch {BATCH}, inverses at every second step",
            *reporting.aligned(rows),
        ]
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.arguments("wide_head", __doc__)
    reporting.add_sizes(parser, _SIZES)
    parser.add_argument("--mode", choices=MODES, help="a single run, in this process")
    options = parser.parse_args(argv)
    if options.steps < 4:
        parser.error(f"argument --steps: {options.steps} leaves no two steps to time")
    return options


if __name__ == "__main__":
    main()
