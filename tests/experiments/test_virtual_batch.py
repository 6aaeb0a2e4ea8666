"""Running mixup and random erasing: oracle, statistics, and the training step."""

import dataclasses
import doctest
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoints, classifier, settings
from experiments.data import pipeline, virtual_batch
from experiments.models import registry, resnet
from lbopt import training

N, CLASSES, SHAPE = 8, 5, (16, 12, 3)
ALPHA = 0.4

OneBlock = functools.partial(
    resnet.ResNet, stage_sizes=(1,), block=resnet.BasicBlock, width=4, stem_reduction=2
)


def make_batch(seed) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "image": random.normal(size=(N, *SHAPE)).astype(np.float32),
        "label": random.integers(0, CLASSES, N).astype(np.int32),
    }


def one_hot(batch) -> Any:
    return np.eye(CLASSES, dtype=np.float32)[batch["label"]]


def key_of(step):
    return jax.random.fold_in(jax.random.key(3), step)


def mixed(steps, form: virtual_batch.Form = "paper"):
    """The virtual batches of the first steps."""
    virtual, found = virtual_batch.empty((N, *SHAPE), CLASSES), []
    mix = jax.jit(
        functools.partial(virtual_batch.running_mixup, alpha=ALPHA, form=form)
    )
    for step in range(steps):
        batch = make_batch(step)
        virtual = mix(key_of(step), virtual, batch["image"], one_hot(batch))
        found.append(virtual)
    return found


def assert_bits_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_examples_run():
    results = doctest.testmod(virtual_batch)
    assert results.failed == 0
    assert results.attempted > 0


# === Running mixup ====================================================================


@pytest.mark.parametrize("form", ["paper", "code"])
def test_the_recursion_is_the_papers(form):
    images, labels = np.zeros(0), np.zeros(0)
    for step, virtual in enumerate(mixed(6, form)):
        batch = make_batch(step)
        x, t = batch["image"].astype(float), one_hot(batch).astype(float)
        weights = virtual_batch.mixing_weights(key_of(step), N, alpha=ALPHA, form=form)
        assert weights.shape == ((1,) if form == "paper" else (N,))
        if step == 0:  # not mixed at all
            images, labels = x, t
            np.testing.assert_array_equal(virtual.images, batch["image"])
            np.testing.assert_array_equal(virtual.labels, one_hot(batch))
        else:
            for i in range(N):  # slot by slot
                share = float(weights[i % len(weights)])
                images[i] = share * x[i] + (1 - share) * images[i]
                labels[i] = share * t[i] + (1 - share) * labels[i]
        np.testing.assert_allclose(virtual.images, images, atol=3e-6)
        np.testing.assert_allclose(virtual.labels, labels, atol=1e-6)
        np.testing.assert_allclose(virtual.labels.sum(1), 1, atol=1e-6)
        assert virtual.count == step + 1
    assert np.any((labels > 0).sum(1) > 2), "more than two real images live in a slot"


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_the_papers_weights_are_beta(alpha):
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = functools.partial(virtual_batch.mixing_weights, n=N, alpha=alpha)
    weights = np.asarray(jax.jit(jax.vmap(draw))(keys), float).ravel()
    assert weights.shape == (20_000,), "one for the batch"
    assert_moments_are_betas(weights, alpha)
    assert abs(weights.mean() - 0.5) < 5 * weights.std() / len(weights) ** 0.5
    assert (weights < 0.1).any()


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_the_codes_weights_are_the_larger_halves(alpha):
    key = jax.random.key(0)
    weights = virtual_batch.mixing_weights(key, 20_000, alpha=alpha, form="code")
    weights = np.asarray(weights, float)
    assert weights.shape == (20_000,), "one an image"
    assert weights.min() >= 0.5
    assert weights.max() <= 1
    assert_moments_are_betas(weights, alpha)  # of |λ - 1/2|, which is that of Beta's
    assert abs(np.corrcoef(weights[1:], weights[:-1])[0, 1]) < 5 / len(weights) ** 0.5


def assert_moments_are_betas(weights, alpha):
    squares = (weights - 0.5) ** 2
    error = squares.std() / len(squares) ** 0.5
    assert abs(squares.mean() - 1 / (4 * (2 * alpha + 1))) < 5 * error


def test_types_are_those_carried():
    previous = virtual_batch.empty((N, *SHAPE), CLASSES)
    previous = previous._replace(images=previous.images.astype(jnp.bfloat16))
    batch = make_batch(0)
    virtual = virtual_batch.running_mixup(
        key_of(0), previous, batch["image"], one_hot(batch), alpha=ALPHA
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), virtual) == jax.tree.map(
        lambda x: (x.shape, x.dtype), previous
    )


