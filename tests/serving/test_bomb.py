"""What an image of a hundred megapixels costs a server that refuses it: next to no memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import process_of
from uploaded import bomb, file_of

PROGRAM = """
from served import config, editing_engine
from ddit_rt.serving.app import create_app
from ddit_rt.serving.run import listen
listen(create_app(editing_engine(), config()), host="127.0.0.1", port=0)
"""
MIB = 2**20
DECODED = 100 * MIB
"""Bytes that Pillow would take for the bomb, one for each pixel."""


class Server:
    """A server of a model that edits, in a process of its own."""

    def __init__(self, pid: int, url: str) -> None:
        self.url = url
        self._folder = Path(f"/proc/{pid}")

    def edit(self, data: bytes) -> httpx.Response:
        asked: dict[str, Any] = {"prompt": "a fox", "num_inference_steps": "2", "size": "64x64"}
        return httpx.post(
            f"{self.url}/v1/images/edits", data=asked, files={"image": data}, timeout=60
        )

    def peak(self) -> int:
        """Most bytes that were resident since the latest `forget`."""
        found = re.search(r"VmHWM:\s+(\d+) kB", (self._folder / "status").read_text("utf-8"))
        assert found is not None
        return int(found[1]) * 1024

    def forget(self) -> None:
        """Sets the peak to what is resident now."""
        (self._folder / "clear_refs").write_text("5", "utf-8")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log, here = tmp_path_factory.mktemp("bomb") / "log", Path(__file__).resolve().parent.parent
    with process_of(["-c", PROGRAM], log, PYTHONPATH=str(here)) as (process, url):
        yield Server(process.pid, url)


def test_bombs_take_no_memory_and_are_refused(server: Server) -> None:
    assert server.edit(file_of()).status_code == 200
    server.forget()
    before = server.peak()
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(server.edit, [bomb()] * 8))
    assert [answer.status_code for answer in answers] == [400] * 8
    assert {answer.json()["error"]["code"] for answer in answers} == {"invalid_image"}
    assert server.peak() - before < DECODED / 4
    assert server.edit(file_of()).status_code == 200


def test_the_measure_sees_what_is_decoded(server: Server) -> None:
    """An upload of as many pixels as are admitted does show."""
    server.forget()
    before = server.peak()
    assert server.edit(bomb(side=4000)).status_code == 200
    assert server.peak() - before > 16 * MIB
