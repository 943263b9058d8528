"""Capturing work into CUDA graphs with torch, on a stream of the executor's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ddit_rt.errors import CaptureError

_WARM_UP_RUNS = 2
"""Runs before a capture: libraries make handles, choose algorithms and load code in the first."""


class Graph(Protocol):
    """One captured bucket."""

    raw: int
    """Address of its `cudaGraph_t`."""

    def replay(self) -> None:
        """Runs it alone, on the executor's stream."""
        ...


class GraphDevice(Protocol):
    """Where graphs are captured and run. `runtime` is `ddit_rt._runtime`."""

    device: torch.device
    runtime: Any

    def on_stream(self) -> Any:
        """Context in which work is queued after the caller's, and the caller's after it.

        Yields the stream's address.
        """
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
        # cuBLAS keeps a workspace per stream, so warm-up, capture and replay share one.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def on_stream(self) -> Iterator[int]:
        """See `GraphDevice.on_stream`."""
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield self._stream.cuda_stream
        finally:
            caller.wait_stream(self._stream)

    def capture(self, name: str, body: Callable[[], None]) -> TorchGraph:
        """See `GraphDevice.capture`.

        Raises:
            CaptureError: The body does what a graph cannot hold, or draws random numbers.
        """
        for _ in range(_WARM_UP_RUNS):
            body()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        try:
            # Other threads may go on with their own CUDA work meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                body()
        except RuntimeError as error:
            raise CaptureError(
                f"the step at {name} cannot be captured in a CUDA graph: {error}"
            ) from error
        graph.instantiate()
        self._refuse_random_numbers(name, graph)
        return TorchGraph(graph)

    def _refuse_random_numbers(self, name: str, graph: torch.cuda.CUDAGraph) -> None:
        """Torch seeds a graph's generator before a replay, which a switched graph never gets."""
        read = functools.partial(torch.cuda.get_rng_state, self.device)
        before = read()
        graph.replay()
        self._stream.synchronize()
        if not torch.equal(before, read()):
            raise CaptureError(
                f"the step at {name} draws random numbers, which a captured graph would repeat: "
                "set the model to eval() and remove dropout from it"
            )

    def memory_bytes(self) -> int:
        """See `GraphDevice.memory_bytes`."""
        return int(torch.cuda.memory_reserved(self.device))
