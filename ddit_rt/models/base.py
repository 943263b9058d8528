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

from ddit_rt.models.calls import ModelCall, PipelineCall, PreparedCall

BATCH = "batch"
IMAGE = "image"
TEXT = "text"
JOINT = "image+text"


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
            (image tokens), `TEXT` (text tokens) and `JOINT` (their sum).
    """

    name: str
    dims: tuple[str | int, ...]

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
        feed_forward: Names of the linear layers, inside the block, that an adapter's LoRA targets.
    """

    name: str
    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: int
    forward: Callable[..., tuple[Tensor, ...]]
    feed_forward: tuple[str, ...]

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The transformer's own blocks of this type, in order."""
        return list(transformer.get_submodule(self.path).children())

    def dtype(self, block: nn.Module) -> torch.dtype:
        """Dtype of a block's matrix products; norms and tables may be kept in float32."""
        return block.get_parameter(f"{self.feed_forward[0]}.weight").dtype


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
        negative: The same tensors for the pass with the negative prompt.
        scale: `[]`, or `[E]` with one for each expert, float32, on the model's device.
    """

    prompt: Mapping[str, Tensor]
    negative: Mapping[str, Tensor]
    scale: Tensor


class Family(ABC):
    """The model-specific part of the runtime. Stateless; one instance per class, in `families`.

    Latents are `[B, C, H, W]`, those of a video family `[B, C, F, H, W]`: the ops, the solver and
    the patch scores take either, and a patch is one frame deep, so that only its edge grows.

    Attributes:
        name: As a manifest writes it.
        transformer_class: Class name of the transformer.
        pipeline_classes: Class names of the pipelines around it.
        conditioning_names: Keyword arguments of `Engine.denoise` that carry the prompt.
        video: Whether latents have frames.
        channels_last: Whether a token that the de-embedding makes holds a pixel's channels side by
            side; see `ops.unpack`.
        time_driven: Whether what TeaCache goes by depends on the time alone; then the family has a
            `time_signal`, otherwise `modulate_input`.
        guided_by_default: Whether a pipeline call that says nothing of guidance runs two passes.
        default_ranges: Fields of `TokenRanges` in which the family departs from its defaults.
    """

    name: ClassVar[str]
    transformer_class: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    conditioning_names: ClassVar[tuple[str, ...]]
    video: ClassVar[bool] = False
    channels_last: ClassVar[bool] = False
    time_driven: ClassVar[bool] = False
    guided_by_default: ClassVar[bool] = False
    default_ranges: ClassVar[Mapping[str, tuple[int, int]]] = {}

    def check_model(self, transformer: nn.Module, pipeline: Any) -> None:
        """Raises `UnsupportedModelError` for a variant of the class that cannot be run.

        Args:
            transformer: A model of `transformer_class`.
            pipeline: A pipeline of one of `pipeline_classes`, or None for a bare transformer.
        """
        del transformer, pipeline

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

    def guidance(self, conditioning: Mapping[str, Tensor]) -> Guidance | None:
        """How a conditioning asks for two passes a step; None for one pass."""
        del conditioning
        return None

    @abstractmethod
    def embed_text(self, transformer: nn.Module, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Text tokens as the blocks take them, `[B, T, d]`. The same at every step."""

    @abstractmethod
    def embed_time(
        self, transformer: nn.Module, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Modulation input of every step.

        Args:
            transformer: The model.
            timesteps: Noise levels t in [0, 1], `[N]`, float32.
            conditioning: The run's conditioning.

        Returns:
            `[N, B, *modulation_shape]`, in the model's dtype.
        """

    def modulation_shape(self, transformer: nn.Module) -> tuple[int, ...]:
        """Shape of one sample's modulation input; by default `[d]`."""
        return (self.hidden_size(transformer),)

    @abstractmethod
    def positions(
        self, transformer: nn.Module, grid: Grid, text_tokens: int, *, stretch: int = 1
    ) -> tuple[Tensor, ...]:
        """Position encodings that the blocks take for a grid of tokens.

        Args:
            transformer: The model.
            grid: Token rows and columns, and frames.
            text_tokens: Length of the text sequence.
            stretch: 1 for the natural positions 0, 1, 2, ...; s for tokens that each cover
                s x s base tokens of one frame, placed at the centres of what they cover.
        """

    @abstractmethod
    def embed_tokens(self, transformer: nn.Module, tokens: Tensor) -> Tensor:
        """The model's own patch embedding: `[B, n, C*p*p]` to `[B, n, d]`."""

    @abstractmethod
    def run_blocks(
        self,
        runners: Mapping[str, Sequence[Runner]],
        hidden: Tensor,
        text: Tensor,
        temb: Tensor,
        positions: tuple[Tensor, ...],
    ) -> Tensor:
        """All blocks.

        Args:
            runners: The blocks of each `BlockType.path`, in order.
            hidden: Image tokens, `[B, n, d]`.
            text: Text tokens, `[B, T, d]`.
            temb: Modulation input of this step, `[B, *modulation_shape]`.
            positions: As `positions` returned them.

        Returns:
            Image tokens, `[B, n, d]`.
        """

    def modulate_input(self, transformer: nn.Module, hidden: Tensor, temb: Tensor) -> Tensor:
        """The first block's modulated norm of embedded tokens, by whose change TeaCache goes.

        Of a family that is not `time_driven`.

        Args:
            transformer: The model.
            hidden: Image tokens, `[B, n, d]`.
            temb: Modulation input of this step, `[B, *modulation_shape]`.

        Returns:
            `[B, n, d]`.
        """
        raise NotImplementedError

    def time_signal(self, transformer: nn.Module, timesteps: Tensor, *, projected: bool) -> Tensor:
        """What TeaCache goes by in a family that is `time_driven`.

        Args:
            transformer: The model.
            timesteps: Noise levels t in [0, 1], `[N]`, float32.
            projected: Whether the projected time embedding is meant, not the embedding itself.

        Returns:
            `[N, m]`, float32.
        """
        raise NotImplementedError

    @abstractmethod
    def modulate_output(self, transformer: nn.Module, hidden: Tensor, temb: Tensor) -> Tensor:
        """The final modulated norm, before the de-embedding: `[B, n, d]`."""

    @abstractmethod
    def project_output(self, transformer: nn.Module, hidden: Tensor) -> Tensor:
        """The model's own de-embedding: `[B, n, d]` to `[B, n, C*p*p]`."""

    @abstractmethod
    def embedding_layers(self, transformer: nn.Module) -> tuple[nn.Linear | nn.Conv3d, nn.Linear]:
        """The patch embedding and de-embedding, from which adapters are initialised."""

    @abstractmethod
    def default_size(self, pipeline: Any) -> tuple[int, int]:
        """Height and width, in pixels, of a pipeline call that names none."""

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
    def encode_call(self, pipeline: Any, scheduler: Any, call: PipelineCall) -> PreparedCall:
        """The pipeline's own call up to its denoising loop.

        Args:
            pipeline: A pipeline of one of `pipeline_classes`.
            scheduler: As `read_call` has set it.
            call: What `read_call` gave.
        """

    def prepare(self, pipeline: Any, scheduler: Any, arguments: Mapping[str, Any]) -> PreparedCall:
        """`read_call`, then `encode_call`."""
        return self.encode_call(pipeline, scheduler, self.read_call(pipeline, scheduler, arguments))

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

    @abstractmethod
    def set_timesteps(
        self, scheduler: Any, num_inference_steps: int, sigmas: Sequence[float] | None, grid: Grid
    ) -> None:
        """Sets the scheduler as the family's pipeline does (dynamic shifting included)."""

    @abstractmethod
    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        """Clean latents of images, scaled as the model takes them.

        Args:
            pipeline: A pipeline of one of `pipeline_classes`.
            pixels: `[B, 3, height, width]`, in [-1, 1].

        Returns:
            `[B, C, H, W]`, float32.
        """

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
