"""What the HTTP server costs, and what it does under twice the load that it can bear.

    pip install 'ddit_rt[bench]'
    python benchmarks/bench_serving.py [--out benchmarks/results/serving_cpu.json] [--minutes 10]
    python benchmarks/bench_serving.py --quick --out quick.json   # seconds of each; no figures

All on the demo model, whose artifact is compiled first, and on `ddit-rt serve` as a user starts it:

- `start`: from the command to the first image, beside the time that importing the libraries takes.
- `overhead`: an image of four steps by HTTP beside the same call of an engine in this process,
  and beside that with its image encoded as the server does, one after the other; milliseconds. What
  HTTP adds does not depend on the number of steps, and the time of few varies less.
- `lora`: an image with a LoRA of all linear layers that is fused for the first time, of this
  process and at all, and again after an image without it.
- `load`: Locust's users ask for images at twice the rate that the server reached when each asked
  again at once, for `--minutes`, at a batch of 1 and batched; the queue holds eight, so that it
  fills. The same load for a fifth of that time warms the server up. `rss_mib` is the server's
  memory at every tenth of the time.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from records import RESULTS, head, parser_of, publish, resident_bytes
from safetensors.torch import save_file

import ddit_rt
from ddit_rt.serving.answer import encode
from ddit_rt.sources import embedded_defaults, embedded_policy, load_pipeline

USERS = Path(__file__).with_name("serving_users.py")
PATH = "/v1/images/generations"
PROMPT = "a red circle"
WAYS = {"alone": ("--max-batch", "1"), "batched": ()}
LIBRARIES = "import torch, diffusers, transformers, fastapi, uvicorn; diffusers.FluxPipeline"
PAUSE = 0.05
"""Seconds before each call: the threads of the process that had the last spin on for a while."""
CALL_STEPS = 4
"""Steps of the overhead's images."""
PEOPLE = 24
"""Locust's users; more than the queue and a batch hold, so that some are refused."""


@dataclass(frozen=True)
class Served:
    """A server that is ready, the seconds since it was started, and its process."""

    url: str
    began: float
    process: subprocess.Popen[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurements."""
    parser = parser_of(__doc__, RESULTS / "serving_cpu.json")
    parser.add_argument("--minutes", type=float, default=10.0, help="of load, for each way")
    parser.add_argument("--quick", action="store_true", help="whether all of it works")
    args = parser.parse_args(argv)
    rounds, steps, minutes = (3, 4, 0.1) if args.quick else (200, 24, args.minutes)
    pipeline = load_pipeline("demo")
    pipeline.set_progress_bar_config(disable=True)
    side = embedded_defaults("demo")["height"]
    engine = ddit_rt.compile(
        pipeline, height=side, width=side, patch_policy=embedded_policy("demo"), progress=False
    )
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "demo.ddit"
        engine.save(artifact)
        report = head(
            schema_version=2,
            steps=steps,
            start=start(artifact, steps),
            overhead={way: overhead(artifact, engine, rounds, own) for way, own in WAYS.items()},
            lora=lora(artifact, engine, steps),
            load={way: load(artifact, steps, minutes * 60, own) for way, own in WAYS.items()},
        )
    publish(args.out, report)
    return 0


@contextmanager
def serving(artifact: Path, *options: str) -> Iterator[Served]:
    """Within, `ddit-rt serve` serves the artifact; it must end with 0."""
    command = [sys.executable, "-m", "ddit_rt.cli", "serve", str(artifact), "--model", "demo"]
    with tempfile.TemporaryDirectory() as folder:
        log, running = Path(folder) / "log", re.compile(r"running on (\S+)")
        began = time.perf_counter()
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [*command, "--port", "0", *options], stdout=file, stderr=file, text=True
            )
        try:
            while not ((found := running.search(log.read_text("utf-8"))) and is_ready(found[1])):
                assert process.poll() is None, log.read_text(encoding="utf-8")
                time.sleep(0.01)
            yield Served(found[1], began, process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, log.read_text(encoding="utf-8")
        finally:
            process.kill()


def is_ready(url: str) -> bool:
    """Whether a server says so."""
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:  # it does not listen yet
        return False


def start(artifact: Path, steps: int) -> dict[str, float]:
    """From the command to the first image."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", LIBRARIES], check=True, capture_output=True)
    imports = time.perf_counter() - began
    with serving(artifact) as served, httpx.Client(base_url=served.url, timeout=60) as client:
        ask(client, steps, seed=0)
        seconds = time.perf_counter() - served.began
    return {"seconds": seconds, "import_seconds": imports}


def ask(client: httpx.Client, steps: int, seed: int, **more: Any) -> float:
    """An image by HTTP; the seconds that it took."""
    began = time.perf_counter()
    body = {"prompt": PROMPT, "num_inference_steps": steps, "seed": seed, **more}
    client.post(PATH, json=body).raise_for_status()
    return time.perf_counter() - began


