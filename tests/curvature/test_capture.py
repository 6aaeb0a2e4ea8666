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
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lbopt
from tests import oracles
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


SPLIT = {"split_rngs": {"params": True}}
SIDE_BY_SIDE = {
    "variable_axes": {"params": 0},
    "in_axes": None,
    "out_axes": 1,
    "axis_size": HEADS,
    **SPLIT,
}


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
        kind = nn.scan(body, variable_axes={"params": axis}, **SPLIT, length=DEPTH)
        return kind(pair=True, name="body")(x, None)[0]

    def scan_axis_1(self, x):
        return self.scan(x, axis=1)

    def scan_remat(self, x):
        return self.scan(x, body=nn.remat(Body, prevent_cse=False))

    def scan_broadcast(self, x):
        shared = {"variable_broadcast": "params", "split_rngs": {"params": False}}
        kind = nn.scan(Body, **shared, length=DEPTH)
        return kind(pair=True, name="body")(x, None)[0]

    def vmap_mapped(self, x):
        return jnp.sum(nn.vmap(Body, **SIDE_BY_SIDE)(name="body")(x), 1)

    def vmap_scan(self, x):
        scanned = nn.scan(Body, variable_axes={"params": 0}, **SPLIT, length=DEPTH)
        kind = nn.vmap(scanned, **SIDE_BY_SIDE)
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
    assert_close(problem.captured(), from_twin(twin.evaluate()[2], names))


def test_the_plain_statistics_are_those_of_the_definition():
    problem = classify(Mlp())
    calls = oracles.layer_calls(problem.loss_fn, problem.params, *problem.args)
    curvature = problem.captured()
    assert list(curvature) == ["first", "last"]
    for path, ((x, g),) in calls.items():
        rows = oracles.with_ones(x) if path == "first" else x
        a, g = oracles.second_moments(rows[:, None], g[:, None])
        assert_close(curvature[path], type(curvature[path])(a, g))


# ------------------------------------------------------------------ normalisation


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
    loss, grads, curvature = problem.evaluate()
    assert_equal((loss, grads), problem.untapped())
    stats, *batch = problem.args

    def loss_of(params, *batch):
        return problem.loss_fn(params, stats, *batch)[0]

    calls = oracles.layer_calls(loss_of, problem.params, *batch, whole=True)
    ((x, g),) = calls["norm"]
    x_hat = oracles.normalised(x, 0, 1e-5)
    expected = oracles.unit_wise(x_hat[:, None], g[:, None])
    assert_close(curvature["norm"].f, expected)


# ------------------------------------------------------------------------ dtypes, trees


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_half_precision_has_float32_statistics(param_dtype):
    problem = classify(Mlp(dtype=jnp.bfloat16, param_dtype=param_dtype))
    curvature = problem.captured()
    assert {s.dtype for s in jax.tree.leaves(curvature)} == {jnp.dtype(jnp.float32)}
    # The sum itself is not rounded to bfloat16: Σ of the layer's own inputs is exact.
    x = problem.args[0].astype(jnp.bfloat16).astype(jnp.float32)
    assert_close(curvature["first"].a[:-1, :-1], x.T @ x / BATCH)
    twin = classify(Mlp())._replace(
        params=jax.tree.map(lambda p: p.astype(jnp.float32), problem.params)
    )
    # Entries carry the rounding of bfloat16 activations, 2⁻⁸ each.
    assert_close(curvature, twin.evaluate()[2], rtol=0.05, atol=0.01)


def test_frozen_params_stay_frozen():
    plain = classify(Mlp())
    frozen = plain._replace(params=flax.core.freeze(plain.params))
    assert_equal(frozen.captured(), plain.evaluate()[2])
    assert isinstance(frozen.evaluate()[1], flax.core.FrozenDict)


# ------------------------------------------------------------- transforms in the loss


def test_a_jitted_loss_is_unwrapped():
    plain = classify(Mlp())
    problem = plain._replace(loss_fn=jax.jit(plain.loss_fn))
    assert_equal(problem.captured(), plain.evaluate()[2])
    sampled = problem.evaluate(fisher="sampled", rng=jax.random.key(0))
    assert_equal(sampled, plain.evaluate(fisher="sampled", rng=jax.random.key(0)))


def test_other_decorators_belong_to_the_loss():
    plain = classify(Mlp())

    @functools.wraps(plain.loss_fn)
    def doubled(*args):
        return 2 * plain.loss_fn(*args)

    loss, grads, _ = plain._replace(loss_fn=doubled).evaluate()
    expected = jax.tree.map(lambda x: 2 * x, plain.untapped())
    assert_close((loss, grads), expected)


