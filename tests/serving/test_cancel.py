"""A client that goes away ends its run, and harms no other."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from served import ASKED, PATH, Held, running, tiny_engine

from ddit_rt.engine.watch import RunWatch


def ask_on(address: tuple[str, int], asked: dict[str, Any]) -> socket.socket:
    """A connection on which a request is under way."""
    body = json.dumps(asked).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(address)
    connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def test_a_client_that_leaves_ends_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    with running(engine, max_batch=1) as url:
        address = (str(urlsplit(url).hostname), int(urlsplit(url).port or 0))
        before = httpx.post(url + PATH, json=ASKED).json()["data"]
        held = Held(engine, monkeypatch)  # a held run goes on once its watch says stop
        connection = ask_on(address, ASKED)
        assert held.running.wait(60)
        waiting = ask_on(address, {**ASKED, "num_inference_steps": 50})
        waiting.close()
        connection.close()
        answers: list[Any] = []
        next_one = threading.Thread(
            target=lambda: answers.append(httpx.post(url + PATH, json=ASKED, timeout=60))
        )
        next_one.start()
        while not any(watch.stopped() for watch in watches(held)):
            next_one.join(0.01)
        held.go.set()
        next_one.join()
        assert answers[0].json()["data"] == before
        assert all(call["num_inference_steps"] == 3 for call in held.calls)
        page = httpx.get(f"{url}/metrics").text
        assert 'ddit_rt_cancellations_total{reason="disconnect"} 2.0' in page


def watches(held: Held) -> list[Any]:
    found = [call["watch"] for call in held.calls]
    assert all(isinstance(watch, RunWatch) for watch in found)
    return found
