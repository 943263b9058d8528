"""Other threads beside a run of the engine."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from driving import trace_of
from models import latents_of, seeded, tiny_embeds
from torch import Tensor

from ddit_rt import Engine
from ddit_rt.errors import RunCancelled


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
    assert len(trace_of(engine)) == 2


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
