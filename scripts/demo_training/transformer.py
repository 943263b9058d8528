"""Stage `transformer`: rectified flow on the latents, in one process per core or on one GPU.

    z_t = (1 - t) x0 + t n,   loss = | model(z_t, t, caption) - (n - x0) |^2

Phase 1 sees only the small resolutions, where a step is cheap and shapes and colours are learnt;
phase 2 is mostly 128 px. Every random draw depends on (seed, rank, step) alone, so that a run
resumed from a checkpoint continues as the uninterrupted run would have, its clock aside.
"""

import copy
import dataclasses
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from tqdm import tqdm

from demo_training.draw_images import random_attributes
from demo_training.latents import (
    CaptionTable,
    LatentSet,
    build_pipeline,
    build_transformer,
    embed_captions,
    encode_latents,
)
from demo_training.settings import Settings, load_checkpoint, save_checkpoint, save_grid
from demo_training.text import MAX_SEQUENCE_LENGTH

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of the training: its share of the time, learning rates and mixture of sizes."""

    share: float
    learning_rates: tuple[float, float]
    mixture: dict[Size, float]


_ODD_SIZES = {(64, 128): 0.02, (128, 64): 0.02, (96, 128): 0.02, (128, 96): 0.02}
PHASES = (
    Phase(share=0.27, learning_rates=(2e-3, 1e-3), mixture={(32, 32): 0.4, (64, 64): 0.6}),
    Phase(
        share=0.73,
        learning_rates=(1.2e-3, 2e-5),
        mixture={(128, 128): 0.64, (64, 64): 0.18, (32, 32): 0.10, **_ODD_SIZES},
    ),
)
_EMA, _CLIP, _UNIFORM_SHARE, _EMPTY_SHARE, _WARM_STEPS = 0.999, 1.0, 0.25, 0.05, 100
_CHECKPOINT_SECONDS = 240.0


def batch_size(size: Size) -> int:
    """Pictures per step and process: fewer of the larger ones, so that steps take alike."""
    tokens = size[0] * size[1] // 64
    return 64 if tokens <= 16 else 32 if tokens <= 64 else 12


def phase_at(progress: float) -> tuple[Phase, float]:
    """The phase at a share of the whole time, and the learning rate there (cosine within it)."""
    begin = 0.0
    for phase in PHASES:
        if progress < begin + phase.share or phase is PHASES[-1]:
            inside = min(1.0, (progress - begin) / phase.share)
            high, low = phase.learning_rates
            return phase, low + (high - low) * 0.5 * (1 + math.cos(math.pi * inside))
        begin += phase.share
    raise AssertionError("the last phase ends the loop")


def sample_times(count: int, size: Size, generator: torch.Generator) -> torch.Tensor:
    """Times ``[count]`` in (0, 1): logit-normal, later for more tokens, a quarter uniform."""
    tokens = size[0] * size[1] // 64
    shift = 0.2 + 0.15 * math.log2(tokens / 256)
    normal = torch.sigmoid(torch.randn(count, generator=generator) + shift)
    uniform = torch.rand(count, generator=generator)
    chosen = torch.rand(count, generator=generator) < _UNIFORM_SHARE
    return torch.where(chosen, uniform, normal)


class Trainer:
    """The training state of one process: model, average of its weights, optimizer, clock."""

    def __init__(self, settings: Settings, minutes: float, rank: int) -> None:
        """Read the data, build or resume the model."""
        self.settings, self.rank, self.seconds = settings, rank, minutes * 60
        self.data = {size: encode_latents(settings, size) for size in PHASES[1].mixture}
        self.table: CaptionTable = embed_captions(settings)
        torch.manual_seed(settings.seed)
        self.model = build_transformer().to(settings.device)
        _zero_modulation(self.model)
        self.parameters = list(self.model.parameters())
        self.average = copy.deepcopy(self.model).eval()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.spent, self.step = 0.0, 0
        self._resume()
        self.saved = self.spent
        self.losses: dict[Size, list[float]] = {}
        if settings.compile:
            self.model.compile_repeated_blocks(fullgraph=True, dynamic=False)

    def run(self) -> None:
        """Train until the time is spent."""
        bar = tqdm(
            total=round(self.seconds),
            initial=round(self.spent),
            unit="s",
            desc="transformer",
            mininterval=20,
            disable=self.rank > 0,
        )
        while self.spent < self.seconds:
            began = time.perf_counter()
            self._train_step()
            self.spent += self._shared(time.perf_counter() - began)
            bar.update(int(self.spent) - bar.n)
            if self.step % 100 == 0 and self.rank == 0:
                bar.write(f"step {self.step} {self._loss_line()}")
            if self.spent - self.saved > _CHECKPOINT_SECONDS or self.spent >= self.seconds:
                self.saved = self.spent
                if self.rank == 0:
                    self._save()

    def _train_step(self) -> None:
        phase, rate = phase_at(self.spent / self.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (self.step + 1) / _WARM_STEPS)
        shared = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        weights = torch.tensor(list(phase.mixture.values()))
        size = list(phase.mixture)[int(torch.multinomial(weights, 1, generator=shared))]
        own = int(torch.randint(2**62, (self.rank + 1,), generator=shared)[self.rank])
        # The rare sizes are not worth the minute that compiling for each would take.
        stance = "force_eager" if size in _ODD_SIZES else "default"
        with torch.compiler.set_stance(stance):
            loss = self._loss(size, torch.Generator().manual_seed(own))
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, _CLIP)
        self.optimizer.step()
        self.step += 1
        decay = min(_EMA, (self.step + 1) / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), self.parameters, 1 - decay)
        self.losses.setdefault(size, []).append(loss.item())

    def _loss(self, size: Size, generator: torch.Generator) -> torch.Tensor:
        data, device = self.data[size], self.settings.device
        count = batch_size(size)
        rows = torch.randint(len(data.latents), (count,), generator=generator)
        clean = data.latents[rows].float()
        noise = torch.randn(clean.shape, generator=generator)
        t = sample_times(count, size, generator)
        blend = t[:, None, None, None]
        noisy, target = (1 - blend) * clean + blend * noise, noise - clean
        sequence, pooled = self._captions(data, rows, generator)
        output = self.model(
            hidden_states=_pack(noisy).to(device),
            encoder_hidden_states=sequence.to(device),
            pooled_projections=pooled.to(device),
            timestep=t.to(device),
            img_ids=_image_ids(clean.shape[2] // 2, clean.shape[3] // 2).to(device),
            txt_ids=torch.zeros(MAX_SEQUENCE_LENGTH, 3, device=device),
            return_dict=False,
        )[0]
        return F.mse_loss(output, _pack(target).to(device))

    def _captions(
        self, data: LatentSet, rows: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the captions, some reworded and some replaced by the empty prompt."""
        captions, count = data.captions[rows].clone(), len(rows)
        phrasings = torch.randint(self.table.pooled.shape[1], (count,), generator=generator)
        phrasings *= torch.rand(count, generator=generator) < 0.4
        captions[torch.rand(count, generator=generator) < _EMPTY_SHARE] = -1
        return self.table.sequence[captions, phrasings], self.table.pooled[captions, phrasings]

    def _average_gradients(self) -> None:
        if not dist.is_initialized():
            return
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)]
        )

    def _shared(self, seconds: float) -> float:
        """The clock of process 0, so that all processes follow the same schedule."""
        if not dist.is_initialized():
            return seconds
        clock = torch.tensor([seconds], dtype=torch.float64)
        dist.broadcast(clock, 0)
        return float(clock)

    def _resume(self) -> None:
        state = load_checkpoint(self.settings.work / "transformer.pt", self.settings.device)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.spent, self.step = state["spent"], state["step"]

    def _save(self) -> None:
        state = {
            "model": {k.replace("_orig_mod.", ""): v for k, v in self.model.state_dict().items()},
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "spent": self.spent,
            "step": self.step,
        }
        save_checkpoint(self.settings.work / "transformer.pt", state)
        sample_grids(self.settings, self.average, f"{self.step:06d}")

    def _loss_line(self) -> str:
        parts = [f"{h}x{w} {sum(v) / len(v):.4f}" for (h, w), v in sorted(self.losses.items())]
        self.losses.clear()
        return " ".join(parts)


