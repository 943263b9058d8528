"""Stages `export` and `evaluate`: what becomes of a model."""

import re
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddit_rt.sources import load_pipeline
from demo_training.data import build_pipeline
from demo_training.kind import Kind
from demo_training.settings import Settings, finished, save_grid

_CARD = "MODEL_CARD.md"


def export(kind: Kind, settings: Settings) -> None:
    """Write the pipeline with the averaged weights.

    The larger networks are float16. `from_pretrained` loads all of them as float32; rounding to
    float16 moves a weight by at most 1 / 2048 of itself.
    """
    state, path = finished(settings, "transformer", "cpu"), settings.export
    transformer = kind.build_transformer()
    transformer.load_state_dict(state["average"])
    pipeline = build_pipeline(kind, settings, transformer)
    for name in kind.half:
        getattr(pipeline, name).to(torch.float16, memory_format=torch.contiguous_format)
    pipeline.save_pretrained(path)
    # As the published pipelines name it; transformers 5 knows both names, version 4 this one only.
    index = path / "model_index.json"
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    card = path / _CARD
    if not card.exists():
        card.write_text((kind.folder / _CARD).read_text(encoding="utf-8"))
    minutes = state["spent"] / 60
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    tqdm.write(f"export: {path}, {size / 1e6:.2f} MB, {state['step']} steps in {minutes:.0f} min")


def evaluate_pipeline(kind: Kind, settings: Settings, steps: int) -> None:
    """Measure how often the exported model shows what a caption says, and note it in its card.

    Drawn samples come first: they show the limit of the measure itself.
    """
    pipeline = load_pipeline(str(settings.export), device=settings.device)
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for side in kind.evaluated:
        for name, every in kind.expected().items():
            expected = every[: settings.count(len(every))]
            tqdm.write(f"{name}, drawn: {_cells(kind, kind.drawn(expected), expected)}")
            parts, noise = [], kind.noise(settings.seed)
            for start in range(0, len(expected), kind.batch):
                prompts = [one.caption for one in expected[start : start + kind.batch]]
                samples = kind.sample(pipeline, prompts, side, steps, noise(start))
                parts.append(samples.float().cpu())
            made = torch.cat(parts)
            rows.append(f"| {side} px | {len(expected)} {name} | {_cells(kind, made, expected)} |")
            tqdm.write(rows[-1])
            grid = settings.work / "grids" / f"evaluate_{name.replace(' ', '_')}_{side}.png"
            save_grid(grid, torch.cat([one[:32] for one in kind.frames(made)]))
    names = list(kind.hits(kind.drawn(expected[:2]), expected[:2]))
    write_card(settings.export / _CARD, ["side", "captions", *names], rows)


def _cells(kind: Kind, samples: Tensor, expected: list[object]) -> str:
    hits = kind.hits(samples, expected).values()
    return " | ".join(f"{hit.float().mean().item():.1%}".replace("100.0%", "100%") for hit in hits)


def write_card(card: Path, columns: list[str], rows: list[str]) -> None:
    """Replace the table under the heading `Measured` of a model card.

    Raises:
        ValueError: The card has no such table.
    """
    text = card.read_text(encoding="utf-8")
    table = re.compile(r"(## Measured\n(?:[^|#]*\n)*?)(?:\|.*\n)+")
    titles = " | ".join(column.replace("_", " ") for column in columns)
    lines = [f"| {titles} |", "|" + "---|" * len(columns), *rows]
    replaced, count = table.subn(lambda found: found[1] + "\n".join(lines) + "\n", text)
    if count != 1:
        raise ValueError(f"{card} has no table under the heading Measured, for what was measured")
    card.write_text(replaced, encoding="utf-8")
