"""Stage `adopt`, of a model that begins as another one, and the export of what is its own."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file
from tqdm import tqdm

from ddit_rt.lab.demo import model_path
from demo_training.kind import Kind
from demo_training.settings import Settings, finished, save_checkpoint

WEIGHTS = "transformer.safetensors"


def adopt_parts(kind: Kind, settings: Settings) -> None:
    """Take the embedded model's autoencoder and text encoders for those of the stages before."""
    pipeline = FluxPipeline.from_pretrained(model_path(), transformer=None)
    vae = pipeline.vae
    statistics = {name: vae.config[name] for name in ("shift_factor", "scaling_factor")}
    save_checkpoint(settings.work / "vae.pt", {"vae": vae.state_dict(), "statistics": statistics})
    encoders = [pipeline.text_encoder.state_dict(), pipeline.text_encoder_2.state_dict()]
    save_checkpoint(settings.work / "text.pt", {"encoders": encoders})
    tqdm.write(f"adopt: {kind.name} takes the image model's autoencoder and text encoders")


def export_weights(kind: Kind, settings: Settings) -> None:
    """Write the averaged weights of the transformer alone, as float16."""
    state = finished(settings, "transformer", "cpu")
    weights = {name: value.half().contiguous() for name, value in state["average"].items()}
    settings.export.mkdir(parents=True, exist_ok=True)
    path = settings.export / WEIGHTS
    save_file(weights, path, metadata=_metadata(state, settings))
    minutes, size = state["spent"] / 60, path.stat().st_size
    tqdm.write(
        f"export: {kind.name}, {path}, {size / 1e6:.2f} MB, {state['step']} steps in "
        f"{minutes:.0f} min"
    )


def _metadata(state: dict[str, Any], settings: Settings) -> dict[str, str]:
    return {
        "steps": str(state["step"]),
        "minutes": f"{state['spent'] / 60:.1f}",
        "seed": str(settings.seed),
        "torch": str(torch.__version__),
    }


def study_path() -> Path:
    """Where the repository keeps the study model's weights."""
    return Path(__file__).resolve().parents[2] / "benchmarks" / "study"
