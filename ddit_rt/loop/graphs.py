"""Capturing work into CUDA graphs with torch, on a stream of the executor's own."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ddit_rt.errors import CaptureError, DditError, StallError

STALL_VARIABLE = "DDIT_RT_STALL_SECONDS"

STALL_SECONDS = 120.0
"""Several times what a step at p takes of the largest video models."""

_WARM_UP_RUNS = 2
"""Runs before a capture: libraries make handles, choose algorithms and load code in the first."""

_POLL_SECONDS = 0.001
"""How often the host looks up while it waits for a warm-up."""


def stall_seconds() -> float:
    """How long a device may go without progress: `DDIT_RT_STALL_SECONDS`, by default 120.

    Raises:
        ValueError: The variable holds no positive number.
    """
    text = os.environ.get(STALL_VARIABLE, "")
    try:
        seconds = float(text) if text else STALL_SECONDS
    except ValueError:
        seconds = 0.0
    if not seconds > 0.0:
        raise ValueError(
            f'{STALL_VARIABLE}="{text}", expected a positive number of seconds, or "inf" to wait '
            "for ever"
        )
    return seconds


class Graph(Protocol):
    """One captured bucket."""

    raw: int
    """Address of its `cudaGraph_t`."""

    def replay(self) -> None:
        """Runs it alone, on the executor's stream."""
        ...


class GraphDevice(Protocol):
    """Where graphs are captured and run.

    Attributes:
        device: The device.
        runtime: `ddit_rt._runtime`.
        stall_seconds: How long it may go without progress.
    """

    device: torch.device
    runtime: Any
    stall_seconds: float

    def on_stream(self) -> Any:
        """Context in which work is queued after the caller's, and the caller's after it.

        Yields the stream's address. After a `StallError` the caller's work does not wait.
        """
        ...

    def idle(self) -> bool:
        """Whether all that was queued on the stream is done; does not wait."""
        ...

    def capture(self, name: str, body: Callable[[], None]) -> Graph:
        """Runs `body` to warm up, then captures it; within `on_stream`."""
        ...

    def memory_bytes(self) -> int:
        """Memory that is in use or kept for graphs."""
        ...


class TorchGraph:
    """A `torch.cuda.CUDAGraph` that keeps its `cudaGraph_t`."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph  # its memory pool lives as long as this object
        self.raw = graph.raw_cuda_graph()

    def replay(self) -> None:
        """See `Graph.replay`."""
        self._graph.replay()


class TorchGraphs:
    """Graphs of one CUDA device; all share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        from ddit_rt import _runtime

        self.device = device
        self.runtime: Any = _runtime
        self.stall_seconds = stall_seconds()
        # cuBLAS keeps a workspace per stream, so warm-up, capture and replay share one.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def on_stream(self) -> Iterator[int]:
        """See `GraphDevice.on_stream`."""
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        stalled = False
        try:
            with torch.cuda.stream(self._stream):
                yield self._stream.cuda_stream
        except StallError:
            stalled = True  # what the caller does next must not hang behind it
            raise
        finally:
            if not stalled:
                caller.wait_stream(self._stream)

    def idle(self) -> bool:
        """See `GraphDevice.idle`."""
        return self._stream.query()

    def capture(self, name: str, body: Callable[[], None]) -> TorchGraph:
        """See `GraphDevice.capture`.

        Raises:
            CaptureError: The body fails, does what a graph cannot hold, or draws random numbers.
            StallError: The body does not end.
        """
        try:
            for _ in range(_WARM_UP_RUNS):
                body()
            self._synchronize(name)
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            # Other threads may go on with their own CUDA work meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                body()
            graph.instantiate()
            self._refuse_random_numbers(name, graph)
        except DditError:
            raise
        except RuntimeError as error:
            raise CaptureError(
                f"the step at {name} cannot be captured in a CUDA graph: {error}"
            ) from error
        return TorchGraph(graph)

    def _synchronize(self, name: str) -> None:
        """Waits for the stream, but not for ever."""
        started = time.monotonic()
        while not self.idle():
            if time.monotonic() - started > self.stall_seconds:
                raise StallError(
                    f"the step at {name} did not end within {self.stall_seconds:g} s while it was "
                    f"captured: a kernel hangs, or {STALL_VARIABLE} is too short for this model"
                )
            time.sleep(_POLL_SECONDS)

    def _refuse_random_numbers(self, name: str, graph: torch.cuda.CUDAGraph) -> None:
        """Torch seeds a graph's generator before a replay, which a switched graph never gets."""
        read = functools.partial(torch.cuda.get_rng_state, self.device)
        before = read()
        graph.replay()
        self._synchronize(name)
        if not torch.equal(before, read()):
            raise CaptureError(
                f"the step at {name} draws random numbers, which a captured graph would repeat: "
                "set the model to eval() and remove dropout from it"
            )

    def memory_bytes(self) -> int:
        """See `GraphDevice.memory_bytes`."""
        return int(torch.cuda.memory_reserved(self.device))
