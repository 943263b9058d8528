"""Requests that Schemathesis makes of the served OpenAPI document, most of them malformed: no 500.

`DDIT_RT_REQUESTS=10000 pytest -m slow tests/serving/test_malformed.py` sends as many.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from extras import need
from hypothesis import HealthCheck, Phase, given, seed, settings
from served import editing_engine, running, tiny_engine, video_engine

from ddit_rt import Engine
from ddit_rt.serving.config import Limits

need("schemathesis")

REQUESTS = int(os.environ.get("DDIT_RT_REQUESTS", "600"))
ROUND = 120
"""Requests of one seed."""

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


SERVED: dict[str, tuple[Callable[[], Engine], set[str]]] = {
    "images": (tiny_engine, {"/v1/images/generations", "/v1/models/{name}"}),
    "edits": (editing_engine, {"/v1/images/edits", "/v1/models/{name}"}),
    "videos": (video_engine, {"/v1/videos", "/v1/videos/{video_id}", "/v1/models/{name}"}),
}
"""Engines, and what of their servers can be asked wrongly."""


def operations(url: str) -> list[Any]:
    """Of the document, those that take anything which could be wrong."""
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found = [one.ok() for one in schema.get_all_operations()]
    return [one for one in found if one.body or one.path_parameters]


def send(operation: Any, count: int, number: int) -> Counter[int]:
    """What as many requests were answered, by status."""
    from schemathesis import GenerationMode

    # No text is a wrong path, but there are odd ones.
    mode = GenerationMode.NEGATIVE if operation.body else GenerationMode.POSITIVE
    told: Counter[int] = Counter()

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        answer = case.call(timeout=60)
        told[answer.status_code] += 1
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)

    try:
        ask()
    except ValueError as error:  # Schemathesis stumbles on files that it made itself
        if "Unsupported type: 'Binary'" not in str(error):
            raise
    return told


@pytest.mark.parametrize("kind", SERVED)
def test_no_malformed_request_is_answered_with_a_500(kind: str) -> None:
    made, paths = SERVED[kind]
    limits = Limits(steps=2, n=1, pixels=64 * 128)
    with running(made(), limits=limits, max_batch=1) as url:
        found = operations(url)
        assert paths <= {one.path for one in found}
        told: Counter[int] = Counter()
        number = 0
        while told.total() < REQUESTS / len(SERVED):
            for operation in found:
                body = 4 if operation.body else 1  # of what a body holds more can be wrong
                told += send(operation, ROUND // len(SERVED) * body, number)
                number += 1
        print(dict(told))  # noqa: T201 - the result of the long form
        assert told[400] + told[404] + told[422] > told.total() / 2
        assert httpx.get(f"{url}/ready").status_code == 200
