"""Stage `vae`: a small `AutoencoderKLWan`, 4 px and 4 frames to a latent, 8 channels.

A coarse step shows the transformer a latent averaged by 2 or by 4, so that average should be the
latent of the averaged clip: besides reconstruction the loss asks for equal latents of both, and
for the decoding of the averaged latent. The first three channels are tied to whitened mean colours
of their 4 x 4 x 4 pixels, for which this holds exactly.
"""

import math
import time

import torch
import torch.nn.functional as F
from demo_training.draw_videos import VideoConfig
from demo_training.settings import (
    Settings,
    evaluation_mode,
    load_checkpoint,
    save_checkpoint,
    save_grid,
)
from diffusers import AutoencoderKLWan
from tqdm import tqdm

from video_training.clip_data import draw_clip_set

CHANNELS = 8
_COUNT, _CROP, _FRAMES, _BATCH = 1024, 32, 9, 8
_KL_WEIGHT, _SMALL_WEIGHT, _LATENT_WEIGHT, _ANCHOR_WEIGHT = 1e-4, 0.3, 0.05, 0.3
_CHECKPOINT_SECONDS = 60.0
Whitening = tuple[torch.Tensor, torch.Tensor]


def build_vae(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """The architecture: three levels; 4 times smaller in space and in time."""
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=mean or [0.0] * CHANNELS,
        latents_std=std or [1.0] * CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )


def load_vae(settings: Settings) -> AutoencoderKLWan:
    """The trained autoencoder, whose config holds the statistics of its latents."""
    state = load_checkpoint(settings.work / "vae.pt", settings.device)
    if state is None:
        raise ValueError(f"no trained autoencoder in {settings.work}; run the stage 'vae' first")
    vae = build_vae(state["mean"], state["std"])
    vae.load_state_dict(state["vae"])
    return vae.to(settings.device).eval()


