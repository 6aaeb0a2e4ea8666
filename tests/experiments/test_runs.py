"""A directory belongs to one run and its settings."""

import dataclasses
import json
import pathlib

import jax
import pytest

from experiments import runs


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    inner: Inner = Inner()
    seed: int = 0
    data_dir: pathlib.Path = pathlib.Path("data")
    resume: bool = False


def test_a_new_directory_is_marked_and_not_overwritten(tmp_path):
    directory = tmp_path / "a" / "b"
    runs.claim(directory, Config(), resume=False)
    assert '"rate": 0.1' in (directory / "config.json").read_text()
    with pytest.raises(FileExistsError, match=r"directory=.*--resume"):
        runs.claim(directory, Config(), resume=False)


def test_a_run_goes_on_under_its_own_settings_only(tmp_path):
    runs.claim(tmp_path, Config(), resume=True)
    elsewhere = Config(data_dir=pathlib.Path("elsewhere"), resume=True)
    runs.claim(tmp_path, elsewhere, resume=True)
    for other, name in (
        (Config(seed=1), "seed=1 must be 0, as when the run"),
        (Config(inner=Inner(0.2)), r"inner=.*0\.2.* must be .*0\.1"),
    ):
        with pytest.raises(ValueError, match=name):
            runs.claim(tmp_path, other, resume=True)


def test_a_run_begun_by_an_older_version_goes_on(tmp_path):
    """Settings that came later have their defaults then."""
    (tmp_path / "config.json").write_text('{"inner": {"rate": 0.1}}')
    runs.claim(tmp_path, Config(), resume=True)
    with pytest.raises(ValueError, match="seed=1 must be 0"):
        runs.claim(tmp_path, Config(seed=1), resume=True)


def test_the_facts_of_the_latest_start_are_kept(tmp_path):
    for steps in (10, 20):
        runs.write_facts(tmp_path, steps=steps, image_shape=(24, 24, 3))
    (path,) = tmp_path.iterdir()
    facts = json.loads(path.read_text())
    assert (facts["steps"], facts["image_shape"]) == (20, [24, 24, 3])
    assert facts["command"].startswith("python ")
    assert (facts["platform"], facts["jax"]) == ("cpu", jax.__version__)
