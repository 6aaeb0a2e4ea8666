"""Random models, losses, batches and devices, against plain JAX and explicit rows.

The oracle knows nothing of lbopt: a second model in plain JAX adds a perturbation to
every layer's output, by which the loss is differentiated.  Rows are independent here,
so each has a signal and a weight of its own.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import lbopt
from lbopt import sharding, statistics_pass
from lbopt.collectives import Axis
from tests import oracles

BATCH, LENGTH, WIDTH, CLASSES, COPIES = 8, 3, 4, 3, 2


# Booleans of what is padding, labels below 0, and numbers of both signs among them.
WEIGHTS = ("none", "none", "bool", "float", "int", "examples", "constant")
WEIGHTS += ("padding", "labels", "signed")


class Draw(NamedTuple):
    """A model, a loss and a way to divide the batch, by the names of their parts."""

    blocks: tuple[str, ...]
    outputs: str  # per token or per sequence
    loss: str  # "categorical", "squares" or "summed"
    weights: str  # one of WEIGHTS
    shift: bool  # each token is the target of the one before
    gain: bool
    penalty: bool
    devices: int
    accumulate: int

    @property
    def counted(self) -> bool:
        """Whether the loss divides by the number of positions."""
        return self.weights in ("none", "constant", "signed")


def draw(seed: int) -> Draw:
    rng = np.random.default_rng(seed)
    pick = lambda *names: names[rng.integers(len(names))]
    size = rng.integers(1, 4)
    kinds = ("dense", "again", "remat", "scan", "jit")
    outputs = pick("tokens", "tokens", "sequences")
    return Draw(
        blocks=("dense", *(pick(*kinds) for _ in range(size))),
        outputs=outputs,
        loss=pick("categorical", "categorical", "squares", "summed"),
        weights=pick(*WEIGHTS),
        shift=outputs == "tokens" and bool(rng.integers(2)),
        gain=bool(rng.integers(2)),
        penalty=bool(rng.integers(2)),
        devices=pick(1, 2, 4),
        accumulate=pick(1, 2),
    )


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(WIDTH, name="inner")(x)), None


class Model(nn.Module):
    """The layers that a draw names, in Flax."""

    blocks: tuple[str, ...]
    gain: bool
    sequences: bool

    @nn.compact
    def __call__(self, x):
        first = None
        for i, kind in enumerate(self.blocks):
            if kind == "again":
                assert first is not None
                x = nn.tanh(first(x))
            elif kind == "scan":
                lifted = nn.scan(
                    Cell,
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    length=COPIES,
                )
                x, _ = lifted(name=f"block{i}")(x, None)
            else:
                make = {"remat": nn.remat(nn.Dense), "jit": nn.jit(nn.Dense)}
                layer = make.get(kind, nn.Dense)(WIDTH, name=f"block{i}")
                first = layer if kind == "dense" else first
                x = nn.tanh(layer(x))
        if self.gain:
            gain = self.param("gain", nn.initializers.constant(0.5), (WIDTH,))
            x = x * gain[None, None]
        if self.sequences:
            x = jnp.mean(x, 1)
        return nn.Dense(CLASSES, name="head")(x)


def explicit(model: Model, params, x, noise) -> tuple[Any, dict[str, list[Any]]]:
    """The same model in plain JAX; also returns the inputs of each layer's calls."""
    inputs: dict[str, list[Any]] = {}
    calls = iter(range(100))

    def dense(key, own, x):
        inputs.setdefault(key, []).append(x)
        z = x @ own["kernel"] + jnp.expand_dims(own["bias"], range(x.ndim - 1))
        call = f"{key}#{next(calls)}"
        return z + noise.get(call, jnp.zeros_like(z)), call

    names = {}
    first = ""
    for i, kind in enumerate(model.blocks):
        name = f"block{i}"
        if kind == "scan":
            for copy in range(COPIES):
                own = jax.tree.map(lambda w, c=copy: w[c], params[name]["inner"])
                z, call = dense(f"{name}/inner/{copy}", own, x)
                names.setdefault(f"{name}/inner/{copy}", []).append((call, z.shape))
                x = jnp.tanh(z)
            continue
        if kind == "again":
            name = first
        elif kind == "dense":
            first = name
        z, call = dense(name, params[name], x)
        names.setdefault(name, []).append((call, z.shape))
        x = jnp.tanh(z)
    if model.gain:
        x = x * params["gain"][None, None]
    if model.sequences:
        x = jnp.mean(x, 1)
    z, call = dense("head", params["head"], x)
    names.setdefault("head", []).append((call, z.shape))
    return z, {key: [inputs[key], names[key]] for key in inputs}


