"""What a request can reach, and what an answer tells."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from served import ASKED, PATH, client_of, tiny_engine

from ddit_rt import Engine
from ddit_rt.cli.main import build_parser
from ddit_rt.serving.config import Limits, ServeConfig, read_keys
from ddit_rt.serving.errors import clean

KEYS = ("sk-first", "sk-second")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    limits = Limits(body=2000, pixels=64 * 96, prompt=20, n=2, steps=5)
    with client_of(engine, keys=KEYS, limits=limits) as client:
        yield client


def ask(client: TestClient, key: str | None = "Bearer sk-second", **change: Any) -> Any:
    headers = {} if key is None else {"Authorization": key}
    return client.post(PATH, json={**ASKED, **change}, headers=headers)


@pytest.mark.parametrize(
    "key",
    [None, "", "Bearer", "Bearer ", "Bearer sk-firs", "Bearer sk-first1", "Basic sk-first"],
)
def test_without_a_key_nothing_but_the_orchestrators_paths_answers(
    client: TestClient, key: str | None
) -> None:
    answer = ask(client, key)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    headers = {} if key is None else {"Authorization": key}
    for path in ("/v1/models", "/docs", "/openapi.json", "/v1/nothing"):
        assert client.get(path, headers=headers).status_code == 401
    for path in ("/health", "/ready", "/metrics"):
        assert client.get(path, headers=headers).status_code == 200


def test_each_key_answers(client: TestClient) -> None:
    assert [ask(client, f"Bearer {key}").status_code for key in KEYS] == [200, 200]


def test_every_key_is_compared_whole(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    own = hmac.compare_digest

    def compare(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return own(given, known)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key in ("sk-first", "sk-second", "other"):
        compared.clear()
        client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert compared == [key.encode() for key in KEYS]


def test_more_than_the_limits_is_refused_by_name(client: TestClient) -> None:
    assert ask(client, size="96x64", num_inference_steps=5).status_code == 200
    for name, value, said in (
        ("prompt", "x" * 21, "at most 20 characters"),
        ("negative_prompt", "x" * 21, "at most 20 characters"),
        ("size", "96x72", "at most 6144 pixels"),
        ("n", 3, "at most 2"),
        ("num_inference_steps", 6, "at most 5"),
    ):
        answer = ask(client, **{name: value})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("limit", name)
        assert said in error["message"]


def test_a_body_beyond_the_limit_is_refused_whether_it_says_its_length_or_not(
    client: TestClient,
) -> None:
    headers = {"Authorization": "Bearer sk-first", "Content-Type": "application/json"}
    long = b'{"prompt": "' + b"x" * 4000 + b'"}'
    read: list[int] = []

    def pieces() -> Iterator[bytes]:
        for place in range(0, len(long), 100):
            read.append(place)
            yield long[place : place + 100]

    for content in (long, pieces()):
        answer = client.post(PATH, content=content, headers=headers)
        assert answer.status_code == 413
        assert "2000 bytes" in answer.json()["error"]["message"]
    assert client.post(PATH, content=b"{}", headers={**headers, "Content-Length": "x"}).is_error


@pytest.mark.filterwarnings("ignore:.*is ignored:UserWarning")
def test_no_answer_tells_of_the_servers_inside(engine: Engine) -> None:
    hostile: list[dict[str, Any]] = [
        {"patch_policy": "/etc/passwd"},
        {"patch_policy": {"tau": {"../../p": 1}}},
        {"step_cache": "file:///etc/passwd"},
        {"step_cache": "teacache:0.4"},
        {"model": "../../etc/passwd"},
        {"lora": "../../etc/passwd"},
        {"prompt": "\0"},
        {"prompt": ""},
        {"size": "-1x-1"},
        {"size": "1x1"},
        {"true_cfg_scale": 3},
        {"negative_prompt": "a"},
        {"guidance_scale": -1e38},
        {"num_inference_steps": 1, "patch_policy": "4p:1"},
        {"callback_on_step_end": "os.system"},
        {"image": "http://localhost/x.png"},
    ]
    inside = re.compile(r"Traceback|File \"|\.py\b|/(root|work|usr|home|tmp|opt)\b|0x[0-9a-f]")
    with client_of(engine, deadline_seconds=60) as client:
        answers = [client.post(PATH, json={**ASKED, **change}) for change in hostile]
        answers += [client.get(path) for path in ("/../etc/passwd", "/v1/models/%2e%2e%2fx", "//")]
    for answer in answers:
        assert answer.status_code < 500, answer.text
        if answer.status_code != 200:  # else it is a picture
            assert not inside.search(answer.text), answer.text


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("no such file: /root/model/x.bin", "no such file: <path>"),
        ("got 'a/b/c' and 1/2", "got 'a/b/c' and 1/2"),
        ("in ~/a/b and (/work/x/y.py:3)", "in <path> and (<path>:3)"),
        ("one\n  two", "one two"),
    ],
)
def test_paths_are_cut_from_messages(message: str, told: str) -> None:
    assert clean(message) == told


def test_it_binds_to_loopback_unless_told_otherwise() -> None:
    assert build_parser().parse_args(["serve", "demo"]).host == "127.0.0.1"


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-1\n\n sk-2 \n", encoding="utf-8")
    assert read_keys(file) == ("sk-1", "sk-2")
    for text, said in (("\n", "no key"), ("a b\n", "no header"), ("k\u00e4se\n", "no header")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=said):
            read_keys(file)


@pytest.mark.parametrize(
    "settings",
    [{"max_queue": 0}, {"max_batch": 0}, {"batch_window_ms": -1}, {"lora_dir": Path("/nowhere")}],
    ids=str,
)
def test_settings_that_make_no_server_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ServeConfig(model="tiny", **settings)
    with pytest.raises(ValueError, match="body"):
        Limits(body=0)
