"""What `TorchGraphs` makes of errors and of a device that hangs; `torch.cuda` is a fake."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from ddit_rt.errors import CaptureError, ShapeError, StallError
from ddit_rt.loop import TorchGraphs

SHORT_S = "0.01"


class FakeStream:
    """A stream that is idle at once, or never.

    Attributes:
        waits_for: Streams whose work its own comes after.
    """

    cuda_stream = 7

    def __init__(self, device: Any = None) -> None:
        self.waits_for: list[FakeStream] = []
        self.busy = False

    def wait_stream(self, other: FakeStream) -> None:
        self.waits_for.append(other)

    def query(self) -> bool:
        return not self.busy


class FakeGraph:
    def __init__(self, keep_graph: bool) -> None:
        assert keep_graph

    def instantiate(self) -> None:
        if FakeGraph.problem:
            raise RuntimeError(FakeGraph.problem)

    def replay(self) -> None:
        """Draws no random number."""

    def raw_cuda_graph(self) -> int:
        return 11

    problem = ""


@contextmanager
def fake_capture(graph: FakeGraph, **options: Any) -> Iterator[None]:
    """Ends as torch's does: what the body raised gives way to an error of its own."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904


@pytest.fixture
def caller(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """The stream that is current; everything of torch.cuda that `TorchGraphs` uses is a fake."""
    current = FakeStream()
    for name, fake in (
        ("Stream", FakeStream),
        ("current_stream", lambda device: current),
        ("stream", lambda stream: nullcontext()),
        ("graph_pool_handle", lambda: (0, 1)),
        ("CUDAGraph", FakeGraph),
        ("graph", fake_capture),
        ("get_rng_state", lambda device: torch.zeros(1)),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setenv("DDIT_RT_STALL_SECONDS", SHORT_S)
    return current


def made() -> tuple[TorchGraphs, Any]:
    graphs = TorchGraphs(torch.device("cuda"))
    return graphs, graphs._stream


def failing(error: Exception, after: int = 0) -> Callable[[], None]:
    """A body that raises once it has run so often."""
    runs = iter(range(after))

    def body() -> None:
        if next(runs, None) is None:
            raise error

    return body


def test_a_body_that_is_captured_has_run_twice_before(caller: FakeStream) -> None:
    graphs, stream = made()
    calls: list[int] = []
    with graphs.on_stream() as address:
        graph = graphs.capture("p", lambda: calls.append(1))
    assert (address, graph.raw, len(calls)) == (7, 11, 3)
    assert (stream.waits_for, caller.waits_for) == ([caller], [stream])


def test_a_warm_up_that_hangs_ends_and_the_caller_does_not_wait_behind_it(
    caller: FakeStream,
) -> None:
    graphs, stream = made()
    stream.busy = True
    assert not graphs.idle()
    with (
        pytest.raises(StallError, match=r"the step at 2p did not end within 0.01 s.*STALL_SECONDS"),
        graphs.on_stream(),
    ):
        graphs.capture("2p", lambda: None)
    assert caller.waits_for == []


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_the_caller_waits_behind_a_run_that_ended_with_another_error(
    caller: FakeStream, error: type[BaseException]
) -> None:
    graphs, stream = made()
    with pytest.raises(error), graphs.on_stream():
        raise error
    assert caller.waits_for == [stream]


@pytest.mark.parametrize("run", [0, 1, 2])
def test_a_body_that_fails_in_a_warm_up_or_a_capture_is_named(caller: FakeStream, run: int) -> None:
    graphs, _ = made()
    body = failing(RuntimeError("run_func_ API call failed"), run)
    with pytest.raises(CaptureError, match="the step at 4p cannot be captured.*run_func_ API"):
        graphs.capture("4p", body)


def test_a_graph_that_cannot_be_instantiated_is_named(
    caller: FakeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGraph, "problem", "CUDA error: invalid argument")
    graphs, _ = made()
    with pytest.raises(CaptureError, match="the step at 4p cannot be captured.*invalid argument"):
        graphs.capture("4p", lambda: None)


@pytest.mark.parametrize("run", [0, 2])
def test_a_lack_of_memory_can_be_told_from_what_is_raised(caller: FakeStream, run: int) -> None:
    """`CapturedLoop` adds the shape; see test_cuda_refusals.py."""
    graphs, _ = made()
    with pytest.raises(CaptureError, match="the step at p") as caught:
        graphs.capture("p", failing(torch.OutOfMemoryError("CUDA out of memory"), run))
    chain: list[BaseException | None] = [caught.value]
    while chain[-1] is not None:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    assert any(isinstance(error, torch.OutOfMemoryError) for error in chain)


def test_errors_that_are_our_own_are_left_as_they_are(caller: FakeStream) -> None:
    graphs, _ = made()
    with pytest.raises(ShapeError, match="an image of 7 tokens"):
        graphs.capture("p", failing(ShapeError("an image of 7 tokens")))


def test_a_limit_that_is_none_is_refused_before_any_work(
    caller: FakeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDIT_RT_STALL_SECONDS", "soon")
    with pytest.raises(ValueError, match="DDIT_RT_STALL_SECONDS"):
        TorchGraphs(torch.device("cuda"))
