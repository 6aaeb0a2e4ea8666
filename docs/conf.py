"""The site: the pages of the repository as they are, and the API from docstrings.

The repository's root is the source directory, so that the pages' links to each other,
to the code and to the figures lead to the same files as on a repository's pages.
"""

import importlib.metadata
import re

from docutils import nodes
from docutils.utils.math import latex2mathml

project = "lbopt"
author = "The lbopt developers"
release = importlib.metadata.version("lbopt")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "notebooks/*.ipynb",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "experiments/README.md",
    "experiments/archive/README.md",
    "experiments/launch/README.md",
]
exclude_patterns = ["docs/_build/**"]

# Formulas are MathML, which browsers show without a script from the network.
html_math_renderer = "mathml"
nb_ipywidgets_js = {}

html_theme = "furo"
html_title = "lbopt"
templates_path = ["_templates"]
html_additional_pages = {"index": "start.html"}

# As on a repository's pages: a heading is a target of links.
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
# The outputs are those that are committed; the tests execute notebooks.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # which has tables

autodoc_typehints = "none"  # the docstrings have types where they say something
napoleon_use_ivar = True  # fields of a NamedTuple are listed once
autodoc_member_order = "bysource"
default_role = "code"

# Commands that docutils' converter lacks, and what they stand for.
_COMMANDS = {
    re.compile(r"\\([bB]ig)(?![a-zA-Z])"): r"\\\1l",
    re.compile(r"\\iff(?![a-zA-Z])"): r"\\Longleftrightarrow",
}


def _mathml(node, as_block):
    tex = node.astext()
    for command, meaning in _COMMANDS.items():
        tex = command.sub(meaning, tex)
    return latex2mathml.tex2mathml(tex, as_block)


def _visit_math(translator, node):
    translator.body.append(_mathml(node, as_block=False))
    raise nodes.SkipNode


def _visit_math_block(translator, node):
    translator.body.append(f'<div class="math">{_mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    """Adds the renderer of formulas."""
    app.add_html_math_renderer("mathml", (_visit_math, None), (_visit_math_block, None))
