"""Who acts on a run of the engine: callbacks, other threads, a model that breaks."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from models import latents_of, seeded, tiny_embeds
from torch import Tensor

from ddit_rt import Engine, FinePolicy
from ddit_rt.errors import RunCancelled

FINE = FinePolicy()


def test_callback_sees_what_the_pipeline_shows(engine: Engine, pipeline: FluxPipeline) -> None:
    def record(log: list[Any]) -> Any:
        def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
            log.append((step, float(timestep), tensors["latents"].clone(), pipe.num_timesteps))
            tensors["latents"] = tensors["latents"] * 0.5 if step == 1 else tensors["latents"]
            return tensors

        return callback

    ours: list[Any] = []
    theirs: list[Any] = []
    call = {**tiny_embeds(), "num_inference_steps": 4, "height": 64, "width": 64}
    call["output_type"] = "latent"
    final = engine(**call, generator=seeded(), patch_policy=FINE, callback_on_step_end=record(ours))
    expected = pipeline(**call, generator=seeded(), callback_on_step_end=record(theirs))
    assert len(ours) == len(theirs) == 4
    for mine, yours in zip(ours, theirs, strict=True):
        assert (mine[0], mine[1], mine[3]) == (yours[0], yours[1], yours[3])
        torch.testing.assert_close(mine[2], yours[2], rtol=0, atol=1e-4)
    torch.testing.assert_close(latents_of(final), latents_of(expected), rtol=0, atol=1e-4)


def test_cancel_from_another_thread_ends_the_run(engine: Engine) -> None:
    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        if step == 2:
            thread = threading.Thread(target=engine.cancel)
            thread.start()
            thread.join()
        return tensors

    with pytest.raises(RunCancelled, match="after 3 of 8 steps"):
        engine(**tiny_embeds(), num_inference_steps=8, callback_on_step_end=callback)
    engine(**tiny_embeds(), num_inference_steps=2)
    assert engine.last_trace is not None
    assert len(engine.last_trace) == 2


def test_threads_queue_and_get_their_own_results(engine: Engine) -> None:
    call = {**tiny_embeds(), "num_inference_steps": 5, "output_type": "latent"}
    alone = [latents_of(engine(**call, generator=seeded(seed))) for seed in range(3)]
    together: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        together[seed] = latents_of(engine(**call, generator=seeded(seed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, expected in enumerate(alone):
        assert torch.equal(together[seed], expected)
