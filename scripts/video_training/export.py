"""Stage `export`: write the diffusers folder that the package ships."""

import torch
from demo_training.settings import Settings, load_checkpoint
from tqdm import tqdm

from ddit_rt.lab.demo import video_model_path
from video_training.latents import build_pipeline, build_transformer


def export_pipeline(settings: Settings) -> None:
    """Write the averaged weights as a pipeline, in float16.

    `from_pretrained` loads all of them as float32; rounding to float16 moves a weight by
    at most 1 / 2048 of itself.
    """
    state = load_checkpoint(settings.work / "transformer.pt", "cpu")
    if state is None:
        raise ValueError(f"no transformer in {settings.work}; run the stage 'transformer' first")
    transformer = build_transformer()
    transformer.load_state_dict(state["average"])
    pipeline = build_pipeline(settings, transformer)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        part.to(torch.float16)
    path = video_model_path()
    pipeline.save_pretrained(path)
    # As Wan2.1's folders name it; transformers 5 knows both names, version 4 loads only this one.
    index = path / "model_index.json"
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    tqdm.write(
        f"export: {path}, {size / 1e6:.2f} MB, {state['step']} steps, "
        f"{state['spent'] / 60:.0f} min of training"
    )
