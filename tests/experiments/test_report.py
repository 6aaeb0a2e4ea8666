"""Reports are made from what runs leave, also from runs that died."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest

from experiments import figures, metrics, report, runs
from experiments.settings import Config, Kfac, Sgd

STEPS, EPOCH = 40, 10
CURVATURE = {
    "refreshed_bytes": 0.5, "inversions": 4.0, "inverse_age": 1.5, "boosted": 0.0,
    "rejected": 3.0,
}  # fmt: skip


def leave_run(directory, config, start=0.0, curvature=True):
    """The files of a run in which everything is known."""
    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.time, "perf_counter", lambda: now[0])
        runs.claim(directory, config, resume=False)
        with metrics.Reporter(
            directory, name="run", total_steps=STEPS, batch_size=64,
            steps_per_epoch=EPOCH,
        ) as reporter:  # fmt: skip
            for step in range(1, STEPS + 1):
                with reporter.phase("input"):
                    now[0] += 0.5
                with reporter.phase("step"):
                    now[0] += 20.0 if step == 1 else 1.5
                found = {"loss": 3.0 / step, "accuracy": start + step / 200}
                if curvature:
                    found |= {"refreshed": float(step % 4 == 1), **CURVATURE}
                    found |= {
                        "inverse_age_max": step % 8,
                        "sent_bytes": 2e6 * (step % 2),
                    }
                reporter.train(step, [found])
                if step % EPOCH == 0:
                    with reporter.phase("evaluate"):
                        now[0] += 3.0
                    accuracy = start + step / 100 - 0.2 * (step == STEPS)
                    reporter.test(step, {"loss": 2.0 / step, "accuracy": accuracy})
                if step == 15:
                    reporter.event("checkpoint skipped: a | b")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Two runs, one of which has a report."""
    root = tmp_path_factory.mktemp("runs")
    kfac = Config(kfac=Kfac(damping=1e-2), batch_size=64, sgd=Sgd(momentum=0.8))
    leave_run(root / "kfac", kfac, start=0.2)
    runs.write_facts(
        root / "kfac", devices=2, parameters=1234, steps=STEPS, image_shape=(24, 24, 3),
        memory_plan={"state": 2.5e6, "temporaries": None},
    )  # fmt: skip
    sgd = Config(optimizer="sgd", batch_size=64)
    leave_run(root / "sgd", sgd, curvature=False)
    report.write(root / "kfac")
    return root


@pytest.fixture
def text(kept):
    return (kept / "kfac" / "report.md").read_text()


@pytest.fixture
def copy(kept, tmp_path):
    """A run that a test may spoil."""
    shutil.copytree(kept / "kfac", tmp_path / "kfac")
    return tmp_path / "kfac"


def spoil(directory, change):
    """Passes the records of a run through a function; None drops one."""
    path = directory / "metrics.jsonl"
    changed = map(change, metrics.read_json_lines(path))
    path.write_text("".join(json.dumps(r) + "\n" for r in changed if r))


def rows(text):
    """The rows of a page's tables, by their first cell."""
    found = re.findall(r"^\| (.*?) \| (.*) \|$", text, flags=re.MULTILINE)
    return {first: rest.split(" | ") for first, rest in found}


def test_the_report_says_what_came_of_the_run(text):
    assert text.startswith("# resnet8 on strokes/20: kfac, batch 64\n\n|")
    results, rest = text.split("![")
    found = {first: rest[0] for first, rest in rows(results).items()}
    assert re.fullmatch(r"[\d.]+ [MG]B", found.pop("memory of the host, peak"))
    assert found == {
        "": "",
        "---": "---",
        "steps": "40 of 40",
        "test accuracy at the end": "40.0% (step 40)",
        "best test accuracy": "50.0% (step 30)",
        "test loss at the end": "0.050",
        "training time, with compilation": "0:01:38",  # 20 + 39·1.5 + 40·0.5
        "speed": "32 images/s (16 per device)",
        "statistics renewed": "25.0% (50.0% of their bytes)",
        "sent by a device, a step": "1 MB",
        "statistics and inverses that were not finite": "3",
        "layers with raised damping at the end": "0",
    }
    facts = {first: rest[0] for first, rest in rows(rest).items()}
    assert (facts["parameters"], facts["image shape"]) == ("1234", "[24, 24, 3]")
    assert facts["memory plan: state"] == "2.5 MB"
    assert "memory plan: temporaries" not in facts
    assert re.search(r"^```\npython ", text, flags=re.MULTILINE)


def test_the_report_tells_times_settings_and_events(text):
    _, time, _, settings, events = text.split("\n## ")
    found = rows(time)
    assert found["compile"] == ["20.0", "18.1%", ""]
    assert found["input"] == ["20.0", "18.1%", "500.00"]
    assert found["step"] == ["58.5", "52.9%", "1,462.50"]
    assert found["evaluate"] == ["12.0", "10.9%", ""]
    assert rows(settings) == {  # and none of another optimizer
        "setting": ["value", "default"],
        "---": ["--:", "--:"],
        "`kfac.damping`": ["`0.01`", "`0.001`"],
        "`batch_size`": ["`64`", "`2048`"],
    }
    assert "| 15 | 48.5 s | checkpoint skipped: a \\| b |" in events


