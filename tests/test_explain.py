"""What a model is told about itself before it is trained."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lbopt
from lbopt import explain

HERE = "tests.test_explain"


class Net(nn.Module):
    """A normalised model with dropout that must be told whether it trains."""

    width: int = 12

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(self.width, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return {"logits": nn.Dense(5, name="head")(x.mean((1, 2))), "code": x[0, 0, 0]}


class Words(nn.Module):
    """A model of two inputs, one of them numbers of words."""

    @nn.compact
    def __call__(self, words, scale):
        return nn.Embed(11, 6, name="table")(words) * scale[:, None, None]


net = Net(width=4)
NOT_A_MODEL = 3.0
TRAINED = [f"{HERE}:Net", "--input", "8x8x8x3", "--set", "train=True"]


def run(capsys, *arguments):
    explain.main(arguments)
    return capsys.readouterr().out


def test_all_three_parts_are_printed(capsys):
    out = run(capsys, *TRAINED, "--devices", "4")
    table, memory, owners = out.split("\n\n")
    kinds = {line.split()[0]: line.split()[2] for line in table.splitlines()[1:4]}
    assert kinds == {"conv": "kronecker", "norm": "unit_wise", "head": "kronecker"}
    parameters = 27 * 12 + 12 + 2 * 12 + 12 * 5 + 5
    assert f"{parameters} parameters; memory per device: parameters 1.7 kB" in memory
    assert "model state 96 B" in memory
    assert f"batch {8 * 8 * 8 * 3 * 4 / 4 / 1e3:.3g} kB" in memory
    assert len(re.findall(r"^ +[0-3] ", owners, re.MULTILINE)) == 4


def test_memory_is_that_of_the_state_and_what_placement_spreads_is_less(capsys):
    comm, memory = (
        float(re.findall(r"inverses ([\d.]+) kB", run(capsys, *TRAINED, *options))[0])
        for options in (["--devices", "2"], ["--devices", "2", "--placement", "memory"])
    )
    inverses = 4 * (28**2 + 12**2 + 13**2 + 5**2 + 12 * 3) / 1e3
    assert comm == pytest.approx(inverses, rel=5e-3)
    assert memory < comm


@pytest.mark.parametrize(
    ("model", "width"), [("Net", 12), ("net", 4), ("Net(7)", 7), ("Net(width=8)", 8)]
)
def test_a_model_is_named_made_or_called(capsys, model, width):
    out = run(capsys, f"{HERE}:{model}", "--input", "4x8x8x3", "--set", "train=True")
    assert f" 28×28 + {width}×{width} " in out


def test_several_inputs_and_their_types(capsys):
    out = run(capsys, f"{HERE}:Words", "--input", "8x5:int32", "--input", "8")
    assert re.search(r"table +Embed +kronecker", out)


def test_periods_and_blocks_reach_the_owner_table(capsys):
    out = run(capsys, *TRAINED, "--devices", "2", "--inverse-period", "3")
    assert "a step of the period of 3" in out
    cut = run(capsys, *TRAINED, "--devices", "2", "--block-size", "7")
    whole, blocks = (int(re.search(r"(\d+) units", o)[1]) for o in (out, cut))
    assert blocks > whole


def test_the_report_is_of_what_training_would_use():
    x = jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32)
    text = explain.report(net, [x], arguments={"train": True})
    init = functools.partial(net.init, train=True)
    stats = init(jax.random.key(0), jnp.zeros(x.shape))

    def loss_fn(params, stats, x):
        variables, rngs = {"params": params, **stats}, {"dropout": jax.random.key(1)}
        outputs, _ = net.apply(
            variables, x, train=True, rngs=rngs, mutable=["batch_stats"]
        )
        return sum(output.mean() for output in outputs.values())

    params = stats.pop("params")
    layers = lbopt.trace_layers(loss_fn, params, stats, x, batch_size=8)
    assert list(layers) == ["conv", "norm", "head"]  # as they are called
    expected = repr(layers).replace("8, stated by batch_size=", "those of your loss")
    assert text.startswith(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"{HERE}", "--input", "4"], "must be MODULE:ATTR"),
        ([f"{HERE}:Net(", "--input", "4"], "must be MODULE:ATTR"),
        ([f"{HERE}:Net(**{{'width': 3}})", "--input", "4"], "must be MODULE:ATTR"),
        ([f"{HERE}:Net(width=x)", "--input", "4"], "with literals"),
        (["no.such:Net", "--input", "4"], "No module named 'no'"),
        ([f"{HERE}:Nat", "--input", "4"], "has no attribute 'Nat'"),
        ([f"{HERE}:Net(depth=3)", "--input", "4"], "cannot be made: .*depth"),
        ([f"{HERE}:NOT_A_MODEL", "--input", "4"], "must be a Flax .*not a float"),
        ([f"{HERE}:Net", "--input", "4x8x8x3"], r"called with float32\[4, 8.*--set"),
        ([f"{HERE}:net", "--input", "4 x"], "input='4 x' must be sizes"),
        ([f"{HERE}:net", "--input", "4:real"], "input='4:real' must be sizes"),
        ([f"{HERE}:net", "--input", "4", "--set", "train"], "must be NAME=VALUE"),
        ([f"{HERE}:net", "--input", "4", "--set", "train=yes"], "must be NAME=VALUE"),
        ([f"{HERE}:net", "--input", "6x8x8x3", "--devices", "4"], "batch of 6 examp"),
        ([f"{HERE}:net", "--input", "6x8x8x3", "--devices", "0"], "whole number, ≥ 1"),
        (
            [*TRAINED, "--devices", "2", "--placement", "both"],
            "placement='both' must be",
        ),
        ([*TRAINED, "--inverse-period", "0"], "inverse_period=0 must be a whole num"),
    ],
)
def test_what_cannot_be_explained_is_refused_by_name(arguments, message):
    with pytest.raises(SystemExit, match=rf"^error: (.|\n)*{message}"):
        explain.main(arguments)


def test_a_model_without_inputs_is_refused():
    with pytest.raises(ValueError, match="at least one array with a batch axis"):
        explain.report(net, [])
