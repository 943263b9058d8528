"""Stage `vae`: a small autoencoder whose latents may be area-averaged.

Beside reconstruction, two terms tie the scales together, since the runtime's coarse steps treat an
area-averaged latent as the latent of a smaller sample:
  decode(down(z)) ~ down(x)       scale equivariance of EQ-VAE (Kouzelis et al., arXiv 2502.09509)
  encode(down(x)) ~ down(z)       the same, seen from the latent side
A third anchors the first three channels to the whitened mean colours of each latent's pixels, which
converges fast on a CPU and is linear, hence the same at every scale; the other channels are free
for what the average loses.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from demo_training.data import draw
from demo_training.kind import Kind, reduce
from demo_training.settings import Settings, load_checkpoint, save_checkpoint, save_grid

_WARM_STEPS, _CHECKPOINT_SECONDS = 40, 60.0
Whitening = tuple[Tensor, Tensor]


def train_vae(kind: Kind, settings: Settings, minutes: float) -> None:
    """Train for `minutes`, resuming from the checkpoint of an interrupted run."""
    torch.manual_seed(settings.seed)
    data, seconds = {}, minutes * 60
    for size, count in kind.vae.counts.items():
        cache = settings.work / f"vae_{size[0]}x{size[1]}.pt"
        data[size], _ = draw(kind, settings, size, settings.count(count), settings.seed, cache)
    whitening = whitening_of(kind, next(iter(data.values()))[:512], settings)
    vae = kind.build_vae().to(settings.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    path, spent, step = settings.work / "vae.pt", 0.0, 0
    if (state := load_checkpoint(path, settings.device)) is not None:
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        spent, step = state["spent"], state["step"]
    saved = spent
    bar = tqdm(total=round(seconds), initial=round(spent), unit="s", desc="vae", mininterval=20)
    while spent < seconds:
        began = settings.clock()
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(kind, spent / seconds, step)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        x, factor = kind.vae_batch(data, step, generator)
        terms = vae_loss(kind, vae, x.to(settings.device), factor, whitening)
        weighted = [kind.vae.weights.get(name, 1.0) * term for name, term in terms.items()]
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(torch.stack(weighted).sum())
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        spent += settings.clock() - began
        bar.update(int(spent) - bar.n)
        if step % 50 == 0:
            bar.write(f"step {step} " + " ".join(f"{k} {v.item():.4f}" for k, v in terms.items()))
        if spent - saved > _CHECKPOINT_SECONDS or spent >= seconds:
            saved = spent
            statistics = _report(kind, vae, next(iter(data.values())), settings)
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"spent": spent, "step": step, "statistics": statistics}
            save_checkpoint(path, state)


def vae_loss(
    kind: Kind, vae: Any, x: Tensor, factor: int, whitening: Whitening
) -> dict[str, Tensor]:
    """Loss terms on samples in [-1, 1]; those that tie two scales need a factor above 1."""
    posterior = vae.encode(x).latent_dist
    z = posterior.sample()
    error = kind.decode(vae, z) - x
    terms = {
        "l1": error.abs().mean(),
        "l2": error.square().mean(),
        "anchor": (posterior.mean[:, :3] - _whitened(kind, x, whitening)).square().mean(),
        "kl": posterior.kl().mean() / z[0].numel(),
    }
    if factor > 1:
        x_small, z_small = reduce(x, factor), reduce(z, factor)
        gap = vae.encode(x_small).latent_dist.mean - reduce(posterior.mean, factor)
        terms["latent"] = gap.square().mean() / posterior.mean.detach().var()
        terms["small"] = (kind.decode(vae, z_small) - x_small).abs().mean()
    return terms


def whitening_of(kind: Kind, samples: Tensor, settings: Settings) -> Whitening:
    """Weight ``[3, 3]`` and bias ``[3]`` that whiten mean colours."""
    still = samples if samples.ndim == 4 else samples[:, :, :1]
    x = kind.colours(still.float().div(127.5).sub(1)).movedim(1, -1).reshape(-1, 3)
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    weight = (vectors / values.sqrt()).T
    return weight.to(settings.device), (-weight @ mean).to(settings.device)


def _whitened(kind: Kind, x: Tensor, whitening: Whitening) -> Tensor:
    weight, bias = whitening
    return (kind.colours(x).movedim(1, -1) @ weight.T + bias).movedim(-1, 1)


def _learning_rate(kind: Kind, progress: float, step: int) -> float:
    high, low = kind.vae.rates
    warm = min(1.0, (step + 1) / _WARM_STEPS)
    return warm * (low + high * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def _report(kind: Kind, vae: Any, samples: Tensor, settings: Settings) -> dict[str, Any]:
    """Print errors, write a grid, and return the statistics of the latents."""
    vae.eval()
    with torch.no_grad():
        x = samples[: kind.vae.shown].to(settings.device).float().div(127.5).sub(1)
        z = vae.encode(x).latent_dist.mean
        shown = x[:8]
        decoded = kind.decode(vae, z[:8]).clamp(-1, 1)
        small = {factor: kind.decode(vae, reduce(z[:8], factor)) for factor in (2, 4)}
        gaps = {
            factor: ((vae.encode(reduce(x, factor)).latent_dist.mean - reduce(z, factor)).std())
            for factor in (2, 4)
        }
    vae.train()
    error = (decoded - shown).div(2).square().mean().item()
    relative = ", ".join(f"{gap.item() / z.std().item():.3f} at {f}" for f, gap in gaps.items())
    deviations = " ".join(f"{z[:, c].std().item():.2f}" for c in range(z.shape[1]))
    decibels = -10 * math.log10(error)
    tqdm.write(f"vae: {decibels:.1f} dB, gaps between scales {relative}, channels {deviations}")
    rows = [*kind.frames(shown), *kind.frames(decoded)]
    for factor, one in small.items():
        rows += [F.interpolate(frame, scale_factor=factor) for frame in kind.frames(one)]
    save_grid(settings.work / "grids" / "vae.png", torch.cat(rows).add(1).div(2))
    return kind.statistics(z)
