"""A request's span goes on with the trace of its client, down to the engine's run."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("opentelemetry.sdk.trace", reason="pip install 'ddit_rt[test]'")
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from served import ASKED, PATH, Held, client_of, tiny_engine, until_waiting
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ddit_rt import telemetry
from ddit_rt.serving.gate import Gate

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [one for one in spans.get_finished_spans() if one.name == name]


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def parent_of(span: ReadableSpan) -> int:
    assert span.parent is not None
    return span.parent.span_id


def request_of(spans: InMemorySpanExporter, span_id: int) -> int:
    """The server's span that another is below of: FastAPI may put spans of its own between."""
    known = {one.context.span_id: one for one in spans.get_finished_spans() if one.context}
    while known[span_id].kind is not SpanKind.SERVER:
        span_id = parent_of(known[span_id])
    return span_id


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_continues_its_clients_trace(
    spans: InMemorySpanExporter, *, stream: bool
) -> None:
    with client_of(tiny_engine(), warmup_steps=0) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        answer = client.post(PATH, json={**ASKED, "stream": stream}, headers=headers)
        assert answer.status_code == 200
    (request,) = named(spans, f"POST {PATH}")
    (batch,) = named(spans, "ddit_rt.batch")
    *_, run = named(spans, "ddit_rt.call")
    assert request.kind is SpanKind.SERVER
    assert f"{parent_of(request):016x}" == PARENT
    assert request_of(spans, span_id(batch)) == span_id(request)
    assert parent_of(run) == span_id(batch)
    for span in (request, batch, run):
        assert span.context is not None
        assert f"{span.context.trace_id:032x}" == TRACE
    told = request.attributes or {}
    assert told["http.route"] == PATH
    assert told["http.response.status_code"] == 200
    assert (run.attributes or {})["ddit_rt.steps.all"] == 3


def gated(path: str, status: int, headers: list[tuple[bytes, bytes]], *keys: str) -> None:
    """Sends a request through the gate alone, to what answers with a status or raises."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = SimpleNamespace(path="/{name}")
        await Response(status_code=status)(scope, receive, send)

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        del message

    scope = {"type": "http", "method": "GET", "path": path, "headers": headers}
    asyncio.run(Gate(app, keys=keys, body=9, metrics=None)(scope, receive, send))


def test_the_gates_own_span_goes_on_with_the_header_and_says_how_it_ended(
    spans: InMemorySpanExporter,
) -> None:
    gated("/x", 200, [(b"traceparent", f"00-{TRACE}-{PARENT}-01".encode())])
    gated("/x", 503, [(b"traceparent", b"none")])
    gated("/x", 200, [], "a key")
    made, failed, refused = spans.get_finished_spans()
    assert made.name == failed.name == "GET /{name}"
    assert f"{parent_of(made):016x}" == PARENT
    assert failed.parent is refused.parent is None
    assert made.status.is_unset
    assert not failed.status.is_unset
    assert refused.name == "GET"
    assert refused.status.is_unset, "a client's mistake is no fault of the server"
    assert [(one.attributes or {})["http.response.status_code"] for one in (made, failed)] == [
        *(200, 503)
    ]
    assert (refused.attributes or {})["http.response.status_code"] == 401


def test_an_orchestrators_requests_and_what_is_in_a_span_already_get_none(
    spans: InMemorySpanExporter,
) -> None:
    for path in ("/health", "/ready", "/metrics"):
        gated(path, 200, [])
    with telemetry.span("of an instrumentation", server=True):
        gated("/x", 200, [])
    assert [one.name for one in spans.get_finished_spans()] == ["of an instrumentation"]


def test_a_batch_belongs_to_the_first_request_and_is_linked_to_the_others(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    settings = {"warmup_steps": 0, "max_batch": 4}
    with client_of(engine, **settings) as client, ThreadPoolExecutor() as pool:
        held = Held(engine, monkeypatch)
        pool.submit(client.post, PATH, json=ASKED)
        assert held.running.wait(60)
        for seed in range(2):
            pool.submit(client.post, PATH, json={**ASKED, "seed": seed})
        until_waiting(client, 2)
        held.go.set()
    requests = {span_id(one) for one in named(spans, f"POST {PATH}")}
    alone, both = named(spans, "ddit_rt.batch")
    assert len(requests) == 3
    assert not alone.links
    assert (both.attributes or {})["ddit_rt.requests"] == 2
    (link,) = both.links
    below = (parent_of(alone), parent_of(both), link.context.span_id)
    assert {request_of(spans, one) for one in below} == requests


def test_a_server_logs_when_it_is_ready_and_when_it_stops(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "ddit_rt.serving")
    with client_of(tiny_engine()) as client:
        client.get("/health")
    told = [one.getMessage() for one in caplog.records if one.name == "ddit_rt.serving"]
    assert told[0].startswith("tiny is ready after ")
    assert told[1].startswith("GET /health: 200 after ")
    assert told[2:] == ["stopping: 0 images wait, 60 s to make them", "stopped; 0 images were left"]
