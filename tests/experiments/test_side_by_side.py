"""Contestants on the same batches, on the tiny data set."""

import dataclasses

import pytest

from experiments.settings import Config, Sgd, SpNgd
from experiments.side_by_side import train_together

STEPS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return Config(
        optimizer="sgd",
        sgd=Sgd(learning_rate=0.1),
        dataset="strokes/tiny",
        model="convnet",
        data_dir=tmp_path_factory.mktemp("data"),
        batch_size=64,
        epochs=STEPS * 64 / 256,
        warmup_epochs=0.0,
        eval_epochs=2 * 64 / 256,
    )


def test_contestants_see_the_same_batches(config, capsys):
    stale = SpNgd(learning_rate=0.01, stale_threshold=1e6)
    outcomes = train_together(
        {
            "sgd": config,
            "again": config,
            "stale": dataclasses.replace(config, optimizer="sp_ngd", sp_ngd=stale),
        }
    )
    capsys.readouterr()  # the table of layers
    sgd, again, stale = outcomes.values()
    assert len(sgd.seconds) == len(sgd.losses) == STEPS
    assert sgd.losses == again.losses
    assert sgd.accuracy == again.accuracy == sgd.curve[-1][1]
    assert [step for step, _ in sgd.curve] == [2, 4]
    assert stale.losses[0] == pytest.approx(sgd.losses[0], rel=1e-6)
    assert not sgd.renewals
    assert sgd.refreshed() == 0
    # Always similar: due at steps 0, 1, 2 and 3 of Fibonacci's 1, 1, 2, 3, 5.
    assert len(stale.renewals) == 2 * 4  # of three convolutions and the head
    assert {tuple(steps) for steps in stale.renewals.values()} == {(0, 1, 2)}
    assert stale.refreshed() == 3 / 4
    assert stale.statistic_bytes == [0.0] * STEPS  # one device sends nothing


@pytest.mark.slow
def test_pmap_changes_no_number(config):
    several = dataclasses.replace(
        config, optimizer="kfac", statistics_fraction=0.5, devices=2
    )
    outcomes = train_together(
        {"shard_map": several, "pmap": dataclasses.replace(several, parallel="pmap")}
    )
    assert outcomes["pmap"].losses == pytest.approx(
        outcomes["shard_map"].losses, rel=1e-5
    )


def test_other_data_are_refused(config):
    other = dataclasses.replace(config, batch_size=32)
    with pytest.raises(ValueError, match=r"batch_size=32 of 'b' must be 64, as of"):
        train_together({"a": config, "b": other})
