"""Order and slices: permutations, and each position in exactly one slice."""

import numpy as np
import pytest

from experiments.data import order


def test_each_epoch_is_a_permutation_of_its_own():
    numbers = order.shuffled(100, 3)
    first, second = ([numbers[i] for i in range(s, s + 100)] for s in (0, 100))
    assert sorted(first) == sorted(second) == list(range(100))
    assert second != first != sorted(first)


def test_epochs_do_not_end():
    numbers = order.shuffled(1_281_167, 0)
    places = range(1_281_167 * 10**6, 1_281_167 * 10**6 + 50)
    records = {numbers[place] for place in places}
    assert len(records) == 50
    assert min(records) >= 0
    assert max(records) < 1_281_167


@pytest.mark.parametrize(("processes", "size"), [(1, 4), (2, 2), (4, 3), (3, 1)])
def test_slices_are_contiguous_parts_of_each_batch(processes, size):
    batch = 12
    parts = [order.Slices(batch, p, processes) for p in range(processes)]
    groups = batch // processes // size
    for k in range(3):
        own = [
            np.concatenate(
                [part.positions(k * groups + g, size) for g in range(groups)]
            )
            for part in parts
        ]
        assert [len(p) for p in own] == [part.local_size for part in parts]
        assert np.concatenate(own).tolist() == list(range(batch * k, batch * (k + 1)))


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (order.Slices(0), "batch_size=0 must"),
        (order.Slices(30, 0, 4), "batch_size=30 must be .*; 4 would do"),
        (order.Slices(32, 1, 1), r"process_index=1 must lie in \[0, 1\)"),
        (order.Slices(32, -1, 2), "process_index=-1 must"),
    ],
)
def test_what_cannot_be_is_refused(slices, message):
    with pytest.raises(ValueError, match=message):
        slices.check()