# === Random erasing ===================================================================


def boxes(erased):
    """Top, left, height and width of each image's zeros; checks that they are a box."""
    zero = np.asarray(erased == 0)
    assert (zero == zero[..., :1]).all(), "channels alike"
    found = []
    for image in zero[..., 0]:
        rows, columns = image.any(1), image.any(0)
        np.testing.assert_array_equal(image, rows[:, None] & columns[None, :])
        ends = [np.flatnonzero(side) for side in (rows, columns)]
        for end in ends:
            assert not end.size or end.size == end[-1] - end[0] + 1
        found.append(
            [ends[0][0], ends[1][0], ends[0].size, ends[1].size]
            if ends[0].size
            else [0, 0, 0, 0]
        )
    return np.array(found)


def test_a_share_of_the_images_is_erased_each_for_itself():
    n = 4000
    erase = jax.jit(virtual_batch.random_erasing)
    chosen = [
        boxes(erase(jax.random.key(seed), jnp.ones((n, 8, 8, 1))))[:, 2] > 0
        for seed in (0, 1)
    ]
    images = make_batch(0)["image"]
    for probability in (0.0, 1.0):
        erased = virtual_batch.random_erasing(
            key_of(0), images, probability=probability
        )
        assert (np.asarray(erased) == 0).any((1, 2, 3)).mean() == probability
    for each in chosen:
        assert abs(each.mean() - 0.5) < 5 * 0.5 / n**0.5
        assert abs(np.corrcoef(each[1:], each[:-1])[0, 1]) < 5 / n**0.5
    assert abs(np.corrcoef(chosen[0], chosen[1])[0, 1]) < 5 / n**0.5


def test_area_and_aspect_are_within_their_bounds():
    n, side = 3000, 40  # the longest box has 36.5 + ½ pixels: none is cut
    erased = virtual_batch.random_erasing(
        jax.random.key(0), jnp.ones((n, side, side, 3)), probability=1.0
    )
    top, left, h, w = boxes(erased).T
    short, long = np.minimum(h, w), np.maximum(h, w)
    # Each side is rounded by at most ½.
    assert ((short + 0.5) * (long + 0.5) >= 0.02 * side**2).all()
    assert ((short - 0.5) * (long - 0.5) <= 0.25 * side**2).all()
    assert ((short + 0.5) / (long - 0.5) >= 0.3).all()
    # U(0.02, 0.25) has mean 0.135; of a swapped pair, half are upright.
    share = h * w / side**2
    assert abs(share.mean() - 0.135) < 5 * share.std() / n**0.5
    assert share.min() < 0.025
    assert share.max() > 0.24
    assert np.mean(short / long) == pytest.approx(0.65, abs=0.02)  # U(0.3, 1)
    upright = h[h != w] > w[h != w]
    assert abs(upright.mean() - 0.5) < 5 * 0.5 / upright.size**0.5
    # Anywhere within the image, to its last row and column.
    for start, length in ((top, h), (left, w)):
        assert start.min() == 0
        assert (start + length).max() == side
        middle = (start + length / 2) / side
        assert abs(middle.mean() - 0.5) < 5 * middle.std() / n**0.5
    # Neighbours have nothing in common.
    for draw in (share, h / w, top / side, left / side):
        assert abs(np.corrcoef(draw[1:], draw[:-1])[0, 1]) < 5 / n**0.5


def test_long_boxes_are_cut_to_the_image():
    erased = virtual_batch.random_erasing(
        jax.random.key(0), jnp.ones((500, 8, 60, 1)), probability=1.0
    )
    _, _, h, w = boxes(erased).T
    assert h.max() == 8
    assert w.max() > 15
    assert (h * w <= 0.25 * 8 * 60 + (h + w) / 2).all()


def test_zeros_inside_and_untouched_outside():
    images = np.random.default_rng(0).normal(size=(200, 16, 12, 3)).astype(np.float32)
    erased = np.asarray(virtual_batch.random_erasing(key_of(0), jnp.asarray(images)))
    assert ((erased == 0) | (erased == images)).all()
    box = boxes(erased)
    assert 0 < (box[:, 2] > 0).mean() < 1
    for image, real, (top, left, h, w) in zip(erased, images, box, strict=True):
        expected = real.copy()
        expected[top : top + h, left : left + w] = 0
        np.testing.assert_array_equal(image, expected)


# === Both =============================================================================


