"""The reader of compiled programs: a program of this machine, and lines of a TPU's."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import lbopt
from benchmarks import aot_figures, aot_program
from benchmarks.aot_figures import AVERAGING, INVERSION, REST, STATISTICS, Collective
from lbopt import sharding

DEVICES = 4


def averaged(x):
    return jax.lax.psum(x, "data")


def on_device(x):
    y = averaged(x)
    y = jax.lax.fori_loop(2, 9, lambda _, y: jnp.tanh(y @ y), y)
    y = jax.lax.cond(y[0, 0] > 0, lambda y: y @ y, lambda y: y, y)
    return y, jax.lax.psum_scatter(x, "data"), jax.lax.all_gather(x[:, :1], "data")


@pytest.fixture(scope="module")
def program():
    mesh = sharding.make_mesh(jax.devices()[:DEVICES])
    out = P(), P("data"), P()
    step = jax.jit(
        jax.shard_map(
            on_device, mesh=mesh, in_specs=P("data"), out_specs=out, check_vma=False
        )
    )
    x = jnp.ones((DEVICES * DEVICES, DEVICES))
    return aot_program.parse(step.lower(x).compile().as_text())


def test_a_program_of_this_machine_is_read(program, monkeypatch):
    # A caller's file decides where the innermost is not listed.
    here = "benchmarks/test_aot_program.py"
    monkeypatch.setattr(
        aot_figures, "PARTS", {f"{here}:averaged": AVERAGING, here: STATISTICS}
    )
    found = aot_figures.figures(program)
    assert found.instructions["while"] == 1
    assert found.instructions["conditional"] == 1
    # Each device puts in a square of float32, or one column of it.
    assert found.collectives == [
        Collective("all-gather", STATISTICS, 1, 16, 4),
        Collective("all-reduce", AVERAGING, 1, 64, 16),
        Collective("reduce-scatter", STATISTICS, 1, 64, 16),
    ]
    assert found.statistics_all_reduce == 16
    assert found.cycles == {}  # XLA:CPU estimates none
    assert found.open_loops == 0


def test_a_loop_runs_from_its_start_to_its_bound(program):
    [(computation, loop)] = [
        (computation, one)
        for computation, one, _ in aot_figures.scheduled(program)
        if one.opcode == "while"
    ]
    assert aot_figures.rounds(program, computation, loop) == 7


TPU = """
HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/lbopt/lbopt/kfac/inverses.py"
2 "/home/me/lbopt/lbopt/kfac/factors.py"
3 "/home/me/lbopt/lbopt/curvature/capture.py"
4 "/home/me/model.py"

FunctionNames
1 "invert"
2 "tap"
3 "Interceptor.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}
2 {file_name_id=2 function_name_id=1 line=1}
3 {file_name_id=3 function_name_id=2 line=1}
4 {file_name_id=3 function_name_id=3 line=1}
5 {file_name_id=4 function_name_id=1 line=1}

StackFrames
1 {file_location_id=4 parent_frame_id=1}
2 {file_location_id=5 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}
4 {file_location_id=2 parent_frame_id=1}
5 {file_location_id=1 parent_frame_id=1}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%a, %b), metadata={op_name="add" stack_frame_id=4}
}

%all-reduce-scatter (input: f32[4,8,128]) -> f32[8,128] {
  %input = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[4,8,128]{2,1,0:T(8,128)} all-reduce(%input), to_apply=%sum
  ROOT %slice = f32[8,128]{1,0} dynamic-slice(%all-reduce.1), sizes={8,128}
}

%body (p: (s32[], f32[8,128], s32[])) -> (s32[], f32[8,128], s32[]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0}, /*index=2*/s32[]) parameter(0)
  %x = f32[8,128]{1,0} get-tuple-element(%p), index=1
  %copy.1 = f32[8,128]{1,0} copy(%x), backend_config={"estimated_cycles":"10"}
  ROOT %t = (s32[], f32[8,128], s32[]) tuple(%copy.1)
}

%until (p: (s32[], f32[8,128], s32[])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0}, /*index=2*/s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=2
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%forever (p: (s32[], f32[8,128], s32[])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0}, /*index=2*/s32[]) parameter(0)
  ROOT %go = pred[] get-tuple-element(%p), index=0
}

%cheap (x: f32[8,128]) -> f32[8,128] {
  ROOT %x = f32[8,128]{1,0} parameter(0)
}

%dear (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  ROOT %f = f32[8,128]{1,0} fusion(%x), kind=kLoop, calls=%inner, \
backend_config={"estimated_cycles":"7"}
}

%inner (x: f32[8,128]) -> f32[8,128] {
  ROOT %x = f32[8,128]{1,0} copy(%x), backend_config={"estimated_cycles":"1000"}
}

