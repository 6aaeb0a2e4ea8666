"""The feature maps that the inputs of dense layers are flattened from."""

import inspect

import flax.linen as nn
import jax.numpy as jnp
import pytest

import lbopt
from tests.problems import BATCH, CLASSES, Mlp, classify


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
