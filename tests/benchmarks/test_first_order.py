"""The benchmark of LARS and NLCG."""

import numpy as np
import pytest

from benchmarks import first_order
from benchmarks.workloads import tiny

NAMES = ["SGD", "LARS", "optax.lars", "NLCG", "NLCG, Polak-Ribière"]


def test_every_optimizer_trains_beside_the_others(run_command, check_contestants):
    record = run_command(first_order.main, "--steps", "3", make=tiny)
    entries = record["contestants"]
    check_contestants(entries, NAMES, steps=3, warm_up=1)
    base = entries[0]
    for entry in entries:
        assert len(entry["seconds"]) == 3
        assert np.all(np.diff(entry["losses"]) < 0)
        total = sum(entry["seconds"]) / sum(base["seconds"])
        assert entry["ratios"]["total"]["median"] == pytest.approx(total)
    # As many vectors as the docs state; SGD has one, the velocity.
    vectors = [round(e["state_bytes"] / base["state_bytes"]) for e in entries]
    assert vectors == [1, 1, 1, 3, 4]
    text = first_order.table(record)
    for name in NAMES[1:]:
        assert text.count(f"\n{name}  ") == 2
    assert "tiny: ResNet + BatchNorm" in text
    assert "3 steps" in text
