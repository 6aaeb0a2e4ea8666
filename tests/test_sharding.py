"""Meshes, the placement of a state, and the owners of inversions, also of ResNet-50."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lbopt
from experiments.models import resnet
from lbopt import sharding
from lbopt.collectives import Axis
from lbopt.curvature import factor, layer_table
from lbopt.sharding import Sharded, Unit
from tests.devices import AXIS, on_devices
from tests.oracles import lookup
from tests.problems import Mlp, assert_close, assert_equal, classify

FLOAT = 4  # bytes


# ------------------------------------------------------------------ longest first


def loads(work, chosen, bins):
    return np.bincount(chosen, weights=work, minlength=bins).tolist()


def textbook(work, bins):
    """The loads of longest-processing-time-first, sorted."""
    found = np.zeros(bins)
    for cost in sorted(work, reverse=True):
        found[np.argmin(found)] += cost
    return sorted(found.tolist())


@pytest.mark.parametrize(
    ("work", "bins", "expected"),
    [
        ([3, 3, 2, 2, 2], 2, [5, 7]),  # the best would be 6 and 6
        ([5, 5, 4, 4, 3, 3, 3], 3, [8, 8, 11]),  # Graham's worst case: 11, not 9
        ([2, 9], 4, [0, 0, 2, 9]),
        ([1, 2, 3], 1, [6]),
        ([], 2, [0, 0]),
    ],
)
def test_known_splits(work, bins, expected):
    chosen = sharding.assign(work, bins)
    assert sorted(loads(work, chosen, bins)) == expected == textbook(work, bins)


@pytest.mark.parametrize("seed", range(5))
def test_random_splits(seed):
    work = np.random.default_rng(seed).integers(1, 50, 7).tolist()
    assert sorted(loads(work, sharding.assign(work, 3), 3)) == textbook(work, 3)


def test_between_equals_earlier_work_decides_and_then_the_count():
    assert sharding.assign([4, 4, 4], 3, [5, 9, 1]) == [2, 0, 1]
    # Earlier work decides between equals only.
    assert loads([4, 1, 1, 1], sharding.assign([4, 1, 1, 1], 2, [0, 99]), 2) == [4, 3]
    # What costs nothing is spread as well.
    assert sorted(sharding.assign([0] * 6, 3)) == [0, 0, 1, 1, 2, 2]


def test_items_of_one_kind_are_not_piled_up():
    # By work alone all small ones go to the second bin; it may have 3 of 4.
    work, kinds = [9, 1, 1, 1, 1], "abbbb"
    assert sharding.assign(work, 2) == [0, 1, 1, 1, 1]
    assert sharding.assign(work, 2, None, kinds) == [0, 1, 1, 1, 0]
    # 8 in 4 bins: at most 3, and everything finds a place.
    chosen = sharding.assign([1] * 8 + [7, 7], 4, None, "c" * 8 + "dd")
    assert max(chosen[:8].count(i) for i in range(4)) == 3


# ------------------------------------------------------------------ owners


@pytest.fixture(scope="module")
def resnet50():
    model = resnet.ResNet50(num_classes=1000)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, train=True), images
    )

    def loss_fn(params, stats, x):
        logits, _ = model.apply(
            {"params": params, **stats}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.mean(logits)

    params = variables.pop("params")
    return params, lbopt.trace_layers(loss_fn, params, variables, images, strict=True)


@pytest.fixture(scope="module")
def units_by_size(resnet50):
    """The units of ResNet-50 for each block size."""
    layers = resnet50[1].preconditioned
    return {
        size: sharding.units_of(layer_table.configured(layers, block_size=size))
        for size in (None, 256, 1024)
    }


def work_of(owners, costs):
    """``[devices, period]``, by hand."""
    work = np.zeros((owners.devices, owners.period))
    np.add.at(work, (np.array(owners.owner), np.array(owners.phase)), costs)
    return work


@pytest.fixture(scope="module")
def orders(resnet50):
    """Rows of each statistic of each layer, from the shapes of the parameters."""
    found = {}
    for path, _ in resnet50[1].items():
        arrays = lookup(resnet50[0], path)
        shapes = {name: x.shape for name, x in arrays.items()}
        if "kernel" in shapes:
            *rows, columns = shapes["kernel"]
            found[path] = {"a": math.prod(rows) + ("bias" in shapes), "g": columns}
        else:
            assert set(shapes) == {"scale", "bias"}
            found[path] = {"f": 2 * shapes["scale"][0]}
    return found


def blocks(orders, block_size):
    """Work of each diagonal block, in alphabetical order of the layers."""
    costs = []
    for path in sorted(orders):
        for kind, order in orders[path].items():
            if kind == "f":
                costs.append(order // 2)
            else:
                parts = -(-order // block_size) if block_size else 1
                costs += [(-(-order // parts)) ** 3] * parts
    return np.array(costs)


def test_sizes_of_resnet50(units_by_size, orders):
    units = units_by_size[None]
    # 53 convolutions, a dense layer and 53 BatchNorms, with A and G or F each.
    assert len({u.path for u in units}) == 107
    assert len({u.statistic for u in units}) == len(units) == 161
    named = [(p, order) for p in sorted(orders) for order in orders[p].values()]
    assert [(u.path, u.factor.order) for u in units] == named
    # Osawa et al. 2022, Fig. 6: a little above 6.1e8 bytes; counted by hand 6.158e8,
    # and half of it as triangles.
    square = sum(
        2 * u.factor.order if u.kind not in ("a", "g") else u.factor.order**2
        for u in units
    )
    packed = sum(u.factor.size for u in units)
    assert FLOAT * square == pytest.approx(6.158e8, rel=1e-4)
    assert FLOAT * packed == pytest.approx(3.082e8, rel=1e-4)


@pytest.mark.parametrize("block_size", [None, 256])
@pytest.mark.parametrize("devices", [1, 8, 200])
def test_every_unit_has_one_owner_and_one_phase(
    units_by_size, orders, devices, block_size
):
    units, costs = units_by_size[block_size], blocks(orders, block_size)
    owners = sharding.owners_of(units, devices, period=7)
    assert [u.factor.work for u in owners.units] == costs.tolist()
    assert len(owners.owner) == len(owners.phase) == len(costs)
    assert set(owners.owner) <= set(range(devices))
    assert set(owners.phase) <= set(range(7))
    work = work_of(owners, costs)
    np.testing.assert_array_equal(owners.work(), work)
    # A run's numbers do not depend on the devices.
    assert owners.phase == sharding.owners_of(units, 3, period=7).phase
    assert owners.step_bound() == max(work.sum(1).max() / 7, costs.max())


def test_layers_that_are_not_gathered_have_one_owner(units_by_size, orders):
    units = units_by_size[256]
    owners = sharding.owners_of(units, 8, gathered=())
    assert not any(owners.gathered)
    by_layer = {}
    for unit, device in zip(units, owners.owner, strict=True):
        by_layer.setdefault(unit.path, set()).add(device)
    assert all(len(devices) == 1 for devices in by_layer.values())
    costs = [blocks({path: kinds}, 256).sum() for path, kinds in orders.items()]
    assert sorted(owners.work().sum(1).tolist()) == textbook(costs, 8)


@pytest.mark.parametrize("devices", [8, 64])
def test_longest_first_balances_resnet50(units_by_size, orders, devices):
    owners = sharding.owners_of(units_by_size[1024], devices)
    costs = blocks(orders, 1024)
    bound = max(costs.sum() / devices, costs.max())
    longest = np.bincount(owners.owner, weights=costs, minlength=devices).max()
    assert bound <= longest <= 1.05 * bound
    assert owners.balance() == pytest.approx(longest / bound)
    contiguous = max(part.sum() for part in np.array_split(costs, devices))
    assert longest < contiguous


@pytest.mark.parametrize("devices", [1, 4, 8, 64])
def test_staggered_steps_are_even(units_by_size, orders, devices):
    owners = sharding.owners_of(units_by_size[256], devices, period=10)
    costs = blocks(orders, 256)
    steps = work_of(owners, costs).max(0)  # the others wait for the longest device
    large = np.bincount(np.array(owners.owner)[costs == costs.max()])
    if large.min() >= 10:
        assert steps.max() <= 1.3 * np.median(steps)
    else:
        assert devices == 64
        assert steps.max() - np.median(steps) <= costs.max()


# ------------------------------------------------------------------ the table


def units(*orders):
    return [
        Unit(f"layer{i}", i, i, "a", 0, factor.symmetric(order))
        for i, order in enumerate(orders)
    ]


def test_work_of_layers_with_one_owner_counts_for_the_others():
    owners = sharding.owners_of(units(4, 2), 2, gathered=["layer1"])
    assert owners.owner == (0, 1)


def test_the_table_counts_units_and_work():
    text = repr(sharding.owners_of(units(4, 2, 2, 3), 2))
    head, *rows = [line.split() for line in text.splitlines()[:3]]
    assert head[:4] == ["device", "units", "largest", "work"]
    # 64 on the first; 27 + 8 + 8 on the second.
    assert rows == [["0", "1", "4", "64", "100.0%"], ["1", "3", "3", "43", "67.2%"]]
    assert "4 units, work 107 in all, 64 on the longest device: 1.000 ×" in text
    assert "period" not in text


def test_the_table_of_a_period_and_of_idle_devices():
    text = repr(sharding.owners_of(units(4, 2, 3), 4, period=2))
    assert len(re.findall(r"^ +\d+ +0 +0 +0 +0\.0%$", text, re.MULTILINE)) == 1
    # 64 at one step; 27 and 8 at the other, on two devices.
    assert "a step of the period of 2: longest 64, median 45.5" in text
    assert text.endswith("largest) 64")


def test_the_table_of_a_model():
    owners = sharding.owner_table(
        classify(Mlp()).trace(), 2, block_size=3, inverse_period=2
    )
    # A of 5 rows and G of 5 in first, A of 5 (no bias) and G of 3 in last.
    assert [u.factor.work for u in owners.units] == [27] * 7
    assert [u.row for u in owners.units] == [0, 1, 0, 1, 0, 1, 0]
    assert [u.statistic for u in owners.units] == [0, 0, 1, 1, 2, 2, 3]
    assert sorted(owners.work().ravel().tolist()) == [27, 54, 54, 54]


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("comm", {"first", "last"}),
        ("memory", set()),
        (1.0, {"first", "last"}),
        (0.0, set()),
        # Inverses of 15 + 6 numbers in last and 15 + 15 in first.
        (0.5, {"last"}),
        (0.4, set()),
    ],
)
def test_layers_whose_inverses_every_device_gets(placement, expected):
    layers = classify(Mlp()).trace()
    assert set(sharding.gathered_layers(layers, placement)) == expected
    owners = sharding.owner_table(layers, 2, placement=placement)
    paths = {u.path for u, g in zip(owners.units, owners.gathered, strict=True) if g}
    assert paths == expected


def test_settings_out_of_range():
    layers = classify(Mlp()).trace()
    with pytest.raises(ValueError, match="devices=0 must be a whole number, ≥ 1; 1 is"):
        sharding.owner_table(layers, 0)
    for name, value, message in (
        ("inverse_period", 0, "0 must be a whole number, ≥ 1; 1 inverts at every"),
        ("block_size", 0, "0 must be a whole number, ≥ 1; None keeps factors whole"),
        ("placement", "both", "'both' must be 'comm', 'memory' or a number"),
        ("placement", 2.0, r"2.0 must lie in \[0, 1\]; 'comm' replicates all"),
    ):
        with pytest.raises(ValueError, match=f"^{name}={message}"):
            sharding.owner_table(layers, 2, **{name: value})


# ------------------------------------------------------------------ the split state


def test_gradients_are_averaged_except_those_of_some_layers():
    problem, axis = classify(Mlp()), Axis(AXIS, 2)
    own = [problem.trace()["first"]]
    grads = jax.tree.map(lambda x: jnp.stack([x, 3 * x]), problem.params)
    found = on_devices(2, lambda g: sharding.mean_of_others(g, own, axis), grads)
    assert_equal(found["first"], grads["first"])
    mean = jax.tree.map(lambda x: jnp.stack([2 * x, 2 * x]), problem.params)
    assert_close(found["last"], mean["last"])


@pytest.mark.parametrize("devices", [1, 3])
def test_a_mesh_of_the_devices_in_order(devices):
    mesh = sharding.make_mesh(jax.devices()[:devices], axis_name="across")
    assert dict(mesh.shape) == {"across": devices}
    assert list(mesh.devices) == jax.devices()[:devices]
    assert mesh.axis_types == (AxisType.Auto,)
    assert sharding.make_mesh().size == len(jax.devices())


def state():
    return {
        "marked": Sharded({"x": jnp.arange(6.0).reshape(2, 3), "y": jnp.ones((2, 1))}),
        "whole": (jnp.arange(4.0), jnp.zeros([])),
    }


def test_marked_arrays_are_split_and_others_whole():
    along, whole = PartitionSpec("across"), PartitionSpec()
    expected = {"marked": Sharded({"x": along, "y": along}), "whole": (whole, whole)}
    assert sharding.specs(state(), "across") == expected
    assert sharding.specs(jax.eval_shape(state), "across") == expected
    mesh = sharding.make_mesh(jax.devices()[:2], axis_name="across")
    placed = sharding.place(state(), mesh, "across")
    assert_equal(placed, state())
    x, whole = placed["marked"].shards["x"], placed["whole"][0]
    assert x.sharding == NamedSharding(mesh, along)
    assert [s.data.tolist() for s in x.addressable_shards] == [[[0, 1, 2]], [[3, 4, 5]]]
    assert [s.data.shape for s in whole.addressable_shards] == [(4,), (4,)]
