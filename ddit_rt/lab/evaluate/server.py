"""The page of the blind comparison, served on this machine only."""

from __future__ import annotations

import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ddit_rt.lab.evaluate.preferences import SIDES, Study, check_rater

HOST = "127.0.0.1"
_LARGEST_BODY = 4096
_PAGE = Path(__file__).parent / "pages" / "preferences.html"


class StudyServer(ThreadingHTTPServer):
    """Serves one study on 127.0.0.1.

    - `GET /`: the page.
    - `GET /state?rater=NAME`: what this rater sees next.
    - `GET /picture?rater=NAME&pair=N&side=left`: an image; its address names no plan.
    - `POST /answer`: JSON with `rater`, `pair` and `choice`.

    A request that is not well-formed is answered with 400 and a reason.
    """

    daemon_threads = True

    def __init__(self, study: Study, port: int = 0) -> None:
        """Binds the port; 0 takes a free one.

        Raises:
            OSError: The port is taken.
        """
        self.study = study
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def is_own(self, host: str | None) -> bool:
        """Whether a Host header names this server: another name may be a page that rebinds one."""
        return host in (f"{HOST}:{self.server_port}", f"localhost:{self.server_port}")


class _Handler(BaseHTTPRequestHandler):
    server: StudyServer

    def do_GET(self) -> None:
        self._guarded(self._get)

    def do_POST(self) -> None:
        self._guarded(self._post)

    def _guarded(self, respond: Any) -> None:
        if not self.server.is_own(self.headers.get("Host")):
            self._json({"error": "this page is for this machine only"}, HTTPStatus.BAD_REQUEST)
            return
        try:
            respond()
        except ValueError as error:  # also json's and int's
            self._json({"error": str(error)}, HTTPStatus.BAD_REQUEST)

    def _get(self) -> None:
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        if address.path == "/":
            self._send(_PAGE.read_bytes(), "text/html; charset=utf-8")
        elif address.path == "/state":
            self._json(self.server.study.state(check_rater(query.get("rater"))))
        elif address.path == "/picture":
            self._image(query)
        else:
            self._json({"error": f"there is no {address.path}"}, HTTPStatus.NOT_FOUND)

    def _image(self, query: dict[str, str]) -> None:
        side = query.get("side", "")
        if side not in SIDES:
            raise ValueError(f"got the side {side!r}; it is one of {list(SIDES)}")
        pair = self.server.study.pair(check_rater(query.get("rater")), int(query.get("pair", "")))
        self._send(pair.files[SIDES.index(side)].read_bytes(), "image/png")

    def _post(self) -> None:
        # Read first: a connection that is closed with unread data loses the reply.
        body = self._body()
        if urlsplit(self.path).path != "/answer":
            self._json({"error": f"there is no {self.path}"}, HTTPStatus.NOT_FOUND)
            return
        # A form of another site cannot send this type without asking first.
        if self.headers.get_content_type() != "application/json":
            raise ValueError("an answer is sent as application/json")
        answer = json.loads(body)
        self.server.study.record(answer)
        self._json(self.server.study.state(check_rater(answer["rater"])))

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= _LARGEST_BODY:
            self.close_connection = True
            raise ValueError(f"got {length} bytes; an answer has 1 to {_LARGEST_BODY}")
        return self.rfile.read(length)

    def _json(self, data: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(data).encode(), "application/json", status)

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        """Says nothing: every request on the terminal helps nobody."""
