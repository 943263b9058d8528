"""Work before a server starts, in a thread that ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def aside(make: Callable[[], T]) -> T:
    """What a function gives, called in a thread of its own that has ended on return.

    On a CPU, libgomp keeps a pool of threads for every thread that has computed in parallel. Once
    all pools together have more threads than there are cores, a pool no longer spins between two
    parallel regions but sleeps, and waking it costs each of a run's thousands of regions more than
    the region itself. A thread that ends gives its pool back: an engine that was loaded aside finds
    all cores free for the thread that runs it.

    Args:
        make: The function. If an interrupt ends the wait, it goes on until the process ends.
    """
    made: Future[T] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller gets it
            made.set_exception(error)

    thread = threading.Thread(target=run, name="ddit-rt-aside", daemon=True)
    thread.start()
    result = made.result()
    thread.join()
    return result
