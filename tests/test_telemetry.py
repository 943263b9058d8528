"""Spans of runs and requests, as OpenTelemetry's own SDK exports them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from models import tiny_embeds, tiny_pipeline

import ddit_rt
from ddit_rt import RunCancelled, StaticCache, StaticPolicy, telemetry
from ddit_rt.engine.watch import RunWatch

pytest.importorskip("opentelemetry.sdk.trace", reason="pip install 'ddit_rt[test]'")
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

CALL = {"height": 64, "width": 64, "num_inference_steps": 4, "output_type": "latent"}


def eager() -> ddit_rt.Engine:
    return ddit_rt.compile(tiny_pipeline(), backend="eager", progress=False)


def test_a_run_is_a_span_with_its_steps_by_patch_size(spans: InMemorySpanExporter) -> None:
    engine = eager()
    policy, cache = StaticPolicy("2p:0.5,p"), StaticCache(2, first=1, last=0)
    engine(**CALL, **tiny_embeds(batch=2), patch_policy=policy, step_cache=cache)
    (span,) = spans.get_finished_spans()
    assert span.name == "ddit_rt.call"
    assert span.status.is_unset
    told: dict[str, Any] = dict(span.attributes or {})
    ran = engine.last_trace
    assert ran is not None
    assert told.pop("ddit_rt.loop_ms") == ran.latency_ms > 0
    assert told == {
        "ddit_rt.policy": repr(policy),
        "ddit_rt.step_cache": repr(cache),
        "ddit_rt.batch": 2,
        "ddit_rt.executor": "cpu",
        "ddit_rt.solver": "FlowMatchEulerDiscreteScheduler",
        "ddit_rt.tokens": ran.tokens,
        "ddit_rt.nonfinite": False,
        "ddit_rt.cancelled": False,
        "ddit_rt.steps.all": 4,
        "ddit_rt.steps.reused": 2,
        "ddit_rt.steps.2p": 2,
        "ddit_rt.steps.p": 2,
    }


def test_a_run_belongs_to_the_span_that_it_is_called_in(spans: InMemorySpanExporter) -> None:
    engine = eager()
    with trace.get_tracer("mine").start_as_current_span("mine") as mine:
        engine(**CALL, **tiny_embeds())
    run, _ = spans.get_finished_spans()
    assert run.parent is not None
    assert run.parent.span_id == mine.get_span_context().span_id


def test_what_fails_and_what_is_cancelled_says_so(spans: InMemorySpanExporter) -> None:
    engine = eager()
    with pytest.raises(ValueError, match="-1 x 64 pixels"):
        engine(**{**CALL, "height": -1}, **tiny_embeds())
    asked = iter([False, True])
    with pytest.raises(RunCancelled):
        engine(**CALL, **tiny_embeds(), watch=RunWatch(stopped=lambda: next(asked)))
    failed, cancelled = spans.get_finished_spans()
    assert not failed.status.is_ok
    assert not failed.status.is_unset
    assert failed.events[0].name == "exception"
    assert "ddit_rt.steps.all" not in (failed.attributes or {})
    told = cancelled.attributes or {}
    assert told["ddit_rt.cancelled"] is True
    assert told["ddit_rt.steps.all"] == 1


def test_without_the_package_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_api", lambda: None)
    assert telemetry.current() is None
    assert telemetry.incoming([(b"traceparent", b"00-1-1-01")]) is None
    headers = [(b"host", b"here")]
    assert telemetry.outgoing(headers) is headers
    with telemetry.span("run", {"a": 1}, links=[None], server=True) as span:
        span.set({"b": 2})
        span.rename("other")
        span.fail("no")
    eager()(**CALL, **tiny_embeds())


def test_the_package_is_looked_for_once_and_its_absence_is_no_fault() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None; from ddit_rt import telemetry; "
        "assert telemetry.current() is None; assert telemetry._api.cache_info().misses == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_headers_that_are_sent_on_carry_the_span_that_is_current(
    spans: InMemorySpanExporter,
) -> None:
    old = (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    context = telemetry.incoming([old])
    with telemetry.span("front", parent=context, server=True):
        sent = dict(telemetry.outgoing([(b"host", b"here"), old]))
    (front,) = spans.get_finished_spans()
    assert front.context is not None
    assert sent[b"host"] == b"here"
    version, trace_id, span_id, _ = sent[b"traceparent"].decode().split("-")
    assert (version, trace_id) == ("00", "0af7651916cd43dd8448eb211c80319c")
    assert int(span_id, 16) == front.context.span_id
