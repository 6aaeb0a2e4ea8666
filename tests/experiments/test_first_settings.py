"""First settings: the defaults do not diverge, and the study's data, rows and table."""

import flax.linen as nn
import numpy as np
import pytest

from experiments import first_settings as study
from experiments.first_settings import Outcome, Setting, Task
from experiments.models import small_networks


class TiedModel(nn.Module):
    """Looks tokens up, and scores the next one by the same embedding."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(8, 12, name="embed")
        x = embed(tokens)
        x = x + nn.Dense(12, kernel_init=nn.initializers.zeros)(nn.relu(x))
        return embed.attend(nn.LayerNorm()(x))


def short_corpus():
    return study.corpus(vocabulary=8, length=6, sequences=64)


MLP = Task("", small_networks.Mlp(10, widths=(16,)), study.digits, 64)
TIED = Task("", TiedModel(), short_corpus, 32)
SMALL = [
    # The optimizers, and the share of the first loss that is left at the end.
    (MLP, {"K-FAC": 0.5, "SP-NGD": 0.5, "LARS": 0.9}),
    (TIED, {"K-FAC": 0.8, "SP-NGD": 0.8}),
]


@pytest.mark.parametrize(("task", "shares"), SMALL, ids=["mlp", "tied"])
def test_the_defaults_train_kernels_that_start_at_zero(task, shares):
    settings = {x.optimizer: x for x in study.SETTINGS if x.optimizer in shares}
    outcomes = study.train(task, settings, seed=0, steps=40)
    for name, share in shares.items():
        assert outcomes[name].skipped == 0
        assert outcomes[name].highest() < 2
        assert outcomes[name].at(40) < share * outcomes[name].losses[0], name


def test_two_tokens_determine_the_odds_of_the_next():
    data = study.corpus(vocabulary=4, length=50, sequences=400)
    tokens = np.concatenate([data["x"], data["y"][:, -1:]], axis=1)
    np.testing.assert_array_equal(tokens[:, 1:], data["y"])
    counts = np.zeros((2, 4, 4, 4))
    for half in (0, 1):
        part = tokens[half::2]
        np.add.at(counts[half], (part[:, :-2], part[:, 1:-1], part[:, 2:]), 1)
    odds = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    # Where a pair is frequent, both halves of the sequences agree on what follows it,
    often = np.min(counts.sum(-1), axis=0) > 200
    assert np.sum(often) >= 8
    assert np.max(np.abs(odds[0] - odds[1])[often]) < 0.15
    # and that is nothing like equal odds.
    assert np.mean(odds[0].max(-1)[often]) > 0.6


def test_drawings_are_brighter_where_something_is_drawn():
    data = study.drawings(images=50)
    assert data["x"].shape == (50, 16, 16, 1)
    bright = data["x"][..., 0]
    assert [round(float(np.mean(bright[data["y"] == k]))) for k in range(3)] == [
        0,
        1,
        1,
    ]


def test_a_row_and_the_table():
    losses = [float(k) for k in range(1, 202)]
    seeds = [Outcome(losses, 0), Outcome([2.0, 7.0, *losses[2:]], 1)]
    row = study.row_of("mlp", Setting("AdamW", 0.003), seeds)
    # The means of losses 42 to 51 and 192 to 201.
    assert row["loss"] == {"0": [1, 2], "50": [46.5, 46.5], "200": [196.5, 196.5]}
    assert row["highest_over_first"] == [201, 100.5]
    assert row["skipped"] == [0, 1]
    last = study.table([row]).splitlines()[-1]
    assert last == "| MLP | AdamW, 0.003 | 1.500 | 46.500 | 196.500 | 201.00 |"


def test_a_loss_that_is_not_finite_is_the_highest():
    assert not Outcome([1.0, float("nan"), 0.5], 0).highest() < 2
