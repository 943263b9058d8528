"""A clock that is set while a server runs changes nothing but the times that it tells."""

from __future__ import annotations

import time
from typing import Any

import pytest
from served import ASKED, PATH, client_of, tiny_engine


@pytest.mark.parametrize("jump", [-(10.0**9), 10.0**9], ids=["back", "forward"])
def test_a_clock_that_jumps_ends_no_request(monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    now, engine = time.time, tiny_engine()
    own, calls = type(engine).__call__, []

    def jumps(one: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(monkeypatch.setattr(time, "time", lambda: now() + jump))
        return own(one, *args, **kwargs)

    with client_of(engine, deadline_seconds=60) as client:
        expected = client.post(PATH, json=ASKED).json()
        monkeypatch.setattr(type(engine), "__call__", jumps)
        answer = client.post(PATH, json=ASKED)
        assert answer.status_code == 200
        assert answer.json()["data"] == expected["data"]
        assert abs(answer.json()["created"] - expected["created"]) > 10**8
        stream = client.post(PATH, json={**ASKED, "stream": True})
        assert "image_generation.completed" in stream.text
    assert calls
