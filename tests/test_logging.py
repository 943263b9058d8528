"""The package is quiet until logging is set up, and then tells operators what they need."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from lora_files import speaking_pipeline, style
from models import noise, tiny_conditioning, tiny_embeds, tiny_pipeline

import ddit_rt
from ddit_rt import RunCancelled, StaticCache, StaticPolicy
from ddit_rt.cli import main
from ddit_rt.engine.watch import RunWatch

CALL = {"height": 64, "width": 64, "num_inference_steps": 4, "output_type": "latent"}


def eager() -> ddit_rt.Engine:
    return ddit_rt.compile(tiny_pipeline(), backend="eager", progress=False)


def said(caplog: pytest.LogCaptureFixture, part: str, level: int = logging.INFO) -> list[str]:
    found = [one for one in caplog.records if one.name == f"ddit_rt.{part}"]
    return [one.getMessage() for one in found if one.levelno == level]


def test_it_says_nothing_by_itself() -> None:
    code = (
        "import logging, ddit_rt; log = logging.getLogger('ddit_rt.engine'); "
        "assert not log.isEnabledFor(logging.INFO); log.error('unheard')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")


@pytest.mark.slow
def test_a_servers_errors_are_heard_without_any_set_up_and_once_with_it() -> None:
    pytest.importorskip("fastapi")
    code = (
        "import logging, sys; from ddit_rt.serving.errors import LOG; LOG.info('no'); "
        "LOG.error('first'); logging.basicConfig(stream=sys.stderr); LOG.error('second')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.splitlines() == ["first", "ERROR:ddit_rt.serving:second"]


def test_compiling_and_a_run_are_told_in_a_line_each(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ddit_rt")
    engine = eager()
    (compiled,) = said(caplog, "engine")
    assert "FluxPipeline" in compiled
    caplog.clear()
    cache = StaticCache(2, first=1, last=0)
    engine(**CALL, **tiny_embeds(), patch_policy=StaticPolicy("2p:0.5,p"), step_cache=cache)
    (run,) = said(caplog, "engine")
    assert run.startswith("call: 4 steps (2 x 2p, 2 x p), ")
    assert ", 2 reused, batch 1, cpu, " in run
    assert len(caplog.records) == 1, "nothing is logged in the step loop"


def test_a_run_that_is_cancelled_and_one_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ddit_rt")
    engine = eager()
    caplog.clear()
    with pytest.raises(ValueError, match="-1 x 64 pixels"):
        engine(**{**CALL, "height": -1}, **tiny_embeds())
    assert not caplog.records, "the caller has the error"
    asked = iter([False, False, True])
    with pytest.raises(RunCancelled):
        engine(**CALL, **tiny_embeds(), watch=RunWatch(stopped=lambda: next(asked)))
    (run,) = said(caplog, "engine")
    assert run.startswith("call: 2 steps")
    assert ", cancelled; " in run


def test_debug_has_the_table_of_steps(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "ddit_rt")
    engine = eager()
    given = tiny_conditioning(engine.pipeline.transformer)
    engine.denoise(noise(1, 4, 16, 16), num_inference_steps=4, patch_policy="fine", **given)
    (table,) = said(caplog, "engine", logging.DEBUG)
    assert table.startswith("denoise\nstep  sigma")
    assert len(table.splitlines()) == 6


def test_changes_of_loras_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ddit_rt")
    pipeline = speaking_pipeline()
    engine = ddit_rt.compile(pipeline, backend="eager", progress=False)
    engine.load_lora(style(pipeline), 0.5, "ink")
    engine.set_loras({})
    engine.unload_loras()
    told = "\n".join(said(caplog, "lora"))
    assert "acting: {'ink': 0.5}; " in told
    assert "loaded ink, which changes " in told
    assert "acting: none; " in told
    assert told.endswith("unloaded ink")


def test_an_artifact_is_told_with_its_digest(
    artifact_path: Path,
    artifact_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("DDIT_RT_HOME", str(artifact_home))
    caplog.set_level(logging.INFO, "ddit_rt")
    engine = ddit_rt.load(artifact_path, tiny_pipeline(), progress=False)
    (opened,) = said(caplog, "artifact")
    assert engine.artifact.manifest.digest in opened
    assert "trusted by this user" in opened
    (loaded,) = said(caplog, "engine")
    assert loaded.startswith("loaded in ")


def test_the_command_line_logs_from_the_level_on_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = list(logging.getLogger("ddit_rt").handlers)
    assert main(["doctor", "--log-level", "loud"]) == 2
    assert "--log-level" in capsys.readouterr().err
    assert main(["doctor", "--log-level", "info"]) == 0
    assert logging.getLogger("ddit_rt").handlers == before
