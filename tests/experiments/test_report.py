"""Reports are made from what runs leave, also from runs that died."""

import io
import json
import re
import shutil

import cv2
import numpy as np
import pytest

from experiments import (
    comparison,
    markdown,
    metrics,
    phases,
    report,
    report_figures,
    run_facts,
    run_records,
    runs,
)
from experiments.settings import Config, Kfac, Sgd

STEPS, EPOCH = 40, 10


def leave_run(directory, config, *, start=0.0, stop=STEPS, curvature=True):
    """The files of a run in which everything is known."""
    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases.time, "perf_counter", lambda: now[0])
        runs.claim(directory, config, resume=False)
        with metrics.Reporter(
            directory, name=config.optimizer, total_steps=STEPS, batch_size=64,
            steps_per_epoch=EPOCH, devices=2, stream=io.StringIO(),
        ) as reporter:  # fmt: skip
            for step in range(1, stop + 1):
                with reporter.phase("input"):
                    now[0] += 0.5
                with reporter.phase("step"):
                    now[0] += 20.0 if step == 1 else 1.5
                reporter.train(step, train_metrics(step, start, curvature))
                if step % EPOCH == 0:
                    with reporter.phase("evaluate"):
                        now[0] += 3.0
                    accuracy = start + step / 100 - 0.2 * (step == STEPS)
                    reporter.test(step, {"loss": 2.0 / step, "accuracy": accuracy})
                if step == 15:
                    reporter.event("checkpoint skipped: a | b")


def train_metrics(step, start, curvature):
    found = {"loss": 3.0 / step, "accuracy": start + step / 200}
    if curvature:
        found |= {
            "refreshed": float(step % 4 == 1), "refreshed_bytes": 0.5,
            "inversions": 4.0, "inverse_age": 1.5, "inverse_age_max": float(step % 8),
            "sent_bytes": 2e6 * (step % 2), "boosted": 0.0, "rejected": 3.0,
        }  # fmt: skip
    return found


def facts(directory, **more):
    found = run_facts.start_facts(
        devices=2,
        parameters=1_234_567,
        steps=STEPS,
        steps_per_epoch=EPOCH,
        data={"train_images": 640, "classes": 20, "image_shape": (24, 24, 3)},
        memory_plan={"state": 2.5e6},
    )
    run_facts.write(directory, found | more)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Two runs, one of which has a report."""
    root = tmp_path_factory.mktemp("runs")
    kfac = Config(kfac=Kfac(damping=1e-2), batch_size=64, label_smoothing=0.1)
    leave_run(root / "kfac", kfac, start=0.2)
    facts(root / "kfac", command="python train.py --seed 3")
    sgd = Config(optimizer="sgd", sgd=Sgd(momentum=0.8), batch_size=64)
    leave_run(root / "sgd", sgd, curvature=False)
    report.write(root / "kfac", target=0.35)
    return root


@pytest.fixture
def copy(kept, tmp_path):
    """A run that a test may spoil."""
    shutil.copytree(kept / "kfac", tmp_path / "kfac")
    return tmp_path / "kfac"


def spoil(directory, keep):
    """Leaves those lines of a run's records that a function chooses."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if keep(json.loads(line))))


def rows(text):
    """The rows of a page's tables, by their first cell."""
    found = re.findall(r"^\| (.+?) \| (.*) \|$", text, flags=re.MULTILINE)
    return {first: rest.split(" | ") for first, rest in found}


