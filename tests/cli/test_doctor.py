from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor

from ddit_rt import _runtime
from ddit_rt.cli import doctor, main


def looked(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit code, and state and text of each finding."""
    capsys.readouterr()
    code = main(["doctor", "--json"])
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert data["works"] == (code == 0)
    return code, {one["name"]: (one["state"], one["text"]) for one in data["findings"]}


def test_a_machine_that_runs_these_tests_works(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = looked(capsys)
    assert code == 0
    names = ("versions", "native ops", "compile on CPU", "trusted artifacts")
    assert {found[name][0] for name in names} == {"works"}
    assert f"torch {torch.__version__}" in found["versions"][1]
    assert main(["doctor"]) == 0
    assert "all that is here works" in capsys.readouterr().out


def test_a_missing_compiler_is_told_with_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    with inductor.patch("cpp.cxx", ("/nowhere/c++",)):
        code, found = looked(capsys)
        assert main(["doctor"]) == 1
    assert "broken: compile on CPU" in capsys.readouterr().out
    assert code == 1
    assert found["compile on CPU"][0] == "broken"
    assert "install g++" in found["compile on CPU"][1]


def test_a_version_that_is_too_old_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_required", lambda: ["torch>=2.11", "diffusers>=99"])
    code, found = looked(capsys)
    assert code == 1
    assert found["versions"][0] == "broken"
    assert "is not >=99: pip install --upgrade diffusers" in found["versions"][1]


def test_an_extra_that_is_not_there_is_no_fault(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: name != "uvicorn")
    code, found = looked(capsys)
    assert code == 0
    assert found["extra serve"] == ("absent", "pip install 'ddit_rt[serve]' brings uvicorn")


@pytest.mark.parametrize(("driver", "state"), [(13000, "works"), (12040, "absent")])
def test_a_driver_without_conditional_nodes_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, driver: int, state: str
) -> None:
    monkeypatch.setattr(doctor, "_gpu", lambda: "H100")
    monkeypatch.setattr(doctor, "_compile_on_cuda", lambda: "with g++")
    built = {**_runtime.build_info(), "cuda": True}
    monkeypatch.setattr(_runtime, "build_info", lambda: built)
    status = {"available": True, "driver_version": driver, "reason": ""}
    monkeypatch.setattr(_runtime, "cuda_status", lambda: status)
    code, found = looked(capsys)
    assert code == 0
    assert found["image in one launch"][0] == state
    assert ("the host launches each step" in found["image in one launch"][1]) == (state == "absent")
