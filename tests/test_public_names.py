"""Every public name and argument has a user outside of the library and its tests."""

import ast
import inspect
import json
import pathlib
import re

import pytest

import lbopt

ROOT = pathlib.Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Modules of the library that stand among the public names; presets are tables.
MODULES = ("health", "memory_plan", "schedules", "sharding", "training")


def sources():
    """The code that users read: experiments, benchmarks, notebooks and pages.

    Ready optimizers and presets are users of the transformations below them.
    """
    for folder in ("experiments", "benchmarks", "lbopt/optimizers", "lbopt/presets"):
        for path in (ROOT / folder).rglob("*.py"):
            if "archive" not in path.parts:
                yield path.read_text()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        yield re.sub(r"^%.*", "", "\n".join(code), flags=re.MULTILINE)
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        yield "\n".join(BLOCK.findall(path.read_text()))


def last_name(node):
    """``kfac`` of ``lbopt.kfac`` and of ``kfac``."""
    return getattr(node, "attr", getattr(node, "id", None))


def uses():
    """For each name that is called: the most positional arguments, and keywords.

    Settings that reach a call as ``**settings`` count by their names: fields of
    classes and keys of dictionaries of the same file, or of experiments/settings.py.
    """
    found, mentioned = {}, set()
    shared = named_settings(ast.parse((ROOT / "experiments/settings.py").read_text()))
    for text in sources():
        tree = ast.parse(text)
        settings = named_settings(tree) | shared
        for node in ast.walk(tree):
            mentioned.add(last_name(node))
            if not isinstance(node, ast.Call):
                continue
            name, arguments = last_name(node.func), node.args
            if name == "partial" and arguments:
                name, *arguments = last_name(arguments[0]), *arguments[1:]
            positional, keywords = found.setdefault(name, (set(), set()))
            starred = any(isinstance(x, ast.Starred) for x in arguments)
            positional.add(99 if starred else len(arguments))
            for keyword in node.keywords:
                keywords |= {keyword.arg} if keyword.arg else settings
    return found, mentioned


def named_settings(tree):
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            names.add(last_name(node.target))
        elif isinstance(node, ast.Dict):
            names |= {k.value for k in node.keys if isinstance(k, ast.Constant)}
        elif isinstance(node, ast.keyword):
            names.add(node.arg)
    return names


def public():
    """The public functions and classes by name."""
    found = {name: getattr(lbopt, name) for name in lbopt.__all__}
    for module in MODULES:
        home = found.pop(module)
        found |= {
            name: value for name, value in vars(home).items() if name in home.__all__
        }
    del found["presets"]
    return found


USES, MENTIONED = uses()
PUBLIC = public()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_user(name):
    assert name in MENTIONED


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() & USES.keys()))
def test_every_argument_has_a_user(name):
    positional, keywords = USES[name]
    signature = inspect.signature(PUBLIC[name]).parameters
    unused = {
        parameter
        for i, (parameter, one) in enumerate(signature.items())
        if i >= max(positional) and parameter not in keywords
        if one.kind is not inspect.Parameter.VAR_POSITIONAL
    }
    assert not unused
