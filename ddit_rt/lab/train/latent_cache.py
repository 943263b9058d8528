"""Latents and text embeddings on disk, made once: safetensors shards and an index.

    index.json                   what was encoded, with which settings, what was skipped
    shard-00000.safetensors      rows of `latents`, `conditioning.<name>`, and, for the model's own
                                 trajectories, `velocities`

Images: `latents` is x0, `[n, C, H, W]`. Trajectories: z_k and v_k of every step,
`[n, N, C, H, W]`. Both are float16: its rounding, 5e-4, is small beside the error of a coarse step.
The index is written last, so that a folder with one is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ddit_rt.lab.measure.report import write_json
from ddit_rt.lab.plans.points import prompt_lines
from ddit_rt.lab.train.config import DataConfig
from ddit_rt.lab.train.denoise import denoise, prepare
from ddit_rt.lab.train.images import captioned_images, read_images
from ddit_rt.steps import StepModel

_SHARD_BYTES = 256 * 2**20
_KEPT_CAPTIONS = 16
_PREFIX = "conditioning."

Rows = dict[str, Tensor]


class LatentCache:
    """A finished cache, read row by row.

    Attributes:
        folder: Where it is.
        index: What it holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: dict[str, Any] = json.loads((folder / "index.json").read_text("utf-8"))
        self._files: list[Any] = [
            safe_open(folder / name, framework="pt") for name in self.index["shards"]
        ]
        self._ends: list[int] = []
        for rows in self.index["rows"]:
            self._ends.append(rows + (self._ends[-1] if self._ends else 0))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def sigmas(self) -> Tensor | None:
        """Noise level of each step of the trajectories, `[N]`; None for images."""
        sigmas = self.index["sigmas"]
        return None if sigmas is None else torch.tensor(sigmas)

    @property
    def captions(self) -> list[str]:
        """The first few captions."""
        return list(self.index["captions"])

    def conditioning(self, rows: list[int]) -> dict[str, Tensor]:
        """Conditioning of some rows."""
        stored = list(self._files[0].keys())
        names = [name for name in stored if name.startswith(_PREFIX)]
        return {
            name.removeprefix(_PREFIX): torch.stack([self._row(name, row) for row in rows])
            for name in names
        }

    def values(self, name: str, rows: list[int], steps: list[int] | None = None) -> Tensor:
        """`latents` or `velocities` of some rows, float32, `[B, C, H, W]`.

        Args:
            name: Which of the two.
            rows: Rows.
            steps: Step of each row's trajectory; None for images.
        """
        chosen = [None] * len(rows) if steps is None else steps
        parts = [self._row(name, row, step) for row, step in zip(rows, chosen, strict=True)]
        return torch.stack(parts).float()

    def _row(self, name: str, row: int, step: int | None = None) -> Tensor:
        shard = next(i for i, end in enumerate(self._ends) if row < end)
        place = row - (self._ends[shard - 1] if shard else 0)
        part = self._files[shard].get_slice(name)
        if step is None:
            found: Tensor = part[place : place + 1]
        else:
            found = part[place : place + 1, step : step + 1][:, 0]
        return found[0]


def open_cache(
    folder: Path, config: DataConfig, model: StepModel, pipeline: Any, *, progress: bool = True
) -> LatentCache:
    """The cache of some data, made now if it is not there yet.

    Raises:
        ValueError: The folder holds a cache of other data, whose settings are shown; or there is
            not one image that can be read.
    """
    wanted = _identity(config, model)
    path = folder / "index.json"
    if path.is_file():
        found = json.loads(path.read_text("utf-8"))["identity"]
        if found != wanted:
            differing = {k: (found.get(k), v) for k, v in wanted.items() if found.get(k) != v}
            raise ValueError(
                f"{folder} caches other data; (there, wanted): {differing}. Delete the folder, or "
                "name another"
            )
        return LatentCache(folder)
    folder.mkdir(parents=True, exist_ok=True)
    skipped, captions = list[str](), list[str]()
    encode = _trajectories if config.kind == "self" else _images
    batches = encode(config, model, pipeline, skipped, captions)
    shards, rows, sigmas = _write_shards(folder, batches, progress)
    if not rows:
        raise ValueError(
            f"not one image of {config.source} can be used; the first reasons: {skipped[:3]}"
        )
    index = {
        "identity": wanted,
        "shards": shards,
        "rows": rows,
        "sigmas": sigmas,
        "captions": captions,
        "skipped": skipped,
    }
    write_json(path, index)
    return LatentCache(folder)


