"""The training run: teacher and student side by side, checkpoints, logs, the finished folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddit_rt.adapters import adaptable_layers, save_adapters
from ddit_rt.lab.train.card import model_card
from ddit_rt.lab.train.checkpoint import Checkpoints, check_same_run, register_hooks
from ddit_rt.lab.train.config import DataConfig, TrainConfig
from ddit_rt.lab.train.evaluate import (
    TRAINED,
    Gain,
    Losses,
    current_losses,
    measure_gain,
    sample_grid,
    untrained_losses,
    warn_if_worse,
    write_png,
)
from ddit_rt.lab.train.latent_cache import LatentCache, open_cache
from ddit_rt.lab.train.optimizers import CLIP, WeightAverage, build_optimizer, learning_rate_at
from ddit_rt.lab.train.states import StateSource, to_device
from ddit_rt.lab.train.student import Student
from ddit_rt.models import family_of
from ddit_rt.policies import patch_name

_PROBE = 32
_GRID_PROMPTS = 4
_CHECK_AFTER = 100
_LOG_EVERY = 10
_KEPT_CHECKPOINTS = 2
_GAIN_SEED = 1_000_000


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run did.

    Attributes:
        folder: The adapters, as `load_adapters` reads them.
        steps: Optimizer steps in all.
        samples: Number of samples in the cache.
        skipped: Images that were left out, each with its reason.
        losses: Losses on one fixed batch, by path and multiple of p.
        gains: Fidelity of images to full resolution.
        warnings: What was said loudly.
        seconds_per_step: Mean over this call's own steps; None when none were left to do.
        is_main: Whether this process wrote the folder; one of several does.
    """

    folder: Path
    steps: int
    samples: int
    skipped: list[str]
    losses: dict[str, Losses]
    gains: list[Gain]
    warnings: list[str]
    seconds_per_step: float | None
    is_main: bool


def train(
    pipeline: Any,
    data: DataConfig,
    config: TrainConfig,
    out: str | Path,
    *,
    gain_prompts: Sequence[str] | None = None,
    cache: str | Path | None = None,
    restart: bool = False,
    save_dtype: torch.dtype | None = None,
    model_name: str | None = None,
    progress: bool = True,
) -> TrainResult:
    """Trains adapters for a pipeline's transformer, which is left as it was.

    A run that was cut off is continued from its last checkpoint, exactly; a finished one is only
    written again.

    Args:
        pipeline: A diffusers pipeline of a supported family, on the device to train on.
        data: What is trained on.
        config: How.
        out: Folder of the adapters; the run's own files lie in `run` under it.
        gain_prompts: Prompts to measure the gain on and to draw samples of; by default captions
            of the training data. None are used when empty.
        cache: Folder of latents and embeddings; by default `run/cache` under `out`.
        restart: Whether to throw an earlier run under `out` away; its cache is kept.
        save_dtype: To store the adapters in; by default float32.
        model_name: Name of the base model on the card; by default what it was loaded from.
        progress: Whether to show progress bars on stderr.

    Raises:
        UnsupportedModelError: No family handles the transformer, or it carries adapters.
        ShapeError: Images of a size that the model cannot make.
        ValueError: Data that cannot be used, or a run under `out` with other settings.
        ModuleNotFoundError: A package is missing; the message says what to install.
    """
    if find_spec("tensorboard") is None:
        raise ModuleNotFoundError('training logs need tensorboard: pip install "ddit_rt[train]"')
    folder = Path(out)
    if restart:
        for name in ("checkpoints", "logs", "samples"):
            shutil.rmtree(folder / "run" / name, ignore_errors=True)
        (folder / "run" / "run.json").unlink(missing_ok=True)
    family = family_of(pipeline.transformer, pipeline)
    adaptable_layers(family, pipeline.transformer)
    family.latent_shape(pipeline, data.height, data.width, 1)  # refuses what cannot be made
    check_same_run(folder / "run" / "run.json", {"train": asdict(config), "data": asdict(data)})
    student = Student(
        family,
        pipeline.transformer,
        config.adapters(),
        seed=config.seed,
        checkpointing=config.gradient_checkpointing,
    )
    try:
        run = _Run(pipeline, data, config, folder, student, cache, gain_prompts, progress)
        loaded_from = pipeline.config.get("_name_or_path") or type(pipeline).__name__
        return run.finish(run.loop(), save_dtype, model_name or str(loaded_from))
    finally:
        student.unload()