def test_an_image_is_treated_alike_on_one_device_and_on_four():
    batch, previous = make_batch(1), mixed(1)[0]

    @jax.jit
    def both(virtual, images, labels):
        virtual = virtual_batch.running_mixup(
            key_of(1), virtual, images, labels, alpha=ALPHA, form="code"
        )
        return virtual, virtual_batch.random_erasing(key_of(2), virtual.images)

    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    spread: Any = jax.NamedSharding(mesh, jax.P("data"))
    whole: Any = jax.NamedSharding(mesh, jax.P())
    arguments = previous, batch["image"], one_hot(batch)
    shardings = virtual_batch.VirtualBatch(spread, spread, whole), spread, spread
    sharded = both(*jax.device_put(arguments, shardings))
    assert sharded[1].sharding.is_equivalent_to(spread, 4)
    for a, b in zip(*map(jax.tree.leaves, (sharded, both(*arguments))), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.4}, r"alpha=-0\.4 must be positive; .*the real batch"),
        ({"alpha": 0.0}, r"alpha=0\.0 must be positive"),
        ({"alpha": math.inf}, "alpha=inf must be positive"),
        ({"alpha": 1.0, "form": "max"}, "form='max' must be 'paper' or 'code'"),
    ],
)
def test_mixup_refuses_bad_settings(arguments, message):
    previous, batch = virtual_batch.empty((N, *SHAPE), CLASSES), make_batch(0)
    with pytest.raises(ValueError, match=message):
        virtual_batch.running_mixup(
            key_of(0), previous, batch["image"], one_hot(batch), **arguments
        )


@pytest.mark.parametrize("part", ["images", "labels"])
def test_mixup_refuses_a_batch_of_another_shape(part):
    batch = make_batch(0)
    arrays = {"images": batch["image"], "labels": one_hot(batch)}
    arrays[part] = arrays[part][:1]  # would broadcast
    previous = virtual_batch.empty((N, *SHAPE), CLASSES)
    with pytest.raises(ValueError, match=r"in previous, \(\(8, 16, 12, 3\).*empty"):
        virtual_batch.running_mixup(key_of(0), previous, **arrays, alpha=ALPHA)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probability": -0.1}, r"probability=-0\.1 must lie in \[0, 1\]; 0 erases"),
        ({"probability": 1.5}, r"probability=1\.5 must lie in"),
        ({"probability": math.nan}, "probability=nan must lie in"),
        ({"images": jnp.ones(SHAPE)}, r"images.shape=\(16, 12, 3\) must be \[n,"),
    ],
)
def test_erasing_refuses_bad_arguments(arguments, message):
    arguments = {"images": make_batch(0)["image"], **arguments}
    with pytest.raises(ValueError, match=message):
        virtual_batch.random_erasing(key_of(0), **arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mixup_alpha", -0.4),
        ("mixup_alpha", math.nan),
        ("random_erasing", -0.1),
        ("random_erasing", 1.1),
    ],
)
def test_a_config_refuses_bad_settings(field, value):
    message = rf"{field}={value} must (be|lie) .*the default is 0\.0"
    with pytest.raises(ValueError, match=message):
        settings.Config(**{field: value})


# === The loss =========================================================================


@pytest.fixture(scope="module")
def problem():
    model = OneBlock(num_classes=CLASSES)
    variables = dict(model.init(jax.random.key(0), make_batch(0)["image"], train=True))
    return model, variables.pop("params"), variables


def with_virtual(model_state, virtual):
    return {**model_state, classifier.VIRTUAL_BATCH: virtual}


def test_the_form_of_mixup_is_passed_on(problem):
    """In the code's form the real image has the larger share, in the paper's not."""
    model, params, model_state = problem
    shares = {}
    for form in ("paper", "code"):
        loss_fn = jax.jit(
            classifier.make_loss(model, 0.0, mixup_alpha=ALPHA, mixup_form=form)
        )
        before = with_virtual(model_state, mixed(1)[0])
        least = []
        for step in range(1, 9):
            batch = make_batch(step)
            _, (after, _) = loss_fn(params, before, batch, key_of(step))
            labels = after[classifier.VIRTUAL_BATCH].labels
            least.append(labels[np.arange(N), batch["label"]].min())
        shares[form] = float(min(least))
    assert shares["paper"] < 0.5 <= shares["code"]


