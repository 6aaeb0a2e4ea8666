"""The benchmark of LARS and NLCG, whole, on a network that compiles in seconds.

Nothing is asserted of the times themselves.
"""

import json

import numpy as np
import pytest

from benchmarks import first_order

NAMES = ["SGD", "LARS", "optax.lars", "NLCG", "NLCG, Polak-Ribière"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("first_order") / "record.json"
    arguments = ["--workload", "tiny", "--steps", "3", "--output", str(path)]
    record = first_order.main(arguments)
    assert json.loads(path.read_text("utf-8")) == record
    return record


def test_every_optimizer_trains_beside_the_others(run):
    assert [entry["name"] for entry in run["contestants"]] == NAMES
    for entry in run["contestants"]:
        assert len(entry["seconds"]) == 3
        assert len(entry["losses"]) == 4
        assert np.all(np.diff(entry["losses"]) < 0)
        assert entry["losses"][0] == run["contestants"][0]["losses"][0]
    base, *others = run["contestants"]
    for entry in others:
        total = sum(entry["seconds"]) / sum(base["seconds"])
        assert entry["ratios"]["total"]["median"] == pytest.approx(total)


def test_states_have_the_vectors_that_the_docs_state(run):
    size = run["contestants"][0]["state_bytes"]  # one velocity
    vectors = [round(e["state_bytes"] / size) for e in run["contestants"]]
    assert vectors == [1, 1, 1, 3, 4]


def test_the_table_has_a_line_for_each(run):
    text = first_order.table(run)
    for name in NAMES[1:]:
        assert text.count(f"{name}  ") >= 1
    assert "tiny: ResNet + BatchNorm" in text
    assert "3 steps" in text