def _identity(config: DataConfig, model: StepModel) -> dict[str, Any]:
    """What must agree for a cache to serve again."""
    weight = model.layers.embedding_layers(model.transformer)[0].weight
    fields = {k: v for k, v in asdict(config).items() if k != "encode_batch"}
    if config.kind == "self":
        fields["prompts"] = hashlib.sha256(Path(config.source).read_bytes()).hexdigest()
    sample = weight.detach().flatten()[:4].float().tolist()
    return {**fields, "dtype": str(model.dtype), "embedding": [round(v, 5) for v in sample]}


def _images(
    config: DataConfig, model: StepModel, pipeline: Any, skipped: list[str], captions: list[str]
) -> Iterator[tuple[Rows, None]]:
    examples = islice(captioned_images(config), config.limit)
    images = read_images(examples, config.height, config.width, skipped)
    while batch := list(islice(images, config.encode_batch)):
        prompts = [caption for _, caption in batch]
        captions += prompts[: _KEPT_CAPTIONS - len(captions)]
        pixels = torch.stack([image for image, _ in batch])
        arguments = {**config.call, "num_inference_steps": 1}
        prepared = prepare(model.family, pipeline, prompts, range(len(batch)), **arguments)
        with torch.no_grad():
            latents = model.layers.encode_images(pipeline, pixels)
        yield {"latents": latents, **_named(prepared.conditioning)}, None


def _trajectories(
    config: DataConfig, model: StepModel, pipeline: Any, skipped: list[str], captions: list[str]
) -> Iterator[tuple[Rows, list[float]]]:
    del skipped  # prompts cannot be broken
    prompts = prompt_lines(config.source)
    captions += prompts[:_KEPT_CAPTIONS]
    count = config.limit or len(prompts)
    for start in range(0, count, config.encode_batch):
        numbers = range(start, min(count, start + config.encode_batch))
        prepared = prepare(
            model.family,
            pipeline,
            [prompts[number % len(prompts)] for number in numbers],
            [config.seed + number for number in numbers],
            num_inference_steps=config.sampling_steps,
            **config.call,
        )
        latents, velocities = list[Tensor](), list[Tensor]()

        def record(
            _: int,
            z: Tensor,
            v: Tensor,
            latents: list[Tensor] = latents,
            found: list[Tensor] = velocities,
        ) -> None:
            latents.append(z.half())
            found.append(v.half())

        sigmas = prepared.scheduler.sigmas[:-1].tolist()
        denoise(model, prepared, [1] * len(sigmas), record=record)
        rows = {"latents": torch.stack(latents, 1), "velocities": torch.stack(velocities, 1)}
        yield {**rows, **_named(prepared.conditioning)}, sigmas


def _named(conditioning: Mapping[str, Tensor]) -> Rows:
    return {_PREFIX + name: value for name, value in conditioning.items()}


def _write_shards(
    folder: Path, batches: Iterator[tuple[Rows, list[float] | None]], progress: bool
) -> tuple[list[str], list[int], list[float] | None]:
    """Gathers batches into shards; returns their names, rows and the sigmas."""
    names, rows, waiting = list[str](), list[int](), list[Rows]()
    sigmas: list[float] | None = None

    def flush() -> None:
        joined = {key: torch.cat([batch[key] for batch in waiting]) for key in waiting[0]}
        names.append(f"shard-{len(names):05d}.safetensors")
        rows.append(len(joined["latents"]))
        save_file(joined, folder / names[-1])
        waiting.clear()

    with tqdm(desc="encode", unit="sample", disable=not progress) as bar:
        for batch, schedule in batches:
            sigmas = schedule
            stored = {
                key: (value.half() if key in ("latents", "velocities") else value).cpu()
                for key, value in batch.items()
            }
            waiting.append({key: value.contiguous() for key, value in stored.items()})
            bar.update(len(stored["latents"]))
            if sum(value.nbytes for one in waiting for value in one.values()) >= _SHARD_BYTES:
                flush()
    if waiting:
        flush()
    return names, rows, sigmas
