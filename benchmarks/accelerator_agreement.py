"""Whether an accelerator computes what the host's CPU does, block by block.

For a small model of each kind of block, both devices run the same program: loss,
gradient, statistics, their averages as whole matrices, the update, and the inverses,
seen through what they make of random gradients at the next step, at which nothing is
renewed.  In float32 products are of the highest precision: at the default, a GPU or TPU
rounds the factors of float32 products too, and the comparison would say little.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lbopt
from benchmarks import contestants
from benchmarks.harness import Record
from benchmarks.parts import Run

BATCH, CLASSES, WORDS, WIDTH = 32, 10, 24, 16
DAMPING = 1e-2

# Relative, see ``error``.  Sums in another order differ by 1e-6 at most; the rounding
# of TF32 is 1e-3.  An inverse is up to a hundred times as sensitive as its factor, the
# mean eigenvalue over the damping.
FLOAT32 = {
    "loss": 1e-5,
    "gradients": 1e-4,
    "statistics": 1e-4,
    "averages": 1e-4,
    "inverses": 1e-3,
    "updates": 1e-3,
}
# How far bfloat16 is from float32 depends on the model, for gradients through a norm
# layer are differences of larger numbers: the CPU's own distance is the measure.
TIMES_OF_CPU = 2.0
BFLOAT16 = 2e-2  # added to it: four roundings


class Dense(nn.Module):
    """Dense layers, one norm layer, and a vector of parameters of no layer."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of ``x [n, width]``."""
        x = nn.tanh(nn.Dense(24, dtype=self.dtype)(x))
        x = nn.LayerNorm(dtype=self.dtype)(x)
        gain = self.param("gain", nn.initializers.ones, (24,))
        return nn.Dense(CLASSES, dtype=self.dtype)(x * gain[None].astype(x.dtype))


class Convolution(nn.Module):
    """Convolutions, the second one in groups, with batch normalisation."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of ``x [n, h, w, c]``."""
        x = nn.Conv(8, (3, 3), strides=2, use_bias=False, dtype=self.dtype)(x)
        x = nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x)
        x = nn.relu(x)
        x = nn.Conv(8, (3, 3), feature_group_count=2, dtype=self.dtype)(x)
        return nn.Dense(CLASSES, dtype=self.dtype)(jnp.mean(nn.relu(x), (1, 2)))


class Embedding(nn.Module):
    """Words that are looked up and, with tied weights, predicted."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of words ``x [n]``."""
        embed = nn.Embed(WORDS, WIDTH, dtype=self.dtype)
        return embed.attend(nn.tanh(nn.Dense(WIDTH, dtype=self.dtype)(embed(x))))


class Map(nn.Module):
    """A dense layer on a flattened feature map."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of ``x [n, h, w, c]``."""
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, dtype=self.dtype)(x))
        x = nn.Dense(24, dtype=self.dtype, name="wide")(x.reshape(len(x), -1))
        return nn.Dense(CLASSES, dtype=self.dtype)(nn.relu(x))


class Case(NamedTuple):
    """A model with what distinguishes its layers' blocks and their inverses."""

    model: Callable[..., nn.Module]
    shape: tuple[int, ...]
    trace: Mapping[str, Any] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})


_IMAGE = (8, 8, 3)
CASES = {
    "dense, norm, diagonal": Case(Dense, (WIDTH,)),
    "dense, blocks of 8 rows": Case(Dense, (WIDTH,), options={"block_size": 8}),
    "dense, EKFAC": Case(Dense, (WIDTH,), options={"eigenvalues": "corrected"}),
    "convolution, groups, norm": Case(Convolution, _IMAGE),
    "embedding, tied": Case(Embedding, ()),
    "doubly factored": Case(Map, _IMAGE, trace={"doubly_factored": {"wide": (16, 6)}}),
}


def measure(run: Run) -> None:
    """Compares the first device with the host's CPU, in float32 and bfloat16.

    Args:
      run: gets two rows for each case: ``errors``, ``tolerances``, ``agrees``.

    Raises:
      RuntimeError: if jax has no CPU backend beside the accelerator's.
    """
    try:
        devices = jax.devices()[0], jax.devices("cpu")[0]
    except RuntimeError as missing:
        raise RuntimeError(
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')!r} leaves out the CPU, "
            "with which the accelerator is compared; append ',cpu' to it, or unset it"
        ) from missing
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: list[tuple[str, list[Any]]] = []
        for name, case in CASES.items():
            jobs = []
            for dtype in ("float32", "bfloat16"):
                program, arguments = problem(case, dtype)
                for device in devices:
                    own = jax.device_put(arguments, device)
                    with jax.default_matmul_precision(precision(dtype)):
                        lowered = jax.jit(program).lower(*own)
                    jobs.append(pool.submit(_results, lowered, own))
            waiting.append((name, jobs))
            # Early, so that a part that is stopped has what was ready.
            while waiting and all(job.done() for job in waiting[0][1]):
                _report(run, *waiting.pop(0))
        for name, jobs in waiting:
            _report(run, name, jobs)


