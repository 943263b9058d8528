"""Stage `vae`: a small AutoencoderKL whose latents may be area-averaged.

Beside reconstruction, two terms tie the scales together, since the runtime's coarse steps treat an
area-averaged latent as the latent of a smaller picture:
  decode(down(z)) ~ down(x)       scale equivariance of EQ-VAE (Kouzelis et al., arXiv 2502.09509)
  encode(down(x)) ~ down(z)       the same, seen from the latent side
A third anchors the first three channels to the whitened colours of the picture averaged by 4, which
converges fast on a CPU and is linear, hence the same at every scale; the fourth channel is free for
what the average loses.
"""

import math
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from demo_training.draw_images import ImageConfig
from demo_training.picture_data import draw_set
from demo_training.settings import (
    Settings,
    evaluation_mode,
    load_checkpoint,
    save_checkpoint,
    save_grid,
)

_CROP = 64
_KL_WEIGHT, _DECODE_WEIGHT, _LATENT_WEIGHT, _ANCHOR_WEIGHT = 5e-4, 0.5, 0.05, 0.3


def build_vae(scaling_factor: float = 1.0, shift_factor: float = 0.0) -> AutoencoderKL:
    """The architecture: three levels, so latents are 4 times smaller, with 4 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=128,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def vae_loss(
    vae: AutoencoderKL, x: torch.Tensor, factor: int, whitening: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Loss terms on pictures ``x [B, 3, H, W]`` in [-1, 1], tying scales `factor` apart."""
    posterior = vae.encode(x).latent_dist
    z = posterior.sample()
    x_small, z_small = F.avg_pool2d(x, factor), F.avg_pool2d(z, factor)
    spread = posterior.mean.detach().var()
    latent_gap = vae.encode(x_small).latent_dist.mean - F.avg_pool2d(posterior.mean, factor)
    anchor = posterior.mean[:, :3] - F.conv2d(F.avg_pool2d(x, 4), *whitening)
    reconstruction = vae.decode(z).sample - x
    return {
        "l1": reconstruction.abs().mean(),
        "l2": reconstruction.square().mean(),
        "small": (vae.decode(z_small).sample - x_small).abs().mean(),
        "latent": latent_gap.square().mean() / spread,
        "anchor": anchor.square().mean(),
        "kl": posterior.kl().mean() / z[0].numel(),
    }