def test_the_report_says_what_came_of_the_run(kept):
    text = (kept / "kfac" / "report.md").read_text()
    assert text.startswith("# resnet8 on strokes/20: kfac, batch 64\n\nFinished: 40")
    found = {first: rest[0] for first, rest in rows(text).items()}
    assert found["test accuracy at the end"] == "40.0% (step 40, epoch 4)"
    assert found["best test accuracy"] == "50.0% (step 30)"
    assert found["test accuracy of 35.0%"] == "step 20"
    assert found["test loss at the end"] == "0.050"
    assert found["training time, with compilation"] == "0:01:38"  # 20 + 39·1.5 + 40·0.5
    assert found["speed"] == "32 images/s (16 a device)"
    assert found["statistics renewed"] == "25.0% (50.0% of their bytes)"
    assert found["sent by a device, a step"] == "1 MB"
    assert found["data"] == "strokes/20, 640 training images, 20 classes, 24 × 24 × 3"
    assert found["model"] == "resnet8, 1,234,567 parameters"
    assert found["memory plan: state"] == "2.5 MB"
    assert "2 × cpu (cpu), 1 process" in found["hardware"]
    assert "python train.py --seed 3" in text
    assert "not finite: 3." in text


def test_the_report_says_where_the_time_went(kept):
    text = (kept / "kfac" / "report.md").read_text()
    found = rows(text[: text.index("## Events")])
    assert found["first step, compiling"] == ["20.0", "18.1%", ""]
    assert found["waiting for input"] == ["20.0", "18.1%", "500.00"]
    assert found["step"] == ["58.5", "52.9%", "1,462.50"]
    assert found["evaluation"] == ["12.0", "10.9%", ""]


def test_curves_may_leave_out_compilation(kept):
    run = run_records.read(kept / "kfac")
    seconds, _ = run.curve("test", "accuracy", "seconds")
    assert seconds[:2] == [20 + 9 * 1.5 + 10 * 0.5, 20 + 19 * 1.5 + 20 * 0.5]
    without, _ = run.curve("test", "accuracy", "after_compiling")
    assert without == [s - 20 for s in seconds]
    axes = report_figures.axes_of([run])
    assert [axis.key for axis in axes] == ["step", "epoch", "after_compiling"]


def test_the_report_tells_events_and_settings(kept):
    text = (kept / "kfac" / "report.md").read_text()
    assert "| 15 | 48.5 s | checkpoint skipped: a \\| b |" in text
    settings = text[text.index("| setting") : text.index("## Events")]
    assert rows(settings) == {
        "setting": ["value", "default"],
        "---": ["--:", "--:"],
        "`kfac.damping`": ["`0.01`", "`0.001`"],
        "`batch_size`": ["`64`", "`2048`"],
        "`label_smoothing`": ["`0.1`", "`0.0`"],
    }