class _Run:
    """One call of `train`."""

    def __init__(
        self,
        pipeline: Any,
        data: DataConfig,
        config: TrainConfig,
        folder: Path,
        student: Student,
        cache: str | Path | None,
        gain_prompts: Sequence[str] | None,
        progress: bool,
    ) -> None:
        from accelerate import Accelerator

        self._pipeline, self._data, self._config = pipeline, data, config
        self._folder, self._student, self._progress = folder, student, progress
        self._accelerator = Accelerator(
            gradient_accumulation_steps=config.accumulate,
            cpu=student.model.device.type == "cpu",
            log_with="tensorboard",
            project_dir=str(folder / "run" / "logs"),
        )
        with self._accelerator.main_process_first():
            self.cache: LatentCache = open_cache(
                Path(cache) if cache else folder / "run" / "cache",
                data,
                student.model,
                pipeline,
                progress=progress and self._accelerator.is_main_process,
            )
        given = gain_prompts is not None
        self._prompts = list(gain_prompts) if gain_prompts is not None else self.cache.captions
        self._prompt_words = "not trained on" if given else "of the training data"
        self._source = StateSource(
            self.cache,
            config,
            process=self._accelerator.process_index,
            processes=self._accelerator.num_processes,
        )
        self._prepare()
        self._probe = to_device(self._source.probe(_PROBE), self._accelerator.device)
        self.untrained: dict[str, Losses] = self._model(untrained_losses, self._probe, self._weigh)
        self.warnings: list[str] = []

    def _prepare(self) -> None:
        config, accelerator = self._config, self._accelerator
        parameters = [p for p in self._student.parameters() if p.requires_grad]
        optimizer = build_optimizer(config.optimizer, parameters)
        self._model, self._optimizer = accelerator.prepare(self._student, optimizer)
        # Sharding may have replaced them.
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._average = WeightAverage(parameters, config.optimizer.ema)
        accelerator.register_for_checkpointing(self._average)
        register_hooks(accelerator)
        accelerator.init_trackers("train")
        self._checkpoints = Checkpoints(self._folder / "run" / "checkpoints", _KEPT_CHECKPOINTS)

    def loop(self) -> float | None:
        """Trains to the end; seconds per step."""
        config, start = self._config, 0
        latest = self._checkpoints.latest()
        if latest is not None:
            start, path = latest
            self._accelerator.load_state(str(path))
        check = min(config.steps, max(_CHECK_AFTER, 2 * config.optimizer.warmup_steps))
        began, recent = time.perf_counter(), list[dict[int, Tensor]]()
        shown = self._progress and self._accelerator.is_main_process
        with tqdm(
            total=config.steps, initial=start, desc="train", unit="step", disable=not shown
        ) as bar:
            for step in range(start, config.steps):
                recent.append(self._step(step))
                bar.update()
                done = step + 1
                if done % _LOG_EVERY == 0 or done == config.steps:
                    self._log(done, recent, bar)
                    recent.clear()
                if done == check:
                    self._check(done)
                if config.sample_every and done % config.sample_every == 0:
                    self._sample(done)
                if done % config.checkpoint_every == 0 or done == config.steps:
                    self._checkpoints.save(self._accelerator, done)
        count = config.steps - start
        return (time.perf_counter() - began) / count if count else None

    def _step(self, step: int) -> dict[int, Tensor]:
        """Takes an optimizer step and returns its mean losses."""
        config, accelerator = self._config, self._accelerator
        rate = learning_rate_at(config.optimizer, step, config.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        means = dict.fromkeys(config.multiples, torch.zeros((), device=accelerator.device))
        for part in range(config.accumulate):
            states = to_device(self._source.batch(step, part), accelerator.device)
            with accelerator.accumulate(self._model):
                errors = self._model(Student.errors, states)
                losses = {m: self._weigh(error, states.sigmas) for m, error in errors.items()}
                means = {
                    m: means[m] + loss.detach() / config.accumulate for m, loss in losses.items()
                }
                total = torch.stack(list(losses.values())).sum()
                accelerator.backward(total)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self._model.parameters(), CLIP)
                self._optimizer.step()
                self._optimizer.zero_grad()
        self._average.update()
        return means

    def _weigh(self, error: Tensor, sigmas: Tensor) -> Tensor:
        """Mean loss of a batch."""
        return (error * sigmas.square() if self._config.weighting == "clean" else error).mean()

    def _log(self, done: int, recent: list[dict[int, Tensor]], bar: Any) -> None:
        """Means over the steps since the last entry: single batches differ by their levels."""
        values = {
            patch_name(multiple): float(torch.stack([losses[multiple] for losses in recent]).mean())
            for multiple in self._config.multiples
        }
        bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
        logged = {f"loss/{name}": value for name, value in values.items()}
        group = self._optimizer.param_groups[0]
        # Prodigy's own estimate of the step size multiplies the rate.
        logged["lr"] = group["lr"] * group.get("d", 1.0)
        self._accelerator.log(logged, step=done)

    def _check(self, done: int) -> None:
        losses = self._model(current_losses, self._probe, self._weigh)
        self.warnings += warn_if_worse(done, self._config.variant, losses, self.untrained)
        self._accelerator.log(
            {f"probe/{patch_name(multiple)}": loss for multiple, loss in losses.items()}, step=done
        )

    def _sample(self, done: int) -> None:
        prompts = self._prompts[:_GRID_PROMPTS]
        if not prompts:
            return
        with self._average.applied():
            grid = self._model(sample_grid, self._pipeline, self._data, prompts, _GAIN_SEED)
        if not self._accelerator.is_main_process:
            return
        write_png(self._folder / "run" / "samples" / f"step-{done:06d}.png", grid)
        writer = self._accelerator.get_tracker("tensorboard", unwrap=True)
        writer.add_image("samples", grid.clamp(0, 1), done)

    def finish(
        self, seconds_per_step: float | None, save_dtype: torch.dtype | None, model_name: str
    ) -> TrainResult:
        """Measures the gain and writes the folder."""
        config, accelerator, student = self._config, self._accelerator, self._student
        with self._average.applied():
            trained = self._model(current_losses, self._probe, self._weigh)
            losses = {**self.untrained, TRAINED: trained}
            gains: list[Gain] = []
            if self._prompts:
                gains = self._model(
                    measure_gain, self._pipeline, self._data, self._prompts, _GAIN_SEED
                )
            adapters = student.export(accelerator.get_state_dict(self._model))
        result = TrainResult(
            folder=self._folder,
            steps=config.steps,
            samples=len(self.cache),
            skipped=self.cache.index["skipped"],
            losses=losses,
            gains=gains,
            warnings=self.warnings,
            seconds_per_step=seconds_per_step,
            is_main=accelerator.is_main_process,
        )
        if accelerator.is_main_process:
            save_adapters(
                adapters, self._folder, student.family, student.transformer, dtype=save_dtype
            )
            card = model_card(model_name, config, self._data, result, self._prompt_words)
            (self._folder / "README.md").write_text(card, encoding="utf-8")
        accelerator.end_training()
        return result
