"""The module graph, drawn from the source: no circles, one way, and nobody reads what is another's own."""

from __future__ import annotations

import ast
import dataclasses
import functools
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from hf_lngd import LNGDConfig

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("hf_lngd", "scripts", "benchmarks", "tools")
# Each imports from its own line or those above it alone (`hf_lngd.` left off).
ORDER = (
    ("config", "heads", "linalg", "torch_internals"),
    ("layers",),
    ("routing", "groups", "topology", "masks"),
    ("statistics",),
    ("factors",),
    ("directions", "adamw", "batches", "norms"),
    ("work",),
    ("capture",),
    ("method",),
    ("paper",),
    ("core",),
    ("state",),
    ("parallel",),
    ("optimizer",),
    ("integrations", "metrics"),
    ("", "__main__"),  # hf_lngd itself
)
# The one import that is made when it is needed, and not seen here: (module, function, what).
LAZY = ("hf_lngd.core", "method_of", "hf_lngd.paper")
# What is read of torch's and transformers' own outside `torch_internals`.
FOREIGN = {
    "hf_lngd.capture": "_parameters",
    "hf_lngd.integrations.doctor": "_model_mapping",
    "hf_lngd.integrations.fsdp": "_save",
    "hf_lngd.integrations.stock": "_member_map_ _member_names_ _name_ _sort_order_ _value2member_map_ _value_",
    "hf_lngd.layers": "_conv_forward _parameters",
    "hf_lngd.linalg": "_foreach_norm",
    "hf_lngd.paper.chains": "_get_current_function_mode _pop_mode _push_mode",
    "hf_lngd.routing": "_parameters",
    "benchmarks.cost.small_batches": "_schema",
    "benchmarks.cost.cases": "_from_config",
    "benchmarks.coverage.check": "_BatchNorm",
    "benchmarks.coverage.zoo": "_from_config",
    "scripts.run_shared": "_model_mapping",
}


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name → file."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def walk(node: ast.AST, function: str = "") -> Iterator[tuple[ast.AST, str]]:
    """Every node below one, and the innermost function that it stands in."""
    for child in ast.iter_child_nodes(node):
        yield child, function
        yield from walk(child, child.name if isinstance(child, ast.FunctionDef) else function)


@functools.cache
def imports_of(name: str) -> list[tuple[str, str]]:
    """(what, function) of every import in a module, also within functions: a module where there is one of the name."""
    parts = name.split(".")
    package = parts if modules()[name].name == "__init__.py" else parts[:-1]
    found = []
    for node, function in walk(tree_of(name)):
        if isinstance(node, ast.Import):
            found += [(alias.name, function) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{whole}.{alias.name}"
                found.append((inner if inner in modules() else whole, function))
    return found


def graph() -> dict[str, set[str]]:
    """Module → the modules here that it imports; all but the one lazy import."""
    return {
        name: {what for what, function in imports_of(name) if what in modules() and (name, function, what) != LAZY}
        for name in modules()
    }


def test_no_import_goes_round_in_a_circle() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def level_of(name: str) -> int:
    """The line of `ORDER` that a module of the package is in."""
    part = name.removeprefix("hf_lngd").removeprefix(".").split(".")[0]
    return next(i for i, line in enumerate(ORDER) if part in line)


def test_imports_go_one_way() -> None:
    package = [name for name in modules() if name.split(".")[0] == "hf_lngd"]
    upward = [
        f"{name} imports {other}"
        for name in package
        for other in graph()[name]
        if other not in package or level_of(other) > level_of(name)
    ]
    assert not upward
    assert any((name, function, what) == LAZY for name in package for what, function in imports_of(name))


def test_every_module_has_its_place_and_the_order_none_that_is_gone() -> None:
    there = {name.removeprefix("hf_lngd").removeprefix(".").split(".")[0] for name in modules() if "hf_lngd" in name}
    assert there == {name for line in ORDER for name in line}


def test_the_core_and_paper_need_torch_alone() -> None:
    top = level_of("hf_lngd.integrations")
    for name in modules():
        if name.split(".")[0] == "hf_lngd" and level_of(name) < top:
            roots = {what.split(".")[0] for what, _ in imports_of(name)}
            assert roots <= {"torch", "hf_lngd"} | sys.stdlib_module_names, name


def test_the_core_imports_paper_in_one_place() -> None:
    paper = level_of("hf_lngd.paper")
    found = [
        (name, function, what)
        for name in modules()
        for what, function in imports_of(name)
        if what.startswith("hf_lngd.paper") and name.split(".")[0] == "hf_lngd" and level_of(name) != paper
    ]
    assert found == [LAZY]


# What begins with an underscore


def is_own(node: ast.expr) -> bool:
    """self, cls, super()."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_reads(tree: ast.Module) -> set[str]:
    """Attributes with one underscore in front that are read of something else than the object itself."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not is_own(node.value)
    }


def private_imports(tree: ast.Module) -> set[str]:
    """Names with an underscore in front that are imported from one of the modules here."""
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] in FOLDERS)
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    }


def test_nobody_reads_what_begins_with_an_underscore() -> None:
    exempt = ("hf_lngd.optimizer", "hf_lngd.torch_internals")
    found = {name: own for name in modules() if name not in exempt and (own := private_reads(tree_of(name)))}
    assert found == {name: set(attributes.split()) for name, attributes in FOREIGN.items()}
    assert not {name: own for name in modules() if (own := private_imports(tree_of(name)))}


def private_names() -> set[str]:
    """Functions, classes, constants and attributes of the package that begin with one underscore."""
    found = set()
    for name in modules():
        if name.split(".")[0] != "hf_lngd":
            continue
        for node in ast.walk(tree_of(name)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
                found.add(node.attr)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize("folder", ["unit", "contract", "distributed"])
def test_no_test_reads_a_private_name(folder: str) -> None:
    from transformers import Trainer

    own = private_names() - set(dir(Trainer))  # a Trainer's methods that ours overrides
    assert "_mask_of" in own and "_counts" in own
    for path in sorted((ROOT / "tests" / folder).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not private_imports(tree), path.name
        assert not private_reads(tree) & own, path.name


def test_there_are_at_most_24_options() -> None:
    assert len(dataclasses.fields(LNGDConfig)) <= 24
