"""What a training run is made of: frozen settings, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ddit_rt.adapters import AdapterConfig
from ddit_rt.policies import parse_patch, patch_name

OPTIMIZERS = ("adamw", "prodigy")
SCHEDULES = ("constant", "cosine")
WEIGHTINGS = ("velocity", "clean")
DATA_KINDS = ("folder", "webdataset", "datasets", "self")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How weights are changed.

    Attributes:
        name: `"adamw"` or `"prodigy"`, which finds its own step size (`lr` scales it).
        lr: Learning rate; by default 1e-4 for AdamW, 1 for Prodigy, as in the paper.
        schedule: `"cosine"`, down to a hundredth, or `"constant"`.
        warmup_steps: Steps of linear warm-up.
        ema: Decay of the average of the weights, which is what is saved; 0 saves the last weights.
    """

    name: str = "adamw"
    lr: float | None = None
    schedule: str = "cosine"
    warmup_steps: int = 50
    ema: float = 0.99

    def __post_init__(self) -> None:
        """Checks the names and ranges."""
        _check_choice("optimizer", self.name, OPTIMIZERS)
        _check_choice("schedule", self.schedule, SCHEDULES)
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"got lr={self.lr}; it must be positive")
        if self.warmup_steps < 0 or not 0 <= self.ema < 1:
            raise ValueError(
                f"got warmup_steps={self.warmup_steps}, ema={self.ema}; expected no negative "
                "warm-up and an ema in [0, 1)"
            )

    @property
    def learning_rate(self) -> float:
        """`lr`, or the optimizer's default."""
        if self.lr is not None:
            return self.lr
        return 1e-4 if self.name == "adamw" else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run.

    Attributes:
        patch_sizes: Sizes that get an adapter, all trained in the one run.
        variant: `"snr"` or `"paper"`; see `ddit_rt/adapters/adapter.py`.
        rank: LoRA rank.
        lora_alpha: LoRA scale times rank; by default the rank.
        steps: Optimizer steps.
        batch_size: Samples of one forward pass and process.
        accumulate: Forward passes per optimizer step.
        optimizer: How weights are changed.
        weighting: `"velocity"`: squared error of v, the paper's loss; `"clean"`: of the clean
            estimate, t^2 times that.
        detail_share: Share of samples, `snr` only, that follow an earlier step at p.
        gradient_checkpointing: Whether blocks are computed again in the backward pass.
        seed: Seed of every random draw.
        sample_every: Steps between grids of samples; 0 makes none.
        checkpoint_every: Steps between checkpoints.
    """

    patch_sizes: tuple[str, ...] = ("2p", "4p")
    variant: str = "snr"
    rank: int = 32
    lora_alpha: int | None = None
    steps: int = 2000
    batch_size: int = 8
    accumulate: int = 1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    weighting: str = "velocity"
    detail_share: float = 0.5
    gradient_checkpointing: bool = False
    seed: int = 0
    sample_every: int = 500
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        """Checks everything that can be checked without a model."""
        _check_choice("weighting", self.weighting, WEIGHTINGS)
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name}={getattr(self, name)}; it must be positive")
        if not self.patch_sizes or len(set(self.multiples)) < len(self.patch_sizes):
            raise ValueError(f"got patch_sizes={self.patch_sizes}; name each size once")
        if not 0 <= self.detail_share <= 1:
            raise ValueError(f"got detail_share={self.detail_share}; it must be in [0, 1]")
        if self.sample_every < 0:
            raise ValueError(f"got sample_every={self.sample_every}; it must not be negative")
        self.adapters()

    @property
    def multiples(self) -> tuple[int, ...]:
        """Patch sizes as multiples of p."""
        return tuple(parse_patch(patch) for patch in self.patch_sizes)

    def adapters(self) -> tuple[AdapterConfig, ...]:
        """Shapes of the adapters."""
        return tuple(
            AdapterConfig(
                patch=patch_name(multiple),
                rank=self.rank,
                lora_alpha=self.lora_alpha or self.rank,
                variant=self.variant,
            )
            for multiple in self.multiples
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is trained on, and how it is brought to latents and embeddings.

    Attributes:
        kind: `"folder"`, `"webdataset"`, `"datasets"`, or `"self"`: the model's own samples.
        source: Folder, tar file(s) (a glob), or data set name; for `"self"` the prompt file.
        height: Pixels rows, in pixels.
        width: Pixels columns, in pixels.
        max_sequence_length: Text tokens; None for the pipeline's own.
        guidance_scale: Guidance of the teacher; None for the pipeline's own.
        limit: Most images to read; for `"self"` the number of trajectories, prompts in turn.
        sampling_steps: Steps of a trajectory (`"self"`).
        image_column: Column of images in a `datasets` data set.
        caption_column: Column of captions in a `datasets` data set.
        encode_batch: Images or prompts that are encoded at once.
        seed: Seed of the noise of trajectories.
    """

    kind: str
    source: str
    height: int
    width: int
    max_sequence_length: int | None = None
    guidance_scale: float | None = None
    limit: int | None = None
    sampling_steps: int = 24
    image_column: str = "image"
    caption_column: str = "text"
    encode_batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        _check_choice("data", self.kind, DATA_KINDS)
        if min(self.height, self.width, self.sampling_steps, self.encode_batch) < 1:
            raise ValueError(
                f"got {self.height} x {self.width} pixels, sampling_steps={self.sampling_steps}, "
                f"encode_batch={self.encode_batch}; all must be positive"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"got limit={self.limit}; it must be positive")

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that all samples share."""
        arguments: dict[str, Any] = {"height": self.height, "width": self.width}
        if self.max_sequence_length is not None:
            arguments["max_sequence_length"] = self.max_sequence_length
        if self.guidance_scale is not None:
            arguments["guidance_scale"] = self.guidance_scale
        return arguments


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"got {name}={value!r}; choose one of {list(choices)}")
