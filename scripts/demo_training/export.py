"""Stages `export` and `evaluate`: write the diffusers folder, measure what it draws."""

import time

import torch
from diffusers import FluxPipeline
from tqdm import tqdm

from ddit_rt.lab.demo import model_path
from ddit_rt.lab.demo.classifier import attribute_hits, load_classifier
from ddit_rt.lab.demo.images import Attributes, parse_caption
from ddit_rt.lab.demo.prompts import MAX_SEQUENCE_LENGTH, held_out_prompts
from demo_training.draw_images import random_attributes
from demo_training.latents import build_pipeline, build_transformer
from demo_training.settings import Settings, load_checkpoint, save_grid

_BATCH = 16


def export_pipeline(settings: Settings) -> None:
    """Write the averaged weights as a pipeline: networks in float16, text encoders in float32.

    `from_pretrained` loads all of them as float32; rounding to float16 moves a weight by
    at most 1 / 2048 of itself.
    """
    state = load_checkpoint(settings.work / "transformer.pt", "cpu")
    if state is None:
        raise ValueError(f"no transformer in {settings.work}; run the stage 'transformer' first")
    transformer = build_transformer()
    transformer.load_state_dict(state["average"])
    pipeline = build_pipeline(settings, transformer)
    pipeline.transformer.to(torch.float16)
    pipeline.vae.to(torch.float16, memory_format=torch.contiguous_format)
    pipeline.save_pretrained(model_path())
    # As FLUX.1-dev names it; transformers 5 knows both names, version 4 loads only this one here.
    index = model_path() / "model_index.json"
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    size = sum(file.stat().st_size for file in model_path().rglob("*") if file.is_file())
    tqdm.write(
        f"export: {model_path()}, {size / 1e6:.2f} MB, trained {state['spent'] / 60:.0f} min"
    )


def evaluate_pipeline(settings: Settings, count: int, steps: int) -> None:
    """Print the share of samples that show each attribute, per resolution and kind of caption."""
    pipeline = FluxPipeline.from_pretrained(model_path())
    pipeline.to(settings.device).set_progress_bar_config(disable=True)
    trained = [random_attributes(10_001, i) for i in range(count)]
    unseen = [parse_caption(caption) for caption in held_out_prompts(min(count, 49))]
    for side in (128, 64, 32):
        for kind, expected in (("trained", trained), ("held-out", unseen)):
            _evaluate(pipeline, expected, side, steps, settings, kind)


def _evaluate(
    pipeline: FluxPipeline,
    expected: list[Attributes],
    side: int,
    steps: int,
    settings: Settings,
    kind: str,
) -> None:
    generator = torch.Generator().manual_seed(20_000 + settings.seed)
    began, parts = time.perf_counter(), []
    for i in range(0, len(expected), _BATCH):
        images = pipeline(
            [attributes.caption for attributes in expected[i : i + _BATCH]],
            height=side,
            width=side,
            num_inference_steps=steps,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=generator,
            output_type="pt",
        ).images
        parts.append(images.float().cpu())
    pictures = torch.cat(parts)
    hits = attribute_hits(load_classifier(), pictures, expected)
    shares = ", ".join(f"{name} {hit.float().mean().item():.1%}" for name, hit in hits.items())
    seconds = time.perf_counter() - began
    tqdm.write(
        f"{side} px, {len(expected)} {kind} captions, {steps} steps: {shares} ({seconds:.0f} s)"
    )
    save_grid(settings.work / "grids" / f"evaluate_{kind}_{side}.png", pictures[:32])
