"""What of the page can be reached, without a browser."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import gradio_client
import httpx
import pytest
from playgrounds import PLAN, playing
from served import tiny_engine

from ddit_rt import cli
from ddit_rt.cli.command import ExitCode
from ddit_rt.serving.playground.events import Update


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with playing(tiny_engine(), tmp_path_factory.mktemp("pictures")) as url:
        yield url


def test_gradios_own_client_gets_picture_and_timeline(url: str, tmp_path: Path) -> None:
    client = gradio_client.Client(
        url, verbose=False, analytics_enabled=False, download_files=tmp_path
    )
    made = client.predict("a fox", PLAN, 0.5, 4, 7, False, api_name="/generate")
    named = dict(zip(Update._fields[:5], made, strict=False))
    assert Path(str(named["picture"])).read_bytes().startswith(b"\x89PNG")
    assert "<svg" in str(named["timeline"])
    refused = client.predict("", PLAN, 0.5, 4, 7, False, api_name="/generate")
    assert "the prompt is empty" in str(refused[0])


def test_the_page_loads_nothing_from_elsewhere_and_shares_nothing(url: str) -> None:
    settings = httpx.get(f"{url}/config").json()
    assert settings["analytics_enabled"] is False
    assert not settings.get("is_space")
    assert settings["stylesheets"] == []
    page = httpx.get(url).text
    assert "fonts.googleapis" not in page
    assert "cdnjs" not in page


@pytest.mark.parametrize("path", ["/etc/passwd", str(Path(__file__)), "pyproject.toml"])
def test_no_file_of_this_machine_is_served(url: str, path: str) -> None:
    answer = httpx.get(f"{url}/gradio_api/file={path}")
    assert answer.status_code in (403, 404)


def test_no_file_is_taken(url: str) -> None:
    answer = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.txt", b"x")})
    assert answer.status_code == 404


def test_the_servers_interface_is_there_too(url: str) -> None:
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
    assert "gradio" not in httpx.get(f"{url}/openapi.json").text


def test_a_missing_extra_is_named_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("ddit_rt.serving.playground")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["ui", "demo"]) == ExitCode.USAGE
    assert "pip install 'ddit_rt[ui]'" in capsys.readouterr().err


def test_a_model_of_videos_is_refused_before_it_is_compiled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["ui", "demo-video"]) == ExitCode.USAGE
    assert "the playground shows images: give demo" in capsys.readouterr().err


def test_a_missing_artifact_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["ui", str(tmp_path / "a.ddit"), "--model", "demo"]) == ExitCode.ARTIFACT
    assert "a.ddit" in capsys.readouterr().err
