"""Imports point downwards, every module has its tests, and sizes stay within bounds."""

import ast
import inspect
import io
import pathlib
import tokenize

import pytest

import lbopt

ROOT = pathlib.Path(__file__).parent.parent
# From the bottom up: a module may import what stands in an earlier row, and, where a
# row names several, nothing of its own row.
ROWS = [
    ["_typing"],
    ["checks", "collectives", "explicit_axes", "in_place", "linalg"],
    ["norms", "parameter_paths", "patches", "sizes", "tables"],
    ["curvature.factor"],
    ["curvature.block"],
    ["curvature.eigen_moments", "curvature.linear_maps"],
    ["curvature.kronecker", "curvature.unit_wise", "curvature.diagonal"],
    ["curvature.doubly_factored", "curvature.embedding"],
    ["curvature.tap_rules"],
    ["curvature.flax_layers"],
    ["curvature.derivatives", "curvature.lanes", "curvature.locations"],
    ["curvature.likelihood", "curvature.loss", "curvature.arrivals"],
    ["curvature.loss_head", "curvature.rows", "curvature.signals"],
    ["curvature.head_experiment", "curvature.terms", "curvature.capture"],
    ["curvature.observation", "curvature.weights_search"],
    ["curvature.discovery", "curvature.lifted_axes", "curvature.terms_search"],
    ["curvature.feature_maps", "curvature.verification", "curvature.layer_table"],
    ["curvature.dependence"],
    ["curvature.registry", "curvature.tapped_pass"],
    ["curvature.evaluation"],
    ["curvature.fisher", "curvature.refresh", "schedules"],
    ["curvature.fisher_products", "sharding"],
    ["batch_functions", "mesh_step"],
    ["settings"],
    ["transforms.statistics", "transforms.owner_buffers", "transforms.validation"],
    ["transforms.placement", "transforms.unit_classes"],
    ["transforms.inversion"],
    ["transforms.scheduled_inversion"],
    ["transforms.kfac_state"],
    ["transforms.natural_gradient", "transforms.renewal", "transforms.reshard"],
    ["transforms.eigen_moments", "transforms.outside"],
    ["transforms.kfac"],
    ["transforms.average", "transforms.norm_constraint"],
    ["transforms.rescale", "transforms.velocity"],
    ["transforms.conjugate_beta", "transforms.diagonal_bfgs"],
    ["transforms.step_control", "transforms.lars"],
    ["transforms.nlcg", "transforms.quadratic_model"],
    ["optimizers.kfac", "optimizers.lars", "optimizers.nlcg", "optimizers.sp_ngd"],
    ["presets.lars", "presets.nlcg", "presets.sp_ngd"],
    ["health", "statistics_pass", "scheduled_step"],
    ["training"],
    ["inversion_worker", "memory_plan"],
    ["background", "explain"],
    [""],  # lbopt/__init__.py re-exports all
]
ROW = {name: i for i, row in enumerate(ROWS) for name in row}
PACKAGES = {"curvature", "optimizers", "presets", "transforms"}


def name_of(path):
    parts = path.relative_to(ROOT / "lbopt").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in sorted((ROOT / "lbopt").rglob("*.py"))}


