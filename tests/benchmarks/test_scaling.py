"""The scaling benchmark: its reading of programs, and its plan against what runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import scaling
from benchmarks.scaling_model import (
    KINDS,
    Collective,
    Machine,
    collectives_of,
    model_seconds,
    operand_bytes,
    planned,
    precondition_flop,
    ring_bytes,
    runs_of,
    step_bytes,
)
from benchmarks.workloads import TINY
from lbopt import sharding, training
from lbopt.curvature import layer_table

DEVICES = 4
# Whether every device gets the inverses, of some layers or of all.
PLACED = {"comm": {True}, 0.5: {False, True}, "memory": {False}}
PROGRAM = """
%region_1 (x: f32[]) -> f32[] {
  %a = f32[1,5]{1,0} reduce-scatter(%p), channel_id=1, replica_groups={{0,1,2,3}}, \
dimensions={0}, to_apply=%add, metadata={op_name="jit(f)/while/body/while/body/rs"}
  %b = (f32[1,5]{1,0}, f32[1,5]{1,0}, /*index=2*/f32[1,5]{1,0}, f32[1,5]{1,0}) \
all-to-all(%q, %q, %q, %q), metadata={op_name="jit(f)/while/body/while/body/while/body"}
  %c = bf16[4,20]{0,1} all-gather(%r), dimensions={1}, metadata={op_name="jit(f)/ag"}
  %d = (f32[], pred[3]{0}, s32[2,2]{1,0}) all-reduce(%s, %t, %u), to_apply=%add, \
metadata={op_name="jit(f)/while/body/ar"}
  %e = f32[7]{0} add(%all-reduce.1, %all-gather.2), metadata={op_name="all-to-all"}
"""


@pytest.fixture(scope="module")
def problem():
    return scaling.make_problem(TINY, 8)


def owners(problem, placement, devices=DEVICES):
    return sharding.owner_table(problem.layers, devices, placement=placement)


def test_collectives_are_read_from_text():
    assert collectives_of(PROGRAM, 4) == {
        Collective("reduce-scatter", 4 * 5 * 4, 2): 1,
        Collective("all-to-all", 4 * 5 * 4, 3): 1,
        Collective("all-gather", 4 * 20 * 2 // 4, 0): 1,
        Collective("all-reduce", 4 + 3 + 4 * 4, 1): 1,
    }


@pytest.mark.parametrize(
    "line",
    [
        '%a = (f32[5], f32[20]) all-gather-start(%x), metadata={op_name="f"}',
        "%a = f32[5]{0} all-reduce(%x), to_apply=%add",
    ],
)
def test_what_cannot_be_counted_is_refused(line):
    with pytest.raises(ValueError, match="cannot read the collective %a = "):
        collectives_of(line, 4)


@pytest.mark.parametrize(
    ("shapes", "size"),
    [("f32[]", 4), ("f64[2,3]{1,0}", 48), ("(f8e4m3fn[8], u32[2])", 16), ("s4[0]", 0)],
)
def test_bytes_of_types(shapes, size):
    assert operand_bytes(shapes, "all-reduce", 4) == size


def test_loops_run_as_often_as_what_is_due():
    counts = {
        Collective("all-reduce", 7, 1): 2,
        Collective("reduce-scatter", 10, 2): 3,
        Collective("all-to-all", 20, 3): 4,  # two in each of two classes
        Collective("all-gather", 5, 4): 2,
    }
    runs = {(3, 20): [1, 5], (4, 5): [4, 6]}
    everything = step_bytes(counts, runs, due=True)
    assert everything["reduce-scatter"] == (3, 30)
    assert everything["all-to-all"] == (2 * 6, 2 * 6 * 20)
    assert everything["all-gather"] == (10, 50)
    nothing = step_bytes(counts, runs, due=False)
    assert nothing == dict.fromkeys(KINDS, (0, 0)) | {"all-reduce": (2, 14)}
    with pytest.raises(ValueError, match="for runs"):
        step_bytes(counts, {(3, 30): [1]}, due=True)


def test_a_ring_sends_a_reduction_once_around_and_back():
    assert [ring_bytes(kind, 100, 4) for kind in KINDS] == [75, 75, 300, 150]


@pytest.mark.parametrize("variant", scaling.VARIANTS)
def test_a_step_sends_what_was_planned_and_what_it_reports(problem, variant):
    compiled, seconds = scaling.compile_step(problem, DEVICES, variant)
    counts = collectives_of(compiled.as_text(), DEVICES)
    table = owners(problem, variant.placement)
    adaptive = variant.stale_threshold is not None
    plan = planned(problem, table, adaptive=adaptive)
    assert scaling.without_reduce(counts) == scaling.without_reduce(plan)
    reduced = [c.bytes for c in counts if c.kind == "all-reduce" and c.loops == 1]
    gradients = [c.bytes for c in plan if c.kind == "all-reduce"]
    # Every parameter of this network belongs to a layer with curvature.
    assert reduced == gradients
    assert bool(gradients) == (variant.placement != "memory")
    assert set(table.gathered) == PLACED[variant.placement]
    assert seconds > 0

    mesh = sharding.make_mesh(jax.devices()[:DEVICES])
    tx = scaling.optimizer(problem.layers, DEVICES, variant)
    params, batch = _ones((problem.params, problem.batch(2 * DEVICES)))
    model_state = jax.tree.map(jnp.zeros_like, _ones(problem.model_state))
    rng = jax.random.key(0)
    state = training.init_state(tx, params, model_state, rng, mesh)
    along = sharding.PartitionSpec("data")
    batch = jax.device_put(batch, sharding.NamedSharding(mesh, along))
    state, _ = compiled(state, batch)
    report = state.opt_state[0].report  # everything is due at the first step
    reduced = [n * c.bytes for c, n in counts.items() if c[::2] == (KINDS[0], 2)]
    assert sum(reduced) == np.sum(report.statistic_bytes)
    whole, nothing = (step_bytes(counts, runs_of(table), due) for due in (True, False))
    inverses = sum(whole[kind][1] - nothing[kind][1] for kind in KINDS[1:3])
    assert inverses == report.inverse_bytes
    placed = sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.opt_state)
    )
    assert placed == scaling.state_bytes(problem, DEVICES, variant)


def _ones(tree):
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), tree)


def test_longest_first_is_at_least_as_even_as_a_split(problem):
    layers = layer_table.configured(problem.layers.preconditioned)
    split = scaling.contiguous(layers, 2)
    table = owners(problem, "memory", 2)
    assert split.sum() == table.work().sum()
    assert table.work().sum(1).max() <= split.max()


def test_owners_apply_less_than_everybody(problem):
    everybody = precondition_flop(owners(problem, "comm"))
    own = precondition_flop(owners(problem, "memory"))
    assert everybody / DEVICES <= own < everybody
    one = precondition_flop(owners(problem, "memory", 1))
    assert one == everybody


def test_the_model_on_one_device_sends_nothing(problem):
    one, some, full = (
        model_seconds(problem, owners(problem, "comm", devices), Machine(), share)
        for devices, share in ((1, 1.0), (DEVICES, 0.5), (DEVICES, 1.0))
    )
    assert one["communication"] == 0
    assert min(one.values()) >= 0
    assert some["inversion"] == full["inversion"] / 2
    assert 0 < some["communication"] < full["communication"]


def test_the_command_prints_tables(tmp_path, monkeypatch, capsys, problem):
    monkeypatch.setattr(scaling, "DEVICES", (1, 4))
    monkeypatch.setattr(scaling, "TABLED", (4,))
    kinds = dict.fromkeys(KINDS, (1, 10**6))
    record = {
        "devices": 4,
        "stale_threshold": 0.1,
        "placement": "comm",
        "seconds": 1.0,
        "temporary_bytes": 10**6,
        "as_planned": False,
        "all": kinds,
        "nothing": dict.fromkeys(KINDS, (0, 0)),
    }
    (tmp_path / "scaling_4_x.json").write_text(json.dumps(record))
    periodic = record | {"stale_threshold": None, "seconds": 77.0}
    (tmp_path / "scaling_4_y.json").write_text(json.dumps(periodic))
    scaling.main([], lambda: problem, tmp_path)
    printed = capsys.readouterr().out
    assert "by a model, not measured: Machine(" in printed
    place = "| 4 | comm NOT AS PLANNED"
    assert f"{place} | nothing | {'0.0 (0) | ' * 4}0.0 | 1 | 1 |" in printed
    # 0.75 + 0.75 + 3 + 1.5 MB around a ring.
    assert f"{place} | all | {'1.0 (1) | ' * 4}6.0 |  |  |" in printed
    assert "| 4 | comm | 6.0 | 1.4 | 0.9 | 0.3 | 0.5 | 0.0 |" in printed
    # Those without a record are planned.
    for placement in ("0.5", "memory"):
        assert f"| 4 | {placement} | all | 0.0 (" in printed
    assert "77" not in printed


def test_compiling_writes_records(tmp_path, monkeypatch, capsys, problem):
    monkeypatch.setattr(jax.config, "update", lambda *args: None)  # devices are chosen
    monkeypatch.setattr(scaling, "VARIANTS", (scaling.Variant(0.5),))
    scaling.main(["--compile", str(DEVICES)], lambda: problem, tmp_path)
    record = json.loads((tmp_path / "scaling_4_adaptive_0.5.json").read_text())
    assert record["as_planned"]
    assert "adaptive\n\n| devices |" in capsys.readouterr().out
