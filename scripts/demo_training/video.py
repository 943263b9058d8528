"""The video model: Wan's architecture at 1.7 million parameters, 13 frames of 64 x 64 px."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import UMT5Config, UMT5EncoderModel

from ddit_rt.lab.demo import video_model_path
from ddit_rt.lab.demo import videos as captions
from ddit_rt.lab.demo.classifier import weights_path
from ddit_rt.lab.demo.video_hits import video_hits
from ddit_rt.lab.demo.videos import all_video_attributes, is_held_out_video
from demo_training.draw_videos import VideoConfig, draw_video, draw_videos
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

_WORDS = (
    *(*captions.SHAPES, *captions.COLOURS, *captions.DIRECTIONS),
    *(*captions.GROUNDS, *captions.GROUND_COLOURS),
    *("a", "an", "on", "moving", "moves", "and", "the"),
)
_FRAMES, _CHANNELS = 13, 8
_BATCH, _BATCH_FRAMES, _CROP = 8, 9, 32
_GUIDANCE = 3.0
_EVALUATED, _SEED = 48, 300_000


class VideoKind:
    """See `ImageKind`; samples are ``[B, 3, F, H, W]``."""

    name = "video"
    folder = video_model_path()
    stages = ("vae", "text", "transformer", "export", "evaluate")
    minutes = {"vae": 20.0, "transformer": 52.0}
    text_steps, text_rate = 600, 3e-3
    attribute_sizes = captions.VIDEO_ATTRIBUTE_SIZES
    attributes = all_video_attributes()
    classifier, classifier_steps = weights_path(), 0  # it is the image model's
    phrasings = 1
    half = ("transformer", "vae", "text_encoder")
    shown, evaluated, batch = (32, 64), (64,), 8
    vae = VaeRecipe(
        counts={(64, 64): 1024},
        rates=(3e-3, 3e-5),
        weights={"small": 0.3, "latent": 0.05, "anchor": 0.3, "kl": 1e-4},
        shown=32,
    )
    transformer = TransformerRecipe(
        # A coarse step at 2p or 4p shows the model the smaller ones.
        counts={(64, 64): 1536, (32, 32): 3072, (16, 16): 1024},
        batches={(64, 64): 12, (32, 32): 32, (16, 16): 64},
        shifts={(64, 64): 0.4, (32, 32): 0.1, (16, 16): -0.2},
        phases=(
            Phase(share=0.4, rates=(2e-3, 1.2e-3), mixture={(32, 32): 0.85, (16, 16): 0.15}),
            Phase(
                share=0.6,
                rates=(1.5e-3, 2e-5),
                mixture={(64, 64): 0.65, (32, 32): 0.25, (16, 16): 0.10},
            ),
        ),
        eager=frozenset({(16, 16)}),
        average=0.998,
        empty=0.08,
    )

    def series(self, size: Size, _: Path) -> tuple[Callable[..., Any], Any]:
        return draw_videos, VideoConfig(height=size[0], width=size[1], frames=_FRAMES)

    def phrase(self, attributes: Any, phrasing: int) -> str:
        del phrasing
        return attributes.caption

    def text_encoders(self) -> list[TextEncoder]:
        return [t5_encoder(_WORDS, UMT5Config, UMT5EncoderModel, read=_masked_mean)]

    def build_vae(self, **statistics: Any) -> Any:
        """Three levels: 4 times smaller in space and in time, with 8 channels."""
        vae = AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=_CHANNELS,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            scale_factor_temporal=4,
            scale_factor_spatial=4,
            **{
                "latents_mean": [0.0] * _CHANNELS,
                "latents_std": [1.0] * _CHANNELS,
                **statistics,
            },
        )
        for name, module in vae.named_modules():  # every residual block begins as its shortcut
            if name.endswith("conv2"):
                torch.nn.init.normal_(module.weight, std=1e-3)
                torch.nn.init.zeros_(module.bias)
        return vae

    def statistics(self, z: Tensor) -> dict[str, Any]:
        # One deviation for all channels: a channel that says little must not be blown up to the
        # size of the others, or the transformer spends itself on it.
        scale = (z - z.mean((0, 2, 3, 4), keepdim=True)).std().item()
        return {
            "latents_mean": z.mean((0, 2, 3, 4)).tolist(),
            "latents_std": [scale] * _CHANNELS,
        }

    def normalise(self, z: Tensor, config: Any) -> Tensor:
        mean, std = (
            torch.tensor(values, device=z.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return (z - mean) / std

    def decode(self, vae: Any, z: Tensor) -> Tensor:
        vae.clear_cache()
        features, parts = vae.post_quant_conv(z), []
        for frame in range(z.shape[2]):
            vae._conv_idx = [0]  # noqa: SLF001
            parts.append(
                vae.decoder(
                    features[:, :, frame : frame + 1],
                    feat_cache=vae._feat_map,  # noqa: SLF001
                    feat_idx=vae._conv_idx,  # noqa: SLF001
                    first_chunk=frame == 0,
                )
            )
        vae.clear_cache()
        return torch.cat(parts, dim=2)

    def colours(self, x: Tensor) -> Tensor:
        small = reduce(x, 4)
        if x.shape[2] == 1:
            return small
        later = F.avg_pool3d(small[:, :, 1:], (4, 1, 1))
        return torch.cat([small[:, :, :1], later], dim=2)

    def frames(self, x: Tensor) -> list[Tensor]:
        return [x[:, :, frame] for frame in (0, x.shape[2] // 2, -1)]

    def vae_batch(
        self, data: Mapping[Size, Tensor], step: int, generator: torch.Generator
    ) -> tuple[Tensor, int]:
        """Crops of whole videos, or (every second time) videos at half their side."""
        (videos,) = data.values()
        side = videos.shape[-1]
        rows = torch.randint(len(videos), (_BATCH,), generator=generator)
        start = int(torch.randint(videos.shape[2] - _BATCH_FRAMES + 1, (), generator=generator))
        x = videos[rows, :, start : start + _BATCH_FRAMES].float().div(127.5).sub(1)
        if step % 2:
            x = reduce(x, side // _CROP)
        else:
            places = (side - _CROP) // 4 + 1
            top, left = (4 * int(n) for n in torch.randint(places, (2,), generator=generator))
            x = x[..., top : top + _CROP, left : left + _CROP]
        return x.contiguous(), (2, 1, 4, 1, 1, 2)[step % 6]

    def build_transformer(self) -> Any:
        model = WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=_CHANNELS,
            out_channels=_CHANNELS,
            text_dim=WIDTH,
            freq_dim=128,
            ffn_dim=448,
            num_layers=6,
            rope_max_seq_len=64,
        )
        zero = ("scale_shift_table", "time_proj", "attn2.to_out", "proj_out")
        for name, parameter in model.named_parameters():
            if any(part in name for part in zero):
                torch.nn.init.zeros_(parameter)
        return model

    def velocity(self, model: Any, noisy: Tensor, t: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        return model(
            hidden_states=noisy,
            timestep=1000 * t,
            encoder_hidden_states=text["sequence"],
            return_dict=False,
        )[0]

    def layout(self, latents: Tensor) -> Tensor:
        return latents

    def pipeline(self, encoders: Sequence[TextEncoder], vae: Any, transformer: Any) -> Any:
        (encoder,) = encoders
        return WanPipeline(
            tokenizer=encoder.tokenizer,
            text_encoder=encoder.model,
            vae=vae,
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            transformer=transformer,
        )

    def embed(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        sequence, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
        )
        return {"sequence": sequence}

    def sample(
        self, pipeline: Any, prompts: list[str], side: int, steps: int, generator: torch.Generator
    ) -> Tensor:
        return pipeline(
            prompts,
            negative_prompt="",
            height=side,
            width=side,
            num_frames=_FRAMES,
            num_inference_steps=steps,
            guidance_scale=_GUIDANCE,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=generator,
            output_type="pt",
        ).frames.transpose(1, 2)

    def expected(self) -> dict[str, list[Any]]:
        pools = {
            "of trained combinations": [a for a in self.attributes if not is_held_out_video(a)],
            "held out": [a for a in self.attributes if is_held_out_video(a)],
        }
        places = range(_EVALUATED)
        return {
            name: [pool[place * len(pool) // _EVALUATED] for place in places]
            for name, pool in pools.items()
        }

    def drawn(self, expected: Sequence[Any]) -> Tensor:
        videos = [draw_video(a, VideoConfig(), _SEED, i) for i, a in enumerate(expected)]
        return torch.stack([torch.from_numpy(video) for video in videos]).movedim(-1, 1)

    def noise(self, seed: int) -> Callable[[int], torch.Generator]:
        return lambda start: torch.Generator().manual_seed(_SEED + seed + start)

    def hits(self, samples: Tensor, expected: list[Any]) -> dict[str, Tensor]:
        return video_hits(samples.transpose(1, 2), expected)


def _masked_mean(output: Any, mask: Tensor) -> Tensor:
    states: Tensor = output.last_hidden_state
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