def overhead(
    artifact: Path, engine: ddit_rt.Engine, rounds: int, options: Sequence[str]
) -> dict[str, Any]:
    """An image by HTTP beside one of the engine, in turns."""
    length = embedded_defaults("demo")["max_sequence_length"]
    times: dict[str, list[float]] = {name: [] for name in ("engine", "encoded", "http")}
    with (
        serving(artifact, *options) as served,
        httpx.Client(base_url=served.url, timeout=60) as client,
    ):
        for seed in range(rounds + 3):
            time.sleep(PAUSE)
            began = time.perf_counter()
            output = engine(
                PROMPT,
                num_inference_steps=CALL_STEPS,
                max_sequence_length=length,
                generator=torch.Generator().manual_seed(seed),
            )
            times["engine"].append(time.perf_counter() - began)
            encode(output.images[0], "png")
            times["encoded"].append(time.perf_counter() - began)
            time.sleep(PAUSE)
            times["http"].append(ask(client, CALL_STEPS, seed))
    return {name: quantiles([1e3 * one for one in values[3:]]) for name, values in times.items()}


def lora(artifact: Path, engine: ddit_rt.Engine, steps: int, rank: int = 16) -> dict[str, Any]:
    """An image with a LoRA, the first time and later."""
    assert engine.pipeline is not None, "the demo is a whole pipeline"
    layers = {
        name: layer
        for name, layer in engine.pipeline.transformer.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    factors = {}
    for name, layer in layers.items():
        factors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features) / 100
        factors[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank) / 100
    asked = (
        *(("plain", None), ("first_of_process", "one"), ("plain", None)),
        *(("first", "other"), ("plain", None), ("next", "other")),
    )
    found: dict[str, Any] = {"layers": len(layers)}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("one", "other"):
            save_file(factors, Path(folder) / f"{name}.safetensors")
        with (
            serving(artifact, "--lora-dir", folder) as served,
            httpx.Client(base_url=served.url, timeout=60) as client,
        ):
            for kind, name in asked:
                found[kind] = 1e3 * ask(client, steps, seed=0, lora=name)
    return found


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Half and nineteen of twenty are no larger."""
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return {"p50": cuts[9], "p95": cuts[18]}


def load(artifact: Path, steps: int, seconds: float, options: Sequence[str]) -> dict[str, Any]:
    """Twice the rate that the server reaches."""
    with serving(artifact, "--max-queue", "8", *options) as served:
        probe = users(served.url, steps, seconds=min(60.0, max(6.0, seconds / 10)), rate=0.0)
        reached = probe["answers"]["200"]["count"] / probe["seconds"]
        users(served.url, steps, seconds=max(6.0, seconds / 5), rate=2 * reached)  # warms up
        with sampled(lambda: resident_bytes(served.process.pid) / 2**20, seconds / 10) as rss:
            asked = users(served.url, steps, seconds=seconds, rate=2 * reached)
    return {
        **asked,
        "offered_per_second": 2 * reached,
        "images_per_second": asked["answers"]["200"]["count"] / asked["seconds"],
        "rss_mib": rss,
    }


@contextmanager
def sampled(read: Callable[[], float], every: float) -> Iterator[list[float]]:
    """Within, a reading at once and one `every` so many seconds; one more at the end."""
    readings = [read()]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every):
            readings.append(read())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield readings
    finally:
        ended.set()
        watcher.join()
        readings.append(read())


def users(url: str, steps: int, *, seconds: float, rate: float) -> dict[str, Any]:
    """What Locust's users were answered; at a rate of 0 each asks again at once."""
    people = PEOPLE if rate else 8
    each = rate / people if rate else 1e3
    command = [sys.executable, "-m", "locust", "-f", str(USERS), "--headless", "--json"]
    command += ["--host", url, "--users", str(people), "--spawn-rate", str(people)]
    command += ["--run-time", f"{seconds:.0f}s", "--stop-timeout", "60"]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "RATE": f"{each:f}", "STEPS": str(steps)},
    )
    entries = json.loads(done.stdout)
    return {
        "seconds": seconds,
        "answers": {entry["name"]: row(entry) for entry in entries},
        "failures": sum(entry["num_failures"] for entry in entries),
    }


def row(entry: dict[str, Any]) -> dict[str, Any]:
    """One line of Locust's statistics, whose times are a histogram of milliseconds."""
    times = [float(ms) for ms, count in entry["response_times"].items() for _ in range(count)]
    cuts = quantiles(times) if len(times) > 1 else {"p50": times[0], "p95": times[0]}
    return {"count": entry["num_requests"], **cuts}


if __name__ == "__main__":
    sys.exit(main())
