"""Stage `transformer`: rectified flow on the latents, in one process per core or on one GPU.

    z_t = (1 - t) x0 + t n,   loss = | model(z_t, t, caption) - (n - x0) |^2

The first phase sees only small samples, where a step is cheap and shapes and colours are learnt.
Every random draw depends on (seed, rank, step) alone, so that a run resumed from a checkpoint
continues as the uninterrupted run would have, its clock aside.
"""

import copy
import functools
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from demo_training.data import build_pipeline, embed_captions, encode_latents
from demo_training.kind import Kind, Phase, Size, TransformerRecipe
from demo_training.settings import Settings, load_checkpoint, save_checkpoint, save_grid

_UNIFORM_SHARE, _CLIP, _WARM_STEPS = 0.25, 1.0, 100
_CHECKPOINT_SECONDS, _MOST_SECONDS = 240.0, 5.0


def phase_at(recipe: TransformerRecipe, progress: float) -> tuple[Phase, float]:
    """The phase at a share of the whole time, and the learning rate there (cosine within it)."""
    begin = 0.0
    for phase in recipe.phases:
        if progress < begin + phase.share or phase is recipe.phases[-1]:
            inside = min(1.0, (progress - begin) / phase.share)
            high, low = phase.rates
            return phase, low + (high - low) * 0.5 * (1 + math.cos(math.pi * inside))
        begin += phase.share
    raise AssertionError("the last phase ends the loop")


def sample_times(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Times ``[count]`` in (0, 1): logit-normal about `shift`, a quarter uniform."""
    device = generator.device
    normal = torch.sigmoid(torch.randn(count, generator=generator, device=device) + shift)
    uniform = torch.rand(count, generator=generator, device=device)
    chosen = torch.rand(count, generator=generator, device=device) < _UNIFORM_SHARE
    return torch.where(chosen, uniform, normal)


class Trainer:
    """The training state of one process: model, average of its weights, optimizer, clock."""

    def __init__(self, kind: Kind, settings: Settings, minutes: float, rank: int) -> None:
        """Read the data, build or resume the model."""
        if settings.device != "cpu":
            torch.set_float32_matmul_precision("high")
        self.kind, self.recipe, self.settings = kind, kind.transformer, settings
        self.rank, self.seconds = rank, minutes * 60
        self.data = {size: encode_latents(kind, settings, size) for size in self.recipe.counts}
        self.prompts = embed_captions(kind, settings)
        torch.manual_seed(settings.seed)
        self.model = kind.build_transformer().to(settings.device)
        self.parameters = list(self.model.parameters())
        self.average = copy.deepcopy(self.model).eval()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.spent, self.step = 0.0, 0
        self._resume()
        self.saved = self.spent
        self.losses: dict[Size, list[Tensor]] = {}
        if settings.compile:
            self.model.compile_repeated_blocks(dynamic=False)

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
            began = self.settings.clock()
            self._train_step()
            # Compiling, which comes with the first steps of a process, is not training.
            self.spent += self._shared(min(self.settings.clock() - began, _MOST_SECONDS))
            bar.update(int(self.spent) - bar.n)
            if self.step % 100 == 0 and self.rank == 0:
                bar.write(f"step {self.step} {self._loss_line()}")
            if self.spent - self.saved > _CHECKPOINT_SECONDS or self.spent >= self.seconds:
                self.saved = self.spent
                if self.rank == 0:
                    self._save()

    def _train_step(self) -> None:
        phase, rate = phase_at(self.recipe, self.spent / self.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (self.step + 1) / _WARM_STEPS)
        shared = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        weights = torch.tensor(list(phase.mixture.values()))
        size = list(phase.mixture)[int(torch.multinomial(weights, 1, generator=shared))]
        own = int(torch.randint(2**62, (self.rank + 1,), generator=shared)[self.rank])
        stance = "force_eager" if size in self.recipe.eager else "default"
        with torch.compiler.set_stance(stance):
            loss = self._loss(size, torch.Generator(self.settings.device).manual_seed(own))
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, _CLIP)
        self.optimizer.step()
        self.step += 1
        decay = min(self.recipe.average, (self.step + 1) / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), self.parameters, 1 - decay)
        self.losses.setdefault(size, []).append(loss.detach())

    def _loss(self, size: Size, generator: torch.Generator) -> Tensor:
        data, device = self.data[size], generator.device
        count = self.recipe.batches[size] * (1 if device.type == "cpu" else self.recipe.on_gpu)
        rows = torch.randint(len(data["latents"]), (count,), generator=generator, device=device)
        clean = data["latents"][rows].float()
        noise = torch.randn(clean.shape, generator=generator, device=device)
        t = sample_times(count, self.recipe.shifts[size], generator)
        blend = t.view(-1, *[1] * (clean.ndim - 1))
        text = self._text(data["captions"][rows], generator)
        noisy = (1 - blend) * clean + blend * noise
        output = self.kind.velocity(self.model, noisy, t, text)
        return F.mse_loss(output, self.kind.layout(noise - clean))

    def _text(self, captions: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Embeddings of the captions, some reworded and some replaced by the empty prompt."""
        count, device = len(captions), generator.device
        phrasings = torch.randint(self.kind.phrasings, (count,), generator=generator, device=device)
        uniform = functools.partial(torch.rand, count, generator=generator, device=device)
        phrasings *= uniform() < self.recipe.reworded
        captions = captions.masked_fill(uniform() < self.recipe.empty, -1)
        rows = self.prompts["rows"][captions, phrasings]
        return {name: one[rows] for name, one in self.prompts["table"].items()}

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
        sample_grids(self.kind, self.settings, self.average, f"{self.step:06d}")

    def _loss_line(self) -> str:
        parts = [
            f"{h}x{w} {torch.stack(v).mean():.4f}" for (h, w), v in sorted(self.losses.items())
        ]
        self.losses.clear()
        return " ".join(parts)


def train_transformer(kind: Kind, settings: Settings, minutes: float) -> None:
    """Train for `minutes`, resuming from the checkpoint of an interrupted run."""
    for size in kind.transformer.counts:
        encode_latents(kind, settings, size)
    embed_captions(kind, settings)
    count = settings.workers if settings.device == "cpu" else 1
    if count == 1:
        Trainer(kind, settings, minutes, rank=0).run()
        return
    (settings.work / "rendezvous").unlink(missing_ok=True)
    shared = [[value] * count for value in (kind, settings, minutes)]
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as executor:
        list(executor.map(_worker, range(count), *shared))


def _worker(rank: int, kind: Kind, settings: Settings, minutes: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{(settings.work / 'rendezvous').resolve()}",
        rank=rank,
        world_size=settings.workers,
    )
    Trainer(kind, settings, minutes, rank).run()
    dist.destroy_process_group()


def sample_grids(kind: Kind, settings: Settings, transformer: Any, name: str) -> None:
    """Write grids of held-out captions."""
    pipeline = build_pipeline(kind, settings, transformer)
    prompts = [attributes.caption for attributes in kind.expected()["held out"][:16:2]]
    for side in kind.shown:
        generator = torch.Generator().manual_seed(settings.seed)
        samples = kind.sample(pipeline, prompts, side, 2 if settings.quick else 24, generator)
        path = settings.work / "grids" / f"{name}_{side}.png"
        save_grid(path, torch.cat(kind.frames(samples)).float())
