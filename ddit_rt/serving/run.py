"""A server that listens, and that ends well."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ddit_rt.serving.errors import LOG
from ddit_rt.serving.worker import Worker

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """Uvicorn's, but for the signals.

    At the first SIGTERM or SIGINT it still listens: what was accepted is finished, within a bound,
    and what comes is told 503, so that whoever balances the load sends it elsewhere. Then it
    ends, and the process goes on to exit with 0. A second signal ends at once what still runs.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker, stop_seconds: float) -> None:
        super().__init__(config)
        self._worker = worker
        self._stop_seconds = stop_seconds
        self._draining = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes the signals for as long as it serves; uvicorn would raise them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.signal(one, self.handle_exit) for one in _SIGNALS}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See the class."""
        del sig, frame
        seconds = 0.0 if self._draining else self._stop_seconds
        self._draining = True

        def drain() -> None:
            self._worker.stop(seconds)
            self.should_exit = True

        threading.Thread(target=drain, name="ddit-rt-drain", daemon=True).start()


def listen(app: FastAPI, *, host: str, port: int) -> None:
    """Serves an application until a signal ends it, and then for the seconds that it was made with.

    Args:
        app: What `create_app` gave.
        host: Address to listen at.
        port: And port.

    Raises:
        OSError: The address cannot be had.
    """
    settings = uvicorn.Config(app, host=host, port=port, lifespan="on", timeout_graceful_shutdown=5)
    listener = settings.bind_socket()
    LOG.info("listening at http://%s:%d", *listener.getsockname()[:2])
    try:
        Server(settings, app.state.service.worker, app.state.stop_seconds).run([listener])
    finally:
        listener.close()
