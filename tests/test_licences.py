"""What docs/licences.md says is shipped and needed is what is, with the licences that it has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/licences.md").read_text(encoding="utf-8")
WORDS = {
    "Apache-2.0": "apache",
    "BSD-2-Clause": "bsd",
    "BSD-3-Clause": "bsd",
    "MIT": "mit",
    "MIT-CMU": "mit-cmu",
    "MPL-2.0": "mpl",
    "PSF-like": "python software foundation",
}
"""What a package says of itself, in lower case, for each licence of the page."""
COPYLEFT = re.compile(r"\b(?:a|l)?gpl|general public|sspl|busl")


def table(title: str) -> list[list[str]]:
    rows = PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row[:1] == "|"]
    return cells[2:]


def needed() -> Iterator[tuple[str, str]]:
    """Names of the requirements, and the extras that they are of."""
    for line in metadata.requires("ddit_rt") or []:
        one = Requirement(line)
        extra = re.search(r"""extra == ['"]([\w-]+)['"]""", str(one.marker or ""))
        if one.name.replace("-", "_") != "ddit_rt":
            yield one.name.lower(), "required" if extra is None else extra[1]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for line in re.findall(r'"(.+?)"', text.split("\nrequires = [", 1)[1].split("]", 1)[0]):
        yield Requirement(line).name, "build"


def said(name: str) -> str:
    """All that an installed package's metadata say of its licence, in lower case."""
    about = metadata.metadata(name)
    kinds = [one for one in about.get_all("Classifier") or [] if one.startswith("License")]
    # Some put the whole text there, which mentions much.
    short = [one for one in (about.get("License") or "").splitlines() if len(one) < 80][:1]
    declared = " ".join([about.get("License-Expression") or "", *short, *kinds]).lower()
    return declared.strip() or of_text(name)


def of_text(name: str) -> str:
    """The licence of a package that declares none, by the words of its text."""
    files = [one for one in metadata.files(name) or [] if one.stem == "LICENSE"]
    texts = [one.read_text(encoding="utf-8").lower() for one in files]
    is_bsd = any("redistribution and use in source and binary forms" in one for one in texts)
    return "bsd" if is_bsd else ""


def test_every_requirement_stands_on_the_page_with_its_extras_and_nothing_else() -> None:
    extras: dict[str, set[str]] = {}
    for name, extra in needed():
        extras.setdefault(name, set()).add(extra)
    assert {name: set(of.split(", ")) for name, of, _ in table("What it needs")} == extras


@pytest.mark.parametrize(
    ("name", "licence"), [(n, one) for n, _, one in table("What it needs")], ids=lambda x: x[:12]
)
def test_a_package_has_the_licence_that_the_page_says(name: str, licence: str) -> None:
    own = re.split(r"[;,]", licence)[0].split(" and ")
    try:
        found = said(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    for one in own:
        assert WORDS[one] in found, found


def test_nothing_that_is_required_is_under_a_copyleft_licence_beyond_its_own_files() -> None:
    seen: dict[str, str] = {}
    waiting = [name for name, extra in needed() if extra == "required"]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        try:
            seen[name] = said(name)
        except metadata.PackageNotFoundError:  # of another system, or of another Python
            continue
        for line in metadata.requires(name) or []:
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                waiting.append(one.name.lower())
    assert len(seen) > 20
    assert not {name: text for name, text in seen.items() if COPYLEFT.search(text)}


def test_every_file_of_the_package_is_of_a_kind_that_the_page_names() -> None:
    patterns = [p for row in table("In the wheel") for p in re.findall("`(.+?)`", row[0])]
    folder = ROOT / "ddit_rt"
    files = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    ]
    assert len(files) > 200
    unnamed = [
        file
        for file in files
        if not any(fnmatch(file, one) or fnmatch(Path(file).name, one) for one in patterns)
    ]
    assert not unnamed
    for pattern in patterns:
        built = pattern.endswith(".so")
        assert built or any(
            fnmatch(file, pattern) or fnmatch(Path(file).name, pattern) for file in files
        ), pattern
