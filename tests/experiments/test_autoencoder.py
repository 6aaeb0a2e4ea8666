"""The deep autoencoders: counts, an oracle in NumPy, and the study in miniature."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import autoencoder as study
from experiments.data import grey
from experiments.models.autoencoder import Autoencoder

LAYERS = [f"encoder{i}" for i in (1, 2, 3)] + ["code"]
LAYERS += [f"decoder{i}" for i in (1, 2, 3)] + ["image"]


def shapes(problem, pixels):
    model = Autoencoder(problem.widths)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, pixels)))
    return params["params"]


def test_the_network_of_the_paper():
    params = shapes(study.STROKES, 784)
    kernels = [params[name]["kernel"].shape for name in LAYERS]
    units = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    assert kernels == list(itertools.pairwise(units))
    # 785,000 + 500,500 + 125,250 + 7,530 + 7,750 + 125,500 + 501,000 + 784,784
    assert sum(x.size for x in jax.tree.leaves(params)) == 2_837_314


def test_the_small_network():
    params = shapes(study.DIGITS, 64)
    # 6,500 + 5,050 + 1,275 + 260 + 275 + 1,300 + 5,100 + 6,464
    assert sum(x.size for x in jax.tree.leaves(params)) == 26_224


def test_code_and_logits_are_linear_and_all_else_tanh():
    model, random = Autoencoder((7, 5, 4, 3)), np.random.default_rng(0)
    x = random.uniform(size=(6, 9)).astype(np.float32)
    params = jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(model.init, jax.random.key(0), x)["params"],
    )
    expected = x
    for name in LAYERS:
        expected = expected @ params[name]["kernel"] + params[name]["bias"]
        if name not in ("code", "image"):
            expected = np.tanh(expected)
    logits = model.apply({"params": params}, x)
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=1e-4, atol=1e-4)


def test_the_loss_is_a_divergence():
    class Constant:
        def apply(self, variables, images):
            return jnp.broadcast_to(variables["params"], images.shape)

    p, q = np.array([[0.2, 0.7, 1.0], [0.0, 0.5, 0.9]]), np.array([0.3, 0.6, 0.8])
    logits = np.log(q / (1 - q)).astype(np.float32)
    loss_fn = study.make_loss(Constant())
    value = loss_fn(logits, {}, jnp.asarray(p, jnp.float32), jax.random.key(0))[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.nan_to_num(p * np.log(p / q))
        terms += np.nan_to_num((1 - p) * np.log((1 - p) / (1 - q)))
    assert float(value) == pytest.approx(terms.sum(1).mean(), rel=1e-5)


@pytest.mark.parametrize("problem", [study.STROKES, study.DIGITS])
def test_both_optimizers_get_as_many_settings(problem):
    assert len(problem.sgd) == len(problem.kfac) == 6
    names = {study.name_of(x) for x in (*problem.sgd, *problem.kfac)}
    assert len(names) == 12
    assert study.name_of(study.Sgd(0.01, 0.9)) == "Sgd learning rate 0.01 momentum 0.9"


# === The study ========================================================================


def outcome(losses, seconds=(9.0, 1.0, 3.0, 1.0)):
    curve = [(2 * i, x, x + 0.5) for i, x in enumerate(losses)]
    return study.Outcome(list(seconds), curve, (1.0, 1.5))


def test_a_reading_is_the_better_of_weights_and_average():
    mixed = study.Outcome([1.0], [(0, 3.0, 2.0), (1, float("nan"), 1.0)], (0.0, 0.0))
    assert mixed.losses() == [2.0, 1.0]
    lost = study.Outcome([1.0], [(0, float("nan"), float("inf"))], (0.0, 0.0))
    assert lost.losses() == [float("inf")]


def test_a_row_counts_to_the_target_with_compilation_apart():
    row = study.row_of(outcome([5.0, 3.0, 2.0]), 3.0)
    assert row["updates_to_sgd"] == 2
    assert row["step_time"] == 1.0
    assert row["seconds_to_sgd"] == 2.0  # 1 for the 9, and 1
    assert row["loss_of_weights_and_average"] == [2.0, 2.5]
    assert outcome([5.0, 3.0, 2.0]).elapsed() == [0.0, 2.0, 6.0]
    never = study.row_of(outcome([5.0, 4.0]), 3.0)
    assert never["updates_to_sgd"] is never["seconds_to_sgd"] is None


def tiny_images():
    images = grey.digits()
    return grey.Images(images.train[:128], images.test[:32])


TINY = dataclasses.replace(
    study.DIGITS,
    name="tiny",
    widths=(16, 4),
    images=tiny_images,
    batch_size=64,
    steps=60,
    eval_period=5,
    sgd=study.sgd_grid((0.2,), (0.9, 0.95)),
    kfac=study.kfac_grid((0.3, 1.0), (1.0,)),
)


TRIED = {
    "Sgd learning rate 0.02 momentum 0.9": [5.0, 4.0, 3.0],
    "Sgd learning rate 0.01 momentum 0.95": [5.0, 2.0, 4.0],
    "Kfac learning rate 0.3 damping 1": [5.0, 4.0, 1.0],
    "Kfac learning rate 1 damping 1": [5.0, 3.0, 2.0],
}


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory):
    """The record of a study whose tuning was done before, and all its files."""
    directory = tmp_path_factory.mktemp("study")
    tried = {name: dataclasses.asdict(outcome(x)) for name, x in TRIED.items()}
    (directory / "tiny-0.json").write_text(json.dumps(tried))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RUNS", "RESULTS", "FIGURES"):
            patch.setattr(study, name, directory)
        record = study.carry_out(TINY)
        # A second time nothing is trained.
        patch.setattr(study, "train_together", None)
        assert study.carry_out(TINY) == record
    return record, directory


def test_a_record_says_what_was_tried_and_compared(carried_out):
    record, directory = carried_out
    assert json.loads((directory / "tiny.json").read_text()) == record
    updates = [row["updates_to_sgd"] for row in record["tried"].values()]
    assert updates == [4, 2, 4, 2]  # to a loss of 3
    compared = record["compared"]
    assert {name: row["settings"] for name, row in compared.items()} == {
        "SGD": "Sgd learning rate 0.02 momentum 0.9",  # the lowest at the end
        "K-FAC": "Kfac learning rate 1 damping 1",  # the first to get there
        "K-FAC, quadratic model": "QuadraticModel damping 150",
    }
    assert compared["SGD"]["updates_to_sgd"] <= TINY.steps
    assert compared["SGD"]["step_time"] > 0
    assert (directory / "tiny.png").stat().st_size > 10_000


def test_kfac_is_ahead_of_sgd(carried_out):
    compared = carried_out[0]["compared"]
    assert compared["K-FAC"]["loss"] < 0.95 * compared["SGD"]["loss"]
    assert compared["K-FAC"]["updates_to_sgd"] < TINY.steps


def test_the_picture_has_every_contestant_by_updates_and_by_time():
    outcomes = {"SGD": outcome([5.0, 4.0, 3.0]), "K-FAC": outcome([5.0, 2.0, 1.0])}
    by_updates, by_time = study.draw("title", outcomes, 3.0).axes
    for panel in (by_updates, by_time):
        *curves, target = panel.lines
        assert [line.get_label() for line in curves] == ["SGD", "K-FAC"]
        assert list(curves[1].get_ydata()) == [5.0, 2.0, 1.0]
        assert set(target.get_ydata()) == {3.0}
    assert list(by_updates.lines[0].get_xdata()) == [0, 2, 4]
    assert list(by_time.lines[0].get_xdata()) == [0.0, 2.0, 6.0]
