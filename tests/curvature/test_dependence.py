"""Inputs that all examples share, and parameters that are used past their layer."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import lbopt
from lbopt.curvature.dependence import note_mapped
from tests import oracles

xent = optax.softmax_cross_entropy_with_integer_labels
WORDS, WIDTH = 7, 3
SHARED = "its input is the same for all examples"
OUTSIDE = "the loss also uses its parameters outside of the layer"

# -------------------------------------------------------------------- shared inputs


class Positions(nn.Module):
    """A table of words, and one of positions made in one of several ways."""

    length: int
    made: str

    @nn.compact
    def __call__(self, words, positions):
        if self.made != "argument":
            positions = jnp.arange(self.length)
        if self.made == "[1, T]":
            positions = positions[None]
        if self.made == "[B, T]":
            positions = jnp.broadcast_to(positions, words.shape)
        if self.made == "dense":
            at = nn.Dense(WIDTH, name="at")(jnp.stack([jnp.cos(positions)] * 2, -1))
        else:
            at = nn.Embed(self.length, WIDTH, name="at")(positions)
        # Zeros, by which the test differentiates.
        at += self.variable("shift", "moved", lambda: jnp.zeros_like(at)).value
        x = nn.Embed(WORDS, WIDTH, name="words")(words)
        x += jnp.broadcast_to(at, x.shape)
        return nn.Dense(WORDS, name="head")(nn.tanh(x))


def positional(batch, length, made):
    """The loss, its parameters, its arguments, and zeros to differentiate by."""
    model = Positions(length, made)
    words = jax.random.randint(jax.random.key(0), (batch, length), 0, WORDS)
    variables = model.init(jax.random.key(1), words, jnp.arange(length))
    shift = variables["shift"]

    def losses(params, words, positions, shift):
        f = model.apply({"params": params, "shift": shift}, words, positions)
        return xent(f, jnp.roll(words, 1, 1))

    return losses, variables["params"], (words, jnp.arange(length)), shift


@pytest.mark.parametrize("made", ["[T]", "[1, T]", "argument", "dense"])
@pytest.mark.parametrize("batch", [2, 4])
def test_a_layer_that_all_examples_share_has_the_square_of_its_gradient(batch, made):
    # As many examples as positions, too: nothing is read off the sizes.
    losses, params, args, shift = positional(batch, 4, made)
    mask = jnp.arange(4)[None] <= jnp.arange(batch)[:, None] + 1

    def loss_fn(params, words, positions, mask):
        each = losses(params, words, positions, shift)
        return jnp.sum(each * mask) / jnp.sum(mask)

    args = (*args, mask)
    if made == "argument" and batch != 4:
        # Without the axis of examples it is no part of the batch, but might be.
        assert not lbopt.trace_layers(loss_fn, params, *args)["at"].fallback
        return
    layers = lbopt.trace_layers(loss_fn, params, *args, strict=True)
    own = {path: layer for path, layer in layers.items() if path.startswith("at/")}
    assert {layer.why for layer in own.values()} == {SHARED}
    assert {layer.block.kind for layer in own.values()} == {"diagonal"}
    evaluate = jax.jit(lbopt.value_grad_and_curvature(loss_fn, layers))
    _, grads, found = evaluate(params, *args)
    for path in own:
        square = jnp.sum(mask) * grads["at"][path.removeprefix("at/")] ** 2
        assert oracles.error(found[path].f, square) < 1e-5
    # The words' rows are those of the batch.
    counts = jnp.zeros(WORDS).at[args[0].ravel()].add(mask.ravel() * 1.0)
    assert oracles.error(found["words"].a, counts / jnp.sum(mask)) < 1e-5


def test_an_input_with_an_axis_of_examples_is_not_shared():
    losses, params, args, shift = positional(4, 4, "[B, T]")
    loss_fn = lambda params, *args: jnp.mean(losses(params, *args, shift))
    layers = lbopt.trace_layers(loss_fn, params, *args)
    assert {layer.block.kind for layer in layers.values()} == {"kronecker"}


# ----------------------------------------------------------------- parameters outside


class Network(nn.Module):
    """Layers inside a transform and out of it, with dropout and batch statistics."""

    lift: str = ""

    @nn.compact
    def __call__(self, x):
        dense = {"remat": nn.remat(nn.Dense), "jit": nn.jit(nn.Dense)}
        x = nn.tanh(dense.get(self.lift, nn.Dense)(4, name="first")(x))
        if self.lift == "scan":
            body = lambda layer, x, _: (nn.tanh(layer(x)), None)
            lifted = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(body, length=2, **lifted)(nn.Dense(4), x, None)
        if self.lift == "state":
            x = nn.BatchNorm(use_running_average=False)(x)
            x = nn.Dropout(0.5, deterministic=False)(x)
        return nn.Dense(3, name="last")(nn.LayerNorm()(x))


X, Y = jax.random.normal(jax.random.key(0), (6, 5)), jnp.arange(6) % 3


def variables_of(lift=""):
    return Network(lift).init(dict.fromkeys(["params", "dropout"], KEY), X)


KEY = jax.random.key(1)
PARAMS = variables_of()["params"]


def plain(params, x, y, lift=""):
    f = Network(lift).apply({"params": params}, x)
    return jnp.mean(xent(lbopt.likelihood(f, "categorical"), y))


def squares(tree):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))


def with_state(params, x, y, stats, key):
    variables = {"params": params, "batch_stats": stats}
    f, _ = Network("state").apply(
        variables, x, mutable=["batch_stats"], rngs={"dropout": key}
    )
    return jnp.mean(xent(f, y))


def towards(params, x, y, start, amount):
    shifts = jax.tree.map(jnp.subtract, params, start)
    norms = [jnp.linalg.norm(w) for w in jax.tree.leaves(shifts)]
    return plain(params, x, y) + amount * (squares(params) + squares(shifts)) + norms[0]


def sharpness_aware(params, x, y):
    grads = jax.grad(plain)(params, x, y)
    up = jax.tree.map(lambda g: jax.lax.stop_gradient(0.1 * g), grads)
    return plain(jax.tree.map(jnp.add, params, up), x, y)


def jitted(params, x, y):
    inner = jax.jit(lambda params, x: Network().apply({"params": params}, x))
    return jnp.mean(xent(lbopt.likelihood(inner(params, x), "categorical"), y))


def distilled(params, x, y, teacher, link, name, nothing):
    del name, nothing
    f, aim = (Network().apply({"params": p}, x) for p in (params, teacher))
    return jnp.mean(xent(f, y)) + jnp.mean((link(f) - link(aim)) ** 2)


STATE = variables_of("state")
LOSSES = {
    "penalties": (towards, PARAMS, (PARAMS, jnp.asarray(0.1))),
    "remat": (functools.partial(plain, lift="remat"), variables_of("remat")["params"]),
    "scan": (functools.partial(plain, lift="scan"), variables_of("scan")["params"]),
    "nn.jit": (functools.partial(plain, lift="jit"), variables_of("jit")["params"]),
    "jit": (jitted, PARAMS),
    "state": (with_state, STATE["params"], (STATE["batch_stats"], KEY)),
    "raw key": (
        with_state,
        STATE["params"],
        (STATE["batch_stats"], jax.random.PRNGKey(0)),
    ),
    "SAM": (sharpness_aware, PARAMS),
    "a teacher": (distilled, PARAMS, (PARAMS, jnp.tanh, "mean", None)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_only_a_use_outside_of_the_layer_is_marked(name):
    loss_fn, params, *more = LOSSES[name]
    args = (X, Y, *(more[0] if more else ()))
    trace = functools.partial(lbopt.trace_layers, batch_size=len(X))
    assert not any(row.fallback for row in trace(loss_fn, params, *args).values())

    def with_use(params, x, *args):
        hidden = x @ params["first"]["kernel"]
        return loss_fn(params, x, *args) + jnp.mean(hidden**2)

    marked = trace(with_use, params, *args)
    reasons = {path: row.why for path, row in marked.items() if row.fallback}
    assert reasons == {"first/kernel": OUTSIDE, "first/bias": OUTSIDE}


class Tied(nn.Module):
    """An embedding that its own module or the loss ties, by hand or as Flax does."""

    tie: str

    @nn.compact
    def __call__(self, words):
        embed = nn.Embed(WORDS, WIDTH, name="embed")
        x = nn.tanh(nn.Dense(WIDTH, name="dense")(embed(words)))
        if self.tie == "attend":
            return embed.attend(x)
        if self.tie == "module":
            return x @ embed.embedding.T
        return x


@pytest.mark.parametrize("tie", ["attend", "module", "loss", "another module"])
def test_an_embedding_that_is_tied_by_hand_is_marked(tie):
    words = jnp.arange(20).reshape(4, 5) % WORDS
    params = Tied(tie).init(jax.random.key(0), words)["params"]

    def loss_fn(params, words):
        f = Tied(tie).apply({"params": params}, words)
        table = params["embed"]["embedding"]
        if tie == "loss":
            f = f @ table.T
        if tie == "another module":
            kernel = {"kernel": table.T}
            f = nn.Dense(WORDS, use_bias=False).apply({"params": kernel}, f)
        return jnp.mean(xent(f, words))

    layers = lbopt.trace_layers(loss_fn, params, words)
    marked = {path: row.why for path, row in layers.items() if row.fallback}
    assert marked == ({} if tie == "attend" else {"embed/embedding": OUTSIDE})


def test_a_use_before_layers_and_inside_the_network_is_marked():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(5, use_bias=False, name="dense")
            x = nn.tanh(dense(x))
            x = nn.tanh(x @ dense.variables["params"]["kernel"])
            x = nn.LayerNorm(name="norm")(nn.Dense(4, name="next")(x))
            return nn.Dense(3, name="last")(x)

    params = Twice().init(KEY, X)["params"]

    def loss_fn(params, x, y):
        return jnp.mean(xent(Twice().apply({"params": params}, x), y))

    layers = lbopt.trace_layers(loss_fn, params, X, Y)
    assert [p for p, row in layers.items() if row.fallback] == ["dense/kernel"]
    with pytest.raises(ValueError, match=OUTSIDE):
        lbopt.trace_layers(loss_fn, params, X, Y, strict=True)


def test_nothing_is_marked_where_the_loss_cannot_be_mapped():
    def loss_fn(params, x, y):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        x = jax.pure_callback(lambda x: x, shape, x)  # without a vmap_method
        return plain(params, x, y)

    layers = lbopt.trace_layers(loss_fn, PARAMS, X, Y)
    assert not any(row.fallback for row in layers.values())


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("inner", [jax.jit, jax.checkpoint, jax.vmap])
def test_a_mapped_input_is_noted_inside_other_transforms(mapped, inner):
    notes = []

    def noted(x, lane):
        return inner(lambda x: note_mapped(jnp.zeros(()), lane, [x], notes.append))(x)

    over = jax.vmap(noted, in_axes=(0 if mapped else None, 0))
    jax.eval_shape(over, jnp.ones((2, 3) if mapped else 3), jnp.zeros(2))
    assert set(notes) == {mapped}
