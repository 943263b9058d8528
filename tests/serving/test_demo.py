"""`ddit-rt serve demo` as a user starts it, and what is written about serving."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import httpx
import pytest
import torch
from served import PATH, picture, process_of

from ddit_rt.serving.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]


def served_picture(home: Path, log: Path) -> dict[str, object]:
    """The first picture of a server that is started and stopped."""
    command = ["-m", "ddit_rt.cli", "serve", "demo", "--port", "0"]
    with process_of(command, log, DDIT_RT_HOME=str(home)) as (process, url):
        asked = {"prompt": "a red circle on plain blue", "seed": 1, "num_inference_steps": 24}
        answer = httpx.post(url + PATH, json=asked, timeout=120).json()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert "Traceback" not in log.read_text(encoding="utf-8")
    entry: dict[str, object] = answer["data"][0]
    return entry


@pytest.mark.slow
def test_the_demo_is_compiled_once_kept_and_served_and_ends_with_zero(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = served_picture(home, tmp_path / "first.log")
    assert picture(first).size == (128, 128)
    (kept,) = home.glob("demo-*.ddit")
    files = {file: file.stat().st_mtime_ns for file in kept.rglob("*")}
    assert served_picture(home, tmp_path / "second.log")["b64_json"] == first["b64_json"]
    assert {file: file.stat().st_mtime_ns for file in kept.rglob("*")} == files


def test_dashboard_and_page_name_metrics_that_there_are() -> None:
    metrics = Metrics(lambda: 0, torch.device("cpu"))
    there = {family.name for family in metrics.registry.collect()}
    dashboard = (ROOT / "examples/serving/grafana.json").read_text(encoding="utf-8")
    json.loads(dashboard)
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    for text in (dashboard, page):
        named = set(re.findall(r"\bddit_rt_[a-z_]+", text)) - {"ddit_rt_rt"}
        named = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in named}
        assert named == there
