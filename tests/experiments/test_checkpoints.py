"""Checkpoints: every bit, typed keys and the place in the data come back."""

import errno
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoints

SMALL = {"x": jnp.arange(1000.0)}


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    rng: Any


def make_state(seed):
    key = jax.random.key(seed)
    return State(
        step=jnp.int32(seed),
        params={"dense": {"kernel": jax.random.normal(key, (5, 3))}},
        opt_state=((), {"half": jnp.bfloat16(seed + 0.1), "flag": jnp.array(True)}),
        rng=key,
    )


def assert_bits_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_round_trip(tmp_path):
    state = make_state(7)
    with checkpoints.Checkpoints(tmp_path / "c") as saved:
        assert saved.restore_latest(lambda place: state) is None
        saved.save(7, state, checkpoints.Place(9, 4, "memory"))
    with checkpoints.Checkpoints(tmp_path / "c") as saved:
        asked = []
        step, restored, place = saved.restore_latest(
            lambda place: asked.append(place) or make_state(0)
        )
    assert (step, asked) == (7, [place])
    assert place == checkpoints.Place(9, devices=4, placement="memory")
    assert_bits_equal(restored, state)
    np.testing.assert_array_equal(
        jax.random.normal(restored.rng, (3,)), jax.random.normal(state.rng, (3,))
    )


def test_shapes_are_enough_to_restore(tmp_path):
    state = make_state(1)
    with checkpoints.Checkpoints(tmp_path) as saved:
        saved.save(1, state, checkpoints.Place(1))
    with checkpoints.Checkpoints(tmp_path) as saved:
        like = jax.eval_shape(lambda: make_state(0))
        _, restored, _ = saved.restore_latest(lambda place: like)
    assert_bits_equal(restored, state)


