"""Classes of units, queues of those that are due, and rows that are replaced."""

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


def test_queues_are_those_of_the_owners():
    owners = owners_of(UNITS, 3)
    classes = unit_classes.classes_of(owners)
    queues = unit_classes.queues_of(classes, jnp.asarray(SOME))
    for ids, queue in zip(CLASSES, queues, strict=True):
        assert queue.due.tolist() == SOME[ids].tolist()
        for device in range(3):
            mine = [k for k, i in enumerate(ids) if owners.owner[i] == device]
            first = [k for k in mine if SOME[ids[k]]]
            assert int(queue.lengths[device]) == len(first)
            positions = queue.positions[device].tolist()
            assert positions[: len(first)] == first
            assert sorted(k for k in positions if k < len(ids)) == mine
    most = unit_classes.longest_queues(queues)
    assert most.tolist() == [int(np.max(queue.lengths)) for queue in queues]
    count = unit_classes.due_counts(queues)
    assert count.tolist() == [int(SOME[ids].sum()) for ids in CLASSES]


def test_sound_rows_are_replaced_and_others_stay():
    owners = owners_of(UNITS, 1)
    units = unit_classes.classes_of(owners)[0]  # statistics 0 and 2, three rows and two
    old = [jnp.full((3, 1, 4, 4), -1.0), jnp.full((2, 4, 4), -2.0)]
    packed = jnp.arange(5.0)[:, None] * jnp.ones((1, units.factor.wire))
    sound = jnp.asarray([True, False, True, False, True])
    new = unit_classes.replace_sound(owners, units, old, packed, sound)
    assert [x.shape for x in new] == [x.shape for x in old]
    corners = [x.reshape(-1, 4, 4)[:, 0, 0].tolist() for x in new]
    assert corners == [[0, -1, 2], [-2, 4]]


def test_a_loop_of_a_traced_length():
    assert unit_classes.repeat(jnp.asarray(4), lambda k, x: x + k, 10) == 16
