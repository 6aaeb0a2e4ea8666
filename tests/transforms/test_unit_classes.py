"""Classes of units, and whose turn it is on which device."""

import jax.numpy as jnp
import numpy as np

from lbopt.sharding import owners_of
from lbopt.transforms import unit_classes
from tests.transforms.test_inversion import CLASSES, SOME, UNITS


def test_units_of_one_kind_and_size_are_a_class():
    classes = unit_classes.classes_of(owners_of(UNITS, 3))
    assert [c.numbers.tolist() for c in classes] == CLASSES
    assert [c.statistics for c in classes] == [[0, 2], [1, 5], [3], [4]]
    owner = owners_of(UNITS, 3).owner
    for ids, units in zip(CLASSES, classes, strict=True):
        assert units.gathered
        for device, queue in enumerate(units.queues.tolist()):
            own = [ids[k] for k in queue if k < len(ids)]
            assert own == [i for i in ids if owner[i] == device]


def test_gathered_units_and_others_are_classes_apart():
    owners = owners_of(UNITS, 3, gathered=["layer0", "layer1", "layer3"])
    classes = unit_classes.classes_of(owners)
    found = [(c.numbers.tolist(), c.gathered) for c in classes]
    assert found == [
        ([0, 1, 2], True),
        ([3], True),
        ([4, 5], False),
        ([6], True),
        ([7, 8], False),
        ([9, 10], False),
    ]


def test_turns_are_those_of_the_owners():
    owners = owners_of(UNITS, 3)
    classes = unit_classes.classes_of(owners)
    turns = unit_classes.queues_of(classes, jnp.asarray(SOME))
    for ids, turn in zip(CLASSES, turns, strict=True):
        assert turn.due.tolist() == SOME[ids].tolist()
        for device in range(3):
            mine = [k for k, i in enumerate(ids) if owners.owner[i] == device]
            first = [k for k in mine if SOME[ids[k]]]
            assert int(turn.lengths[device]) == len(first)
            positions = turn.positions[device].tolist()
            assert positions[: len(first)] == first
            assert sorted(k for k in positions if k < len(ids)) == mine
    most = unit_classes.longest_queues(turns)
    assert most.tolist() == [int(np.max(turn.lengths)) for turn in turns]
    count = unit_classes.due_counts(turns)
    assert count.tolist() == [int(SOME[ids].sum()) for ids in CLASSES]