def test_the_newest_is_restored_and_the_oldest_are_dropped(tmp_path):
    with checkpoints.Checkpoints(tmp_path, keep=2) as saved:
        for step in (1, 2, 3):
            saved.save(step, make_state(step), checkpoints.Place(step))
    with checkpoints.Checkpoints(tmp_path) as saved:
        step, restored, _ = saved.restore_latest(lambda place: make_state(0))
    assert step == 3
    assert_bits_equal(restored, make_state(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_the_state_may_be_donated_while_it_is_being_saved(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def overwrite(state):
        return jax.tree.map(lambda x: x * 0 - 1, state)

    state = {"x": jnp.arange(1_000_000.0), "y": jnp.ones((700, 700))}
    expected = jax.tree.map(np.array, state)
    with checkpoints.Checkpoints(tmp_path) as saved:
        saved.save(1, state, checkpoints.Place(1))
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
    with checkpoints.Checkpoints(tmp_path) as saved:
        _, restored, _ = saved.restore_latest(lambda place: state)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_another_shape_is_refused(tmp_path):
    with checkpoints.Checkpoints(tmp_path) as saved:
        saved.save(1, {"x": jnp.zeros(3)}, checkpoints.Place(1))
        with pytest.raises(ValueError, match="shape"):
            saved.restore_latest(lambda place: {"x": jnp.zeros(4)})


def test_nothing_to_keep_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep"):
        checkpoints.Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize(
    ("accuracies", "kept"),
    [
        ({1: 0.5, 2: 0.9, 3: None, 4: 0.7, 5: 0.6}, [2, 4, 5]),
        ({1: None, 2: None, 3: None, 4: None}, [3, 4]),
        ({1: 0.1, 2: 0.2, 3: 0.3}, [2, 3]),
    ],
    ids=["the best is old", "never evaluated", "the best is new"],
)
def test_the_best_is_kept_with_the_newest(tmp_path, accuracies, kept):
    with checkpoints.Checkpoints(tmp_path, keep=2, keep_best=True) as saved:
        for step, accuracy in accuracies.items():
            saved.save(step, SMALL, checkpoints.Place(step), accuracy=accuracy)
        assert saved.wait()
        assert saved.steps() == kept
    with checkpoints.Checkpoints(tmp_path, keep=2, keep_best=True) as saved:
        assert saved.steps() == kept


def saved_at(directory, *steps):
    with checkpoints.Checkpoints(directory, keep=9) as saved:
        for step in steps:
            saved.save(step, {"x": SMALL["x"] + step}, checkpoints.Place(step))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest_file(directory):
    return max(
        (path for path in directory.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda c: flip_a_bit(largest_file(c / "state")), "another checksum"),
        (lambda c: largest_file(c / "state").unlink(), "is missing"),
        (lambda c: largest_file(c / "state").write_bytes(b""), "another checksum"),
        (lambda c: (c / "checksums.json").unlink(), "checksums.json is missing"),
        (lambda c: (c / "checksums.json").write_text("{"), "cannot be read"),
    ],
    ids=["a bit", "a file lost", "a file emptied", "no sums", "half the sums"],
)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_taken(
    tmp_path, damage, told
):
    directory, messages = tmp_path / "checkpoints", []
    saved_at(directory, 1, 2)
    damage(directory / "2")
    with checkpoints.Checkpoints(directory, tell=messages.append) as saved:
        step, restored, _ = saved.restore_latest(lambda place: SMALL)
        assert step == 1
        assert_bits_equal(restored, {"x": SMALL["x"] + 1})
        (message,) = messages
        assert "checkpoint of step 2 is damaged" in message
        assert told in message
        assert (tmp_path / "damaged" / "2").is_dir(), "nothing is thrown away"
        # The run comes to the same step again.
        saved.save(2, {"x": SMALL["x"] + 2}, checkpoints.Place(2))
        assert saved.wait()
        assert saved.steps() == [1, 2]
    with checkpoints.Checkpoints(directory) as saved:
        assert saved.restore_latest(lambda place: SMALL).step == 2


def test_a_run_never_begins_anew_because_its_checkpoints_are_damaged(tmp_path):
    directory = tmp_path / "checkpoints"
    saved_at(directory, 1)
    flip_a_bit(largest_file(directory / "1" / "state"))
    for _ in range(2):  # and not at the second attempt either
        with (
            checkpoints.Checkpoints(directory) as saved,
            pytest.raises(
                ValueError, match=r"must hold a checkpoint that is whole.*--dir"
            ),
        ):
            saved.restore_latest(lambda place: SMALL)


def test_what_a_killed_run_had_begun_to_write_is_no_checkpoint(tmp_path):
    saved_at(tmp_path, 1)
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").write_text("half")
    with checkpoints.Checkpoints(tmp_path) as saved:
        assert saved.restore_latest(lambda place: SMALL).step == 1
        saved.save(2, SMALL, checkpoints.Place(2))
        assert saved.wait()
        assert saved.steps() == [1, 2]


@pytest.mark.parametrize("at", ["while the files are written", "at once"])
def test_a_full_disk_is_told_and_loses_nothing(tmp_path, monkeypatch, at):
    messages = []

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with checkpoints.Checkpoints(tmp_path, keep=1, tell=messages.append) as saved:
        saved.save(1, SMALL, checkpoints.Place(1))
        assert saved.wait()
        with monkeypatch.context() as patch:
            if at == "at once":
                patch.setattr(saved._manager, "save", full)
            else:
                patch.setattr(checkpoints, "_checksum", full)
            saved.save(2, SMALL, checkpoints.Place(2))
            saved.wait()
        (message,) = messages
        assert "step 2 could not be written" in message
        assert "No space left on device" in message
        assert "the newest is that of step 1" in message
        assert saved.steps() == [1]
        assert [path.name for path in tmp_path.iterdir()] == ["1"], "no remains"
        saved.save(3, SMALL, checkpoints.Place(3))
        assert saved.wait()
        assert saved.steps() == [3]
        assert len(messages) == 1


def test_a_step_that_is_there_is_not_written_again(tmp_path):
    with checkpoints.Checkpoints(tmp_path) as saved:
        for shift in (0, 5):
            saved.save(1, {"x": SMALL["x"] + shift}, checkpoints.Place(1))
        assert saved.wait()
        assert_bits_equal(saved.restore_latest(lambda place: SMALL).state, SMALL)
