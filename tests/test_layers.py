"""Imports point one way: a room imports itself and those above it in ARCHITECTURE.md's table."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import ddit_rt

ROOT = Path(ddit_rt.__file__).parent
ARCHITECTURE = Path(__file__).parent.parent / "ARCHITECTURE.md"


def rooms() -> list[str]:
    """The rooms of the table, lowest first."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    table = text.split("| room | owns |", 1)[1].split("\n\n", 1)[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [name for cell in cells for name in re.findall("`(.+?)`", cell)]
    return [name.removesuffix(".py").rstrip("/") for name in names]


def room_of(parts: tuple[str, ...]) -> str:
    """The room that a module, given by the parts of its name, stands in."""
    return "/".join(parts[:2]) if parts[0] == "lab" else parts[0]


def imported(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """Modules of `ddit_rt` that a file imports, wherever in it, as parts of their names."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (tuple(n.split(".")[1:]) for n in names if n.startswith("ddit_rt."))


def files() -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Every module with the parts of its name, but for the package's own front."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts not in {("__init__",), ("lab", "__init__")}:
            yield path, parts


def test_imports_point_one_way() -> None:
    level = {room: index for index, room in enumerate(rooms())}
    problems = [
        f"{path.relative_to(ROOT)} imports {room_of(name)}"
        for path, parts in files()
        for name in imported(ast.parse(path.read_text(encoding="utf-8")))
        if level.get(room_of(name), -1) > level[room_of(parts)]
    ]
    assert not problems


def test_the_runtime_never_imports_the_lab() -> None:
    problems = [
        str(path.relative_to(ROOT))
        for path, parts in files()
        if parts[0] not in ("lab", "sources", "serving", "cli")
        and any(name[0] == "lab" for name in imported(ast.parse(path.read_text(encoding="utf-8"))))
    ]
    assert not problems


def test_the_table_names_every_room_and_nothing_else() -> None:
    assert sorted(rooms()) == sorted({room_of(parts) for _, parts in files()})
