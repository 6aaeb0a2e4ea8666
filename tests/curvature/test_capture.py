"""Capture under every transform: same loss, same gradient, the plain statistics.

Each transform stands as a pair of problems that compute the same function, one with the
transform and one written out without it.  Loss and gradient are compared with the same
program without taps, bit for bit; the statistics with those of the plain twin.
"""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lbopt
from lbopt.curvature import capture
from tests.problems import (
    BATCH,
    CLASSES,
    WIDTH,
    Mlp,
    Problem,
    assert_close,
    assert_equal,
    classify,
    cross_entropy,
    inputs,
    labels,
)

DEPTH, HEADS = 3, 2


def stack(trees, axis=0):
    return jax.tree.map(lambda *xs: jnp.stack(xs, axis), *trees)


def from_twin(curvature, names):
    """The twin's statistics under the transformed model's paths, copies stacked."""

    def pick(name):
        if isinstance(name, list):
            return stack([pick(n) for n in name])
        return curvature[name]

    return {path: pick(name) for path, name in names.items()}


# ------------------------------------------------------------------- lifted transforms


class Body(nn.Module):
    """One residual layer; a scan's body returns a pair."""

    pair: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.tanh(nn.Dense(x.shape[-1], name="dense")(x))
        return (x, None) if self.pair else x


class Lifted(nn.Module):
    """``Body`` under a lifted transform, and a head."""

    lift: str

    @nn.compact
    def __call__(self, x):
        x = getattr(self, self.lift)(x)
        return nn.Dense(CLASSES, name="head")(x)

    def remat(self, x):
        return nn.remat(Body)(name="body")(x)

    def jit(self, x):
        return nn.jit(Body)(name="body")(x)

    def scan(self, x, axis=0, body=Body):
        kind = nn.scan(
            body,
            variable_axes={"params": axis},
            split_rngs={"params": True},
            length=DEPTH,
        )
        return kind(pair=True, name="body")(x, None)[0]

    def scan_axis_1(self, x):
        return self.scan(x, axis=1)

    def scan_remat(self, x):
        return self.scan(x, body=nn.remat(Body, prevent_cse=False))

    def scan_broadcast(self, x):
        kind = nn.scan(
            Body,
            variable_broadcast="params",
            split_rngs={"params": False},
            length=DEPTH,
        )
        return kind(pair=True, name="body")(x, None)[0]

    def vmap_mapped(self, x, body=Body):
        kind = nn.vmap(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=1,
            axis_size=HEADS,
        )
        return jnp.sum(kind(name="body")(x), 1)

    def vmap_scan(self, x):
        scanned = nn.scan(
            Body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=DEPTH,
        )
        kind = nn.vmap(
            scanned,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=1,
            axis_size=HEADS,
        )
        return jnp.sum(kind(pair=True, name="body")(x, None)[0], 1)

    def vmap_shared(self, x):
        kind = nn.vmap(
            Body, variable_axes={"params": None}, split_rngs={"params": False}
        )
        return kind(name="body")(x)

    # The plain twins.

    def once(self, x):
        return Body(name="body")(x)

    def chained(self, x):
        for i in range(DEPTH):
            x = Body(name=f"body_{i}")(x)
        return x

    def repeated(self, x):
        body = Body(name="body")
        for _ in range(DEPTH):
            x = body(x)
        return x

    def side_by_side(self, x):
        return sum(Body(name=f"body_{i}")(x) for i in range(HEADS))

    def chained_side_by_side(self, x):
        total = 0
        for i in range(HEADS):
            y = x
            for j in range(DEPTH):
                y = Body(name=f"body_{i}_{j}")(y)
            total += y
        return total


def lifted_params(params, names, axes):
    """Lifted parameters from a twin's; ``axes`` are where the copies stand."""

    def pick(name, axes):
        if isinstance(name, list):
            return stack([pick(n, axes[1:]) for n in name], axes[0])
        return params[name]

    return {"head": params["head"], "body": pick(names, axes)}


