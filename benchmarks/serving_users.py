"""Users of a server, for Locust; `bench_serving.py` runs it.

Each waits for its answer before it asks again, at most as often as `RATE` says, and takes an image,
a 429 and a 503 for proper answers; anything else is a failure. They stand under their status.
"""

from __future__ import annotations

import base64
import os
from typing import ClassVar

from locust import HttpUser, constant_throughput

PATH = "/v1/images/generations"
PNG = b"\x89PNG\r\n\x1a\n"


class Asker(HttpUser):  # type: ignore[misc]  # Locust's types are not read
    """One of them."""

    wait_time = constant_throughput(float(os.environ["RATE"]))

    def ask(self) -> None:
        """An image of a seed of its own."""
        body = {"prompt": "a red circle", "num_inference_steps": int(os.environ["STEPS"])}
        with self.client.post(PATH, json=body, catch_response=True, name="?") as answer:
            answer.request_meta["name"] = str(answer.status_code)
            if answer.status_code == 200:
                (entry,) = answer.json()["data"]
                if not base64.b64decode(entry["b64_json"]).startswith(PNG):
                    answer.failure("no image")
            elif answer.status_code in (429, 503) and "retry-after" in answer.headers:
                answer.success()
            else:
                answer.failure("no proper answer")

    tasks: ClassVar = [ask]
