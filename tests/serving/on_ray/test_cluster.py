"""On a Ray cluster of this machine, workers are killed: no request and no image is lost."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from models import seeded
from PIL import Image
from ray_runs import environment, kill, running, until, workers_below
from served import ASKED, PATH, picture, tiny_engine

from ddit_rt import Engine
from ddit_rt.serving import batch

pytestmark = pytest.mark.slow

REQUESTS = 16

HEAD = """
import sys
import ray

for left in (3, 2, 1, 0):  # it gives up after 30 s, which a machine that is busy may need
    try:
        started = ray.init(
            "local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20
        )
        break
    except Exception:
        ray.shutdown()
        if not left:
            raise
print("address", started.address_info["gcs_address"], flush=True)
port = sys.stdin.readline()
if port:
    from ray import serve
    from ddit_rt.serving.config import Limits, ServeConfig
    from ddit_rt.serving.ray_app import Placed, application
    from ray_runs import load

    serve.start(http_options={"port": int(port)})
    placed = Placed(artifact="tiny", min_replicas=2, max_replicas=2, num_gpus=0)
    config = ServeConfig(model="tiny", warmup_steps=1, max_batch=1, limits=Limits(steps=1000))
    serve.run(application(load, placed, config))
    print("up", flush=True)
    sys.stdin.readline()
ray.shutdown()
"""

BATCH = """
import sys
from ddit_rt.cli import batch, main
from ray_runs import load

batch.engine_loader = lambda *_, **__: load
sys.exit(main(["batch", *sys.argv[1:]]))
"""


class Head:
    """A process that holds a Ray cluster, and at will an application on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        # Paths of sockets are at most 107 bytes: pytest's folders are too deep.
        self.own = tempfile.TemporaryDirectory(
            prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
        )
        with self.log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", HEAD],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                text=True,
                env={**environment(folder), "RAY_TMPDIR": self.own.name},
            )

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def said(self, pattern: str) -> re.Match[str]:
        def look() -> re.Match[str] | None:
            text = self.log.read_text(encoding="utf-8")
            assert self.process.poll() is None, text
            return re.search(pattern, text, re.MULTILINE)

        found: re.Match[str] = until(look, pattern)
        return found

    def workers(self, name: str) -> list[int]:
        return workers_below(self.process.pid, name)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ended(Head(tmp_path_factory.mktemp("ray"))) as head:
        yield head


@contextmanager
def ended(head: Head) -> Iterator[Head]:
    try:
        yield head
        assert head.process.stdin is not None
        head.process.stdin.close()
        assert head.process.wait(120) == 0
    finally:
        head.process.kill()
        head.process.wait()
        head.own.cleanup()


class Job:
    """`ddit-rt batch` with the tiny engine, in a process of its own."""

    LINES: tuple[dict[str, Any], ...] = (
        *({"prompt": f"fox {place}", "num_inference_steps": 40} for place in range(14)),
        {"prompt": "a cat", "id": "cat", "seed": 5, "n": 2, "size": "96x64"},
    )

    def __init__(self, head: Head, folder: Path) -> None:
        self.out = folder / "out"
        self.prompts = folder / "prompts.jsonl"
        self.prompts.write_text("\n".join(map(json.dumps, self.LINES)), encoding="utf-8")
        self.log = folder / "log"
        self._address = head.said(r"^address (\S+)")[1]
        self._folder = folder

    @contextmanager
    def running(self, workers: int) -> Iterator[subprocess.Popen[bytes]]:
        options = ["--artifact", "demo", "--out", str(self.out), "--workers", str(workers)]
        with self.log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", BATCH, str(self.prompts), *options, "--debug"],
                stdout=file,
                stderr=file,
                env={**environment(self._folder), "RAY_ADDRESS": self._address},
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def made(self) -> set[Path]:
        return set(self.out.glob("*.png"))

    def makes(self, process: subprocess.Popen[bytes], count: int) -> None:
        """Waits for that many images."""
        until(lambda: len(self.made()) >= count or process.poll() is not None, f"{count} images")
        assert process.poll() is None, self.log.read_text(encoding="utf-8")


