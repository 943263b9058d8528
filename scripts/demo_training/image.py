"""The image model: FLUX's architecture at 2.3 million parameters, 128 x 128 px."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ddit_rt.lab.demo import images as captions
from ddit_rt.lab.demo import model_path
from ddit_rt.lab.demo.classifier import attribute_hits, load_classifier, weights_path
from ddit_rt.lab.demo.images import all_attributes
from ddit_rt.lab.demo.prompts import held_out_prompts
from demo_training.draw_images import ImageConfig, draw_image, draw_series, random_attributes
from demo_training.kind import (
    MAX_SEQUENCE_LENGTH,
    WIDTH,
    Phase,
    Size,
    TextEncoder,
    TransformerRecipe,
    VaeRecipe,
    reduce,
    t5_encoder,
)

_CROP = 64
_ODD_SIZES = ((64, 128), (128, 64), (96, 128), (128, 96))
# Three resolutions, and a few images that are not square.
_COUNTS = {
    (32, 32): 16384,
    (64, 64): 16384,
    (128, 128): 12288,
    **dict.fromkeys(_ODD_SIZES, 1024),
}
_EVALUATED = 96


def _tokens(size: tuple[int, int]) -> int:
    return size[0] * size[1] // 64


class ImageKind:
    """What the recipe must know of a model. Samples are ``[B, 3, H, W]``.

    Attributes:
        name: As on the command line.
        folder: Where the repository keeps the model.
        stages: In their order.
        minutes: Of training, by stage.
        text_steps: Steps that the text encoders are trained for.
        text_rate: Their highest learning rate.
        attribute_sizes: Number of classes of every attribute.
        attributes: Every combination; each has a `caption`, and class indices as `labels`.
        classifier: Weights of the network that tells them from a sample.
        classifier_steps: Steps that it is trained for.
        phrasings: Ways to word the same attributes.
        vae: See `VaeRecipe`.
        transformer: See `TransformerRecipe`.
        words: Of the captions, which the tokenizers know whole.
        half: Parts of the pipeline that are stored as float16.
        shown: Side of the grids of samples, in px.
        evaluated: Sides that `evaluate` measures, in px.
        batch: Samples that `evaluate` generates at once.
    """

    name = "image"
    folder = model_path()
    stages = ("vae", "text", "transformer", "classifier", "export", "evaluate")
    minutes = {"vae": 15.0, "transformer": 66.0}
    text_steps, text_rate = 800, 2e-3
    attribute_sizes = captions.ATTRIBUTE_SIZES
    classifier, classifier_steps = weights_path(), 700
    attributes = all_attributes()
    phrasings = 4
    words: tuple[str, ...] = (
        *(*captions.SHAPES, *captions.COLOURS, *captions.BACKGROUNDS, *captions.BACKGROUND_COLOURS),
        *("a", "an", "on", "with", "picture", "of", "background", "the", "and", "in", "front"),
    )
    half = ("transformer", "vae")
    shown, evaluated, batch = (32, 64, 128), (128, 64, 32), 16
    vae = VaeRecipe(
        counts={(128, 128): 3072, (64, 64): 6144},
        rates=(2e-3, 2e-5),
        weights={"small": 0.5, "latent": 0.05, "anchor": 0.3, "kl": 5e-4},
        shown=256,
    )
    transformer = TransformerRecipe(
        counts=_COUNTS,
        batches={s: 64 if _tokens(s) <= 16 else 32 if _tokens(s) <= 64 else 12 for s in _COUNTS},
        shifts={size: 0.2 + 0.15 * math.log2(_tokens(size) / 256) for size in _COUNTS},
        phases=(
            Phase(share=0.27, rates=(2e-3, 1e-3), mixture={(32, 32): 0.4, (64, 64): 0.6}),
            Phase(
                share=0.73,
                rates=(1.2e-3, 2e-5),
                mixture={
                    (128, 128): 0.64,
                    (64, 64): 0.18,
                    (32, 32): 0.10,
                    **dict.fromkeys(_ODD_SIZES, 0.02),
                },
            ),
        ),
        eager=frozenset(_ODD_SIZES),
        average=0.999,
        empty=0.05,
    )

    def series(self, size: Size, _: Path) -> tuple[Callable[..., Any], Any]:
        """What draws samples, given the configuration beside it, seed, first index and count.

        Samples of some kinds are made of what an earlier stage left in the folder that is given.
        """
        return draw_series, ImageConfig(height=size[0], width=size[1])

    def phrase(self, attributes: Any, phrasing: int) -> str:
        """One of the ways (0 is the caption) in which training words the same attributes."""
        caption = attributes.caption
        subject, ground = caption.split(" on ")
        bare = subject.split(" ", 1)[1]
        return (
            caption,
            f"{bare} on {ground}",
            f"a picture of {subject} on a {ground} background",
            f"{ground} with {subject}",
        )[phrasing]

    def text_encoders(self) -> list[TextEncoder]:
        """Untrained."""
        # FLUX gives all text tokens one position, so only the encoders can tell the word order.
        tokenizer = _clip_tokenizer(self.words)
        clip = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return [
            TextEncoder(
                tokenizer=tokenizer,
                model=CLIPTextModel(clip),
                length=77,
                read=lambda output, _: output.pooler_output,
            ),
            t5_encoder(
                self.words,
                T5Config,
                T5EncoderModel,
                read=lambda output, _: output.last_hidden_state.mean(1),
            ),
        ]

    def build_vae(self, **statistics: Any) -> Any:
        """Untrained; three levels, so latents are 4 times smaller, with 4 channels.

        The statistics are part of its configuration.
        """
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=128,
            force_upcast=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
            **{"scaling_factor": 1.0, "shift_factor": 0.0, **statistics},
        )
        return vae.to(memory_format=torch.channels_last)

    def statistics(self, z: Tensor) -> dict[str, Any]:
        """What makes the mean of latents 0 and their deviation 1, as the autoencoder keeps it."""
        return {"shift_factor": z.mean().item(), "scaling_factor": 1 / z.std().item()}

    def normalise(self, z: Tensor, config: Any) -> Tensor:
        """Latents as the transformer sees them."""
        return (z - config.shift_factor) * config.scaling_factor

    def decode(self, vae: Any, z: Tensor) -> Tensor:
        """Samples, not clamped: a clamp has no gradient outside [-1, 1]."""
        return vae.decode(z).sample

    def colours(self, x: Tensor) -> Tensor:
        """Mean colours ``[B, 3, ...]`` of each latent's pixels."""
        return reduce(x, 4)

    def frames(self, x: Tensor) -> list[Tensor]:
        """Some images ``[B, 3, H, W]`` of samples, for a grid."""
        return [x]

    def vae_batch(
        self, data: Mapping[Size, Tensor], step: int, generator: torch.Generator
    ) -> tuple[Tensor, int]:
        """Samples in [-1, 1], and the factor between the scales that this step ties together.

        Whole 64 px images, crops of 128 px ones, or (one in four) whole 128 px ones.
        """
        side, whole = 64 if step % 2 else 128, step % 4 == 2
        images = data[side, side]
        rows = torch.randint(len(images), (6 if whole else 16,), generator=generator)
        x = images[rows].float().div(127.5).sub(1)
        if side == 128 and not whole:
            top, left = (4 * int(n) for n in torch.randint(17, (2,), generator=generator))
            x = x[:, :, top : top + _CROP, left : left + _CROP]
        x = x.contiguous(memory_format=torch.channels_last)
        return x, 4 if step % 8 in (2, 5) else 2

    def build_transformer(self) -> Any:
        """Untrained, every block the identity and the output zero (adaLN-Zero of DiT)."""
        model = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(4, 14, 14),
        )
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and ("norm" in name or name == "proj_out"):
                torch.nn.init.zeros_(module.weight)
                torch.nn.init.zeros_(module.bias)
        return model

    def velocity(self, model: Any, noisy: Tensor, t: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The transformer's output for latents at times t in (0, 1), as `layout` lays them out."""
        rows, columns = noisy.shape[2] // 2, noisy.shape[3] // 2
        grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        positions = torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).flatten(0, 1).float()
        return model(
            hidden_states=self.layout(noisy),
            encoder_hidden_states=text["sequence"],
            pooled_projections=text["pooled"],
            timestep=t,
            img_ids=positions.to(noisy.device),
            txt_ids=torch.zeros(MAX_SEQUENCE_LENGTH, 3, device=noisy.device),
            return_dict=False,
        )[0]

    def layout(self, latents: Tensor) -> Tensor:
        """Latents as the transformer gives its output: tokens ``[B, H/2 W/2, 4C]``."""
        count, channels, height, width = latents.shape
        blocks = latents.view(count, channels, height // 2, 2, width // 2, 2)
        return blocks.permute(0, 2, 4, 1, 3, 5).reshape(count, height * width // 4, channels * 4)

    def pipeline(self, encoders: Sequence[TextEncoder], vae: Any, transformer: Any) -> Any:
        """A pipeline around trained parts."""
        clip, t5 = encoders
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=1000,
                shift=3.0,
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=4096,
            ),
            vae=vae,
            text_encoder=clip.model,
            tokenizer=clip.tokenizer,
            text_encoder_2=t5.model,
            tokenizer_2=t5.tokenizer,
            transformer=transformer,
        )

    def embed(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """Embeddings of prompts, exactly as sampling makes them."""
        sequence, pooled, _ = pipeline.encode_prompt(
            prompts, None, max_sequence_length=MAX_SEQUENCE_LENGTH
        )
        return {"sequence": sequence, "pooled": pooled}

    def sample(
        self, pipeline: Any, prompts: list[str], side: int, steps: int, generator: torch.Generator
    ) -> Tensor:
        """Generated samples in [0, 1]."""
        return pipeline(
            prompts,
            height=side,
            width=side,
            num_inference_steps=steps,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=generator,
            output_type="pt",
        ).images

    def expected(self) -> dict[str, list[Any]]:
        """Attributes that `evaluate` asks for: of trained combinations, and of held-out ones."""
        trained = [random_attributes(10_001, index) for index in range(_EVALUATED)]
        held_out = [captions.parse_caption(caption) for caption in held_out_prompts()]
        return {"of trained combinations": trained, "held out": held_out}

    def drawn(self, expected: Sequence[Any]) -> Tensor:
        """Drawn samples of the same attributes."""
        config = ImageConfig()
        images = [draw_image(a, config, 20_000, i) for i, a in enumerate(expected)]
        return torch.stack([torch.from_numpy(image) for image in images]).movedim(-1, 1)

    def noise(self, seed: int) -> Callable[[int], torch.Generator]:
        """Of the samples of `evaluate`, by the index of a batch's first one."""
        generator = torch.Generator().manual_seed(20_000 + seed)
        return lambda _: generator

    def hits(self, samples: Tensor, expected: list[Any]) -> dict[str, Tensor]:
        """By attribute ``[B]``, whether a sample shows it."""
        return attribute_hits(load_classifier(), samples, expected)


def _clip_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """Byte-level BPE whose merges spell the caption words; any other text falls apart to bytes."""
    letters = list(bytes_to_unicode().values())
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(words):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
                vocabulary.append(pieces[0] + pieces[1])
            pieces[:2] = [pieces[0] + pieces[1]]
    tokens = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    numbered = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=numbered, merges=merges, model_max_length=77)