CHAIN = [f"body_{i}" for i in range(DEPTH)]
GRID = [[f"body_{i}_{j}" for j in range(DEPTH)] for i in range(HEADS)]
LIFTED = {  # transform: twin, the twin's names, axes of the copies
    "remat": ("once", "body", ()),
    "jit": ("once", "body", ()),
    "scan": ("chained", CHAIN, (0,)),
    "scan_axis_1": ("chained", CHAIN, (1,)),
    "scan_remat": ("chained", CHAIN, (0,)),
    "scan_broadcast": ("repeated", "body", ()),
    "vmap_mapped": ("side_by_side", [f"body_{i}" for i in range(HEADS)], (0,)),
    "vmap_shared": ("once", "body", ()),
    "vmap_scan": ("chained_side_by_side", GRID, (0, 0)),
}


def append_dense(names):
    if isinstance(names, list):
        return [append_dense(name) for name in names]
    return f"{names}/dense"


@functools.cache
def lifted_pair(lift):
    twin_lift, names, axes = LIFTED[lift]
    twin = classify(Lifted(twin_lift))
    problem = classify(Lifted(lift))._replace(
        params=lifted_params(twin.params, names, axes)
    )
    return problem, twin, {"head": "head", "body/dense": append_dense(names)}


@pytest.mark.parametrize("lift", LIFTED)
def test_lifted_transforms(lift):
    problem, twin, names = lifted_pair(lift)
    loss, grads, curvature = problem.evaluate()
    assert_equal((loss, grads), problem.untapped())
    assert_close(curvature, from_twin(twin.evaluate()[2], names))


def test_the_plain_statistics_are_those_of_the_definition():
    # A from the inputs, G from the gradients at the outputs, example by example.
    problem = classify(Mlp())
    x, y = problem.args
    hidden = np.tanh(
        x @ problem.params["first"]["kernel"] + problem.params["first"]["bias"][None]
    )

    def loss_of_outputs(outputs, y):
        logits = nn.tanh(outputs["first"]) @ problem.params["last"]["kernel"]
        logits = logits + outputs["last"]
        return -jax.nn.log_softmax(logits)[y]

    outputs = {
        "first": x @ problem.params["first"]["kernel"]
        + problem.params["first"]["bias"][None],
        "last": jnp.zeros((BATCH, CLASSES)),
    }
    g = jax.vmap(jax.grad(loss_of_outputs))(outputs, y)
    rows = {"first": np.concatenate([x, np.ones((BATCH, 1))], 1), "last": hidden}
    curvature = problem.evaluate()[2]
    assert list(curvature) == ["first", "last"]
    for path, statistics in curvature.items():
        a = np.mean([np.outer(r, r) for r in rows[path]], 0)
        expected = np.mean([np.outer(r, r) for r in np.asarray(g[path])], 0)
        assert_close(statistics.a, a)
        assert_close(statistics.g, expected)


# ------------------------------------------------------------- other ways to use layers


class Twice(nn.Module):
    """One layer on two inputs, called twice or once with a shared axis."""

    twice: bool

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(CLASSES, name="layer")
        if self.twice:
            return layer(x) + layer(jnp.flip(x, -1))
        return jnp.sum(layer(jnp.stack([x, jnp.flip(x, -1)], 1)), 1)


def test_a_module_called_twice_is_a_shared_axis():
    problem = classify(Twice(True))
    loss, grads, curvature = problem.evaluate()
    assert_equal((loss, grads), problem.untapped())
    twin = classify(Twice(False))._replace(params=problem.params)
    assert_close(curvature, twin.evaluate()[2])


class Tied(nn.Module):
    """A bag of words, predicted through the same embedding or through another."""

    tied: bool

    @nn.compact
    def __call__(self, words):
        embed = nn.Embed(CLASSES, WIDTH, name="embed")
        x = jnp.mean(embed(words), 1)
        if self.tied:
            return embed.attend(x)
        return nn.Dense(CLASSES, use_bias=False, name="output")(x)


def test_tied_embeddings_add_both_uses():
    words = jnp.arange(BATCH * 2).reshape(BATCH, 2) % CLASSES
    problem = classify(Tied(True), words)
    loss, grads, curvature = problem.evaluate()
    assert_equal((loss, grads), problem.untapped())
    twin = classify(Tied(False), words)._replace(
        params={
            **problem.params,
            "output": {"kernel": problem.params["embed"]["embedding"].T},
        }
    )
    untied = twin.evaluate()[2]
    a1, g1 = untied["embed"]
    g2, full = untied["output"]  # the query is the input, the word is the output
    a2 = jnp.diag(full)
    c = jnp.sqrt(jnp.sum(a1) * jnp.trace(g2) / (jnp.sum(a2) * jnp.trace(g1)))
    assert_close(curvature["embed"].a, a1 + c * a2)
    assert_close(curvature["embed"].g, g1 + g2 / c)


