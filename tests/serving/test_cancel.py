"""A client that goes away ends its run, and harms no other."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from served import ASKED, PATH, PAUSE, Held, running, tiny_engine

from ddit_rt.engine.watch import RunWatch

DISCONNECTS = 'ddit_rt_cancellations_total{reason="disconnect"}'


def ask_on(address: tuple[str, int], asked: dict[str, Any]) -> socket.socket:
    """A connection on which a request is under way."""
    body = json.dumps(asked).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(address)
    connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def wait_for(url: str, sample: str) -> None:
    """Until the server's metrics have a sample."""
    while sample not in httpx.get(f"{url}/metrics").text:
        time.sleep(PAUSE)


def test_a_client_that_leaves_ends_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    with running(engine, max_batch=1) as url:
        address = (str(urlsplit(url).hostname), int(urlsplit(url).port or 0))
        before = httpx.post(url + PATH, json=ASKED).json()["data"]
        held = Held(engine, monkeypatch)  # a held run goes on once its watch says stop
        connection = ask_on(address, ASKED)
        assert held.running.wait(60)
        waiting = ask_on(address, {**ASKED, "num_inference_steps": 50})
        # In turn: a server may hear of two that leave at once in either order.
        wait_for(url, "ddit_rt_queue_depth 1.0")
        waiting.close()
        wait_for(url, f"{DISCONNECTS} 1.0")
        connection.close()
        with ThreadPoolExecutor() as pool:
            next_one = pool.submit(httpx.post, url + PATH, json=ASKED, timeout=60)
            wait_for(url, f"{DISCONNECTS} 2.0")
            held.go.set()
        assert next_one.result().json()["data"] == before
        assert all(call["num_inference_steps"] == 3 for call in held.calls)
        assert all(isinstance(call["watch"], RunWatch) for call in held.calls)
