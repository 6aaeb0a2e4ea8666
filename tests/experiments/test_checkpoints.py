"""Checkpoints: every bit, typed keys and the place in the data come back."""

import errno
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoints
from experiments.checkpoints import Checkpoints, Place
from tests.experiments.real_runs import arrays

SMALL = {"x": jnp.arange(1000.0)}


def make_state(seed):
    key = jax.random.key(seed)
    return {
        "params": {"dense": {"kernel": jax.random.normal(key, (5, 3))}},
        "opt": ((), {"half": jnp.bfloat16(seed + 0.1), "flag": jnp.array(True)}),
        "key": key,
    }


def assert_bits_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
    for a, b in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_array_equal(a, b)


def saved_at(directory, *steps, shift=0):
    """Saves another state at each step."""
    with Checkpoints(directory) as saved:
        for step in steps:
            saved.save(step, {"x": SMALL["x"] + step + shift}, Place(step))


def restored(directory, like=SMALL):
    """What a new process restores."""
    with Checkpoints(directory) as saved:
        return saved.restore_latest(lambda place: like)


def test_round_trip(tmp_path):
    state, place = make_state(7), Place(9, devices=4, placement="memory")
    with Checkpoints(tmp_path / "c") as saved:
        assert saved.restore_latest(lambda place: state) is None
        saved.save(7, state, place)
    asked = []
    with Checkpoints(tmp_path / "c") as saved:
        found = saved.restore_latest(lambda place: asked.append(place) or make_state(0))
    assert (found.step, found.place, asked) == (7, place, [place])
    assert_bits_equal(found.state, state)
    jax.random.normal(found.state["key"], (3,))  # a typed key, still
    shapes = jax.eval_shape(lambda: make_state(0))
    assert_bits_equal(restored(tmp_path / "c", shapes).state, state)


def test_the_state_may_be_donated_while_it_is_being_saved(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def overwrite(state):
        return jax.tree.map(lambda x: x * 0 - 1, state)

    state = {"x": jnp.arange(1_000_000.0), "y": jnp.ones((700, 700))}
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state, Place(1))
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
    assert_bits_equal(restored(tmp_path, state).state, expected)


def test_another_shape_is_refused(tmp_path):
    saved_at(tmp_path, 1)
    with pytest.raises(ValueError, match="shape"):
        restored(tmp_path, {"x": jnp.zeros(4)})


def test_nothing_to_keep_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep=0 must be a whole number"):
        Checkpoints(tmp_path, keep=0)


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
    with Checkpoints(tmp_path, keep=2, keep_best=True) as saved:
        for step, accuracy in accuracies.items():
            saved.save(step, SMALL, Place(step), accuracy=accuracy)
        assert saved.wait()
        assert saved.steps() == kept
    with Checkpoints(tmp_path, keep=2, keep_best=True) as saved:
        assert saved.steps() == kept


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest_file(directory):
    files = (path for path in directory.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


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
    with Checkpoints(directory, tell=messages.append) as saved:
        found = saved.restore_latest(lambda place: SMALL)
        assert found.step == 1
        assert_bits_equal(found.state, {"x": SMALL["x"] + 1})
        (message,) = messages
        assert "checkpoint of step 2 is damaged" in message
        assert told in message
        assert (tmp_path / "damaged" / "2").is_dir(), "nothing is thrown away"
        # The run comes to the same step again.
        saved.save(2, SMALL, Place(2))
        assert saved.wait()
        assert saved.steps() == [1, 2]
    assert restored(directory).step == 2


def test_a_run_never_begins_anew_because_its_checkpoints_are_damaged(tmp_path):
    directory = tmp_path / "checkpoints"
    saved_at(directory, 1)
    flip_a_bit(largest_file(directory / "1" / "state"))
    for _ in range(2):  # and not at the second attempt either
        with pytest.raises(ValueError, match=r"must hold a checkpoint that is.*--dir"):
            restored(directory)


def test_what_a_killed_run_had_begun_to_write_is_no_checkpoint(tmp_path):
    saved_at(tmp_path, 1)
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").write_text("half")
    assert restored(tmp_path).step == 1
    saved_at(tmp_path, 2)
    assert restored(tmp_path).step == 2


@pytest.mark.parametrize("at", ["while the files are written", "at once"])
def test_a_full_disk_is_told_and_loses_nothing(tmp_path, monkeypatch, at):
    messages = []

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(tmp_path, keep=1, tell=messages.append) as saved:
        saved.save(1, SMALL, Place(1))
        assert saved.wait()
        with monkeypatch.context() as patch:
            if at == "at once":
                patch.setattr(saved._manager, "save", full)
            else:
                patch.setattr(checkpoints, "_checksum", full)
            saved.save(2, SMALL, Place(2))
            saved.wait()
        (message,) = messages
        assert "step 2 could not be written" in message
        assert "No space left on device" in message
        assert "the newest is that of step 1" in message
        assert saved.steps() == [1]
        assert [path.name for path in tmp_path.iterdir()] == ["1"], "no remains"
        saved.save(3, SMALL, Place(3))
        assert saved.wait()
        assert saved.steps() == [3]
        assert len(messages) == 1


def test_a_step_that_is_there_is_not_written_again(tmp_path):
    saved_at(tmp_path, 1)
    saved_at(tmp_path, 1, shift=5)
    assert_bits_equal(restored(tmp_path).state, {"x": SMALL["x"] + 1})
