"""Every Python block printed for readers runs, and every command exists."""

import pathlib
import re
import subprocess
import sys

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


COMMAND = re.compile(
    r"python3? (?:-m )?((?:benchmarks|experiments|lbopt|notebooks)[\w./]*)([^`#\n]*)"
)


def commands():
    """The flags that pages give to each command: ``{file: {flag, ...}}``."""
    found = {}
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        text = re.sub(r"(`[^`\n]+)\n([^`\n]+`)", r"\1 \2", text)  # wrapped by the line
        for command, arguments in COMMAND.findall(text):
            dotted = command.rstrip(".")
            path = dotted if "/" in dotted else f"{dotted.replace('.', '/')}.py"
            flags = {part for part in arguments.split() if part.startswith("--")}
            found.setdefault(path, set()).update(flags)
    return found


COMMANDS = commands()


def test_commands_of_the_pages_exist():
    assert len(COMMANDS) > 15
    for path in COMMANDS:
        assert (ROOT / path).is_file(), path


# Each command has a process of its own, for some register data sets, or choose devices.
# It is a copy of one process that has imported what most of them need: seconds each.
SHOW_HELP = """
import os, runpy, sys
import experiments.command_line
folder, *modules = sys.argv[1:]
for module in modules:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, module
        continue
    os.dup2(os.open(f"{folder}/{module}", os.O_WRONLY | os.O_CREAT), 1)
    sys.argv = [module, "--help"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    break
"""


def test_flags_of_the_pages_exist(tmp_path):
    named = {
        path.removesuffix(".py").replace("/", "."): flags
        for path, flags in COMMANDS.items()
        if flags
    }
    subprocess.run(
        [sys.executable, "-c", SHOW_HELP, tmp_path, *named], cwd=ROOT, check=True
    )
    for module, flags in named.items():
        known = set(re.findall(r"--[\w.-]+", (tmp_path / module).read_text()))
        assert flags - {"--help"} <= known, module
