"""What an image of a hundred megapixels costs a server that refuses it: next to no memory."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import wait_until_served
from uploaded import bomb, file_of

PROGRAM = """
import sys
from flux_edit_models import img2img
from models import prompting_pipeline
from served import config
import ddit_rt
from ddit_rt.serving.run import serve
pipeline = img2img()
pipeline.encode_prompt = prompting_pipeline().encode_prompt
engine = ddit_rt.compile(pipeline, height=64, width=64, backend="eager", progress=False)
serve(engine, config(), host="127.0.0.1", port=int(sys.argv[1]), stop_seconds=5)
"""
MIB = 2**20
DECODED = 100 * MIB
"""Bytes that Pillow would take for the bomb, one for each pixel."""


class Server:
    """A server of a model that edits, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.url = url
        self._folder = Path(f"/proc/{process.pid}")

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
def server() -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    here = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(port)],
        text=True,
        env={**os.environ, "PYTHONPATH": str(here)},
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_served(process, url)
        yield Server(process, url)
    finally:
        process.terminate()
        process.wait()


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
