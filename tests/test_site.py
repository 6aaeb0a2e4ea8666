"""The site builds without a warning, and has every public name."""

import pathlib
import re
import subprocess
import sys

import pytest

import lbopt

# Modules of the library that stand among the public names.
MODULES = ("health", "memory_plan", "schedules", "sharding", "training")
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    # As `make docs` does, in another place.
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-c", "docs"]
    where = ["-d", str(out / "doctrees"), ".", str(out / "html")]
    done = subprocess.run(
        [*command, *where], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    return out / "html"


def test_pages_are_there(site):
    assert "url=docs/index.html" in (site / "index.html").read_text()
    for page in ROOT.glob("docs/**/*.md"):
        relative = page.relative_to(ROOT)
        if "_build" not in relative.parts:
            assert (site / relative).with_suffix(".html").exists(), relative
    assert (site / "README.html").exists()


def test_pages_need_no_network(site):
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    for path, text in pages.items():
        loaded = re.findall(
            r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:[^\"]*)", text
        )
        assert not loaded, path
        assert "\\frac" not in text, path
    # The step of K-FAC, and an equation of a page.
    kfac = pages[site / "docs" / "api" / "optimizers.html"]
    assert re.search(r"<math[^>]*>.*?<mo>←</mo>.*?</math>", kfac, re.DOTALL)
    choose = pages[site / "docs" / "how_to" / "choose_an_optimizer.html"]
    assert re.search(r"<math[^>]*display=\"block\".*?<mfrac>", choose, re.DOTALL)


def test_every_public_name_is_documented(site):
    text = "".join(p.read_text() for p in (site / "docs" / "api").glob("*.html"))
    for name in lbopt.__all__:
        if name not in {*MODULES, "presets"}:
            assert f'id="lbopt.{name}"' in text, name
    for module in MODULES:
        assert f'id="module-lbopt.{module}"' in text, module