def train_transformer(settings: Settings, minutes: float) -> None:
    """Train for `minutes`, resuming from the checkpoint of an interrupted run."""
    for size in PHASES[1].mixture:
        encode_latents(settings, size)
    embed_captions(settings)
    if settings.device == "cpu" and settings.workers > 1:
        (settings.work / "rendezvous").unlink(missing_ok=True)
        count = settings.workers
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as executor:
            list(executor.map(_worker, range(count), [settings] * count, [minutes] * count))
    else:
        Trainer(settings, minutes, rank=0).run()


def sample_grids(settings: Settings, transformer: FluxTransformer2DModel, name: str) -> None:
    """Write grids of 16 held-out captions at 32, 64 and 128 px, 24 steps."""
    pipeline = build_pipeline(settings, transformer)
    prompts = [random_attributes(settings.seed, i, held_out=True).caption for i in range(16)]
    for side in (32, 64, 128):
        pictures = pipeline(
            prompts,
            height=side,
            width=side,
            num_inference_steps=24,
            output_type="pt",
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=torch.Generator().manual_seed(settings.seed),
        ).images
        save_grid(settings.work / "grids" / f"{name}_{side}.png", pictures.float())


def _worker(rank: int, settings: Settings, minutes: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{(settings.work / 'rendezvous').resolve()}",
        rank=rank,
        world_size=settings.workers,
    )
    Trainer(settings, minutes, rank).run()
    dist.destroy_process_group()


def _pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents ``[B, C, H, W]`` as tokens ``[B, H/2 W/2, 4C]``, as `FluxPipeline` packs them."""
    count, channels, height, width = latents.shape
    blocks = latents.view(count, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(count, height * width // 4, channels * 4)


def _image_ids(rows: int, columns: int) -> torch.Tensor:
    """Positions ``[rows * columns, 3]`` (0, row, column), as `FluxPipeline` makes them."""
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).flatten(0, 1).float()


def _zero_modulation(model: FluxTransformer2DModel) -> None:
    """Start every block as the identity and the output at zero (adaLN-Zero of DiT)."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ("norm" in name or name == "proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
