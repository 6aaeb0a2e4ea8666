"""The benchmark of a wide head; whole, on a narrow one, if slow."""

import pytest

from benchmarks import wide_head


def test_the_table_is_of_all_that_was_measured():
    def run(factors, state, peak, seconds):
        return {
            "factors": factors,
            "state_bytes": state,
            "peak_bytes": peak,
            "seconds": seconds,
            "losses": [2.5, 1.0],
        }

    runs = {
        "SGD": run([], 1e6, 2e9, [0.1, 0.1]),
        # Every second step inverts: the median of 0.3, 0.2 and 0.4.
        "three factors": run([36, 4, 5], 2e6, 3e9, [0.4, 0.2, 0.2, 0.2, 0.6, 0.2]),
    }
    text = wide_head.table({"channels": 4, "outputs": 5, "runs": runs})
    assert "144 inputs and 5 outputs" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "SGD 1 2,000 100 2.500 → 1.000" in lines
    assert "three factors 36 4 5 2 3,000 300 2.500 → 1.000" in lines


@pytest.mark.slow
def test_every_mode_trains(run_command):
    record = run_command(wide_head.main, channels=4, outputs=8)
    sgd, three, full = (record["runs"][mode] for mode in wide_head.MODES)
    assert (sgd["factors"], full["factors"]) == ([], [145, 8])
    assert three["factors"] == [36, 4, 8, 8]
    for run in (sgd, three, full):
        assert len(run["losses"]) == wide_head.STEPS
        assert len(run["seconds"]) == wide_head.STEPS - 2
        assert run["losses"][-1] < run["losses"][0]
        assert run["peak_bytes"] > 1e7
    assert sgd["state_bytes"] < three["state_bytes"] < full["state_bytes"]