ENTRY %main (x: f32[4,8,128], y: bf16[5]) -> f32[8,128] {
  %x = f32[4,8,128]{2,1,0} parameter(0), metadata={op_name="jit(step)/(odd) {name}"}
  %y = bf16[5]{0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %six = s32[]{:T(128)} constant(6)
  %scatter = f32[8,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
  %start = (bf16[5]{0}, bf16[20]{0}) all-gather-start(%y), dimensions={0}
  %done = bf16[20]{0} all-gather-done(%start)
  %ar = (f32[8,128]{1,0}, bf16[5]{0}) all-reduce(%scatter, %y), to_apply=%sum, \
metadata={op_name="ar" stack_frame_id=5}
  %state = (s32[], f32[8,128], s32[]) tuple(%zero, %scatter, %six)
  %w1 = (s32[], f32[8,128], s32[]) while(%state), condition=%until, body=%body, \
metadata={op_name="jit(step)/while" stack_frame_id=5}
  %w2 = (s32[], f32[8,128], s32[]) while(%w1), condition=%forever, body=%body
  %c = f32[8,128]{1,0} conditional(%six, %scatter, %scatter), \
branch_computations={%cheap, %dear}, metadata={op_name="cond" stack_frame_id=3}
  %forward = f32[8,128]{1,0} convolution(%c), metadata={op_name="conv" \
stack_frame_id=2}, backend_config={"estimated_cycles":"100"}
  ROOT %out = f32[8,128]{1,0} copy(%forward)
}
"""


def test_a_program_of_a_tpu_is_read():
    found = aot_figures.figures(aot_program.parse(TPU))
    assert found.collectives == [
        # The operand alone, where the type of an asynchronous one has both.
        Collective("all-gather", REST, 1, 10, 5),
        Collective("all-reduce", INVERSION, 1, 4 * 1024 + 10, 1024 + 5),
        # An all-reduce in a fusion, which only its sum can place.
        Collective("reduce-scatter", AVERAGING, 1, 4 * 4096, 4096),
    ]
    assert found.statistics_all_reduce == 0  # the only one is of inverses
    assert found.cycles == {
        INVERSION: 6 * 10,  # six rounds of a copy that has no place of its own
        STATISTICS: 7,  # the dearer branch, without what is inside of its fusion
        REST: 10 + 100,  # a loop without a known bound; and the model below the tap
    }
    assert found.open_loops == 1
    assert found.instructions["while"] == 2
    assert found.instructions["fusion"] == 2


GPU = """
StackFrames

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b), metadata={op_name="add" stack_frame_id=4}
}

%concatenated (a: f32[100], b: f32[3], c: f32[7]) -> f32[110] {
  %a = f32[100]{0} parameter(0)
  %b = f32[3]{0} parameter(1)
  %c = f32[7]{0} parameter(2)
  ROOT %all = f32[110]{0} concatenate(%a, %b, %c), dimensions={0}
}

ENTRY %main (x: f32[10,10], y: f32[3]) -> f32[110] {
  %x = f32[10,10]{1,0} parameter(0), metadata={op_name="x"}
  %y = f32[3]{0} parameter(1), metadata={op_name="y"}
  %gradient = f32[10,10]{1,0} negate(%x), metadata={op_name="g" stack_frame_id=2}
  %flat = f32[100]{0} bitcast(%gradient)
  %statistic = f32[3]{0} negate(%y), metadata={op_name="s" stack_frame_id=4}
  %inverse = f32[7]{0} slice(%flat), metadata={op_name="i" stack_frame_id=5}
  %joined = f32[110]{0} fusion(%flat, %statistic, %inverse), kind=kLoop, \
calls=%concatenated
  ROOT %out = f32[110]{0} all-reduce-start(%joined), to_apply=%sum
}
"""


def test_a_combined_collective_is_divided_by_what_made_its_operands():
    # Frames of the program above; its sum is that of the statistics, as shared.
    tables = TPU[: TPU.index("%sum")].rpartition("StackFrames\n")
    text = tables[0] + GPU.replace("StackFrames", f"StackFrames\n{tables[2].strip()}")
    found = aot_figures.figures(aot_program.parse(text))
    assert found.collectives == [
        Collective("all-reduce", AVERAGING, 0, 12, 3),
        Collective("all-reduce", REST, 1, 400, 100),
        Collective("all-reduce", INVERSION, 0, 28, 7),
    ]
    assert found.statistics_all_reduce == 3


def test_every_part_has_a_file():
    root = pathlib.Path(lbopt.__file__).parent
    places = (place.partition(":")[0] for place in aot_figures.PARTS)
    files = {place for place in places if (root / place).exists()}
    found = {
        part for at, part in aot_figures.PARTS.items() if at.split(":")[0] in files
    }
    assert found == set(aot_figures.PART_NAMES) - {REST}
