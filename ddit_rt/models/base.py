"""What a model family must say about itself: the one interface behind which models differ.

A family is a stateless description of one transformer class: how its latents are cut into
tokens, where those tokens sit, how the conditioning enters, which block classes repeat, and
which diffusers pipelines wrap it. Everything else in `ddit_rt` is written against this file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ddit_rt.models.calls import ModelCall, PipelineCall

BATCH = "batch"
IMAGE = "image"
TEXT = "text"
JOINT = "image+text"
SOUND = "sound"


class Runner(Protocol):
    """A block ready to run."""

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Flat tensors in the order of `BlockType.inputs`, a tuple of tensors out."""
        ...

    def stale(self) -> bool:
        """Whether the model has moved the weights that this runner reads."""
        ...

    def rebind(self) -> None:
        """Reads the weights from where the model holds them now."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Name and shape of one block input.

    Attributes:
        name: The block's own argument name.
        dims: One entry per dimension: a fixed size, or one of the symbols `BATCH`, `IMAGE`
            (image tokens), `TEXT` (text tokens), `JOINT` (their sum) and `SOUND` (tokens of a
            soundtrack that advances with the video).
        dtype: Its data type; None for that of the block's weights with a batch dimension, and
            float32 without.
    """

    name: str
    dims: tuple[str | int, ...]
    dtype: torch.dtype | None = None

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape for given symbol sizes."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.dims)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockType:
    """One repeated block class of a transformer: the unit that is compiled ahead of time.

    Attributes:
        name: Class name of the block, e.g. `FluxTransformerBlock`.
        path: Attribute of the transformer that holds the `nn.ModuleList` of these blocks.
        inputs: The flat tensor inputs, in order.
        outputs: Number of tensors returned.
        forward: Calls a block of this type on the flat inputs.
        feed_forward: Names of the linear layers, inside the block, that an adapter's LoRA targets;
            empty in a family without adapters.
        variant: What sets it apart from another type of the same blocks, such as an input more.
        members: Places in the list of the blocks of this type; None for all.
    """

    name: str
    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: int
    forward: Callable[..., tuple[Tensor, ...]]
    feed_forward: tuple[str, ...]
    variant: str = ""
    members: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        """By which its runners are found: path or first block, and the variant if there is one."""
        path = self.block_path(0) if self.members else self.path
        return f"{path}:{self.variant}" if self.variant else path

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The transformer's own blocks of this type, in order."""
        return [
            block
            for place, block in enumerate(transformer.get_submodule(self.path).children())
            if self.members is None or place in self.members
        ]

    def block_path(self, index: int) -> str:
        """Path of the block that stands at an index among those of this type."""
        return f"{self.path}.{self.members[index] if self.members else index}"

    def dtype(self, block: nn.Module) -> torch.dtype:
        """Dtype of a block's matrix products; norms and tables may be kept in float32."""
        return max(block.parameters(), key=Tensor.numel).dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Tokens of one patch size over one latent.

    Attributes:
        height: Token rows.
        width: Token columns.
        frames: Latent frames (1 for images).
    """

    height: int
    width: int
    frames: int = 1

    @property
    def tokens(self) -> int:
        """Image tokens."""
        return self.frames * self.height * self.width


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """Classifier-free guidance: v = v_negative + scale (v_prompt - v_negative).

    Attributes:
        prompt: Conditioning of the pass with the prompt.
        negative: The same for the pass with the negative prompt.
        scale: `[]`, or `[E]` with one for each expert, float32, on the model's device.
    """

    prompt: Mapping[str, Any]
    negative: Mapping[str, Any]
    scale: Tensor


class Family(ABC):
    """The model-specific part of the runtime. Stateless; one instance per class, in `families`.

    Latents are `[B, C, H, W]`, those of a video family `[B, C, F, H, W]`: the ops, the solver and
    the patch scores take either, and a patch is one frame deep, so that only its edge grows. Those
    of an audio family are `[B, C, 1, T]`: a patch is a stretch of time there.

    Attributes:
        name: As a manifest writes it.
        transformer_class: Class name of the transformer.
        pipeline_classes: Class names of the pipelines around it.
        pipeline_config: Values of the pipeline's configuration by which it is this family's, where
            a later one takes all other pipelines of the class.
        conditioning_names: Keyword arguments of `Engine.denoise` that carry the prompt.
        video: Whether latents have frames.
        audio: Whether latents have one row, of time. Where a height and a width in pixels are asked
            for, such a family has 1 and samples.
        soundtrack: Whether a second latent, of sound, advances with that of the video: it comes and
            goes with the calls of the transformer, and the pipelines' own loop steps it.
        size_names: Arguments of the pipelines' calls that say the size.
        channels_last: Whether a token that the de-embedding makes holds a pixel's channels side by
            side; see `ops.unpack`.
        guided_by_default: Whether a pipeline call that says nothing of guidance runs two passes.
        tables: Attributes around the blocks that hold tensors once the model has run.
        numbering: Attributes that number a block, which its forward does not read.
        default_ranges: Fields of `TokenRanges` in which the family departs from its defaults.
        own_blocks: Classes of blocks that the family computes in a form of its own, and their
            modules whose `forward` that passes by, "" for the block's: another could only be
            ignored.
        own_loop: Why only the pipelines' own loop can take the steps; empty where a table can.
        rehearsed: Whether a pipeline's own loop must be seen once, up to its first step, before the
            passes of guidance can be planned: they differ in more than the length of a text.
        time_driven: Whether what TeaCache goes by depends on the time alone.
    """

    name: ClassVar[str]
    transformer_class: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    pipeline_config: ClassVar[Mapping[str, Any]] = {}
    conditioning_names: ClassVar[tuple[str, ...]]
    video: ClassVar[bool] = False
    audio: ClassVar[bool] = False
    soundtrack: ClassVar[bool] = False
    size_names: ClassVar[tuple[str, ...]] = ("height", "width", "num_frames")
    channels_last: ClassVar[bool] = False
    guided_by_default: ClassVar[bool] = False
    tables: ClassVar[tuple[str, ...]] = ()
    numbering: ClassVar[tuple[str, ...]] = ()
    default_ranges: ClassVar[Mapping[str, tuple[int, int]]] = {}
    own_blocks: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    own_loop: ClassVar[str] = ""
    rehearsed: ClassVar[bool] = True
    time_driven: ClassVar[bool] = False

    def check_model(self, transformer: nn.Module, pipeline: Any) -> None:
        """Raises `UnsupportedModelError` for a variant of the class that cannot be run.

        Args:
            transformer: A model of `transformer_class`.
            pipeline: A pipeline of one of `pipeline_classes`, or None for a bare transformer.
        """
        del transformer, pipeline

    def default_passes(self) -> int:
        """Passes of the model in a step of a pipeline call that says nothing of guidance."""
        return 2 if self.guided_by_default else 1

    def experts(self, pipeline: Any) -> tuple[nn.Module, ...]:
        """Models of a pipeline that take over from its `transformer` in later steps, in order.

        They have its class and shapes.
        """
        del pipeline
        return ()

    def expert_steps(self, pipeline: Any, scheduler: Any) -> tuple[int, ...]:
        """Which model each step runs: 0 is the pipeline's `transformer`, then its experts.

        Args:
            pipeline: A pipeline of one of `pipeline_classes`, or None for a bare transformer.
            scheduler: The run's, its timesteps set.
        """
        del pipeline
        return (0,) * len(scheduler.timesteps)

    @abstractmethod
    def base_patch_size(self, transformer: nn.Module) -> int:
        """The patch size p of the unmodified model, in latent pixels."""

    @abstractmethod
    def latent_channels(self, transformer: nn.Module) -> int:
        """Channels of the latent that the model denoises."""

    @abstractmethod
    def first_weight(self, transformer: nn.Module) -> Tensor:
        """The weight that meets the latents first: its dtype and device are the model's."""

    @abstractmethod
    def hidden_size(self, transformer: nn.Module) -> int:
        """Width d of a token inside the blocks."""

    @abstractmethod
    def block_types(self, transformer: nn.Module) -> tuple[BlockType, ...]:
        """The repeated block classes, in the order in which the forward pass runs them."""

    @abstractmethod
    def check_conditioning(
        self, transformer: nn.Module, batch: int, conditioning: Mapping[str, Tensor | None]
    ) -> None:
        """Raises `ValueError` when a conditioning tensor is missing, unknown or misshapen."""

    def check_sizes(self, shape: tuple[int, ...], conditioning: Mapping[str, Any]) -> None:
        """Raises `ShapeError` for conditioning of another size than latents of a shape."""
        del shape, conditioning

    def guidance(self, conditioning: Mapping[str, Tensor]) -> Guidance | None:
        """How a conditioning asks for two passes a step; None for one pass."""
        del conditioning
        return None

    @abstractmethod
    def default_size(self, pipeline: Any) -> tuple[int, int]:
        """Height and width, in pixels, of a pipeline call that names none."""

    def call_size(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width, in pixels, that some arguments of a pipeline's call say.

        Args:
            pipeline: A pipeline of one of `pipeline_classes`.
            call: Arguments; where they say nothing, the pipeline's defaults hold.
        """
        rows, columns = self.default_size(pipeline)
        height, width = call.get("height"), call.get("width")
        return rows if height is None else height, columns if width is None else width

    def default_frames(self, pipeline: Any) -> int | None:
        """Frames of a pipeline call that names none; None for images."""
        del pipeline
        return None

    @abstractmethod
    def latent_shape(
        self, pipeline: Any, height: int, width: int, batch: int, num_frames: int | None = None
    ) -> tuple[int, ...]:
        """Latent shape of an image of `height` x `width` pixels, or of a video.

        Args:
            pipeline: A pipeline of one of `pipeline_classes`.
            height: Pixel rows.
            width: Pixel columns.
            batch: Samples.
            num_frames: Frames of a video; None for the pipeline's default, and for images.

        Raises:
            ShapeError: A size that the model cannot make.
        """

    @abstractmethod
    def read_call(
        self, pipeline: Any, scheduler: Any, arguments: Mapping[str, Any]
    ) -> PipelineCall:
        """Checks a pipeline call, before any work, and sets the scheduler's timesteps.

        Args:
            pipeline: A pipeline of one of `pipeline_classes`.
            scheduler: The copy of the pipeline's scheduler that this run may set.
            arguments: Keyword arguments of the pipeline's `__call__`.
        """

    @abstractmethod
    def read_model_call(
        self, transformer: nn.Module, shape: tuple[int, ...], arguments: Mapping[str, Any]
    ) -> ModelCall:
        """A pipeline's call of its transformer, by the arguments of the transformer's `forward`.

        Args:
            transformer: The model.
            shape: Latent shape of the run.
            arguments: Those that were given.

        Raises:
            UnsupportedModelError: One that the compiled blocks could only ignore.
            ShapeError: A misshapen tensor.
        """

    def passes_in(self, given: Mapping[str, Any], batch: int) -> Sequence[Mapping[str, Any]]:
        """The passes that a pipeline's call of its transformer holds, that with the prompt first.

        Args:
            given: Arguments of the transformer's `forward`.
            batch: Samples of the run.
        """
        del batch
        return (given,)

    def as_called(self, velocities: Sequence[Tensor]) -> Any:
        """The inverse of `passes_in`, of what the passes give."""
        (velocity,) = velocities
        return velocity

    def outputs(
        self, velocities: Sequence[Tensor], sounds: Sequence[Tensor | None]
    ) -> tuple[Any, ...]:
        """What a pipeline's call of its transformer gives, of what the passes in it give.

        Args:
            velocities: Of each pass, in the pipeline's layout.
            sounds: Of the soundtrack, likewise; None where there is none.
        """
        del sounds
        return (self.as_called(velocities),)

    @abstractmethod
    def set_timesteps(
        self, scheduler: Any, num_inference_steps: int, sigmas: Sequence[float] | None, grid: Grid
    ) -> None:
        """Sets the scheduler as the family's pipeline does (dynamic shifting included)."""

    @abstractmethod
    def pack_latents(self, latents: Tensor) -> Tensor:
        """Latents, or a velocity, in the layout that the pipeline has them in."""

    @abstractmethod
    def unpack_latents(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `pack_latents`, of latents of a shape."""

    def linear_timesteps(self, scheduler: Any) -> Tensor:
        """Noise levels t in [0, 1] that the model is given at each step, `[N]`, float32."""
        timesteps: Tensor = scheduler.timesteps
        return timesteps.to(torch.float32) / 1000
