from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ddit_rt.lab.demo.prompts import held_out_prompts
from ddit_rt.lab.evaluate.prompt_sets import read_prompts


def test_file_gives_different_lines_in_order(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# animals\na zebra\n\n  a fox \na zebra\n", encoding="utf-8")
    assert read_prompts(str(file)) == ("a zebra", "a fox")


def test_limit_spreads_over_the_whole_list(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(10)))
    assert read_prompts(str(file), 3) == ("prompt 0", "prompt 3", "prompt 6")
    assert len(read_prompts(str(file), 99)) == 10


def test_demo_is_the_held_out_captions() -> None:
    assert read_prompts("demo") == tuple(held_out_prompts())


def test_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="got a limit of 0 prompts"):
        read_prompts("demo", 0)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# nothing\n \n\n")
    with pytest.raises(ValueError, match="holds no prompts; write one a line"):
        read_prompts(str(file))


def test_hub_set_without_datasets_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="COCO.* pip install datasets"):
        read_prompts("coco")


def install(monkeypatch: pytest.MonkeyPatch, load_dataset: Any) -> None:
    """A stand-in for `datasets`, which has no build for every machine and needs the Hub."""
    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_set_reads_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> dict[str, list[str]]:
        assert (name, split) == ("nateraw/parti-prompts", "train")
        return {"Prompt": ["a cat", "a dog"], "Category": ["Animals", "Animals"]}

    install(monkeypatch, load_dataset)
    assert read_prompts("parti") == ("a cat", "a dog")


@pytest.mark.parametrize("error", [ConnectionError("no route"), KeyError("Prompts")])
def test_unreachable_hub_is_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> None:
        raise error

    install(monkeypatch, load_dataset)
    with pytest.raises(ValueError, match=r"cannot read DrawBench \(sayakpaul/drawbench.*a file"):
        read_prompts("drawbench")
