"""SIGKILL in the middle of a compile and of a request: nothing that was there is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from artifacts import contents, make_artifact
from diffusers import FluxTransformer2DModel

from ddit_rt.artifact import open_artifact

pytest.importorskip("fastapi", reason="pip install 'ddit_rt[test]'")
pytest.importorskip("uvicorn", reason="pip install 'ddit_rt[test]'")
from served import ASKED, PATH, PROGRAM, wait_until_served

pytestmark = pytest.mark.slow

COMPILE = """
import sys, ddit_rt
from models import tiny_pipeline
ddit_rt.compile(tiny_pipeline(), height=64, width=64, progress=False).save(sys.argv[1])
"""


def started(program: str, argument: object, home: Path, work: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "DDIT_RT_HOME": str(home),
        "TMPDIR": str(work),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
    }
    command = [sys.executable, "-W", "ignore", "-c", program, str(argument)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_compile_that_is_killed_leaves_the_artifact_that_was_there(
    transformer: FluxTransformer2DModel, tmp_path: Path
) -> None:
    target, work = tmp_path / "model.ddit", tmp_path / "work"
    work.mkdir()
    whole = contents(make_artifact(tmp_path / "old", transformer).save(target))
    process = started(COMPILE, target, tmp_path / "home", work)
    try:
        while not any(work.glob("inductor/**/*.cpp")):  # it compiles
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert contents(target) == whole
    open_artifact(target)


def test_a_server_that_is_killed_serves_the_same_image_once_it_is_started_again(
    tmp_path: Path,
) -> None:
    told = []
    for _ in range(2):
        process = started(PROGRAM, 0, tmp_path / "home", tmp_path)
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "running on" in line)
            url = line.split("running on ")[1].split()[0]
            wait_until_served(process, url)
            told.append(httpx.post(url + PATH, json=ASKED, timeout=60).json()["data"])
            # So long that it cannot be over before the server is.
            asked = {**ASKED, "stream": True, "num_inference_steps": 100}
            with httpx.stream("POST", url + PATH, json=asked) as stream:
                lines = stream.iter_lines()
                next(lines)
                process.kill()
                with pytest.raises(httpx.TransportError):
                    list(lines)
        finally:
            process.kill()
            process.communicate()
    assert told[0] == told[1]
