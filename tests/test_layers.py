"""Imports point one way: a module may import its own layer's packages and lower ones."""

from __future__ import annotations

import ast
from pathlib import Path

import ddit_rt

ROOT = Path(ddit_rt.__file__).parent
LAYERS = (
    {"checks", "errors", "ops", "torch_state", "version"},
    {"families", "patch_scheduler", "solver", "step_cache"},
    {"buckets", "artifact"},
    {"adapters"},
    {"compilation", "executor", "training"},
    {"pipeline"},
    {"demo"},
    {"calibration", "evaluation"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported_packages(tree: ast.AST) -> set[str]:
    """Sub-packages of `ddit_rt` that a module imports, wherever in the file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "ddit_rt":
                names.update(f"ddit_rt.{alias.name}" for alias in node.names)
            names.add(node.module)
    return {name.split(".")[1] for name in names if name.startswith("ddit_rt.")}


def test_imports_point_one_way() -> None:
    problems = []
    for path in ROOT.rglob("*.py"):
        package = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if package in ("__init__", "__main__"):
            continue
        assert package in LEVEL, f"give {package} a place in LAYERS"
        problems += [
            f"{path.relative_to(ROOT)} imports {imported}"
            for imported in imported_packages(ast.parse(path.read_text()))
            if imported in LEVEL and LEVEL[imported] > LEVEL[package]
        ]
    assert not problems


def test_every_package_has_a_place() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= set(LEVEL)
