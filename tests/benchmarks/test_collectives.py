"""Compiled collectives: the benchmark's reading of programs, and the page's table."""

import pathlib
import subprocess
import sys

import pytest

from benchmarks.collectives import FORMS, Traffic, row, traffic

ROOT = pathlib.Path(__file__).parents[2]
# As XLA:TPU writes them: a fused reduce-scatter of 24 padded rows, its permutation, a
# plain one, an all-reduce, an all-gather and an all-to-all.
PROGRAM = """
%region_0.0 (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter (input: f32[20,128]) -> f32[6,128] {
  %all-reduce.1 = f32[24,128]{1,0:T(8,128)} all-reduce(%pad), channel_id=2, \
replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%region_0.0
  ROOT %dynamic-slice.1 = f32[6,128]{1,0} dynamic-slice(%all-reduce.1, %i, %zero)
}

ENTRY %main.9_spmd (param: f32[20,128]) -> f32[5,128] {
  %fusion = f32[6,128]{1,0} fusion(%param), kind=kCustom, calls=%all-reduce-scatter
  %collective-permute-start = (f32[2,128]{1,0:S(1)}, f32[2,128]{1,0}, u32[], u32[]) \
collective-permute-start(%slice), source_target_pairs={{0,1},{1,2}}
  %collective-permute-done = f32[2,128]{1,0} collective-permute-done(%start)
  %rs = f32[1,5,128]{2,1,0} reduce-scatter(%x), replica_groups={{0,2},{1,3}}, \
dimensions={0}, to_apply=%region_0.0
  %ar = f32[8]{0} all-reduce(%y), replica_groups={{0,1,2,3}}, to_apply=%region_0.0
  %ag = bf16[2,10]{1,0} all-gather(%z), replica_groups={{0,1},{2,3}}, dimensions={0}
  %aa = f32[4,3]{1,0} all-to-all(%w), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""


def test_collectives_are_read_from_text():
    kinds = {"all-reduce": 1, "reduce-scatter": 2, "all-gather": 1, "all-to-all": 1}
    fused, permuted, scattered = 24 * 128 * 4 * 3 / 4, 2 * 128 * 4, 10 * 128 * 4 / 2
    reduced, gathered, exchanged = 2 * 8 * 4 * 3 / 4, 20 * 2 / 2, 12 * 4 * 3 / 4
    sent = fused + permuted + scattered + reduced + gathered + exchanged
    assert traffic(PROGRAM) == Traffic(kinds, sent)
    for line, message in (
        ("ENTRY\n%a = f32[8] all-reduce(%y), replica_groups=[1,4]<=[4]", "groups of"),
        ("ENTRY\n%a = f32[8] all-gather-start(%y), replica_groups={{0,1}}", "collect"),
    ):
        with pytest.raises(ValueError, match=f"cannot read the {message}"):
            traffic(line)


def test_a_row_of_the_table():
    found = {"a": Traffic({"all-gather": 1}, 6.0), "b": Traffic({"all-reduce": 2}, 4.0)}
    expected = "| v5e 2x2 | all-gather 0.75 | 2 all-reduce 0.50 |"
    assert row("v5e:2x2", found, numbers=2) == expected


@pytest.mark.slow
def test_the_page_says_what_the_compiler_does():
    pytest.importorskip("libtpu", reason="needs XLA:TPU: pip install '.[aot-tpu]'")
    # In a process of its own: the compiler reads its environment when it starts.
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.collectives", "v5e:2x2", "v5e:4x4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    page = (ROOT / "docs/design/distribution.md").read_text().splitlines()
    lines = [x for x in result.stdout.splitlines() if x.startswith("| v5e")]
    assert len(lines) == 2
    assert all(len(x.split("|")) == len(FORMS) + 3 for x in lines)
    assert set(lines) <= set(page)
