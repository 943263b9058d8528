"""`ddit-rt eval` and `ddit-rt ab` on a tiny artifact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from extras import need

from ddit_rt.artifact import read_manifest
from ddit_rt.cli import main


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the CLIP score from asking the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def options(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a zebra\na fox\na vase\n")
    model = ["--model", str(model_folder), "--trust-code", "--max-sequence-length", "8"]
    return [*model, "--prompts", str(prompts), "--steps", "8", "--limit", "2"]


@pytest.fixture(scope="module")
def evaluated(artifact: Path, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("torchmetrics")
    out = tmp_path_factory.mktemp("evaluated") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setenv("DDIT_RT_HOME", str(out.parent / "home"))
        policies = ["--policy", "2p:0.4,p", "--policy", "dynamic"]
        assert main(["eval", str(artifact), *options, *policies, "--out", str(out)]) == 0
    return out


def test_report_has_the_chosen_plans_and_their_baselines(evaluated: Path, artifact: Path) -> None:
    report = json.loads((evaluated / "report.json").read_text())
    assert report["main"] == "dynamic"
    assert [plan["name"] for plan in report["plans"]][:3] == ["fine", "policy-1", "dynamic"]
    assert {p["name"] for p in report["plans"] if p["role"] == "rival"} <= {
        "equal-steps",
        "equal-static",
    }
    assert report["artifact"]["digest"] == read_manifest(artifact).digest
    assert [entry["prompt"] for entry in report["prompts"]] == ["a zebra", "a fox"]
    assert report["settings"]["arguments"] == {"max_sequence_length": 8}
    assert (evaluated / "report.html").stat().st_size > 1000


def test_second_run_goes_on_and_prints_json(
    evaluated: Path, artifact: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*options, "--policy", "2p:0.4,p", "--policy", "dynamic", "--json"]
    assert main(["eval", str(artifact), *arguments, "--out", str(evaluated)]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["files"] == [str(evaluated / "report.html"), str(evaluated / "report.json")]
    assert len(data["report"]["sessions"]) == 1
    # Each metric that is missing is named once.
    assert captured.err.count("without CLIP score (clip-vit-large-patch14): OSError") == 1
    assert main(["eval", str(artifact), *arguments, "--out", str(evaluated), "--seed", "7"]) == 2
    assert "seed: 0 there, 7 now" in capsys.readouterr().err


def test_ab_summary_before_and_after_an_answer(
    evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ab", str(evaluated), "--summary"]) == 0
    assert "dynamic against fine: no answers yet" in capsys.readouterr().out
    from ddit_rt.lab.evaluate.preferences import Study

    Study(evaluated).record({"rater": "ada", "pair": 0, "choice": "equal"})
    assert main(["ab", str(evaluated), "--summary", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shares"]["as_good"]["value"] == 1
