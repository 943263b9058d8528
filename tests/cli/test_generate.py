from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ddit_rt.cli import main


@pytest.fixture
def generate(artifact: Path, model_folder: Path) -> list[str]:
    """Arguments of a short run."""
    model = ["--model", str(model_folder), "--trust-code", "--max-sequence-length", "8"]
    return ["generate", str(artifact), *model, "--steps", "4", "--prompt", "a zebra"]


def test_picture_has_the_compiled_size_and_a_line_of_its_own(
    generate: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new folder" / "zebra.png"
    assert main([*generate, "-o", str(path), "--seed", "3", "--policy", "2p:0.5,p"]) == 0
    with Image.open(path) as image:
        assert image.size == (48, 32)
    assert capsys.readouterr().out.endswith(" s  seed 3  2 x 2p, 2 x p\n")


def test_several_prompts_are_numbered_and_traced(
    generate: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    out = ["-o", str(tmp_path / "a.jpg"), "--trace", str(trace), "--json"]
    assert main([*generate, "a fox", "--seed", "5", "--policy", "2p:0.5,p", *out]) == 0
    result = json.loads(capsys.readouterr().out)
    pictures = result["pictures"]
    assert [Path(picture["path"]).name for picture in pictures] == ["a-1.jpg", "a-2.jpg"]
    assert [picture["prompt"] for picture in pictures] == ["a zebra", "a fox"]
    assert [picture["seed"] for picture in pictures] == [5, 6]
    assert pictures[0]["patch_sizes"] == ["2p", "2p", "p", "p"]
    assert result["policy"]["policy"] == "StaticPolicy"
    traced = json.loads(trace.read_text())["pictures"][1]["trace"]
    assert [step["tokens"] for step in traced["steps"]] == [6, 6, 24, 24]
    assert "trace" not in pictures[0]


def test_a_trace_for_perfetto_has_a_process_for_each_picture(
    generate: list[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.perfetto.json"
    out = ["-o", str(tmp_path / "a.png"), "--trace", str(trace)]
    assert main([*generate, "a fox", "--seed", "5", "--policy", "2p:0.5,p", *out]) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert [Path(name).name for name in names] == ["a-1.png, seed 5", "a-2.png, seed 6"]
    steps = [event["name"] for event in events if event.get("cat") == "computed"]
    assert steps == ["2p", "2p", "p", "p"] * 2


def test_seed_repeats_a_picture(generate: list[str], tmp_path: Path) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    both = ["--num-images", "2", "--seed", "1"]
    assert main([*generate, "-o", str(first), *both]) == 0
    assert main([*generate, "-o", str(again), "--seed", "2"]) == 0
    assert (tmp_path / "first-2.png").read_bytes() == again.read_bytes()
    assert (tmp_path / "first-1.png").read_bytes() != again.read_bytes()


def test_size_can_differ_from_the_compiled_one(generate: list[str], tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    size = ["--height", "64", "--width", "64", "--policy", "static"]
    assert main([*generate, "-o", str(path), *size]) == 0
    with Image.open(path) as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["-o", "picture.txt"], "must end in .png"),
        (["--policy", "8p:0.5,p"], "offer only"),
    ],
)
def test_bad_request_is_one_line_and_exit_2(
    generate: list[str],
    extra: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*generate, "--json", *extra]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("ddit-rt generate: ")
    assert message in last
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("instead", "code", "message"),
    [
        ({"--trust-code": "--debug"}, 3, "native code"),
        ({"{model}": "{other}"}, 3, "other weights"),
        ({"{artifact}": "{folder}/none.ddit"}, 3, "no such file: "),
        ({"{model}": "{folder}"}, 2, "model_index.json"),
    ],
)
def test_what_does_not_load_is_told(
    generate: list[str],
    artifact: Path,
    model_folder: Path,
    other_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    instead: dict[str, str],
    code: int,
    message: str,
) -> None:
    places = {"artifact": artifact, "model": model_folder, "other": other_model_folder}
    ((old, new),) = (
        (text.format(**places, folder=tmp_path) for text in pair) for pair in instead.items()
    )
    arguments = [new if argument == old else argument for argument in generate]
    assert main([*arguments, "-o", str(tmp_path / "a.png")]) == code
    assert message in capsys.readouterr().err