def test_jitted_apply_in_the_loss_cannot_reuse_old_flags():
    # The inner function is compiled once for all callers; each caller's flags and
    # markers must be its own.
    plain = classify(Mlp())
    inner = jax.jit(lambda params, x: apply(params, x))
    problem = plain._replace(
        loss_fn=lambda params, x, y: cross_entropy(inner(params, x), y)
    )
    for layers in (problem.trace(), problem.trace()):
        assert [x.block.kind for x in layers.values()] == ["kronecker"] * 2
    expected = plain.evaluate()[2]
    zeros = jax.tree.map(jnp.zeros_like, expected)
    f = lbopt.value_grad_and_curvature(problem.loss_fn, layers)
    on = lbopt.refresh(lbopt.scale_by_kfac(layers).init(problem.params))
    off = jax.tree.map(jnp.logical_not, on)
    half = {**on, "first": off["first"]}
    assert_close(problem.captured(layers, due=on), expected)
    both = jax.jit(
        lambda p, args, due: (f(p, *args, due=due)[2], f(p, *args, due=off)[2])
    )(problem.params, problem.args, half)
    assert_close(both[0], {**expected, "first": zeros["first"]})
    assert_equal(both[1], zeros)


def apply(params, x):
    return Mlp().apply({"params": params}, x)


def per_example(params, x, y):
    one = jax.vmap(lambda x, y: cross_entropy(apply(params, x[None]), y[None]))
    return jnp.mean(one(x, y))


def unbatched(params, x, y):
    return cross_entropy(jax.vmap(functools.partial(apply, params))(x), y)


def split(x):
    return x.reshape(2, BATCH // 2, *x.shape[1:])


def mapped_microbatches(params, x, y):
    def one(xy):
        return cross_entropy(apply(params, xy[0]), xy[1])

    return jnp.mean(jax.lax.map(one, (split(x), split(y))))


def scanned_microbatches(params, x, y):
    def add(total, xy):
        return total + cross_entropy(apply(params, xy[0]), xy[1]) / 2, None

    return jax.lax.scan(add, jnp.zeros([]), (split(x), split(y)))[0]


def checkpointed(params, x, y):
    return cross_entropy(jax.checkpoint(apply)(params, x), y)


LOSSES = (
    per_example,
    unbatched,
    mapped_microbatches,
    scanned_microbatches,
    checkpointed,
)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_transforms_in_the_loss(loss_fn):
    plain = classify(Mlp())
    problem = plain._replace(loss_fn=loss_fn)
    assert_close(problem.captured(), plain.evaluate()[2])


# ---------------------------------------------------------------------------- devices


@pytest.fixture
def mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


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


def over_devices(mesh, function, check_vma):
    """A function of parameters, a batch that is split, and a mask."""
    specs = PartitionSpec(), PartitionSpec("data"), PartitionSpec()
    kinds = {"out_specs": PartitionSpec(), "check_vma": check_vma}
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, **kinds))


def test_shard_map_without_vma_gives_local_means(mesh):
    problem = classify(Mlp())
    layers = problem.trace()
    f = lbopt.value_grad_and_curvature(problem.loss_fn, layers)
    due = lbopt.refresh(lbopt.scale_by_kfac(layers).init(problem.params))

    def mean(params, args, due):
        local = jax.value_and_grad(problem.loss_fn)(params, *args)
        result = f(params, *args, due=due)
        same = jax.tree.map(jnp.array_equal, result[:2], local)
        same = jnp.all(jnp.stack(jax.tree.leaves(same)))
        return jax.lax.pmean((result, same.astype(float)), "data")

    result, same = over_devices(mesh, mean, False)(problem.params, problem.args, due)
    assert same == 1
    assert_close(result, problem.evaluate())


def test_shard_map_with_vma_adds_up_by_itself(mesh):
    plain = classify(Mlp())

    def loss_fn(params, x, y):
        return jax.lax.pmean(plain.loss_fn(params, x, y), "data")

    layers = plain.trace()
    f = lbopt.value_grad_and_curvature(loss_fn, layers, batch_size=BATCH)
    due = lbopt.refresh(lbopt.scale_by_kfac(layers).init(plain.params))

    def both(params, args, due):
        return f(params, *args, due=due), jax.value_and_grad(loss_fn)(params, *args)

    tapped, untapped = over_devices(mesh, both, True)(plain.params, plain.args, due)
    assert_equal(tapped[:2], untapped)
    assert_close(tapped, plain.evaluate())


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


def test_a_cast_that_was_not_traced_is_refused():
    plain = classify(Mlp())
    layers = plain.trace()

    def loss_fn(params, x, y):
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return plain.loss_fn(half, x, y)

    f = lbopt.value_grad_and_curvature(loss_fn, layers)
    # Traced without the cast, which trace_layers would have seen.
    with pytest.raises(ValueError, match=r"\['first', 'last'\] did not run"):
        f(plain.params, *plain.args)


def test_a_layer_that_does_not_run_is_named():
    plain = classify(Mlp())

    def loss_fn(params, x, y):
        first = {"params": params["first"]}
        return cross_entropy(nn.Dense(WIDTH).apply(first, x), y)

    f = lbopt.value_grad_and_curvature(loss_fn, plain.trace())
    with pytest.raises(ValueError, match=r"\['last'\] did not run.*trace_layers again"):
        f(plain.params, *plain.args)