def _results(lowered: jax.stages.Lowered, arguments: tuple[Any, ...]) -> Record:
    return jax.device_get(lowered.compile()(*arguments))


def _report(run: Run, name: str, jobs: list[Any]) -> None:
    ours, cpu, our_half, cpu_half = (job.result() for job in jobs)
    run.report(f"{name}, float32", compared(ours, cpu))
    run.report(f"{name}, bfloat16", compared(our_half, cpu, cpu_half))


def precision(dtype: str) -> str:
    """Returns the precision of products of arrays without one of their own."""
    return "highest" if dtype == "float32" else "default"


def compared(ours: Record, single: Record, half: Record | None = None) -> Record:
    """Returns the row of a case.

    Args:
      ours: the accelerator's results.
      single: the CPU's in float32.
      half: the CPU's in bfloat16, if the accelerator's are; its errors against
        ``single`` are then the measure of what is allowed.

    Returns:
      ``errors`` of ``ours`` against ``single``, ``tolerances``, and whether all are
      within: ``agrees``.
    """
    errors = {key: error(ours[key], single[key]) for key in FLOAT32}
    allowed = dict(FLOAT32)
    if half is not None:
        of_cpu = {key: error(half[key], single[key]) for key in FLOAT32}
        allowed = {key: BFLOAT16 + TIMES_OF_CPU * e for key, e in of_cpu.items()}
    # Not finite numbers are no JSON, and never within.
    return {
        "errors": {k: e if np.isfinite(e) else None for k, e in errors.items()},
        "tolerances": allowed,
        "agrees": all(errors[key] <= allowed[key] for key in errors),
    }


def problem(
    case: Case, dtype: str
) -> tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]:
    """Returns a case as a function to compile, and its arguments."""
    model = case.model(dtype=jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    if case.shape:
        inputs = jnp.asarray(rng.normal(size=(BATCH, *case.shape)), jnp.float32)
        classes = CLASSES
    else:
        inputs, classes = jnp.asarray(rng.integers(WORDS, size=BATCH)), WORDS
    targets = jnp.asarray(rng.integers(classes, size=BATCH))
    variables = dict(jax.jit(model.init)(jax.random.key(0), inputs))
    params = variables.pop("params")

    def loss_fn(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        collections = {"params": params, **variables}
        logits, _ = model.apply(collections, inputs, mutable=list(variables))
        wide = jnp.asarray(logits, jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(wide, targets)
        return jnp.mean(losses)

    layers = lbopt.trace_layers(loss_fn, params, inputs, targets, **case.trace)
    probe = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params
    )
    program = functools.partial(_quantities, loss_fn, layers, case.options)
    return program, (params, probe, inputs, targets)


def _quantities(
    loss_fn: Callable[..., jax.Array],
    layers: Any,
    options: Mapping[str, Any],
    params: Any,
    probe: Any,
    *batch: jax.Array,
) -> dict[str, Any]:
    """Returns what the two devices are compared by."""
    periods = lbopt.Periods(contestants.STATS_PERIOD, contestants.INVERSE_PERIOD)
    tx = lbopt.scale_by_kfac(layers, damping=DAMPING, periods=periods, **options)
    state = tx.init(params)
    f = lbopt.value_grad_and_curvature(loss_fn, layers)
    # Corrected eigenvalues are renewed as flags in the state say.
    by_flags = "eigenvalues" in options
    all_due, none_due = (
        {} if by_flags else contestants.due(kind) for kind in ("full", "none")
    )
    mask = lbopt.refresh(state, **all_due)
    loss, grads, curvature = f(params, *batch, due=mask)
    updates, state = tx.update(grads, state, params, curvature=curvature, **all_due)
    averages = lbopt.layer_factors(state, layers)
    # The second step renews nothing: the inverses are those of the first.
    applied, _ = tx.update(probe, state, params, curvature=curvature, **none_due)
    return {
        "loss": loss,
        "gradients": grads,
        "statistics": curvature,
        "averages": averages,
        "inverses": applied,
        "updates": updates,
    }


def error(tree: Any, expected: Any) -> float:
    """Returns the largest relative error of an array of a tree.

    That is ‖x − e‖ / ‖e‖ in float64, where e counts as at least a thousandth of the
    largest array of the tree: gradients that are zero but for rounding agree.
    """
    pairs = [
        (np.asarray(x, np.float64), np.asarray(e, np.float64))
        for x, e in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
    ]
    norms = [float(np.linalg.norm(e)) for _, e in pairs]
    least = max(1e-3 * np.max(norms), np.finfo(np.float32).tiny)
    errors = [
        np.linalg.norm(x - e) / max(norm, least)
        for (x, e), norm in zip(pairs, norms, strict=True)
    ]
    return float(np.max(errors))  # unlike Python's, it does not pass over NaN