@pytest.mark.parametrize("alpha", [0.0, ALPHA], ids=["real batch", "mixup"])
def test_the_loss_is_on_the_soft_labels_and_the_accuracy_on_the_real_ones(
    problem, alpha
):
    model, params, model_state = problem
    batch = make_batch(1)
    loss_fn = classifier.make_loss(model, 0.1, mixup_alpha=alpha)
    before = with_virtual(model_state, mixed(1)[0]) if alpha else model_state
    loss, (after, metrics) = jax.jit(loss_fn)(params, before, batch, key_of(1))
    assert after.keys() == before.keys()
    virtual = virtual_batch.VirtualBatch(batch["image"], one_hot(batch), 1)
    if alpha:
        virtual = after[classifier.VIRTUAL_BATCH]
        assert virtual.count == 2
        assert ((virtual.labels > 0).sum(1) == 2).any(), "labels are soft"
    variables = {"params": params, **model_state}
    logits: Any = model.apply(
        variables, virtual.images, train=True, mutable=["batch_stats"]
    )[0]
    log_p = np.asarray(jax.nn.log_softmax(logits), float)
    targets = 0.9 * np.asarray(virtual.labels, float) + 0.1 / CLASSES
    assert float(loss) == pytest.approx(-(targets * log_p).sum(1).mean(), rel=1e-5)
    correct = log_p.argmax(1) == batch["label"]
    assert float(metrics["accuracy"]) == pytest.approx(correct.mean())


def test_erasures_do_not_leak_into_the_next_step(problem):
    model, params, model_state = problem
    before = with_virtual(model_state, mixed(1)[0])
    (plain, (kept, _)), (erased, (after, _)) = (
        classifier.make_loss(model, 0.0, mixup_alpha=ALPHA, random_erasing=probability)(
            params, before, make_batch(1), key_of(1)
        )
        for probability in (0.0, 1.0)
    )
    assert plain != erased
    name = classifier.VIRTUAL_BATCH
    assert_bits_equal(after[name], kept[name])
    assert (after[name].images != 0).all()


def test_erasing_alone_carries_nothing(problem):
    model, params, model_state = problem
    loss_fn = classifier.make_loss(model, 0.0, random_erasing=1.0)
    _, (after, _) = loss_fn(params, model_state, make_batch(0), key_of(0))
    assert jax.tree.structure(after) == jax.tree.structure(model_state)


# === The training step ================================================================


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setitem(registry.MODELS, "resnet8", OneBlock)
    return settings.Config(
        optimizer="sgd", batch_size=N, mixup_alpha=ALPHA, random_erasing=0.5
    )


@pytest.fixture
def data():
    unread: Any = None
    return pipeline.Data(
        train=unread,
        test=unread,
        image_shape=SHAPE,
        num_classes=CLASSES,
        steps_per_epoch=4,
        train_images=4 * N,
        test_images=N,
    )


def test_a_run_resumes_bit_for_bit_and_a_refused_step_changes_nothing(
    config, data, tmp_path, monkeypatch
):
    traces = []
    make_loss = classifier.make_loss

    def counting(*arguments, **settings):
        loss_fn = make_loss(*arguments, **settings)

        def counted(*arguments):
            traces.append(None)
            return loss_fn(*arguments)

        return counted

    monkeypatch.setattr(classifier, "make_loss", counting)
    program = classifier.build_program(config, data)
    state, name = program.init(), classifier.VIRTUAL_BATCH
    virtual = state.model_state[name]
    assert_bits_equal(virtual, virtual_batch.empty((N, *SHAPE), CLASSES))
    for step in range(3):
        state, metrics = program.train_step(state, make_batch(step))
        assert np.isfinite(metrics["loss"])
    assert state.model_state[name].count == 3

    with checkpoints.Checkpoints(tmp_path) as store:
        store.save(3, state, checkpoints.Place(3))
    with checkpoints.Checkpoints(tmp_path) as store:
        latest = store.restore_latest(lambda place: program.init())
    assert latest is not None
    restored = latest.state
    assert_bits_equal(restored, state)
    on, resumed = (program.train_step(s, make_batch(3)) for s in (state, restored))
    assert_bits_equal(on, resumed)
    assert on[0].model_state[name].count == 4

    kept = jax.device_get(on[0].model_state)
    broken = make_batch(4)
    broken["image"][0] = np.nan  # all of it: erasing leaves three quarters
    state, metrics = program.train_step(on[0], broken)
    assert metrics["skipped"] == 1
    assert_bits_equal(jax.device_get(state.model_state), kept)
    assert len(traces) == 1, "six steps, one compilation"

    test = {**make_batch(5), "mask": np.ones(N, np.float32)}
    bare = {k: v for k, v in state.model_state.items() if k != name}
    sums = [
        program.eval_step(s, test) for s in (state, state._replace(model_state=bare))
    ]
    assert_bits_equal(*sums)


def test_kfac_finds_its_layers_and_its_step_keeps_the_state(config, data):
    config = dataclasses.replace(config, optimizer="kfac")
    program = classifier.build_program(config, data)
    state: training.TrainState = jax.eval_shape(program.init)
    batch = pipeline.batch_shapes(N, SHAPE)
    after, metrics = jax.eval_shape(program.train_step, state, batch)
    assert metrics.keys() > {"accuracy", "loss", "skipped", "refreshed"}
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for a, b in zip(*map(jax.tree.leaves, (after, state)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
