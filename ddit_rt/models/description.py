"""What a family says of its models: one description, in one file, for each way to use a model.

The model's forward is the model, with its repeated blocks replaced by compiled ones; a coarse step
is the same forward on a smaller latent. So a family says how the pipeline lays its latents out,
which arguments of the forward hang on their size, how time enters, how guidance joins two passes,
and what of the forward need not be computed at every step. What follows from it says `family.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddit_rt.errors import ShapeError
from ddit_rt.models.calls import batch_of

REFERENCE = "reference_tokens"
"""Conditioning behind the latents' tokens: of other images, the same at every step and size."""

REFERENCE_SHAPES = "reference_shapes"
"""What `resized` must know of those images."""

REFERENCE_IDS = "reference_ids"
"""Positions of their tokens, `[m, axes]`."""


class Description(ABC):
    """What differs from one family to the next. Stateless.

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
            passes of guidance can be planned: they differ in more than the length of a text, which
            the pipeline's `encode_prompt` tells.
        time_driven: Whether what TeaCache goes by depends on the time alone.
        patch: p, the side of the square of latent pixels that becomes a token.
        held: Children of the transformer whose outputs are the same at every step of a run; one
            that a model has None in the place of is left out.
        timed: Children whose outputs hang on the time alone.
        sized: Arguments of the forward that hang on the latents' size; `resized` makes them.
        unbatched: Tensor arguments of the forward without a batch dimension.
        text: The argument that holds text tokens, `[B, T, D]`.
        repeated: Class names of its repeated blocks, where it has no `_repeated_blocks`.
        variants: In how many ways the forward may be called; see `example`.
        extra: Conditioning that is no argument of the forward; `forward_arguments` takes it in.
        exact: Tensor arguments that keep their own dtype, such as times and positions.
        image_first: Whether image tokens come before text tokens where blocks take both as one.
        scale: Conditioning that is the scale of classifier-free guidance.
        embeds: Embeddings that the pipeline's call takes and does not repeat for several of a
            prompt, by the arguments of the forward that they become.
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
    patch: ClassVar[int] = 2
    held: ClassVar[tuple[str, ...]] = ()
    timed: ClassVar[tuple[str, ...]] = ()
    sized: ClassVar[tuple[str, ...]] = ()
    unbatched: ClassVar[tuple[str, ...]] = ()
    text: ClassVar[str] = "encoder_hidden_states"
    repeated: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[int] = 1
    extra: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[tuple[str, ...]] = ()
    image_first: ClassVar[bool] = False
    scale: ClassVar[str] = "guidance_scale"
    embeds: ClassVar[Mapping[str, str]] = {}

    def check_model(self, transformer: nn.Module, pipeline: Any) -> None:
        """Raises `UnsupportedModelError` for a variant of the class that cannot be run.

        Args:
            transformer: A model of `transformer_class`.
            pipeline: A pipeline of one of `pipeline_classes`, or None for a bare transformer.
        """
        del transformer, pipeline

    @abstractmethod
    def latent_channels(self, transformer: nn.Module) -> int:
        """Channels of the latent that the model denoises."""

    @abstractmethod
    def example(self, transformer: Any, variant: int, batch: int, text: int) -> dict[str, Any]:
        """Arguments of the forward that carry the prompt, as tensors without data, on `meta`.

        Args:
            transformer: The model.
            variant: Which of the ways: with a text mask or without, say.
            batch: Samples.
            text: Text tokens.
        """

    def sound_example(self, transformer: Any, batch: int, tokens: int) -> dict[str, Any]:
        """The same of what carries a soundtrack, `tokens` long."""
        return {}

    def sound_tokens(self, transformer: Any, frames: int) -> int:
        """Tokens of the soundtrack of a video of so many latent frames at its usual speed."""
        return 0

    def resized(self, arguments: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """The arguments named by `sized`, for latents of a shape.

        Positions are those of an image of that size, as the pipeline would make them.

        Args:
            arguments: Those that carry the prompt.
            shape: Shape of the latents.
        """
        return {}

    def forward_arguments(
        self, latents: Tensor, level: Tensor, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """All arguments of the forward.

        Args:
            latents: `[B, C, h, w]` in the model's dtype, of whatever size.
            level: t in [0, 1], `[1]`, float32.
            arguments: Those that carry the prompt.
        """
        time = self.time(level, latents.dtype).expand(len(latents))
        hidden = self.pack_latents(latents)
        if REFERENCE in arguments:
            hidden = torch.cat((hidden, arguments[REFERENCE]), dim=1)
        references = (REFERENCE, REFERENCE_SHAPES, REFERENCE_IDS)
        sized = self.resized(arguments, tuple(latents.shape))
        if (ids := arguments.get(REFERENCE_IDS)) is not None:
            sized["img_ids"] = torch.cat((sized["img_ids"], ids.to(sized["img_ids"].dtype)))
        return {
            **{name: one for name, one in arguments.items() if name not in references},
            **sized,
            "hidden_states": hidden,
            "timestep": time,
            "return_dict": False,
        }

    def reference_places(self, arguments: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """Conditioning that says where the tokens of reference images are.

        By default what `img_ids` say of them, `[n, axes]` or `[B, n, axes]`.

        Args:
            arguments: Arguments of the transformer's `forward`.
            tokens: The image's own, which come first.
        """
        ids: Tensor = arguments["img_ids"]
        return {REFERENCE_IDS: (ids[0] if ids.ndim == 3 else ids)[tokens:]}

    def time(self, level: Tensor, dtype: torch.dtype) -> Tensor:
        """The forward's `timestep`: by default t in [0, 1], rounded as the pipeline rounds 1000 t.

        Args:
            level: t in [0, 1], `[1]`, float32.
            dtype: Dtype of the latents.
        """
        return level if dtype == torch.float32 else (level * 1000).to(dtype) / 1000

    def level_of(self, timestep: Tensor) -> Tensor:
        """T in [0, 1], float32, of the forward's `timestep`; the inverse of `time`."""
        return timestep.float()

    def read_output(self, given: Any) -> Tensor:
        """The velocity, in the pipeline's layout, of what the forward returns."""
        velocity: Tensor = given[0]
        return velocity

    def read_sound(self, given: Any) -> Tensor | None:
        """The velocity of the soundtrack in what the forward returns; None without one."""
        return None

    def no_output(self, given: Mapping[str, Any]) -> Any:
        """Stands for what a call of the forward with these arguments gives: zeros.

        A tuple where it gives more than a velocity.
        """
        return torch.zeros_like(given["hidden_states"])

    def block_call(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a block's call by name, as its package is to take them."""
        return given

    def join(self, prompt: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
        """Velocity of a guided step, from those of its passes, in the pipeline's layout."""
        return negative + scale * (prompt - negative)

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

    def linear_timesteps(self, scheduler: Any) -> Tensor:
        """Noise levels t in [0, 1] that the model is given at each step, `[N]`, float32."""
        timesteps: Tensor = scheduler.timesteps
        return timesteps.to(torch.float32) / 1000

    def mu(self, scheduler: Any, tokens: int, steps: int) -> float:
        """Shift that the pipeline gives its scheduler; by default FLUX's."""
        del steps
        config = scheduler.config
        least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return float(low + (high - low) * (tokens - least) / (most - least))

    def pack_latents(self, latents: Tensor) -> Tensor:
        """Latents, or a velocity, in the pipeline's layout; by default as they are."""
        return latents

    def unpack_latents(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `pack_latents`, of latents of a shape."""
        return latents

    def given_latents(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in which a pipeline's call takes `latents`; by default in its own layout."""
        return _packed_shape(self, shape)

    def tokens_of(self, shape: tuple[int, ...]) -> int:
        """Size of the second dimension of latents of a shape in the pipeline's layout."""
        return _packed_shape(self, shape)[1]

    def extra_size(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Rows and columns, of a video frames before them, of images beside latents."""
        return shape[2:]

    def more_tokens(self, conditioning: Mapping[str, Any]) -> int:
        """Tokens that a pass has beside the image's: those of reference images."""
        reference = conditioning.get(REFERENCE)
        return 0 if reference is None else int(reference.shape[1])

    def default_size(self, pipeline: Any) -> tuple[int, int]:
        """Height and width, in pixels, of a pipeline call that names none."""
        size = int(pipeline.default_sample_size * pipeline.vae_scale_factor)
        return size, size

    def default_frames(self, pipeline: Any) -> int | None:
        """Frames of a pipeline call that names none; None for images."""
        del pipeline
        return None

    def call_size(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width, in pixels, that some arguments of a pipeline's call say.

        Args:
            pipeline: A pipeline of one of `pipeline_classes`.
            call: Arguments; where they say nothing, the pipeline's defaults hold.
        """
        rows, columns = self.default_size(pipeline)
        height, width = call.get("height"), call.get("width")
        return rows if height is None else height, columns if width is None else width

    def size_of(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width that the pipeline makes of a call's."""
        return self.call_size(pipeline, call)

    def call_shape(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
        """Latent shape of a pipeline's call."""
        size = self.size_of(pipeline, call)
        return self.latent_shape(pipeline, *size, batch_of(call), call.get("num_frames"))

    def latent_shape(
        self, pipeline: Any, height: int, width: int, batch: int, num_frames: int | None = None
    ) -> tuple[int, ...]:
        """Latent shape of an image of `height` x `width` pixels, or of a video.

        Odd sizes round down to whole tokens, as the pipeline does.

        Args:
            pipeline: A pipeline of one of `pipeline_classes`.
            height: Pixel rows.
            width: Pixel columns.
            batch: Samples.
            num_frames: Frames of a video; None for the pipeline's default, and for images.

        Raises:
            ShapeError: A size that the model cannot make.
        """
        if num_frames is not None:
            raise ShapeError(f"got num_frames={num_frames}; {self.name} makes images: leave it out")
        unit = pipeline.vae_scale_factor * self.patch
        if height < unit or width < unit:
            raise ShapeError(
                f"got {height} x {width} pixels; this pipeline's smallest image is {unit} x {unit}"
            )
        channels = self.latent_channels(pipeline.transformer)
        return batch, channels, self.patch * (height // unit), self.patch * (width // unit)

    def default_passes(self) -> int:
        """Passes of the model in a step of a pipeline call that says nothing of guidance."""
        return 2 if self.guided_by_default else 1

    @abstractmethod
    def scale_of(self, pipeline: Any, call: Mapping[str, Any]) -> float | None:
        """Scale of classifier-free guidance of a pipeline's call; None for a single pass.

        Args:
            pipeline: The pipeline.
            call: All arguments of its call.
        """

    def scales_of(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[float, ...]:
        """That of each expert; empty for a single pass."""
        scale = self.scale_of(pipeline, call)
        return () if scale is None else (scale,)

    def ignored(
        self, pipeline: Any, given: Mapping[str, Any], call: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Arguments that the pipeline ignores too, each with what makes it count.

        Args:
            pipeline: The pipeline.
            given: What the caller gave.
            call: All arguments, defaults filled in.
        """
        return ()

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


@lru_cache(maxsize=64)
def _packed_shape(family: Description, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of latents in the pipeline's layout."""
    return tuple(family.pack_latents(torch.empty(shape, dtype=torch.float32, device="meta")).shape)
