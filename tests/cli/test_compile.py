from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ddit_rt.cli import main


def test_artifact_records_size_and_patch_sizes(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["pipeline_defaults"] == {"height": 32, "width": 48}
    assert [bucket["patch"] for bucket in manifest["buckets"]] == ["p", "2p"]


def test_what_is_in_the_way_is_exit_2_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    for output, message in ((path, "is a file"), (tmp_path, "holds other files")):
        assert main(["compile", "no-such-model", "-o", str(output)]) == 2
        assert message in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_no_place_for_the_list_of_trusted_artifacts_is_exit_3_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DDIT_RT_HOME", str(tmp_path / "file"))
    out = tmp_path / "a.ddit"
    assert main(["compile", "no-such-model", "-o", str(out)]) == 3
    assert "set DDIT_RT_HOME to a folder" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--patch-sizes", "2p,4p"], '"p", the model\'s own, must be among them'),
        (["--patch-sizes", "p,3p"], "powers of two"),
        (["--height", "2"], "smallest"),
    ],
)
def test_bad_request_is_exit_2(
    model_folder: Path,
    tmp_path: Path,
    extra: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "a.ddit"
    assert main(["compile", str(model_folder), "-o", str(out), *extra]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]
    assert not out.exists()


def test_the_demos_adapters_are_known_by_name_and_refused_for_another_model(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.ddit"
    assert main(["compile", str(model_folder), "--adapter", "demo", "-o", str(out)]) == 3
    message = capsys.readouterr().err.splitlines()[-1]
    assert "identifier is [128], the model needs [32]" in message
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "demo", "-o", str(tmp_path / "a.ddit"), "--device", "cuda"]) == 2
    assert "needs a CUDA device, and torch can use none here: " in capsys.readouterr().err
