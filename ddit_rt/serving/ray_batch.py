"""Large offline jobs on Ray Data: one engine per GPU, or some on the CPU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import cloudpickle

from ddit_rt.engine import Engine
from ddit_rt.errors import StallError, UnsupportedModelError
from ddit_rt.lab.measure.video_file import write_mp4
from ddit_rt.serving.batch import Item, Line, Records
from ddit_rt.serving.config import Limits, ServeConfig
from ddit_rt.serving.errors import ApiError
from ddit_rt.serving.jobs import Work
from ddit_rt.serving.requests import Reader
from ddit_rt.serving.worker import edits

_BLOCKS = 4096
"""Most blocks of rows; up to this number of images, each block is one image."""

_MOST_DEATHS = 3
"""Workers that may die of one image before it is given up; the image may be the reason."""

_STORE = 256 * 2**20
"""Bytes of Ray's object store; images do not go through it."""

_ANY = 2**62


class Painter:
    """A worker of Ray Data with an engine of its own; it is called once per image."""

    def __init__(
        self, load: Callable[[], Engine], out: Path, kinds: Sequence[Item], settings: dict[str, Any]
    ) -> None:
        """Loads the engine, and checks all that the job asks for before any image is made.

        What goes wrong is not raised, since Ray would begin the worker again; every call returns
        it.

        Args:
            load: Makes the engine; called in this process.
            out: The job's folder.
            kinds: An image of each kind that the job asks for.
            settings: Fields of `ServeConfig`.
        """
        self._out = out
        self._refused = b""
        self._records = Records(out)
        limits = Limits(prompt=_ANY, pixels=_ANY, steps=_ANY, frames=_ANY)
        self._config = ServeConfig(model="batch", limits=limits, **settings)
        try:
            self._engine = load()
            if edits(self._engine):
                raise UnsupportedModelError(
                    "ddit-rt batch makes images from prompts alone, and this model works on an "
                    "image that it is given; call its engine in Python"
                )
            self._read = Reader(self._engine, self._config)
            for item in kinds:
                self._work(item)
        except (ValueError, OSError) as error:
            self._refused = cloudpickle.dumps(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Makes an image, unless its file exists.

        Args:
            row: The fields of its `Item`.

        Returns:
            `line` and `file` of the row; `error`, why the image could not be made, or `""`; and
            `refused`, a pickled exception if the whole job cannot be run, or `b""`.
        """
        item = Item(**row)
        told = {"line": item.line, "file": item.file, "error": "", "refused": self._refused}
        if self._refused or (self._out / item.file).exists():
            return told
        if self._records.begin(item) >= _MOST_DEATHS:
            return {**told, "error": f"{_MOST_DEATHS} workers ended while they made it"}
        try:
            self._make(item)
        except (StallError, torch.AcceleratorError):
            os._exit(1)  # the device cannot be used from this process again; Ray begins another
        except Exception as error:  # noqa: BLE001 - of whatever kind, it concerns this image alone
            told["error"] = f"{type(error).__name__}: {error}"
        self._records.end(item)
        return told

    def _work(self, item: Item) -> Work:
        line = Line.model_validate_json(item.fields).model_copy(update={"seed": item.seed})
        more: dict[str, Any] = {} if line.num_frames is None else {"num_frames": line.num_frames}
        try:
            return self._read(line, alone=True, **more)
        except ApiError as error:
            raise ValueError(f"line {item.line}: {error}") from error

    def _make(self, item: Item) -> None:
        work = self._work(item)
        given = {**work.arguments, "output_type": "pil"}
        if work.negative_prompt is not None:
            given["negative_prompt"] = work.negative_prompt
        generator = torch.Generator().manual_seed(item.seed)
        output = self._engine(work.prompt, generator=generator, **given)
        trace = self._engine.last_trace
        assert trace is not None, "a run that returned has a trace"
        path = self._records.room(item)
        if hasattr(output, "frames"):
            frames = [np.asarray(frame.convert("RGB")) for frame in output.frames[0]]
            write_mp4(path, frames, self._config.fps)
        else:
            output.images[0].save(path)
        self._records.keep(item, path, trace.to_dict())


def kinds_of(items: Sequence[Item]) -> list[Item]:
    """The first image of each kind: those of a kind differ in prompt, name and seed alone."""
    found: dict[str, Item] = {}
    for item in items:
        kind = json.loads(item.fields)
        for name in ("prompt", "id"):
            kind.pop(name, None)
        kind["negative_prompt"] = "negative_prompt" in kind
        found.setdefault(json.dumps(kind, sort_keys=True), item)
    return list(found.values())


def start_ray(workers: int | None, *, gpu: bool) -> tuple[int, dict[str, float]]:
    """Starts Ray on this machine, or connects to the cluster that `RAY_ADDRESS` names.

    Args:
        workers: Number of engines; by default one per GPU, or one on the CPU.
        gpu: Whether each engine takes a GPU.

    Returns:
        The number of engines, and the resources that each of them takes.

    Raises:
        ValueError: Engines take GPUs, and there is none.
    """
    import ray

    joins = "RAY_ADDRESS" in os.environ
    cores = os.cpu_count() or 1
    if joins:
        ray.init()
    else:
        ray.init(
            "local",
            num_cpus=max(cores, workers or 1),
            include_dashboard=False,
            object_store_memory=_STORE,
        )
    if not gpu:
        count = workers or 1
        return count, {"num_cpus": 1 if joins else max(1, cores // count)}
    there = int(ray.cluster_resources().get("GPU", 0))
    if not there:
        raise ValueError("this artifact runs on CUDA, and Ray finds no GPU")
    return workers or there, {"num_cpus": 1, "num_gpus": 1}


def make(
    items: Sequence[Item],
    load: Callable[[], Engine],
    out: Path,
    settings: dict[str, Any],
    *,
    workers: int,
    takes: dict[str, float],
) -> Iterator[dict[str, Any]]:
    """Makes images; Ray must be running.

    Args:
        items: The images.
        load: Makes an engine; called in each worker.
        out: The job's folder, which all workers must see.
        settings: Fields of `ServeConfig`.
        workers: Number of engines.
        takes: Resources that each of them takes.

    Yields:
        What `Painter` returns for each image, in any order.

    Raises:
        ValueError, OSError: The engine cannot be loaded, or cannot make one of the images; none is
            made then.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    rows = [asdict(item) for item in items]
    made = ray.data.from_items(rows, override_num_blocks=min(len(rows), _BLOCKS)).map(
        Painter,
        fn_constructor_args=(load, out, kinds_of(items), settings),
        compute=ray.data.ActorPoolStrategy(size=workers),
        **takes,
    )
    for told in made.iter_rows():
        if told["refused"]:
            raise cloudpickle.loads(told["refused"])
        yield told
