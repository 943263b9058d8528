from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ddit_rt.blocks.rewrites import has_native_products
from ddit_rt.cli import main

ATTENTION = "ddit_rt" if has_native_products() else "flash_attention_for_cpu"


def test_json_tells_what_the_artifact_holds(artifact: Path, info: Any) -> None:
    data = info(artifact)
    assert data["fits"] is True
    assert data["mismatches"] == []
    assert data["trusted"] is False
    assert data["manifest"]["family"] == "flux"
    assert data["default_policy"]["policy"] == "DDiTPolicy"
    assert data["default_step_cache"] == {"step_cache": "NoCache"}
    packages = data["manifest"]["packages"]
    on_disk = sum(path.stat().st_size for path in artifact.rglob("*.pt2"))
    assert data["memory"]["packages_bytes"] == on_disk
    assert sum(entry["bytes"] for entry in packages.values()) == on_disk
    assert data["attention"] == {name: [ATTENTION] for name in packages}


def test_model_adds_memory_counts(
    artifact: Path, model_folder: Path, info: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = info(artifact, "--model", model_folder)
    memory = data["memory"]
    assert data["fits"] is True
    assert [bucket["tokens"] for bucket in memory["buckets"]] == [24, 6]
    assert (memory["height"], memory["width"]) == (32, 48)
    # cos and sin, 16 wide, of 512 text and 24 image tokens; 50 steps' times and modulations,
    # 3 + 12 + 2 * 3 of width 32.
    assert memory["buckets"][0]["positions_bytes"] == 4 * 2 * (512 + 24) * 16
    assert memory["buckets"][0]["bytes"] == 4 * (2 * (512 + 24) * 16 + 50 * 21 * 32)
    assert [bucket["residual_bytes"] for bucket in memory["buckets"]] == [4 * 24 * 32, 4 * 6 * 32]
    assert memory["latent_bytes"] == 4 * 4 * 8 * 12
    assert main(["info", str(artifact), "--model", str(model_folder)]) == 0
    text = capsys.readouterr().out
    assert "history               6,144 bytes" in text
    # Four latents, the detail and its mean over 2 x 2; Euler keeps no velocity.
    assert "8,064 bytes, 5.25 latents" in text


def test_other_model_is_named_as_mismatch_with_a_remedy(
    artifact: Path, other_model_folder: Path, info: Any
) -> None:
    data = info(artifact, "--model", other_model_folder)
    assert data["fits"] is False
    assert "compile again" in data["mismatches"][0]


def test_nothing_of_the_artifact_is_executed(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("info loaded a package")

    monkeypatch.setattr("torch._C._aoti.AOTIModelPackageLoader", refuse)
    assert main(["info", str(artifact)]) == 0
    text = capsys.readouterr().out
    assert "--trust-code" in text
    assert "FluxTransformerBlock" in text
    assert text.count(f"attention: {ATTENTION}") == 2


def test_altered_package_is_exit_3(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.ddit"
    shutil.copytree(artifact, copy)
    package = next(copy.rglob("*.pt2"))
    package.write_bytes(package.read_bytes()[:-1] + b"x")
    assert main(["info", str(copy), "--json"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "SHA-256" in captured.err
