"""What the tests of benchmarks share: each runs its command whole, on a tiny problem.

Nothing is asserted of times and rates themselves.
"""

import json

import pytest

from benchmarks import contestants
from benchmarks.workloads import tiny


@pytest.fixture(scope="package")
def setup():
    return contestants.set_up(tiny())


@pytest.fixture(scope="package")
def run_command(tmp_path_factory):
    """Runs a ``main`` and returns its record, as written."""

    def run(main, *arguments, **sizes):
        path = tmp_path_factory.mktemp("benchmark") / "record.json"
        record = main([*arguments, "--output", str(path)], **sizes)
        assert json.loads(path.read_text("utf-8")) == record
        assert {"processor", "cores", "versions", "date"} <= record.keys()
        assert record["command"].startswith("python -m benchmarks.")
        json.dumps(record, allow_nan=False)
        return record

    return run


@pytest.fixture(scope="package")
def check_contestants():
    """Checks that all named contestants ran so many steps and learned."""

    def check(entries, names, steps, warm_up):
        assert [e["name"] for e in entries] == names
        for e in entries:
            assert len(e["losses"]) == warm_up + steps
            assert e["losses"][-1] < e["losses"][0]
            # Taken before any update: all start from the same parameters.
            assert e["losses"][0] == pytest.approx(entries[0]["losses"][0], rel=1e-4)
            assert e["compile_seconds"] > 0
            assert e["state_bytes"] > 0
            assert e["temporary_bytes"] >= 0

    return check
