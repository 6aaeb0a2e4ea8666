"""Batches on devices: the same arrays, resumed from what was taken, errors in place."""

import threading

import jax
import numpy as np
import pytest

from experiments.data import device_feed


class Counting:
    """Batches that say which they are; fails at one of them as long as it is told."""

    def __init__(self, bad=None):
        self.taken, self.bad, self.closed = 0, bad, False

    def __next__(self):
        if self.taken == self.bad:
            raise ValueError(f"batch {self.bad} is bad")
        self.taken += 1
        image = np.arange(8 * 6, dtype=np.float32).reshape(8, 6) + 100 * self.taken
        return {"image": image, "label": np.full(8, self.taken, np.int32)}

    def get_state(self):
        return self.taken

    def set_state(self, taken):
        self.taken = taken

    def close(self):
        self.closed = True


@pytest.fixture
def mesh():
    types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((4,), ("data",), types, devices=jax.devices()[:4])


def numbers(feed, count):
    return [int(next(feed)["label"][0]) for _ in range(count)]


def feeding():
    return [t for t in threading.enumerate() if t.name == "device feed"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not feeding()


def test_a_mesh_gets_the_whole_batch_divided(mesh):
    feed = device_feed.DeviceFeed(Counting(), mesh)
    placed, expected = next(feed), next(Counting())
    feed.close()
    assert placed.keys() == expected.keys()
    for key, array in placed.items():
        np.testing.assert_array_equal(array, expected[key])
        assert array.dtype == expected[key].dtype
        assert array.sharding.is_equivalent_to(
            jax.sharding.NamedSharding(mesh, jax.P("data")), array.ndim
        )
        assert [shard.data.shape[0] for shard in array.addressable_shards] == [2] * 4


def test_without_a_mesh_the_default_device_has_it_all():
    placed = device_feed.place(next(Counting()), None)
    assert placed["image"].devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(placed["image"], next(Counting())["image"])


def test_state_counts_what_was_taken_and_not_what_is_ahead():
    batches = Counting()
    feed = device_feed.DeviceFeed(batches, None)
    assert feed.get_state() == 0
    assert numbers(feed, 2) == [1, 2]
    deadline = threading.Event()
    for _ in range(500):
        if batches.taken >= 5:
            break
        deadline.wait(0.01)
    # Two wait in the queue, and the thread holds one more.
    assert batches.taken == 5
    assert feed.get_state() == 2
    feed.set_state(2)
    assert numbers(feed, 2) == [3, 4]
    feed.set_state(0)
    assert feed.get_state() == 0
    assert numbers(feed, 1) == [1]
    feed.close()


def test_a_stream_begins_where_its_batches_stand(mesh):
    batches = Counting()
    batches.set_state(41)
    feed = device_feed.DeviceFeed(batches, mesh)
    assert feed.get_state() == 41
    assert numbers(feed, 7) == [42, 43, 44, 45, 46, 47, 48]
    feed.close()


def test_an_error_is_raised_in_its_batch_s_place_and_again():
    batches = Counting(bad=3)
    feed = device_feed.DeviceFeed(batches, None)
    assert numbers(feed, 3) == [1, 2, 3]
    for _ in range(2):
        with pytest.raises(ValueError, match="batch 3 is bad"):
            next(feed)
        assert feed.get_state() == 3
        assert not feeding()
    batches.bad = None
    assert numbers(feed, 2) == [4, 5]
    feed.close()


def test_closing_ends_the_thread_and_leaves_the_state():
    batches = Counting()
    feed = device_feed.DeviceFeed(batches, None)
    assert numbers(feed, 2) == [1, 2]
    assert len(feeding()) == 1
    feed.close()
    assert not feeding()
    assert batches.closed
    assert feed.get_state() == batches.get_state() == 2
    feed.close()
    assert numbers(feed, 1) == [3]
    feed.close()


def test_what_cannot_be_divided_is_refused(mesh):
    batch = {"label": np.zeros(6, np.int32)}
    with pytest.raises(ValueError, match=r"label: 6 .* 4 devices .* multiple of 4"):
        device_feed.place(batch, mesh)
