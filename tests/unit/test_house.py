"""Bounds on size and shape that the whole package keeps, so that a part can be found and read."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import distcl

ROOT = Path(distcl.__file__).parent
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}
CLASSES = {
    f"{name}:{node.name}": node
    for name, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
}

LINES, METHODS, ARGUMENTS, MODULES = 400, 15, 8, 8

ARGUMENTS_LEFT = {"sampling/sampler.py:DistributedWeightedSampler": 10}  # its public options


def methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [part for part in node.body if isinstance(part, ast.FunctionDef)]


def arguments(node: ast.ClassDef) -> int:
    """The arguments of a constructor that is written out: a dataclass is a record of its fields."""
    every = [m.args for m in methods(node) if m.name == "__init__"]
    return sum(len(a.posonlyargs + a.args + a.kwonlyargs) - 1 for a in every)


def assigned(method: ast.FunctionDef) -> set[str]:
    """The attributes of its own object that a method sets."""
    return {
        part.attr
        for part in ast.walk(method)
        if isinstance(part, ast.Attribute)
        and isinstance(part.ctx, ast.Store)
        and isinstance(part.value, ast.Name)
        and part.value.id == "self"
    }


def born(node: ast.ClassDef) -> set[str]:
    """The attributes that a class, or one above it, declares or sets as it is made."""
    found = {method.name for method in methods(node)}  # properties can be set, too
    for part in node.body:
        targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    for method in methods(node):
        if method.name in ("__init__", "__post_init__"):
            found |= assigned(method)
    names = {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases}
    for other in CLASSES.values():
        if other.name in names and other is not node:
            found |= born(other)
    return found


def unborn(node: ast.ClassDef) -> set[str]:
    return {name for method in methods(node) for name in assigned(method)} - born(node)


def beyond(found: dict[str, int], most: int, left: dict[str, int] | None = None) -> dict[str, int]:
    allowed = left or {}
    assert allowed.keys() <= found.keys(), "an exception for what is not there"
    return {name: number for name, number in found.items() if number > allowed.get(name, most)}


def test_no_file_is_long() -> None:
    assert beyond({name: len(text.splitlines()) for name, text in SOURCES.items()}, LINES) == {}


def test_no_class_has_many_methods() -> None:
    assert beyond({name: len(methods(node)) for name, node in CLASSES.items()}, METHODS) == {}


def test_no_constructor_takes_many_arguments() -> None:
    found = {name: arguments(node) for name, node in CLASSES.items()}
    assert beyond(found, ARGUMENTS, ARGUMENTS_LEFT) == {}


def test_every_attribute_is_born_with_its_object() -> None:
    assert beyond({name: len(unborn(node)) for name, node in CLASSES.items()}, 0) == {}


def public(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name


def test_no_public_name_is_defined_in_two_files() -> None:
    files = defaultdict(list)
    for name, tree in TREES.items():
        for defined in public(tree):
            files[defined].append(name)
    assert {defined: some for defined, some in files.items() if len(set(some)) > 1} == {}


def test_few_modules_lie_at_the_root() -> None:
    modules = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "__main__"}
    assert len(modules) <= MODULES, modules