class Attend(nn.Module):
    """Self-attention by Flax, or by matrices."""

    flax: bool

    @nn.compact
    def __call__(self, x):
        if self.flax:
            x = nn.MultiHeadDotProductAttention(HEADS, deterministic=True, name="mix")(
                x
            )
        else:
            dims = x.shape[-1]
            dense = functools.partial(nn.Dense, dims)
            q, k, v = (
                dense(name=name)(x).reshape(*x.shape[:-1], HEADS, dims // HEADS)
                for name in ("query", "key", "value")
            )
            weights = nn.softmax(
                jnp.einsum("nqhd,nkhd->nhqk", q, k) / jnp.sqrt(dims / HEADS)
            )
            x = jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(x.shape)
            x = dense(name="out")(x)
        return jnp.mean(nn.Dense(CLASSES, name="head")(x), 1)


def test_attention_is_four_dense_layers():
    x = inputs(batch=BATCH * 3).reshape(BATCH, 3, -1)
    problem = classify(Attend(True), x)
    loss, grads, curvature = problem.evaluate()
    assert_equal((loss, grads), problem.untapped())
    names = ("query", "key", "value", "out")
    dims = x.shape[-1]
    mix = problem.params["mix"]
    plain = {
        name: {
            "kernel": mix[name]["kernel"].reshape(dims, dims),
            "bias": mix[name]["bias"].reshape(dims),
        }
        for name in names
    }
    twin = classify(Attend(False), x)._replace(
        params={**plain, "head": problem.params["head"]}
    )
    expected = from_twin(
        twin.evaluate()[2], {f"mix/{n}": n for n in names} | {"head": "head"}
    )
    assert_close(curvature, expected)


class Recurrent(nn.Module):
    """A recurrent cell, scanned or in a loop."""

    scanned: bool

    @nn.compact
    def __call__(self, x):  # [batch, time, features]
        if self.scanned:
            y = nn.RNN(nn.SimpleCell(WIDTH, name="cell"), name="rnn")(x)[:, -1]
        else:
            cell = nn.SimpleCell(WIDTH, name="cell")
            y = jnp.zeros((x.shape[0], WIDTH))
            for t in range(x.shape[1]):
                y, _ = cell(y, x[:, t])
        return nn.Dense(CLASSES, name="head")(y)


def test_a_recurrent_cell_is_a_layer_used_at_every_step():
    x = inputs(batch=BATCH * 3).reshape(BATCH, 3, -1)
    problem, twin = classify(Recurrent(True), x), classify(Recurrent(False), x)
    twin = twin._replace(params=problem.params)
    loss, grads, curvature = problem.evaluate()
    assert_equal((loss, grads), problem.untapped())
    assert set(curvature) == {"cell/i", "cell/h", "head"}
    assert_close(curvature, twin.evaluate()[2])


class Normalised(nn.Module):
    """A dense layer, batch normalisation, a head."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(WIDTH, name="dense")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(CLASSES, name="head")(nn.relu(x))


def normalised_problem():
    model = Normalised()
    variables = model.init(jax.random.key(1), inputs())

    def loss_fn(params, batch_stats, x, y):
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats}, x, mutable=["batch_stats"]
        )
        return cross_entropy(logits, y), updated["batch_stats"]

    args = (variables["batch_stats"], inputs(), labels())
    return Problem(loss_fn, variables["params"], args, has_aux=True)


def test_batch_norm_with_mutable_statistics():
    problem = normalised_problem()
    (loss, aux), grads, curvature = problem.evaluate()
    assert_equal(((loss, aux), grads), problem.untapped())
    # Each example with a scale and a bias of its own, whose gradients are the rows.
    _, x, y = problem.args
    params = problem.params
    hidden = x @ params["dense"]["kernel"] + params["dense"]["bias"][None]

    def loss_of(scales, biases):
        mean, var = jnp.mean(hidden, 0), jnp.var(hidden, 0)
        normalised = (hidden - mean[None]) * jax.lax.rsqrt(var + 1e-5)[None]
        logits = nn.relu(normalised * scales + biases) @ params["head"]["kernel"]
        return cross_entropy(logits + params["head"]["bias"][None], y)

    wide = [
        jnp.broadcast_to(params["norm"][name], hidden.shape)
        for name in ("scale", "bias")
    ]
    rows = np.stack(jax.grad(loss_of, argnums=(0, 1))(*wide), -1) * BATCH
    expected = np.mean(rows[..., :, None] * rows[..., None, :], 0)
    assert_close(curvature["norm"].f, expected)


# ------------------------------------------------------------------------ dtypes, trees


def test_mixed_precision_statistics_are_float32():
    problem = classify(Mlp(dtype=jnp.bfloat16))
    loss, grads, curvature = problem.evaluate()
    assert_equal((loss, grads), problem.untapped())
    assert all(s.dtype == jnp.float32 for s in jax.tree.leaves(curvature))
    twin = classify(Mlp())._replace(params=problem.params)
    # Entries carry the rounding of bfloat16 activations, 2⁻⁸ each.
    expected = twin.evaluate()[2]
    assert_close(curvature, expected, rtol=0.05, atol=0.01)
    # The sum itself is not rounded to bfloat16: Σ of the layer's own inputs is exact.
    x = problem.args[0].astype(jnp.bfloat16).astype(jnp.float32)
    assert_close(curvature["first"].a[:-1, :-1], x.T @ x / BATCH)


def test_bfloat16_params_have_float32_statistics():
    problem = classify(Mlp(param_dtype=jnp.bfloat16, dtype=jnp.bfloat16))
    loss, grads, curvature = problem.evaluate()
    assert_equal((loss, grads), problem.untapped())
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
    assert all(s.dtype == jnp.float32 for s in jax.tree.leaves(curvature))
    x = problem.args[0].astype(jnp.bfloat16).astype(jnp.float32)
    assert_close(curvature["first"].a[:-1, :-1], x.T @ x / BATCH)


def test_frozen_params_stay_frozen():
    plain = classify(Mlp())
    frozen = plain._replace(params=flax.core.freeze(plain.params))
    loss, grads, curvature = frozen.evaluate()
    assert_equal((loss, grads), frozen.untapped())
    assert isinstance(grads, flax.core.FrozenDict)
    assert_equal(curvature, plain.evaluate()[2])


def test_collections_passed_whole():
    plain = classify(Mlp())
    model = Mlp()

    def loss_fn(variables, x, y):
        return cross_entropy(model.apply(variables, x), y)

    problem = Problem(loss_fn, {"params": plain.params}, plain.args)
    loss, grads, curvature = problem.evaluate()
    assert_equal((loss, grads), problem.untapped())
    expected = from_twin(
        plain.evaluate()[2], {"params/first": "first", "params/last": "last"}
    )
    assert_equal(curvature, expected)


def test_two_models_in_one_tree():
    encoder, decoder = Mlp(classes=WIDTH), Mlp()
    x, y = inputs(), labels()
    params = {
        "encoder": encoder.init(jax.random.key(1), x)["params"],
        "decoder": decoder.init(jax.random.key(2), jnp.ones((1, WIDTH)))["params"],
    }

    def loss_fn(params, x, y):
        code = encoder.apply({"params": params["encoder"]}, x)
        return cross_entropy(decoder.apply({"params": params["decoder"]}, code), y)

    problem = Problem(loss_fn, params, (x, y))
    loss, grads, curvature = problem.evaluate()
    assert_equal((loss, grads), problem.untapped())

    def encoder_loss(p, x, y):
        return loss_fn({**params, "encoder": p}, x, y)

    def decoder_loss(p, x, y):
        return loss_fn({**params, "decoder": p}, x, y)

    for name, alone in (("encoder", encoder_loss), ("decoder", decoder_loss)):
        own = Problem(alone, params[name], (x, y)).evaluate()[2]
        assert_close({p: curvature[f"{name}/{p}"] for p in own}, own)


# ------------------------------------------------------------- transforms in the loss


def test_a_jitted_loss_is_unwrapped():
    plain = classify(Mlp())
    problem = plain._replace(loss_fn=jax.jit(plain.loss_fn))
    loss, grads, curvature = problem.evaluate()
    assert_equal((loss, grads), problem.untapped())
    assert_equal(curvature, plain.evaluate()[2])
    sampled = problem.evaluate(fisher="sampled", rng=jax.random.key(0))
    assert_equal(sampled, plain.evaluate(fisher="sampled", rng=jax.random.key(0)))


def test_other_decorators_belong_to_the_loss():
    plain = classify(Mlp())

    @functools.wraps(plain.loss_fn)
    def doubled(*args):
        return 2 * plain.loss_fn(*args)

    problem = plain._replace(loss_fn=doubled)
    loss, grads, _ = problem.evaluate()
    assert_equal((loss, grads), problem.untapped())
    assert float(loss) == 2 * float(plain.evaluate()[0])


def test_jitted_apply_in_the_loss_cannot_reuse_old_flags():
    # The inner function is compiled once for all callers; each caller's flags and
    # markers must be its own.
    plain = classify(Mlp())
    apply = jax.jit(lambda params, x: Mlp().apply({"params": params}, x))

    def loss_fn(params, x, y):
        return cross_entropy(apply(params, x), y)

    problem = plain._replace(loss_fn=loss_fn)
    layers = problem.trace()
    assert [layers[p].block.kind for p in layers] == ["kronecker"] * 2
    again = problem.trace()
    assert [again[p].block.kind for p in again] == ["kronecker"] * 2
    expected = plain.evaluate()[2]
    f = lbopt.value_grad_and_curvature(loss_fn, layers)
    state = lbopt.scale_by_kfac(layers).init(problem.params)
    mask = lbopt.refresh(state)
    traced = jax.jit(lambda p, args, due: f(p, *args, due=due))
    off = jax.tree.map(jnp.logical_not, mask)
    half = {**mask, "first": off["first"]}
    loss, grads, curvature = traced(problem.params, problem.args, mask)
    assert_equal((loss, grads), problem.untapped())
    assert_close(curvature, expected)
    curvature = jax.jit(lambda p, args: f(p, *args, due=half))(
        problem.params, problem.args
    )[2]
    zeros = jax.tree.map(jnp.zeros_like, expected["first"])
    assert_close(curvature, {**expected, "first": zeros})
    both = jax.jit(
        lambda p, args, due: (f(p, *args, due=due)[2], f(p, *args, due=off)[2])
    )(problem.params, problem.args, half)
    assert_close(both[0], {**expected, "first": zeros})
    assert_equal(both[1], jax.tree.map(jnp.zeros_like, expected))


def per_example(model):
    def loss_fn(params, x, y):
        def one(x, y):
            return cross_entropy(model.apply({"params": params}, x[None]), y[None])

        return jnp.mean(jax.vmap(one)(x, y))

    return loss_fn


def unbatched(model):
    def loss_fn(params, x, y):
        logits = jax.vmap(lambda x: model.apply({"params": params}, x))(x)
        return cross_entropy(logits, y)

    return loss_fn


def split(x):
    return x.reshape(2, BATCH // 2, *x.shape[1:])


def mapped_microbatches(model):
    def loss_fn(params, x, y):
        def one(xy):
            return cross_entropy(model.apply({"params": params}, xy[0]), xy[1])

        return jnp.mean(jax.lax.map(one, (split(x), split(y))))

    return loss_fn


def scanned_microbatches(model):
    def loss_fn(params, x, y):
        def add(total, xy):
            loss = cross_entropy(model.apply({"params": params}, xy[0]), xy[1])
            return total + loss / 2, None

        return jax.lax.scan(add, jnp.zeros([]), (split(x), split(y)))[0]

    return loss_fn


def checkpointed(model):
    def loss_fn(params, x, y):
        apply = jax.checkpoint(lambda p, x: model.apply({"params": p}, x))
        return cross_entropy(apply(params, x), y)

    return loss_fn


@pytest.mark.parametrize(
    "make",
    [
        per_example,
        unbatched,
        mapped_microbatches,
        scanned_microbatches,
        checkpointed,
    ],
)
def test_transforms_in_the_loss(make):
    plain = classify(Mlp())
    problem = plain._replace(loss_fn=make(Mlp()))
    loss, grads, curvature = problem.evaluate()
    assert_equal((loss, grads), problem.untapped())
    assert_close(curvature, plain.evaluate()[2])


# ---------------------------------------------------------------------------- devices


@pytest.fixture
def mesh():
    kinds = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((4,), ("data",), axis_types=kinds)


@pytest.mark.parametrize("lift", ["once", "scan"])
def test_batch_sharded_jit(mesh, lift):
    problem = classify(Lifted(lift))
    sharded = problem._replace(
        params=jax.device_put(problem.params, NamedSharding(mesh, PartitionSpec())),
        args=jax.device_put(problem.args, NamedSharding(mesh, PartitionSpec("data"))),
    )
    loss, grads, curvature = sharded.evaluate()
    assert_equal((loss, grads), sharded.untapped())
    # The devices' partial sums are added in another order.
    assert_close((loss, grads, curvature), problem.evaluate())


def test_shard_map_without_vma_gives_local_means(mesh):
    problem = classify(Mlp())
    f = lbopt.value_grad_and_curvature(problem.loss_fn, problem.trace())
    due = lbopt.refresh(lbopt.scale_by_kfac(problem.trace()).init(problem.params))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    def everywhere(params, args, due):
        local = jax.value_and_grad(problem.loss_fn)(params, *args)
        loss, grads, curvature = f(params, *args, due=due)
        same = [
            jnp.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves((loss, grads)), jax.tree.leaves(local), strict=True
            )
        ]
        return jax.lax.pmean((loss, grads, curvature), "data"), jnp.stack(same)

    result, same = everywhere(problem.params, problem.args, due)
    assert bool(jnp.all(same))
    assert_close(result, problem.evaluate())


def test_shard_map_with_vma_adds_up_by_itself(mesh):
    plain = classify(Mlp())

    def loss_fn(params, x, y):
        return jax.lax.pmean(plain.loss_fn(params, x, y), "data")

    layers = plain.trace()
    f = lbopt.value_grad_and_curvature(loss_fn, layers, batch_size=BATCH)
    due = lbopt.refresh(lbopt.scale_by_kfac(layers).init(plain.params))

    def everywhere(function, *specs):
        return jax.jit(
            jax.shard_map(
                function,
                mesh=mesh,
                in_specs=(PartitionSpec(), PartitionSpec("data"), *specs),
                out_specs=PartitionSpec(),
                check_vma=True,
            )
        )

    tapped = everywhere(
        lambda params, args, due: f(params, *args, due=due), PartitionSpec()
    )
    untapped = everywhere(
        lambda params, args: jax.value_and_grad(loss_fn)(params, *args)
    )
    loss, grads, curvature = tapped(plain.params, plain.args, due)
    assert_equal((loss, grads), untapped(plain.params, plain.args))
    assert_close((loss, grads, curvature), plain.evaluate())


def test_pmap_gives_local_means():
    problem = classify(Mlp())
    f = lbopt.value_grad_and_curvature(problem.loss_fn, problem.trace())

    def everywhere(params, args):
        return jax.lax.pmean(f(params, *args), "data")

    args = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), problem.args)
    result = jax.pmap(everywhere, "data", in_axes=(None, 0))(problem.params, args)
    first = jax.tree.map(lambda x: x[0], result)
    assert_close(first, problem.evaluate())


# ------------------------------------------------------------------------------- probes


def test_insert_and_remove_are_inverse():
    params = flax.core.freeze({"a": {"w": jnp.ones(2), "b": {"w": jnp.zeros(3)}}})
    added = {("a",): {"new": jnp.ones(1)}, ("a", "b"): {"new": jnp.ones(1)}}
    wide = capture.insert(params, added)
    assert set(wide["a"]) == {"w", "b", "new"}
    narrow, taken = capture.remove(wide, {keys: ["new"] for keys in added})
    assert_equal(narrow, params)
    assert_equal(taken, added)


def test_a_cast_of_the_whole_tree_is_refused():
    plain = classify(Mlp())
    layers = plain.trace()

    def loss_fn(params, x, y):
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return plain.loss_fn(half, x, y)

    f = lbopt.value_grad_and_curvature(loss_fn, layers)
    with pytest.raises(ValueError, match=r"'first'.*'a' arrived as bfloat16.*dtype="):
        f(plain.params, *plain.args)


def test_a_layer_that_does_not_run_is_named():
    plain = classify(Mlp())

    def loss_fn(params, x, y):
        first = {"params": params["first"]}
        return cross_entropy(nn.Dense(WIDTH).apply(first, x), y)

    f = lbopt.value_grad_and_curvature(loss_fn, plain.trace())
    with pytest.raises(ValueError, match=r"\['last'\] did not run.*trace_layers again"):
        f(plain.params, *plain.args)
