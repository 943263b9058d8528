"""What the documents say to type, and where they point, is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddit_rt.cli.main import build_parser, main
from ddit_rt.models import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
CARDS = sorted((ROOT / "ddit_rt").rglob("MODEL_CARD.md"))
FILES = (
    *("prompts.txt", "pictures", "adapters", "demo-eval", "coco-val", "flux-eval", "cat.png"),
    *("styles", "prompts.jsonl"),
)
"""What the documents' commands read, beside artifacts and models."""
BLOCK = re.compile(r"(<!-- needs: [\w ]+ -->\n)?```sh\n(.*?)```", re.DOTALL)


def commands(document: Path, *, everywhere: bool) -> Iterator[list[str]]:
    """Words of every command of a document that any machine can run, or of all."""
    for marked, block in BLOCK.findall(document.read_text(encoding="utf-8")):
        if everywhere or not marked:
            for line in block.replace("\\\n", " ").splitlines():
                for command in re.split(" && | [|] ", line):
                    yield shlex.split(command, comments=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_ones_that_the_program_takes(
    document: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in FILES:  # the parser looks for what a command reads
        path = tmp_path / name
        if path.suffix:
            path.write_text("a red circle\n", encoding="utf-8")
        else:
            path.mkdir()
    for words in commands(document, everywhere=True):
        if words[:1] == ["ddit-rt"]:
            build_parser().parse_args(words[1:])
        for word in words:
            if word.startswith(("scripts/", "benchmarks/", ".ci/")):
                assert (ROOT / word).exists(), words


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", [*DOCUMENTS, *CARDS], ids=lambda path: path.parent.name)
def test_files_that_are_named_are_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:[\w.]+/)+[\w.]+\.(?:py|sh|h|cu|cuh|cpp|json))`", text):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "ddit_rt")), name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_pipeline_stands_in_the_readme_and_on_a_page_with_its_commands(family: Any) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs/models").glob("*.md")]
    for pipeline in family.pipeline_classes:
        assert f"`{pipeline}`" in readme
        (found, *_) = (
            page for page in pages if f"`{pipeline}`" in page and family.transformer_class in page
        )
        assert "ddit-rt compile" in found
        assert "ddit-rt info" in found


def test_every_fault_has_its_test() -> None:
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) > 40
    for file, test in named:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"^(?:async )?def {test}\(", source, re.MULTILINE), (file, test)
    table = text.split("## Faults", 1)[1].split("\n## ", 1)[0]
    for row in (line for line in table.splitlines()[2:] if line.startswith("| ")):
        fault, *_, tests = (cell.strip() for cell in row.strip("|").split("|"))
        assert fault == "fault" or "::test_" in tests, fault


def test_readme_is_short() -> None:
    assert 110 <= len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_page_of_the_command_line_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import cli_page

    assert cli_page.PAGE.read_text(encoding="utf-8") == cli_page.page(), "run scripts/cli_page.py"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("compiled_before")
def test_what_the_readme_shows_on_the_command_line_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = [
        words[1:]
        for words in commands(ROOT / "README.md", everywhere=False)
        if words[:1] == ["ddit-rt"]
    ]
    assert [words[0] for words in ran] == ["compile", "generate", "info", "info", "doctor"]
    for words in ran:
        assert main(words) == 0
    assert (tmp_path / "circle.png").stat().st_size > 0