def test_a_job_that_is_killed_goes_on_and_makes_every_image_once(
    head: Head, tmp_path: Path, engine: Engine
) -> None:
    job = Job(head, tmp_path)
    with job.running(workers=1) as process:
        job.makes(process, 2)
        workers = head.workers("MapWorker")
        kill(process.pid)
    until(lambda: not any(map(running, workers)), "its worker ends")
    first = {path: path.stat().st_mtime_ns for path in job.made()}
    assert 2 <= len(first) < 16
    assert not (job.out / batch.MANIFEST).exists()

    with job.running(workers=2) as process:
        job.makes(process, len(first) + 1)
        kill(head.workers("MapWorker")[0])
        assert process.wait(300) == 0, job.log.read_text(encoding="utf-8")
    assert f"16 images, {16 - len(first)} made now" in job.log.read_text(encoding="utf-8")
    assert {path: path.stat().st_mtime_ns for path in first} == first
    lines = (job.out / batch.MANIFEST).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    files = [f"{line:06d}-{line - 1}.png" for line in range(1, 15)] + ["cat-5.png", "cat-6.png"]
    assert [record["file"] for record in records] == files
    assert sorted(path.name for path in job.made()) == sorted(files)
    assert {path.name for path in (job.out / ".job").iterdir()} == {"job.json", "lock"}
    for record in records:
        asked = {"num_inference_steps": record.get("num_inference_steps", 28)}
        asked |= {"width": 96, "height": 64} if "size" in record else {}
        expected = engine(record["prompt"], generator=seeded(record["seed"]), **asked).images[0]
        with Image.open(job.out / record["file"]) as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(expected)), record
        assert len(record["trace"]["steps"]) == asked["num_inference_steps"]


class Application:
    """Two replicas of the tiny engine on that cluster."""

    def __init__(self, head: Head) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.head = head
        head.tell(f"{self.port}\n")
        head.said("^up$")

    def replicas(self) -> list[int]:
        return self.head.workers("ServeReplica:default:Replica")

    def metric(self, pattern: str) -> float:
        """The sum of a metric over the replicas."""
        page = httpx.get(f"{self.url}/metrics", timeout=60).text
        return sum(map(float, re.findall(rf"^{pattern} (\S+)$", page, re.MULTILINE)))


@pytest.fixture(scope="module")
def cluster(head: Head) -> Application:
    return Application(head)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_who_leaves_ends_its_run(cluster: Application, stream: bool) -> None:
    began, ended = (
        r"ddit_rt_queue_wait_seconds_count\{.+\}",
        r'ddit_rt_cancellations_total\{reason="disconnect",.+\}',
    )
    before = cluster.metric(began), cluster.metric(ended)
    body = json.dumps({**ASKED, "num_inference_steps": 900, "stream": stream})
    head = f"POST {PATH} HTTP/1.1\r\nHost: {cluster.url[7:]}\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", cluster.port)) as client:
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        until(lambda: cluster.metric(began) > before[0], "it runs")
    until(lambda: cluster.metric(ended) == before[1] + 1, "its run has ended")


def test_no_request_is_lost_with_a_replica_that_is_killed(
    cluster: Application, engine: Engine
) -> None:
    asked = [{**ASKED, "num_inference_steps": 40, "seed": seed} for seed in range(REQUESTS)]
    for one in asked[::4]:
        del one["seed"]
    before = cluster.replicas()
    assert len(before) == 2
    with httpx.Client(timeout=300) as client, ThreadPoolExecutor(REQUESTS) as pool:
        answers = [pool.submit(client.post, cluster.url + PATH, json=one) for one in asked]
        until(lambda: any(answer.done() for answer in answers), "the first answer")
        assert sum(answer.done() for answer in answers) < REQUESTS // 2, "both are under load"
        kill(before[0])
        made = [answer.result() for answer in answers]
    assert [answer.status_code for answer in made] == [200] * REQUESTS
    for one, answer in zip(asked, made, strict=True):
        (entry,) = answer.json()["data"]
        assert entry["seed"] == one.get("seed", entry["seed"])
        expected = engine("a fox", num_inference_steps=40, generator=seeded(entry["seed"]))
        assert np.array_equal(np.asarray(picture(entry)), np.asarray(expected.images[0]))
    assert "its request goes to another" in cluster.head.log.read_text(encoding="utf-8")
    until(lambda: set(cluster.replicas()) - set(before), "Ray begins another replica")
