"""What the abstract trace of a loss finds, and what it refuses."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lbopt
from lbopt.curvature import discovery, loss
from tests.problems import BATCH, CLASSES, FEATURES, Mlp, classify, inputs, labels

# ------------------------------------------------------------------------ the batch


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((inputs(), labels()), BATCH),
        (({"image": inputs(), "label": labels()},), BATCH),
        (({"norm": {"mean": jnp.ones(5)}}, inputs()), BATCH),  # batch_stats
        (({"mean": jnp.ones(5), "scale": jnp.ones((3, 2))}, inputs()), BATCH),
        ((inputs(), jax.random.key(0)), BATCH),
        ((inputs(), jnp.zeros(2, jnp.uint32)), BATCH),  # a raw key
        ((inputs(), 0.1, None, jnp.ones([])), BATCH),
        ((jax.ShapeDtypeStruct((7, 2), jnp.float32),), 7),
        ((), None),
        ((jnp.ones([]),), None),
    ],
)
def test_batch_size_is_the_shared_leading_size(args, expected):
    assert loss.infer_batch_size(args) == expected


def test_an_ambiguous_batch_is_refused():
    message = r"argument 1: 8, argument 2: 3\); pass batch_size="
    with pytest.raises(ValueError, match=message):
        loss.infer_batch_size((inputs(), jnp.ones(CLASSES)))


# --------------------------------------------------------------------------- use


def test_used_arrays_are_those_with_a_gradient():
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(2), "d": jnp.ones(2)}}

    def loss(params, x):
        stopped = jax.lax.stop_gradient(params["b"]["d"])
        return jnp.sum(params["a"] * params["b"]["c"] * stopped * x)

    assert discovery.used_arrays(loss, params, (jnp.ones(2),)) == {("a",), ("b", "c")}


# --------------------------------------------------------------------- lifted axes


class Square(nn.Module):
    """Scanned layers as many as their width, so that sizes alone say nothing."""

    axis: int
    depth: int = FEATURES

    @nn.compact
    def __call__(self, x):
        kinds = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        return nn.scan(Layer, length=self.depth, **kinds)(name="body")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(FEATURES, name="dense")(x)), None


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("depth", [FEATURES, 3])
def test_lifted_axes_are_told_from_the_layers_own(axis, depth):
    layers = classify(Square(axis, depth)).trace()
    assert layers["body/dense"].tapped.axes == (axis,)
    assert layers["body/dense"].tapped.copies == (depth,)


def test_an_axis_without_a_common_position_falls_back():
    # The bias of rank 1 has its axis last, at 1; the kernel at 2.
    problem = classify(Square(axis=-1, depth=3))
    layers = problem.trace()
    assert [x.fallback for x in layers.values()] == [True, True]
    assert "use axis 0 in variable_axes" in layers["body/dense/kernel"].why
    with pytest.raises(ValueError, match=r"strict=True.*'body/dense/kernel'.*axis 0"):
        problem.trace(strict=True)


# ------------------------------------------------------------------- feature maps


class Trunk(nn.Module):
    """Convolutions, and what stands between the last of them and a wide layer."""

    between: str = ""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="low")(x))
        x = nn.ConvTranspose(4, (2, 2), name="high")(x)
        x = nn.relu(nn.LayerNorm(name="norm")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))  # leaves 2 × 3 locations
        if self.between == "tokens":
            return nn.Dense(CLASSES, name="wide")(x).mean((1, 2))
        if self.between == "pool":
            x = jnp.mean(x, (1, 2))
        x = x.reshape(x.shape[0], -1)
        if self.between == "dense":
            x = nn.Dense(8, name="first")(x)
        if self.between == "slice":
            x = x[:, 1:]
        kind = nn.DenseGeneral if self.between == "general" else nn.Dense
        return kind(CLASSES, name="wide")(x)


def trunk(between):
    return classify(Trunk(between), jnp.ones((BATCH, 4, 6, 2)))


@pytest.mark.parametrize(
    ("between", "rows", "kind", "why"),
    [
        ("", 24, "doubly_factored", "6 locations × 4 channels, rank one per example"),
        ("", 25, "kronecker", "expand over locations"),  # 24 inputs and the bias
        ("general", 2, "kronecker", "expand over locations"),
        ("pool", 2, "kronecker", "no convolution before it explains 4 inputs"),
        ("slice", 2, "kronecker", "no convolution before it explains 23 inputs"),
        ("dense", 2, "kronecker", "no convolution before it explains 8 inputs"),
        ("tokens", 2, "kronecker", "wide, but it has several rows per example"),
    ],
)
def test_wide_layers_on_a_map_that_a_convolution_explains(between, rows, kind, why):
    layers = trunk(between).trace(doubly_factored=rows, strict=True)
    assert layers["wide"].block.kind == kind
    assert why in layers["wide"].why
    if "no convolution" in why:
        way_out = "pass doubly_factored={'wide': (locations, channels)}"
        assert layers["wide"].why.endswith(way_out)
    if between == "dense":
        assert layers["first"].block.kind == "doubly_factored"


def test_wide_layers_without_a_convolution_are_ordinary():
    layers = classify(Mlp()).trace(doubly_factored=1)
    for layer in layers.values():
        assert layer.block.kind == "kronecker"
        assert "no convolution before it explains" in layer.why


@pytest.mark.parametrize(
    ("between", "choice", "message"),
    [
        (
            "",
            {"top": (6, 4)},
            r"'top', which is no layer that runs.*nn.Dense \['wide'\]",
        ),
        ("", {"high": (6, 4)}, r"'high', which is ConvTranspose.*\['wide'\]"),
        ("general", {"wide": (6, 4)}, r"'wide', which is DenseGeneral.*nn.Dense \[\]"),
        ("", {"wide": (5, 4)}, r"\['wide'\]=\(5, 4\).*product is 24"),
        ("", {"wide": (-6, -4)}, r"\['wide'\]=\(-6, -4\).*product is 24"),
        ("", {"wide": (6.0, 4)}, r"\['wide'\]=\(6.0, 4\).*\(locations, channels\)"),
        ("", {"wide": (6, 2, 2)}, r"\['wide'\]=\(6, 2, 2\).*product is 24"),
        ("", {"wide": 24}, r"\['wide'\]=24 must be \(locations, channels\)"),
        ("tokens", {"wide": (2, 2)}, r"\(2, 2\).*\[8, 2, 3, 4\] has several rows.*out"),
        ("", 0, "doubly_factored=0 must be a whole number, ≥ 1; pass a number of rows"),
        ("", True, "doubly_factored=True must be a whole number"),
        ("", "wide", r"doubly_factored='wide' must be.*\{path: \(locations, channels"),
    ],
)
def test_a_choice_that_cannot_be_met_is_refused(between, choice, message):
    problem = trunk(between)
    trace_layers = inspect.unwrap(lbopt.trace_layers)  # the test run checks types, too
    with pytest.raises(ValueError, match=message):
        trace_layers(
            problem.loss_fn, problem.params, *problem.args, doubly_factored=choice
        )


# ------------------------------------------------------------------- raw transforms


class Raw(nn.Module):
    """A bound layer under a transform of JAX's own."""

    transform: str

    def setup(self):
        self.dense = nn.Dense(CLASSES)

    def __call__(self, x):
        if self.is_initializing():
            return self.dense(x)
        if self.transform == "vmap":
            return jax.vmap(self.dense)(x)
        if self.transform == "checkpoint":
            return jax.checkpoint(lambda x: self.dense(x))(x)
        if self.transform == "jit":
            return jax.jit(lambda x: self.dense(x))(x)
        return jax.lax.map(self.dense, x)


@pytest.mark.parametrize("transform", ["vmap", "checkpoint", "jit", "map"])
def test_a_raw_transform_around_a_bound_module_is_refused(transform):
    message = r"'dense' \(Dense\).*raw JAX transform.*jax.vmap.*nn.vmap.*model.apply"
    with pytest.raises(ValueError, match=message):
        classify(Raw(transform)).trace()


class Unrecognised(nn.Module):
    """A raw transform around parameters of no known layer is nobody's business."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (FEATURES, CLASSES))
        return jax.vmap(lambda x: x @ w)(x)


def test_a_raw_transform_around_plain_arrays_is_allowed():
    assert list(classify(Unrecognised()).trace()) == ["w"]
