"""The CUDA executor's device on a CPU: the mock runtime runs what the real one would capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class EmulatedGraph:
    """A bucket whose graph calls Python."""

    def __init__(self, runtime: Any, body: Callable[[], None]) -> None:
        self.raw: int = runtime.call_graph(body)
        self.replay = body


class EmulatedGraphs:
    """See `GraphDevice`. Attributes: `captured`, the names of all captures in order."""

    def __init__(self, runtime: Any) -> None:
        self.device = torch.device("cpu")
        self.runtime = runtime
        self.stall_seconds = 60.0
        self.captured: list[str] = []
        self.node_type: int | None = None

    @contextmanager
    def on_stream(self) -> Iterator[int]:
        yield 0

    def idle(self) -> bool:
        return bool(self.runtime.idle())

    def capture(self, name: str, body: Callable[[], None]) -> EmulatedGraph:
        for _ in range(2):
            body()
        self.captured.append(name)
        graph = EmulatedGraph(self.runtime, body)
        if self.node_type is not None:
            graph.raw = self.runtime.typed_graph(self.node_type, 1)
        return graph

    def memory_bytes(self) -> int:
        return 0