def test_the_picture_shows_the_run(kept, copy):
    blue = (0xB2, 0x72, 0x00)
    image = cv2.imread(str(kept / "kfac" / "report.png")).astype(int)
    drawn = np.abs(image - blue).max(-1) < 8
    panels = [half for row in np.split(drawn, 4) for half in np.array_split(row, 2, 1)]
    assert [panel.sum() > 500 for panel in panels] == [True] * 7 + [False]
    spoil(copy, lambda r: {k: v for k, v in r.items() if k != "images_per_second"})
    report.write(copy)
    fewer = cv2.imread(str(copy / "report.png"))
    assert len(fewer) / len(image) == 3 / 4, "no panel of what was not measured"


def test_bytes_are_drawn_in_the_unit_of_the_axis(copy, monkeypatch):
    drawn, plot = [], figures.plot

    def noted(panel, index, x, y, label, *, marked):
        drawn.append(max(y))
        plot(panel, index, x, y, label, marked=marked)

    monkeypatch.setattr(figures, "plot", noted)
    report.write(copy)
    assert drawn[-3] == 2.0, "MB sent"
    assert 0.05 < drawn[-1] < 100, "GiB of memory"


def test_a_run_that_goes_on_is_reported_as_far_as_it_came(copy):
    spoil(copy, lambda record: record if record["step"] <= 25 else None)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 26, "lo')
    assert "| steps | 25 of 40 |" in report.write(copy).read_text()


def test_a_run_of_which_little_is_known_is_reported(copy):
    for name in ("run.json", "config.json"):
        (copy / name).unlink()
    known = {"kind", "step", "seconds", "loss", "accuracy"}
    spoil(copy, lambda r: {k: r[k] for k in known} if r["kind"] != "event" else None)
    text = report.write(copy).read_text()
    assert text.startswith("# kfac\n\n|")
    assert "| steps | 40 |" in text
    assert "## " not in text


def test_a_number_that_was_not_finite_is_no_obstacle(copy):
    spoil(
        copy, lambda r: r | ({"loss": None, "accuracy": None} if r["step"] > 30 else {})
    )
    found = report.results(report.read(copy))
    assert found["test accuracy at the end"] == "50.0% (step 30)"
    assert found["best test accuracy"] == "50.0% (step 30)"


def test_the_first_layer_that_was_not_finite_is_named(copy):
    named = {7: "stage2/Conv_0", 10: "head"}

    def change(record):
        if record["kind"] == "train" and record["step"] in named:
            record["layer_not_finite"] = named[record["step"]]
        return record

    spoil(copy, change)
    found = rows(report.write(copy).read_text())
    assert found["first layer with numbers that were not finite"] == [
        "stage2/Conv_0 (step 7)"
    ]


@pytest.mark.parametrize("kind", ["train", "test"])
def test_a_run_too_young_for_a_report_is_refused(copy, kind):
    spoil(copy, lambda record: record if record["kind"] != kind else None)
    with pytest.raises(ValueError, match=f"must hold a record of kind '{kind}'"):
        report.write(copy)


def test_runs_are_compared(kept, capsys):
    report.main([str(kept / name) for name in ("kfac", "sgd")])
    found = rows(capsys.readouterr().out)
    assert found[""] == [str(kept / "kfac"), str(kept / "sgd")]
    assert found["best test accuracy"] == ["50.0% (step 30)", "30.0% (step 30)"]
    assert found["statistics renewed"] == ["25.0% (50.0% of their bytes)", ""]
    assert "memory of the device, peak" not in found, "no run tells it"


def test_the_command_writes_a_report(copy, capsys):
    report.main([str(copy)])
    assert capsys.readouterr().out == f"{copy / 'report.md'}\n"
    with pytest.raises(SystemExit, match=r"error: directory=.*\.\. must hold metrics"):
        report.main([str(copy / "..")])


def test_the_settings_of_the_optimizer_and_its_preconditioner_are_told(copy):
    config = {"optimizer": "lars", "lars": {"after_kfac": True}, "recipe": {"a": 1}}
    config |= {"sgd": {"momentum": 7}, "kfac": {"damping": 7}, "data_dir": "x"}
    names = [name for name, *_ in report._changed(config)]
    told = ["optimizer", "lars.after_kfac", "recipe.a", "kfac.damping"]
    assert names == [f"`{name}`" for name in told]


def test_durations():
    said = [report._duration(seconds) for seconds in (0.1234, 59, 60, 3723.4)]
    assert said == ["0.123 s", "59 s", "0:01:00", "1:02:03"]


def test_means_over_steps_weigh_records_by_their_steps():
    records = [{"step": 1, "x": 8.0}, {"step": 4, "x": 4.0}]
    assert report._mean_over_steps(records, "x") == (1 * 8 + 3 * 4) / 4


def test_long_curves_are_thinned_to_means():
    x, y = map(report.thinned, (range(1000), [i % 4 for i in range(1000)]))
    assert len(x) == len(y) == 250
    assert set(y) == {1.5}
    assert x[:2] == [1.5, 5.5]
    assert report.thinned([1, 2]) == [1, 2]