def losses_of(kind, outputs, y, targets):
    if kind == "categorical":
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y)
    squares = (outputs - targets) ** 2
    return jnp.sum(squares, -1) if kind == "summed" else jnp.mean(squares, -1)


def total(one: Draw, losses, w):
    if one.weights == "none":
        return jnp.mean(losses)
    w = jnp.broadcast_to(
        w.reshape(w.shape + (1,) * (losses.ndim - w.ndim)), losses.shape
    )
    return jnp.sum(losses * w) / (losses.size if one.counted else jnp.sum(w))


def weights_of(one: Draw, batch):
    if one.weights == "labels":
        return batch["y"] >= 0
    w = batch.get("w")
    return ~w if one.weights == "padding" else w


def mean_loss(one: Draw, outputs, batch):
    y, targets, w = jnp.maximum(batch["y"], 0), batch["targets"], weights_of(one, batch)
    if one.shift:
        outputs, y, targets = outputs[:, :-1], y[:, 1:], targets[:, 1:]
        w = w[:, 1:] if w is not None and w.ndim > 1 else w
    return total(one, losses_of(one.loss, outputs, y, targets), w)


class Case(NamedTuple):
    """A draw with its arrays; ``loss_fn(params, model_state, batch, rng)``."""

    one: Draw
    model: Model
    loss_fn: Any
    params: Any
    batch: Any


def make(one: Draw) -> Case:
    model = Model(one.blocks, one.gain, one.outputs == "sequences")
    keys = jax.random.split(jax.random.key(7), 3)
    x = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH))
    shape = (BATCH,) if one.outputs == "sequences" else (BATCH, LENGTH)
    y = jax.random.randint(keys[1], shape, 0, CLASSES)
    params = model.init(keys[2], x)["params"]
    # The last examples are padding, so that a device may have nothing else.
    real = jnp.ones(shape).at[BATCH - 3 :].set(0)
    if len(shape) > 1:
        real = real.at[0, 1:].set(0)
    kinds = {
        "none": real,
        "bool": real > 0,
        "int": real.astype(int),
        "float": real * (1 + jnp.arange(real.size).reshape(shape) % 3),
        "examples": jnp.asarray(jnp.arange(BATCH) % 3, float),
        "constant": real,
        "padding": real == 0,
        "signed": real * (jnp.arange(real.size).reshape(shape) % 4 - 1.5),
    }
    targets = jax.nn.one_hot(y, CLASSES)
    batch = {"x": x, "y": y, "targets": targets}
    if one.weights == "labels":
        batch["y"] = jnp.where(real > 0, y, -100)
    elif one.weights != "none":
        batch["w"] = kinds[one.weights]

    def loss_fn(params, model_state, batch, rng):
        del rng
        value = mean_loss(one, model.apply({"params": params}, batch["x"]), batch)
        if one.penalty:
            value += 1e-2 * sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
        return value, (model_state, {})

    return Case(one, model, loss_fn, params, batch)


