"""What a family says of its models: one description, in one file, for each way to use a model.

The model's forward is the model, with its repeated blocks replaced by compiled ones; a coarse step
is the same forward on a smaller latent. So a family says how the pipeline lays its latents out,
which arguments of the forward hang on their size, how time enters, how guidance joins two passes,
and what of the forward need not be computed at every step. How calls of its pipelines are read says
`call_description.py`, what follows from both `family.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddit_rt import ops
from ddit_rt.models.base import TEXT

REFERENCE = "reference_tokens"
"""Conditioning behind the latents' tokens: of other images, the same at every step and size."""

REFERENCE_SHAPES = "reference_shapes"
"""What `resized` must know of those images."""

REFERENCE_IDS = "reference_ids"
"""Positions of their tokens, `[m, axes]`."""


class Description:
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
        prompt: Tensor arguments of the forward that carry the prompt, by their sizes behind the
            batch: `TEXT` for the text's, else the name of a field of the model's configuration.
            One named `guidance` is left out of a model that embeds none.
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
        packed: Whether the pipelines cut latents into tokens of p x p pixels, `[B, n, C*p*p]`.
        thousands: Whether the forward's time is 1000 t, and not t.
        negative_first: Whether a pipeline's call of its transformer holds all passes as one batch,
            that with the prompt last.
        shifts: Image tokens between which the pipelines shift noise levels by a straight line, and
            the shifts there: least, most, low, high.
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
        dtypes: Those of the arguments in `shapes`, where they are not the model's.
        masks: Masks that the pipeline's call takes, by the arguments of the forward that they
            become, whose dtype they must have.
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
    prompt: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    video: ClassVar[bool] = False
    audio: ClassVar[bool] = False
    soundtrack: ClassVar[bool] = False
    size_names: ClassVar[tuple[str, ...]] = ("height", "width", "num_frames")
    channels_last: ClassVar[bool] = False
    guided_by_default: ClassVar[bool] = False
    tables: ClassVar[tuple[str, ...]] = ()
    numbering: ClassVar[tuple[str, ...]] = ()
    packed: ClassVar[bool] = False
    thousands: ClassVar[bool] = False
    negative_first: ClassVar[bool] = False
    shifts: ClassVar[tuple[float, float, float, float]] = (256, 4096, 0.5, 1.15)
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
    dtypes: ClassVar[Mapping[str, torch.dtype]] = {}
    masks: ClassVar[Mapping[str, str]] = {}
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

    def latent_channels(self, transformer: Any) -> int:
        """Channels of the latent that the model denoises; `in_channels` may count packed ones."""
        return int(transformer.config.in_channels) // (self.patch**2 if self.packed else 1)

    def shapes(
        self, transformer: Any, variant: int, batch: int, text: int
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensor arguments of the forward that carry the prompt, as `prompt` says.

        Images and videos of one pixel serve every size.

        Args:
            transformer: The model.
            variant: Which of the ways: with a text mask or without, say.
            batch: Samples.
            text: Text tokens.
        """
        config = transformer.config
        return {
            name: (batch, *(text if size == TEXT else int(config[size]) for size in sizes))
            for name, sizes in self.prompt.items()
            if name != "guidance" or config.guidance_embeds
        }

    def example(self, transformer: Any, variant: int, batch: int, text: int) -> dict[str, Any]:
        """Arguments of the forward that carry the prompt, as tensors without data, on `meta`.

        Arguments as of `shapes`.
        """
        return {
            name: torch.empty(shape, dtype=self.dtypes.get(name, transformer.dtype), device="meta")
            for name, shape in self.shapes(transformer, variant, batch, text).items()
        }

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

    def image_ids(self, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
        """Positions 0, row and column of every token of latents of a shape, `[n, 3]`.

        Args:
            shape: Shape of the latents.
            dtype: Of the positions.
            like: A tensor on their device.
        """
        rows, columns = (
            torch.arange(size // self.patch, dtype=dtype, device=like.device) for size in shape[-2:]
        )
        return torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns)

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

        In thousands it is not rounded; through float64, as schedulers may give whole timesteps.

        Args:
            level: t in [0, 1], `[1]`, float32.
            dtype: Dtype of the latents.
        """
        if self.thousands:
            return (level.double() * 1000).float()
        return level if dtype == torch.float32 else (level * 1000).to(dtype) / 1000

    def level_of(self, timestep: Tensor) -> Tensor:
        """T in [0, 1] of the forward's `timestep`: the inverse of `time`."""
        return timestep.double() / 1000 if self.thousands else timestep.float()

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
        """Shift that the pipeline gives its scheduler: by `shifts`, where that has none."""
        del steps
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        given = zip(names, self.shifts, strict=True)
        least, most, low, high = (scheduler.config.get(name, own) for name, own in given)
        return float(low + (high - low) * (tokens - least) / (most - least))

    def pack_latents(self, latents: Tensor) -> Tensor:
        """Latents, or a velocity, in the pipeline's layout."""
        return ops.pack(latents, self.patch) if self.packed else latents

    def unpack_latents(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `pack_latents`, of latents of a shape."""
        if not self.packed:
            return latents
        frames = shape[2] if self.video else 0
        return ops.unpack(latents, self.patch, shape[-2], shape[-1], frames)

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


@lru_cache(maxsize=64)
def _packed_shape(family: Description, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of latents in the pipeline's layout."""
    return tuple(family.pack_latents(torch.empty(shape, dtype=torch.float32, device="meta")).shape)
