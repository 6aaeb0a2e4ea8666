"""Every Python block printed for readers runs, and every command exists."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "experiments").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_run(page):
    """The blocks of one page run in order, in one namespace."""
    namespace = {}
    for block in BLOCK.findall(page.read_text()):
        with jax.numpy_rank_promotion("allow"):  # a user's code, not ours
            exec(compile(block, str(page), "exec"), namespace)


def test_the_front_page_has_python_to_run():
    assert BLOCK.findall((ROOT / "README.md").read_text())


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"`make (\w+)`|^make (\w+)", page.read_text(), re.M):
            name = target[0] or target[1]
            assert re.search(rf"^{name}:", makefile, re.MULTILINE), (page, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_local_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_commands_of_the_pages_exist():
    """``python -m package.module`` and ``python path.py`` name files that are here."""
    for page in PAGES:
        text = page.read_text()
        for module in re.findall(r"python -m ((?:benchmarks|experiments)[\w.]*)", text):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
        for script in re.findall(
            r"python ((?:benchmarks|experiments)/[\w/]+\.py)", text
        ):
            assert (ROOT / script).exists(), script
