"""A directory belongs to one run and its settings."""

import dataclasses
import pathlib

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


def test_a_new_directory_is_made_and_marked(tmp_path):
    runs.claim(tmp_path / "a" / "b", Config(), resume=False)
    assert '"rate": 0.1' in (tmp_path / "a" / "b" / "config.json").read_text()


def test_a_run_is_not_overwritten(tmp_path):
    runs.claim(tmp_path, Config(), resume=False)
    with pytest.raises(FileExistsError, match=r"directory: .*--resume"):
        runs.claim(tmp_path, Config(), resume=False)


def test_a_run_goes_on_under_its_own_settings_only(tmp_path):
    runs.claim(tmp_path, Config(), resume=True)
    elsewhere = Config(data_dir=pathlib.Path("elsewhere"), resume=True)
    runs.claim(tmp_path, elsewhere, resume=True)
    for other, name in (
        (Config(seed=1), "seed: .*begun with 0.*with 1"),
        (Config(inner=Inner(0.2)), r"inner: .*0\.1.*0\.2"),
    ):
        with pytest.raises(ValueError, match=name):
            runs.claim(tmp_path, other, resume=True)
