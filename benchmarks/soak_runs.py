"""The runs of `bench_soak.py`: what is drawn for each, how one is made, and how it must end."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ddit_rt import DDiTPolicy, Engine, PatchPolicy, StaticCache, StepCache
from ddit_rt.engine.watch import UNWATCHED, RunWatch
from ddit_rt.errors import RunCancelled
from ddit_rt.lab.demo.prompts import DEMO_PROMPTS, MAX_SEQUENCE_LENGTH

SIZES = {(64, 64): 6, (96, 64): 5, (96, 96): 4}
"""Steps by height and width."""
POLICIES: dict[str, PatchPolicy | str] = {
    "full resolution": "fine",
    "static": "p:0.25,4p:0.25,2p:0.25,p",
    "dynamic": DDiTPolicy(tau=0.05, order=1, fine_tail=1),
}
CACHES: dict[str, StepCache | str] = {
    "none": "none",
    "SeaCache": "seacache:0.4",
    "static": StaticCache(2, first=1),
}
ENDINGS: dict[str, tuple[int, type[Exception] | None]] = {
    "done": (76, None),
    "stopped by its watch": (5, RunCancelled),
    "cancelled by a thread": (5, RunCancelled),
    "callback raises": (4, InterruptedError),
    "watch raises": (3, InterruptedError),
    "arguments refused": (4, ValueError),
    "LoRA refused": (3, ValueError),
}
"""Of a hundred runs how many end so, and with which error."""
REFUSED: tuple[dict[str, Any], ...] = (
    {"patch_policy": "8p"},
    {"step_cache": "all of it"},
    {"num_inference_steps": 0},
    {"guidance_interval": (0.9, 0.1)},
    {"height": 4096, "width": 4096},
    {},  # noise that is not finite, which only the loop sees
)
RANKS = {"thin": 4, "wide": 16}
"""LoRAs that fit, by their rank."""
UNFIT = ("strange", "torn")
"""LoRAs that do not: for another model, and a file that was cut off."""


class UnexpectedEnd(Exception):
    """A run did not end as was drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What was drawn.

    Attributes:
        index: Its place.
        seed: Of its noise, its prompts, and what is refused.
        size: Height and width.
        images: How many at once.
        policy: A name of `POLICIES`.
        cache: A name of `CACHES`.
        guided: Whether a negative prompt guides the first half of its steps.
        called_back: Whether a callback has the pipeline's own loop drive it.
        ending: A name of `ENDINGS`.
        at: The step at which it ends, where it does not run to its end.
        loras: Weights of the LoRAs that are loaded, in the order in which they were.
    """

    index: int
    seed: int
    size: tuple[int, int]
    images: int
    policy: str
    cache: str
    guided: bool
    called_back: bool
    ending: str
    at: int
    loras: dict[str, float]

    @property
    def kind(self) -> str:
        """What its latency hangs on."""
        parts = (*self.size, self.images, self.policy, self.cache, self.guided, self.called_back)
        return "/".join(map(str, parts))


def schedule(runs: int, seed: int, cadence: int) -> list[Run]:
    """What one seed draws; every `cadence`-th has no LoRA, so that looks compare."""
    drawn = random.Random(seed)  # noqa: S311 - nothing secret
    found: list[Run] = []
    loras: dict[str, float] = {}
    for index in range(runs):
        loras = _changed(loras, drawn) if index % cadence else {}
        size = drawn.choice(list(SIZES))
        (ending,) = drawn.choices(list(ENDINGS), [share for share, _ in ENDINGS.values()])
        found.append(
            Run(
                index=index,
                seed=drawn.randrange(2**31),
                size=size,
                images=drawn.choice((1, 1, 2)),
                policy=drawn.choice(list(POLICIES)),
                cache=drawn.choice(("none", *CACHES)),
                guided=drawn.random() < 0.25,
                called_back=drawn.random() < 0.25 or ending == "callback raises",
                ending=ending,
                at=drawn.randrange(SIZES[size]),
                loras=loras,
            )
        )
    return found


def _changed(loras: Mapping[str, float], drawn: random.Random) -> dict[str, float]:
    """Mostly the same; else one more, one less, or one of another weight."""
    name, weight = drawn.choice(list(RANKS)), round(drawn.uniform(-1, 1), 3)
    chance = drawn.random()
    if chance > 0.4:
        return dict(loras)
    if name in loras and chance < 0.1:
        return {other: loras[other] for other in loras if other != name}
    return {**loras, name: weight}


def write_loras(transformer: torch.nn.Module, folder: Path) -> None:
    """Writes the LoRAs as PEFT names their parts, those that do not fit too."""
    noise = torch.Generator().manual_seed(0)
    factors: dict[str, torch.Tensor] = {}
    for lora, rank in RANKS.items():
        factors = {}
        for name, layer in transformer.named_modules():
            if isinstance(layer, torch.nn.Linear) and (lora == "thin" or ".attn." in name):
                down = torch.randn(rank, layer.in_features, generator=noise) / 30
                up = torch.randn(layer.out_features, rank, generator=noise) / 30
                factors[f"transformer.{name}.lora_A.weight"] = down
                factors[f"transformer.{name}.lora_B.weight"] = up
        save_file(factors, folder / f"{lora}.safetensors")
    strange = {name.replace(".attn.", ".other."): value for name, value in factors.items()}
    save_file(strange, folder / "strange.safetensors")
    whole = (folder / "thin.safetensors").read_bytes()
    (folder / "torn.safetensors").write_bytes(whole[: len(whole) // 2])


def settle(engine: Engine, run: Run, folder: Path) -> None:
    """Loads, sets and unloads LoRAs, so that they are as the run has them."""
    engine.unload_loras([name for name in engine.loras if name not in run.loras])
    for name, weight in run.loras.items():
        if name not in engine.loras:
            engine.load_lora(str(folder / f"{name}.safetensors"), weight, name)
    if engine.loras != run.loras:
        engine.set_loras(run.loras)


def perform(engine: Engine, run: Run, folder: Path) -> str | None:
    """Makes a run, which must end as was drawn.

    Args:
        engine: The demo's, with the run's LoRAs.
        run: What was drawn.
        folder: Where `write_loras` wrote.

    Returns:
        SHA-256 of the images' float32 values; None of a run without any.

    Raises:
        UnexpectedEnd: It ended in another way.
    """
    expected = ENDINGS[run.ending][1]
    try:
        digest = _attempt(engine, run, folder)
    except Exception as error:
        if expected is None or not isinstance(error, expected):
            raise UnexpectedEnd(f"{run} ended with {error!r}") from error
        return None
    if expected is not None:
        raise UnexpectedEnd(f"{run} ended without {expected.__name__}")
    return digest


def _attempt(engine: Engine, run: Run, folder: Path) -> str:
    drawn = random.Random(run.seed)  # noqa: S311 - nothing secret
    call: dict[str, Any] = {
        "prompt": drawn.choices(DEMO_PROMPTS, k=run.images),
        "height": run.size[0],
        "width": run.size[1],
        "num_inference_steps": SIZES[run.size],
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "patch_policy": POLICIES[run.policy],
        "step_cache": CACHES[run.cache],
        "generator": torch.Generator().manual_seed(run.seed),
        "output_type": "np",
    }
    if run.guided:
        call |= {"negative_prompt": DEMO_PROMPTS[: run.images], "true_cfg_scale": 2.0}
        call["guidance_interval"] = (0.0, 0.5)
    if run.called_back:
        raising = run.at if run.ending == "callback raises" else -1
        call["callback_on_step_end"] = lambda _, step, *__: _raise_if(step == raising)
    if run.ending == "arguments refused":
        height, width = run.size
        noise = torch.full((run.images, height // 8 * (width // 8), 16), torch.nan)
        wrong = drawn.choice(REFUSED)
        call |= wrong or {"latents": noise}
    if run.ending == "LoRA refused":
        engine.load_lora(str(folder / f"{drawn.choice(UNFIT)}.safetensors"))
    images = engine(**call, watch=_watch(engine, run)).images
    return hashlib.sha256(images.tobytes()).hexdigest()


def _watch(engine: Engine, run: Run) -> RunWatch:
    """What ends the run, if it is that."""
    if run.ending == "stopped by its watch":
        asked = count()
        return RunWatch(stopped=lambda: next(asked) >= run.at)
    if run.ending == "cancelled by a thread":
        return RunWatch(stepped=lambda view: _cancel(engine) if view.step == run.at else None)
    if run.ending == "watch raises":
        return RunWatch(stepped=lambda view: _raise_if(view.step == run.at))
    return UNWATCHED


def _cancel(engine: Engine) -> None:
    thread = threading.Thread(target=engine.cancel)
    thread.start()
    thread.join()


def _raise_if(here: bool) -> None:
    if here:
        raise InterruptedError("as was drawn")


def spots(runs: Sequence[Run], number: int, seed: int) -> list[Run]:
    """Runs to make again, as many with LoRAs that act as without."""
    drawn = random.Random(seed)  # noqa: S311 - nothing secret
    done = [run for run in runs if run.ending == "done"]
    styled = [run for run in done if any(run.loras.values())]
    plain = [run for run in done if not any(run.loras.values())]
    return drawn.sample(styled, number // 2) + drawn.sample(plain, number - number // 2)
