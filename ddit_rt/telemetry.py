"""OpenTelemetry spans, where its API is installed (extra `otel`); otherwise nothing at all.

Where spans go is the process's own matter: it sets up OpenTelemetry's SDK, in Python or by
`opentelemetry-instrument`. Without an SDK the API itself drops them.

A run is a span, a server's request is one, and so is the batch in between. A step is none: the
trace of the run has the steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

from ddit_rt.version import __version__

Attributes = Mapping[str, str | bool | int | float]
Headers = Sequence[tuple[bytes, bytes]]
"""Of an ASGI scope."""


class Span:
    """A span, or the lack of one: then nothing happens."""

    def __init__(self, own: Any = None) -> None:
        self._own = own

    def set(self, attributes: Attributes) -> None:
        """Adds attributes."""
        if self._own is not None:
            self._own.set_attributes(dict(attributes))

    def rename(self, name: str) -> None:
        """Gives it the name that only its end knows."""
        if self._own is not None:
            self._own.update_name(name)

    def fail(self, reason: str) -> None:
        """Marks it as failed."""
        if self._own is not None:
            self._own.set_status(_api().trace.StatusCode.ERROR, reason)


_NONE = Span()


@cache
def _api() -> Any:
    """The modules of OpenTelemetry's API, or None where it is not installed."""
    try:
        from opentelemetry import context, propagate, trace
    except ModuleNotFoundError:
        return None
    return SimpleNamespace(context=context, propagate=propagate, trace=trace)


@contextmanager
def span(
    name: str,
    attributes: Attributes | None = None,
    *,
    parent: Any = None,
    links: Iterable[Any] = (),
    server: bool = False,
) -> Iterator[Span]:
    """A span around a block; an exception that leaves the block is recorded in it.

    Args:
        name: Its name.
        attributes: What is known at its beginning.
        parent: What `current` gave, or `incoming`; by default what is current here.
        links: Contexts as of `current`, of other spans that it belongs to.
        server: Whether it is a server's side of a request.
    """
    api = _api()
    if api is None:
        yield _NONE
        return
    trace = api.trace
    others = [trace.get_current_span(one).get_span_context() for one in links]
    with trace.get_tracer("ddit_rt", __version__).start_as_current_span(
        name,
        context=parent,
        kind=trace.SpanKind.SERVER if server else trace.SpanKind.INTERNAL,
        attributes=attributes,
        links=[trace.Link(one) for one in others if one.is_valid],
    ) as own:
        yield Span(own)


def current() -> Any:
    """What spans begun here would belong to; for a thread that goes on with it. None: nothing."""
    api = _api()
    return None if api is None else api.context.get_current()


def inside() -> bool:
    """Whether a span is current here, of whoever made it."""
    api = _api()
    return api is not None and bool(api.trace.get_current_span().get_span_context().is_valid)


def incoming(headers: Headers) -> Any:
    """What a request belongs to, by W3C's header `traceparent`; None: nothing."""
    api = _api()
    if api is None:
        return None
    given = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
    return api.propagate.extract(given)


def outgoing(headers: Headers) -> Headers:
    """The headers of a request that is sent on, as part of the span that is current."""
    api = _api()
    if api is None:
        return headers
    carrier: dict[str, str] = {}
    api.propagate.inject(carrier)
    own = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in carrier.items()]
    replaced = {name for name, _ in own}
    return [*((name, value) for name, value in headers if name not in replaced), *own]
