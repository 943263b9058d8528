from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from extras import need

from ddit_rt.cli import main

TINY = ["--height", "64", "--width", "64", "--rank", "4", "--batch-size", "2", "--steps", "2"]
SHORT = ["--sampling-steps", "4", "--sample-every", "0", "--checkpoint-every", "1"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a fox\nan owl\n")
    return path


# A random model makes nothing of a small picture, and two steps train nothing.
@pytest.mark.filterwarnings("ignore:after 2 steps the loss")
def test_adapters_are_trained_and_compile_takes_them(
    model_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need("tensorboard")
    out = tmp_path / "adapters"
    arguments = ["train", str(model_folder), "--self", str(prompts), "--out", str(out)]
    assert main([*arguments, *TINY, *SHORT, "--gain-prompts", str(prompts), "--json"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["adapters"] == str(out)
    assert data["samples"] == 2
    assert set(data["losses"]["trained"]) == {"2p", "4p"}
    assert {gain["patch"] for gain in data["gains"]} == {"2p", "4p"}
    assert (out / "2p" / "adapter_config.json").is_file()
    assert str(model_folder) in (out / "README.md").read_text()

    assert main([*arguments, *TINY, *SHORT, "--lr", "0.5"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "train.optimizer.lr: None there, 0.5 now" in message


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data", "no-such-folder"], "no such file or folder: no-such-folder"),
        (["--data", "none-*.tar"], "no file matches none-*.tar"),
        (["--self", "{prompts}", "--patch-sizes", "p"], 'got patch="p"'),
    ],
)
def test_bad_request_is_exit_2(
    model_folder: Path,
    prompts: Path,
    tmp_path: Path,
    extra: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    need("tensorboard")
    extra = [part.format(prompts=prompts) for part in extra]
    arguments = ["train", str(model_folder), "--out", str(tmp_path / "out"), *TINY, *extra]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_train_one_folder(model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    """They share the work of every step; one of them writes and reports."""
    need("tensorboard")
    arguments = ["train", str(model_folder), "--self", str(prompts), "--out", str(tmp_path / "out")]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "ddit_rt.cli"]
    result = subprocess.run(
        [sys.executable, *launch, *arguments, *TINY, *SHORT, "--gain-prompts", str(prompts)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wrote ") == 1
    assert (tmp_path / "out" / "4p" / "adapter_model.safetensors").is_file()
    assert len(list((tmp_path / "out" / "run" / "checkpoints").glob("*/optimizer.bin"))) >= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:after 16 steps the loss")
def test_process_that_is_killed_twice_ends_as_one_that_is_not(
    model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    """SIGKILL while trajectories are cached, and in the middle of training: equal to the bit."""
    need("tensorboard")
    rest = [*TINY, *SHORT, "--steps", "16", "--limit", "16", "--encode-batch", "1"]

    def command(name: str) -> list[str]:
        arguments = ["train", str(model_folder), "--self", str(prompts), "--out"]
        return [sys.executable, "-m", "ddit_rt.cli", *arguments, str(tmp_path / name), *rest]

    def kill_when(exists: str) -> None:
        with subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL) as process:
            while not (tmp_path / "killed" / exists).exists():
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)

    kill_when("run/cache")
    assert not (tmp_path / "killed/run/cache/index.json").exists()
    kill_when("run/checkpoints/step-000003")
    assert not (tmp_path / "killed/2p").exists()
    for name in ("killed", "whole"):
        assert main(command(name)[3:]) == 0
    paths = sorted(path.relative_to(tmp_path / "whole") for path in _weights(tmp_path / "whole"))
    assert {path.name for path in paths} == {
        "adapter_model.safetensors",
        "patch_adapter.safetensors",
    }
    for path in paths:
        assert (tmp_path / "killed" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()


def _weights(folder: Path) -> list[Path]:
    return list(folder.glob("*p/*.safetensors"))