def test_pictures_are_there_and_show_the_run(kept):
    directory = kept / "kfac"
    pictures = re.findall(r"!\[.+\]\((.+)\)", (directory / "report.md").read_text())
    assert pictures == [
        f"report_{name}.png" for name in ("curves", "time", "curvature", "resources")
    ]
    for name in pictures:
        image = cv2.imread(str(directory / name))
        assert min(image.shape[:2]) > 350
        blue = np.abs(image.astype(int) - (0xB2, 0x72, 0x00)).max(-1) < 8
        assert blue.sum() > 500, name
    bar = cv2.imread(str(directory / "report_time.png")).astype(int)
    # Of the upper bar 18% is orange, of the lower one 25%.
    orange = np.abs(bar - (0x00, 0x5E, 0xD5)).max(-1) < 8
    widths = orange.sum(1)
    upper, lower = (
        np.median(w[w > 0]) for w in np.split(widths, [len(widths) * 2 // 7])
    )
    assert upper / lower == pytest.approx(0.181 / 0.255, rel=0.03)


def test_a_run_that_goes_on_is_reported_as_far_as_it_came(copy):
    spoil(copy, lambda record: record["step"] <= 25)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 26, "lo')
    text = report.write(copy).read_text()
    assert "25 of 40 steps: the run goes on, or was stopped." in text
    assert "40.0% (step 20, epoch 2)" in text


def test_a_run_of_which_little_is_known_is_reported(copy):
    for name in ("run.json", "config.json"):
        (copy / name).unlink()
    known = {"kind", "step", "seconds", "loss", "accuracy"}
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k in known}
               for line in lines if '"event"' not in line]  # fmt: skip
    (copy / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text = report.write(copy).read_text()
    assert text.startswith("# kfac\n\n40 steps on record.")
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == ["Curves"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [("test", "no train record.*first step"), ("train", "no test record.*evaluation")],
)
def test_a_run_too_young_for_a_report_is_refused(copy, kind, message):
    spoil(copy, lambda record: record["kind"] == kind)
    with pytest.raises(ValueError, match=message):
        report.write(copy)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        report.write(tmp_path)


def test_a_broken_file_is_named(copy):
    (copy / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        report.write(copy)


def test_a_number_that_was_not_finite_is_no_obstacle(copy):
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    records[-1] |= {"loss": None, "accuracy": None}
    (copy / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found = run_records.summarize(run_records.read(copy))
    assert found.final_accuracy == found.best_accuracy == 0.5, "of step 30"


def test_runs_are_compared(kept, tmp_path, capsys):
    report.main([
        str(kept / "kfac"), str(kept / "sgd"), "--target", "0.25",
        "--output", str(tmp_path / "new"),
    ])  # fmt: skip
    path = tmp_path / "new" / "comparison.md"
    assert capsys.readouterr().out.strip() == str(path)
    found = rows(path.read_text())
    head = found["run"]
    kfac, sgd = (dict(zip(head, found[name], strict=True)) for name in ("kfac", "sgd"))
    assert (kfac["best"], sgd["best"]) == ("50.0%", "30.0%")
    assert (kfac["accuracy at the end"], sgd["accuracy at the end"]) == (
        "40.0%",
        "20.0%",
    )
    assert (kfac["steps to 25.0%"], sgd["steps to 25.0%"]) == ("10", "30")
    assert kfac["time to 25.0%"] == "38.5 s"
    assert kfac["images/s"] == sgd["images/s"] == "32"
    assert (kfac["statistics renewed"], sgd["statistics renewed"]) == ("25.0%", "")
    assert kfac["sent, a step"] == "1 MB"
    assert "device memory" not in head, "no run tells it"
    image = cv2.imread(str(path.with_suffix(".png"))).astype(int)
    for colour in ((0xB2, 0x72, 0x00), (0x00, 0x5E, 0xD5)):
        there = (np.abs(image - colour).max(-1) < 8).sum(0)
        for third in np.array_split(there, 3):
            assert third.sum() > 200, "each run is in each column"


def test_a_comparison_is_put_beside_its_runs(kept, monkeypatch):
    monkeypatch.setattr(report_figures, "draw_curves", lambda runs, path: None)
    path = comparison.write([kept / "kfac", kept / "sgd"])
    assert path == kept.resolve() / "comparison.md"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/kfac", "--output", "x"], "--output is for comparisons"),
        (["{}/kfac", "--target", "70"], r"--target must be in \(0, 1\], got 70"),
        (["{}/kfac", "{}/sgd/../kfac"], "named twice"),
        (["{}/kfac", "{}/other"], "other holds no run"),
    ],
)
def test_the_command_line_says_what_is_wrong(kept, arguments, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        report.main([argument.format(kept) for argument in arguments])


def test_settings_of_a_preconditioner_are_told():
    config = {"optimizer": "lars", "lars": {"after_kfac": True}, "kfac": {"damping": 7}}
    config["sgd"] = {"momentum": 7}
    names = [name for name, *_ in run_facts.settings_changed(config)]
    assert names == ["`optimizer`", "`lars.after_kfac`", "`kfac.damping`"]
    config["lars"]["after_kfac"] = False
    names = [name for name, *_ in run_facts.settings_changed(config)]
    assert names == ["`optimizer`"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.1234, "0.123 s"), (59, "59 s"), (3723.4, "1:02:03")]
)
def test_durations(seconds, text):
    assert markdown.duration(seconds) == text


def test_long_curves_are_thinned_to_means():
    x, y = report_figures._thinned(range(1000), [i % 4 for i in range(1000)])
    assert len(x) == len(y) == 250
    assert set(y) == {1.5}
    assert x[:2] == [1.5, 5.5]
