"""Stage `transformer`: rectified flow on the latents.

    z_t = (1 - t) x0 + t n,   loss = | model(z_t, 1000 t, caption) - (n - x0) |^2

Phase 1 sees only the small clips, where a step is cheap and shapes, colours and directions are
learnt; phase 2 is mostly 64 px. Every random draw depends on (seed, step) alone. The clock counts
CPU time, so that the schedule does not depend on what else the machine does.
"""

import copy
import dataclasses
import math
import time

import torch
import torch.nn.functional as F
from demo_training.draw_videos import random_video_attributes
from demo_training.settings import Settings, load_checkpoint, save_checkpoint, save_grid
from diffusers import WanTransformer3DModel
from tqdm import tqdm

from video_training.latents import (
    FRAMES,
    build_pipeline,
    build_transformer,
    embed_captions,
    encode_latents,
)
from video_training.text import MAX_SEQUENCE_LENGTH


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of the training: its share of the time, learning rates and mixture of sides in px."""

    share: float
    learning_rates: tuple[float, float]
    mixture: dict[int, float]


PHASES = (
    Phase(share=0.4, learning_rates=(2e-3, 1.2e-3), mixture={32: 0.85, 16: 0.15}),
    Phase(share=0.6, learning_rates=(1.5e-3, 2e-5), mixture={64: 0.65, 32: 0.25, 16: 0.10}),
)
# Fewer of the larger clips, so that steps take alike.
BATCH = {64: 12, 32: 32, 16: 64}
_SHIFT = {64: 0.4, 32: 0.1, 16: -0.2}
_EMA, _CLIP, _UNIFORM_SHARE, _EMPTY_SHARE, _WARM_STEPS = 0.998, 1.0, 0.25, 0.08, 100
_CHECKPOINT_SECONDS = 180.0


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


def sample_times(count: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """Times ``[count]`` in (0, 1): logit-normal, later for more tokens, a quarter uniform."""
    normal = torch.sigmoid(torch.randn(count, generator=generator) + _SHIFT[side])
    uniform = torch.rand(count, generator=generator)
    chosen = torch.rand(count, generator=generator) < _UNIFORM_SHARE
    return torch.where(chosen, uniform, normal)


class Trainer:
    """Model, average of its weights, optimizer, clock."""

    def __init__(self, settings: Settings, minutes: float) -> None:
        """Read the data, build or resume the model."""
        self.settings, self.seconds = settings, minutes * 60
        self.data = {side: encode_latents(settings, side) for side in BATCH}
        self.table = embed_captions(settings)
        torch.manual_seed(settings.seed)
        self.model = build_transformer().to(settings.device)
        _start_as_identity(self.model)
        self.parameters = list(self.model.parameters())
        self.average = copy.deepcopy(self.model).eval()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.spent, self.step = 0.0, 0
        self._resume()
        self.saved = self.spent
        self.losses: dict[int, list[float]] = {}
        if settings.compile:
            self.model.compile_repeated_blocks(dynamic=False)

    def run(self) -> None:
        """Train until the time is spent."""
        bar = tqdm(total=round(self.seconds), unit="s", desc="transformer", mininterval=30)
        while self.spent < self.seconds:
            began = time.process_time()
            self._train_step()
            # Compiling, which comes with the first steps of a process, is not training.
            self.spent += min(time.process_time() - began, 5.0)
            bar.update(int(self.spent) - bar.n)
            if self.step % 100 == 0:
                bar.write(f"step {self.step} {self._loss_line()}")
            if self.spent - self.saved > _CHECKPOINT_SECONDS or self.spent >= self.seconds:
                self.saved = self.spent
                self._save()

    def _train_step(self) -> None:
        phase, rate = phase_at(self.spent / self.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (self.step + 1) / _WARM_STEPS)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        weights = torch.tensor(list(phase.mixture.values()))
        side = list(phase.mixture)[int(torch.multinomial(weights, 1, generator=generator))]
        # The smallest size is not worth the minute that compiling for it would take.
        with torch.compiler.set_stance("force_eager" if side == min(BATCH) else "default"):
            loss = self._loss(side, generator)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, _CLIP)
        self.optimizer.step()
        self.step += 1
        decay = min(_EMA, (self.step + 1) / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), self.parameters, 1 - decay)
        self.losses.setdefault(side, []).append(loss.item())

    def _loss(self, side: int, generator: torch.Generator) -> torch.Tensor:
        data, count, device = self.data[side], BATCH[side], self.settings.device
        rows = torch.randint(len(data.latents), (count,), generator=generator)
        clean = data.latents[rows].float()
        noise = torch.randn(clean.shape, generator=generator)
        t = sample_times(count, side, generator)
        blend = t[:, None, None, None, None]
        captions = data.captions[rows].clone()
        captions[torch.rand(count, generator=generator) < _EMPTY_SHARE] = -1
        output = self.model(
            hidden_states=((1 - blend) * clean + blend * noise).to(device),
            timestep=(1000 * t).to(device),
            encoder_hidden_states=self.table[captions].to(device),
            return_dict=False,
        )[0]
        return F.mse_loss(output, (noise - clean).to(device))

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
        parts = [f"{side} px {sum(v) / len(v):.4f}" for side, v in sorted(self.losses.items())]
        self.losses.clear()
        return " ".join(parts)


def train_transformer(settings: Settings, minutes: float) -> None:
    """Train for `minutes` of CPU time, resuming from an interrupted run's checkpoint."""
    Trainer(settings, minutes).run()


def sample_grids(settings: Settings, transformer: WanTransformer3DModel, name: str) -> None:
    """Write grids of 8 held-out captions at 32 and 64 px: first, middle and last frames."""
    pipeline = build_pipeline(settings, transformer)
    prompts = [random_video_attributes(settings.seed, i, held_out=True).caption for i in range(8)]
    for side in (32, 64):
        clips = pipeline(
            prompts,
            negative_prompt="",
            height=side,
            width=side,
            num_frames=FRAMES,
            num_inference_steps=16,
            guidance_scale=3.0,
            output_type="pt",
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=torch.Generator().manual_seed(settings.seed),
        ).frames
        rows = [clips[:, f] for f in (0, FRAMES // 2, FRAMES - 1)]
        save_grid(settings.work / "grids" / f"{name}_{side}.png", torch.cat(rows).float())


def _start_as_identity(model: WanTransformer3DModel) -> None:
    """Start every block as the identity and the output at zero (adaLN-Zero of DiT)."""
    for name, parameter in model.named_parameters():
        zero = ("scale_shift_table", "time_proj", "attn2.to_out", "proj_out")
        if any(part in name for part in zero):
            torch.nn.init.zeros_(parameter)