def expected(case: Case) -> dict[str, tuple[Any, Any]]:
    """Each layer's A and G, or the diagonal's f, from explicit rows."""
    one, model, batch = case.one, case.model, case.batch
    _, seen = explicit(model, case.params, batch["x"], {})

    def loss(params, noise):
        outputs, _ = explicit(model, params, batch["x"], noise)
        return mean_loss(one, outputs, batch)

    noise = {call: jnp.zeros(s) for _, named in seen.values() for call, s in named}
    grads, signals = jax.grad(loss, argnums=(0, 1))(case.params, noise)
    shape = batch["y"].shape
    w = weights_of(one, batch)
    w = jnp.ones(shape) if w is None else jnp.asarray(w, float)
    spread = jnp.broadcast_to(w.reshape(w.shape + (1,) * (len(shape) - w.ndim)), shape)
    targets = spread[:, 1:] if one.shift else spread
    n = targets.size if one.counted else jnp.sum(targets)
    n *= CLASSES if one.loss == "squares" else 1
    if one.shift and w.ndim > 1 and one.weights != "none":
        # A row has the weight of the next one's target, the last row none.
        spread = jnp.pad(spread[:, 1:], ((0, 0), (0, 1)))
    spread = jnp.abs(spread)
    # The weights of rows [batch, tokens] or [batch] of a layer's input and signal.
    tokens = (
        jnp.broadcast_to(spread[:, None], (BATCH, LENGTH))
        if len(shape) == 1
        else spread
    )
    found = {}
    for key, (inputs, named) in seen.items():
        a_rows, g_rows = [], []
        for a, (call, _) in zip(inputs, named, strict=True):
            rows = tokens if a.ndim == 3 else spread
            a = jnp.concatenate([a, jnp.ones((*a.shape[:-1], 1))], -1)
            a_rows.append((a.reshape(-1, a.shape[-1]), rows.reshape(-1)))
            g = signals[call]
            g_rows.append((g.reshape(-1, g.shape[-1]), rows.reshape(-1)))
        a, r = (jnp.concatenate(x) for x in zip(*a_rows, strict=True))
        g, s = (jnp.concatenate(x) for x in zip(*g_rows, strict=True))
        inverse = jnp.where(s > 0, 1 / jnp.where(s > 0, s, 1), 0)
        found[key] = (
            jnp.einsum("r,ri,rj->ij", r, a, a) / jnp.sum(r),
            n * jnp.einsum("r,ri,rj->ij", inverse, g, g),
        )
    if model.gain:
        found["gain"] = (grads["gain"], n)
    return found


def evaluated(case: Case, layers) -> Any:
    """Loss, gradient and statistics of the whole batch, divided as the draw says."""
    one = case.one
    mesh = sharding.make_mesh(jax.devices()[: one.devices])
    axis = Axis("data", one.devices)
    evaluate = statistics_pass.make_evaluate(
        case.loss_fn,
        layers,
        axis,
        fisher="empirical",
        accumulate=one.accumulate,
        fraction=1.0,
        devices=0,
        per_example=(),
    )

    def on_device(params, batch):
        keys = jax.random.split(jax.random.key(0), one.accumulate)
        keys = keys if one.accumulate > 1 else keys[0]
        due = {
            path: jax.tree.map(lambda _: True, layer.block.factor_shapes(()))
            for path, layer in layers.preconditioned.items()
        }
        found = evaluate(params, {}, batch, None, keys, due)
        return jax.lax.pmean((found.loss, found.grads, found.curvature), "data")

    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    return jax.jit(run)(case.params, case.batch)


def check(seed: int) -> None:
    case = make(draw(seed))
    args = {}, case.batch, jax.random.key(0)
    layers = lbopt.trace_layers(case.loss_fn, case.params, *args, has_aux=True)
    loss, grads, curvature = evaluated(case, layers)
    plain = jax.value_and_grad(lambda p: case.loss_fn(p, *args)[0])
    loss0, grads0 = jax.jit(plain)(case.params)
    assert oracles.error(loss, loss0) < 1e-5, case.one
    errors = jax.tree.map(oracles.error, grads, grads0)
    assert max(jax.tree.leaves(errors)) < 1e-4, (case.one, errors)
    for key, (a, g) in jax.jit(lambda: expected(case))().items():
        if key == "gain":
            # With the penalty's gradient, as any gradient of the loss.
            square = g * grads0["gain"] ** 2
            assert oracles.error(curvature["gain"].f, square) < 1e-4, case.one
            continue
        path, _, copy = key.partition("/inner/")
        own = curvature[f"{path}/inner" if copy else path]
        if copy:
            own = jax.tree.map(lambda x, c=int(copy): x[c], own)
        assert oracles.error(own.a, a) < 1e-4, (case.one, key)
        assert oracles.error(own.g, g) < 1e-4, (case.one, key)


@pytest.mark.parametrize("seed", range(20))
def test_random_losses(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(20, 220, 20))
def test_many_random_losses(first):
    for seed in range(first, first + 20):
        check(seed)