def train_vae(settings: Settings, minutes: float) -> None:
    """Train for `minutes` of CPU time, resuming from an interrupted run's checkpoint."""
    torch.manual_seed(settings.seed)
    clips = draw_clip_set(
        VideoConfig(),
        _COUNT,
        seed=settings.seed,
        workers=settings.workers,
        cache=settings.work / "clips_vae.pt",
    ).clips
    whitening = _whitening(clips[:256])
    vae = build_vae().to(settings.device)
    _start_near_linear(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    path, spent, step = settings.work / "vae.pt", 0.0, 0
    if (state := load_checkpoint(path, settings.device)) is not None:
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        spent, step = state["spent"], state["step"]
    saved, bar = spent, tqdm(total=round(minutes * 60), unit="s", desc="vae", mininterval=30)
    while spent < minutes * 60:
        began = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(spent / (minutes * 60), step)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        x, factor = _batch(clips, step, generator)
        terms = vae_loss(vae, x.to(settings.device), factor, whitening)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(_total(terms))
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        spent += time.process_time() - began
        bar.update(int(spent) - bar.n)
        if step % 25 == 0:
            bar.write(f"step {step} " + " ".join(f"{k} {v.item():.4f}" for k, v in terms.items()))
        if spent - saved > _CHECKPOINT_SECONDS or spent >= minutes * 60:
            saved = spent
            mean, std = _report(vae, clips, settings)
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(path, {**state, "spent": spent, "step": step, "mean": mean, "std": std})


def vae_loss(
    vae: AutoencoderKLWan, x: torch.Tensor, factor: int, whitening: Whitening
) -> dict[str, torch.Tensor]:
    """Loss terms on clips ``x [B, 3, F, H, W]`` in [-1, 1]; with `factor` 1, of them alone."""
    posterior = vae.encode(x).latent_dist
    z = posterior.sample()
    error = _decode(vae, z) - x
    terms = {
        "l1": error.abs().mean(),
        "l2": error.square().mean(),
        "anchor": (posterior.mean[:, :3] - _mean_colours(x, whitening)).square().mean(),
        "kl": posterior.kl().mean() / z[0].numel(),
    }
    if factor > 1:
        x_small, z_small = _reduce(x, factor), _reduce(z, factor)
        gap = vae.encode(x_small).latent_dist.mean - _reduce(posterior.mean, factor)
        terms["latent"] = gap.square().mean() / posterior.mean.detach().var()
        terms["small"] = (_decode(vae, z_small) - x_small).abs().mean()
    return terms


def _total(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    weights = {
        "anchor": _ANCHOR_WEIGHT,
        "kl": _KL_WEIGHT,
        "latent": _LATENT_WEIGHT,
        "small": _SMALL_WEIGHT,
    }
    return torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()


def _decode(vae: AutoencoderKLWan, z: torch.Tensor) -> torch.Tensor:
    """As `AutoencoderKLWan.decode`, without its clamp, which has no gradient outside [-1, 1]."""
    vae.clear_cache()
    features, parts = vae.post_quant_conv(z), []
    for i in range(z.shape[2]):
        vae._conv_idx = [0]  # noqa: SLF001
        parts.append(
            vae.decoder(
                features[:, :, i : i + 1],
                feat_cache=vae._feat_map,  # noqa: SLF001
                feat_idx=vae._conv_idx,  # noqa: SLF001
                first_chunk=i == 0,
            )
        )
    vae.clear_cache()
    return torch.cat(parts, dim=2)


def _reduce(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Means over `factor` x `factor` of every frame: ``[B, C, F, H, W]``."""
    return F.avg_pool3d(x, (1, factor, factor))


def _mean_colours(x: torch.Tensor, whitening: Whitening) -> torch.Tensor:
    """Whitened mean colours of each latent's pixels: ``[B, 3, 1 + (F - 1) / 4, H/4, W/4]``."""
    small = _reduce(x, 4)
    later = F.avg_pool3d(small[:, :, 1:], (4, 1, 1)) if x.shape[2] > 1 else small[:, :, :0]
    return F.conv3d(torch.cat([small[:, :, :1], later], dim=2), *whitening)


def _whitening(clips: torch.Tensor) -> Whitening:
    """Weight ``[3, 3, 1, 1, 1]`` and bias ``[3]`` that whiten mean colours."""
    x = F.avg_pool2d(clips[:, :, 0].float().div(127.5).sub(1), 4).movedim(1, -1).reshape(-1, 3)
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    weight = (vectors / values.sqrt()).T
    return weight[:, :, None, None, None], -weight @ mean


def _start_near_linear(vae: AutoencoderKLWan) -> None:
    """Start every residual block as its shortcut."""
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            torch.nn.init.normal_(module.weight, std=1e-3)
            torch.nn.init.zeros_(module.bias)


def _batch(clips: torch.Tensor, step: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """Crops of whole clips, or (every second time) clips at half their side; and a factor."""
    side, half = clips.shape[-1], step % 2
    rows = torch.randint(len(clips), (_BATCH,), generator=generator)
    start = int(torch.randint(clips.shape[2] - _FRAMES + 1, (), generator=generator))
    x = clips[rows, :, start : start + _FRAMES].float().div(127.5).sub(1)
    if half:
        x = _reduce(x, side // _CROP)
    else:
        top, left = (
            4 * int(torch.randint((side - _CROP) // 4 + 1, (), generator=generator))
            for _ in range(2)
        )
        x = x[..., top : top + _CROP, left : left + _CROP]
    return x.contiguous(), (2, 1, 4, 1, 1, 2)[step % 6]


def _learning_rate(progress: float, step: int) -> float:
    warm = min(1.0, (step + 1) / 30)
    return warm * (3e-5 + 3e-3 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def _report(
    vae: AutoencoderKLWan, clips: torch.Tensor, settings: Settings
) -> tuple[list[float], list[float]]:
    """Print errors, write a grid of first, middle and last frames; return the latents' statistics.

    The deviation is one number for all channels: a channel that says little must not be blown up
    to the size of the others, or the transformer spends itself on it.
    """
    with evaluation_mode(vae):
        x = clips[:32].to(settings.device).float().div(127.5).sub(1)
        z = vae.encode(x).latent_dist.mean
        shown = x[:8]
        decoded = vae.decode(z[:8]).sample
        small = vae.decode(_reduce(z[:8], 2)).sample
        gaps = [
            (vae.encode(_reduce(x, factor)).latent_dist.mean - _reduce(z, factor)).std() / z.std()
            for factor in (2, 4)
        ]
    error = (decoded - shown).div(2).square().mean().item()
    deviations = z.std((0, 2, 3, 4)).tolist()
    tqdm.write(
        f"vae: {-10 * math.log10(error):.1f} dB, gaps between scales "
        f"{gaps[0]:.3f} {gaps[1]:.3f}, channel std " + " ".join(f"{d:.2f}" for d in deviations)
    )
    enlarged = F.interpolate(small, scale_factor=(1, 2, 2))
    rows = [c[:, :, f] for f in (0, clips.shape[2] // 2, -1) for c in (shown, decoded, enlarged)]
    save_grid(settings.work / "grids" / "vae.png", torch.cat(rows).add(1).div(2))
    mean = z.mean((0, 2, 3, 4)).tolist()
    scale = (z - z.mean((0, 2, 3, 4), keepdim=True)).std().item()
    return mean, [scale] * CHANNELS