def train_vae(settings: Settings, minutes: float) -> None:
    """Train for `minutes`, resuming from the checkpoint of an interrupted run."""
    torch.manual_seed(settings.seed)
    data = _pictures(settings)
    whitening = _whitening(data[128][:512], settings)
    vae = build_vae().to(settings.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    path, spent, step = settings.work / "vae.pt", 0.0, 0
    if (state := load_checkpoint(path, settings.device)) is not None:
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        spent, step = state["spent"], state["step"]
    bar = tqdm(total=round(minutes * 60), initial=round(spent), unit="s", desc="vae", mininterval=5)
    while spent < minutes * 60:
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(spent / (minutes * 60), step)
        terms = vae_loss(vae, *_batch(data, step, settings), whitening)
        loss = (
            terms["l1"]
            + terms["l2"]
            + _DECODE_WEIGHT * terms["small"]
            + _LATENT_WEIGHT * terms["latent"]
            + _ANCHOR_WEIGHT * terms["anchor"]
            + _KL_WEIGHT * terms["kl"]
        )
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        spent += time.perf_counter() - began
        bar.update(int(spent) - bar.n)
        if step % 50 == 0:
            bar.write(f"step {step} " + " ".join(f"{k} {v.item():.4f}" for k, v in terms.items()))
        if step % 200 == 0 or spent >= minutes * 60:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(path, state | {"spent": spent, "step": step})
            _report(vae, data[128][:8], settings)
    _measure_statistics(vae, data[128][:256], settings)


def load_vae(settings: Settings) -> AutoencoderKL:
    """The trained autoencoder, with the scaling that gives its latents mean 0 and deviation 1."""
    state = load_checkpoint(settings.work / "vae.pt", settings.device)
    if state is None or "scaling_factor" not in state:
        raise ValueError(f"no trained autoencoder in {settings.work}; run the stage 'vae' first")
    vae = build_vae(state["scaling_factor"], state["shift_factor"])
    vae.load_state_dict(state["vae"])
    return vae.to(settings.device, memory_format=torch.channels_last).eval()


def _pictures(settings: Settings) -> dict[int, torch.Tensor]:
    return {
        size: draw_set(
            ImageConfig(height=size, width=size),
            count,
            seed=settings.seed,
            workers=settings.workers,
            cache=settings.work / f"pictures_vae_{size}.pt",
        ).pictures
        for size, count in ((128, 3072), (64, 6144))
    }


def _whitening(pictures: torch.Tensor, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight ``[3, 3, 1, 1]`` and bias ``[3]`` of a 1 x 1 convolution that whitens mean colours."""
    x = F.avg_pool2d(pictures.float().div(127.5).sub(1), 4).movedim(1, -1).reshape(-1, 3)
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    weight = (vectors / values.sqrt()).T
    return weight[..., None, None].to(settings.device), (-weight @ mean).to(settings.device)


def _batch(
    data: dict[int, torch.Tensor], step: int, settings: Settings
) -> tuple[torch.Tensor, int]:
    """Whole 64 px pictures, crops of 128 px ones, or (one in four) whole 128 px ones."""
    size = 64 if step % 2 else 128
    whole = step % 4 == 2
    rows = torch.randint(len(data[size]), (6 if whole else 16,))
    x = data[size][rows].to(settings.device).float().div(127.5).sub(1)
    if size == 128 and not whole:
        top, left = (4 * int(torch.randint((size - _CROP) // 4 + 1, ())) for _ in range(2))
        x = x[:, :, top : top + _CROP, left : left + _CROP]
    factor = 4 if step % 8 in (2, 5) else 2
    return x.contiguous(memory_format=torch.channels_last), factor


def _learning_rate(progress: float, step: int) -> float:
    warm = min(1.0, (step + 1) / 50)
    return warm * (2e-5 + 2e-3 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def _report(vae: AutoencoderKL, pictures: torch.Tensor, settings: Settings) -> None:
    """Write a grid: pictures, reconstructions, decoded latents averaged by 2 and by 4."""
    with evaluation_mode(vae):
        x = pictures.to(settings.device).float().div(127.5).sub(1)
        z = vae.encode(x).latent_dist.mean
        rows = [x, vae.decode(z).sample]
        rows += [
            F.interpolate(vae.decode(F.avg_pool2d(z, factor)).sample, scale_factor=factor)
            for factor in (2, 4)
        ]
    save_grid(settings.work / "grids" / "vae.png", torch.cat(rows).add(1).div(2))


def _measure_statistics(vae: AutoencoderKL, pictures: torch.Tensor, settings: Settings) -> None:
    """Store shift and scale, print the reconstruction error and the gap between the scales."""
    with evaluation_mode(vae):
        x = pictures.to(settings.device).float().div(127.5).sub(1)
        z = vae.encode(x).latent_dist.mean
        error = (vae.decode(z).sample.clamp(-1, 1) - x).div(2).square().mean().item()
        gaps = {}
        for factor in (2, 4):
            small = vae.encode(F.avg_pool2d(x, factor)).latent_dist.mean
            gap = (small - F.avg_pool2d(z, factor)).square().mean() / small.var()
            gaps[factor] = math.sqrt(gap.item())
    shift, scale = z.mean().item(), 1 / z.std().item()
    tqdm.write(f"vae: {-10 * math.log10(error):.1f} dB, relative gap between scales {gaps}")
    tqdm.write(f"vae: shift {shift:.4f} scale {scale:.4f}, channel std {z.std((0, 2, 3)).tolist()}")
    path = settings.work / "vae.pt"
    state = load_checkpoint(path, "cpu")
    assert state is not None
    save_checkpoint(path, state | {"scaling_factor": scale, "shift_factor": shift})