def imports_of(path):
    """The modules of lbopt that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {n if n in _dotted() else node.module for n in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {n.removeprefix("lbopt").lstrip(".") for n in found if n.startswith("lbopt")}


def row_of(name):
    """A package stands where the highest of its modules does."""
    return max(ROW[n] for n in ROW if n == name or n.startswith(f"{name}."))


def _dotted():
    return {f"lbopt.{name}".rstrip(".") for name in MODULES}


def test_every_module_has_its_place():
    assert set(MODULES) - PACKAGES == set(ROW)


@pytest.mark.parametrize("name", sorted(set(MODULES) - PACKAGES))
def test_imports_point_downwards(name):
    for other in imports_of(MODULES[name]):
        assert row_of(other) < ROW[name], f"{name} imports {other}"


@pytest.mark.parametrize("folder", ["lbopt"])
def test_the_library_imports_nothing_above_it(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                top = module.split(".")[0]
                assert top not in {"experiments", "benchmarks", "tests"}, path
                # Heavy packages stay out of the core.
                assert top not in {"tensorflow", "tensorflow_datasets", "grain"}, path
                assert not module.startswith("jax._src"), path


def test_nothing_but_what_runs_between_steps_compiles():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "jit":
                allowed = {"training", "mesh_step", "background", "inversion_worker"}
                allowed |= {"scheduled_step"}
                # Outside of jit it would compile its loops at every call.
                allowed |= {"transforms.kfac"}
                # Its programs are compiled once for each size, where an eager
                # evaluation would compile every operation.
                allowed |= {"curvature.head_experiment"}
                assert name in allowed, f"{path}: {ast.unparse(node)}"


def test_no_global_statements():
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, (ast.Global, ast.Nonlocal)), path


@pytest.mark.parametrize("name", sorted(set(MODULES) - PACKAGES - {"", "_typing"}))
def test_every_module_has_a_test_file(name):
    if name.startswith("presets."):
        name = "presets"  # one file compares all tables with their sources
    *folders, module = name.split(".")
    assert (ROOT.joinpath("tests", *folders) / f"test_{module}.py").exists()


@pytest.mark.parametrize("path", [*MODULES.values()], ids=str)
def test_modules_are_short(path):
    assert len(path.read_text().splitlines()) <= 450


def code_lines(path):
    """The numbers of lines with code, without docstrings; and those with comments."""
    code, comments = set(), set()
    skipped = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    line_start = True
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in skipped | {tokenize.ENDMARKER}:
            # A string that begins a statement is a docstring.
            if not (token.type == tokenize.STRING and line_start):
                code |= set(range(token.start[0], token.end[0] + 1))
            line_start = False
        if token.type in {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}:
            line_start = True
    return code, comments


def test_comments_are_at_least_six_percent_of_the_library():
    counts = [[len(x) for x in code_lines(path)] for path in MODULES.values()]
    code, comments = map(sum, zip(*counts, strict=True))
    assert comments >= 0.06 * code, f"{comments} comments on {code} lines of code"


EVERYTHING = [
    path
    for folder in ("lbopt", "experiments", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "archive" not in path.parts
]


def numbers_of(value):
    """The numbers of a table's row by which one recognises it."""
    if isinstance(value, dict):
        return set().union(*map(numbers_of, value.values()))
    if isinstance(value, tuple):
        return set().union(set(), *map(numbers_of, value))
    # Round numbers stand everywhere.
    common = not isinstance(value, (int, float)) or float(f"{value:.0e}") == value
    return set() if common else {value}


ROWS_OF_PAPERS = [
    numbers_of(row)
    for table in vars(lbopt.presets).values()
    if isinstance(table, dict)
    for row in table.values()
    if isinstance(row, tuple)
]


def test_there_are_tables_of_papers():
    assert {8.18e-3, 0.997, 2.5e-4} <= set().union(*ROWS_OF_PAPERS)
    assert sum(len(row) >= 2 for row in ROWS_OF_PAPERS) > 40


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: str(p.relative_to(ROOT)))
def test_tables_of_papers_are_presets(path):
    """No other tuple, list, dictionary or call holds three numbers of one row.

    Rows of two such numbers, a batch size and an accuracy, are recognised by both.
    """
    if "presets" in path.parts:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Tuple, ast.List, ast.Dict, ast.Call)):
            inside = {x.value for x in ast.walk(node) if isinstance(x, ast.Constant)}
            for row in ROWS_OF_PAPERS:
                same = {x for x in inside if isinstance(x, float | int)} & row
                least = max(2, min(3, len(row)))
                assert len(same) < least, f"line {node.lineno}: {sorted(same)}"


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            start = node.body[0]
            if ast.get_docstring(node) is not None:
                lines = node.end_lineno - start.end_lineno + start.lineno - node.lineno
            else:
                lines = node.end_lineno - node.lineno + 1
            assert lines <= 90, f"{node.name}: {lines} lines without its docstring"


def public_callables():
    """Every public function and class by its dotted name; presets are tables."""
    found = {}
    for name in set(lbopt.__all__) - {"presets"}:
        value = getattr(lbopt, name)
        for inner in value.__all__ if inspect.ismodule(value) else [None]:
            dotted = f"lbopt.{name}" + (f".{inner}" if inner else "")
            found[dotted] = getattr(value, inner) if inner else value
    return dict(sorted(found.items()))


@pytest.mark.parametrize("name", public_callables())
def test_public_signatures_are_short(name):
    assert len(inspect.signature(public_callables()[name]).parameters) <= 12


def test_public_names_are_sorted_and_exist():
    assert lbopt.__all__ == sorted(lbopt.__all__)
    for name in lbopt.__all__:
        assert getattr(lbopt, name).__doc__, name
