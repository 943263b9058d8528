"""The shipped pipeline: loads with diffusers, is small, draws what its captions say."""

from pathlib import Path

import pytest
import torch
from demo_training.draw_images import ImageConfig, draw_series
from diffusers import FluxPipeline

from ddit_rt.lab.demo import adapters_path, model_path, video_model_path
from ddit_rt.lab.demo.classifier import (
    attribute_hits,
    image_features,
    load_classifier,
    weights_path,
)
from ddit_rt.lab.demo.images import parse_caption
from ddit_rt.lab.demo.prompts import MAX_SEQUENCE_LENGTH, held_out_prompts
from ddit_rt.lab.measure.statistics import frechet_distance, gaussian


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    loaded = FluxPipeline.from_pretrained(model_path())
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize(
    ("folder", "most"),
    [(model_path(), 12e6), (video_model_path(), 6e6), (adapters_path(), 3e6)],
)
def test_files_stay_small(folder: Path, most: float) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert 0 < sum(file.stat().st_size for file in files) <= most
    assert weights_path().stat().st_size <= 300e3


def test_classifier_reads_drawn_images() -> None:
    images, drawn = draw_series(ImageConfig(), seed=99, start=0, count=48)
    hits = attribute_hits(load_classifier(), torch.from_numpy(images) / 255, drawn)
    assert all(hit.float().mean() >= 0.95 for hit in hits.values())


def test_distance_of_features_grows_with_blur() -> None:
    drawn, _ = draw_series(ImageConfig(), seed=99, start=0, count=72)
    images = torch.from_numpy(drawn) / 255
    gaussians = []
    for width in (1, 3, 7, 15):
        blurred = torch.nn.functional.avg_pool2d(images, width, stride=1, padding=width // 2)
        features = image_features(load_classifier(), blurred)
        assert features.shape == (72, 64)
        gaussians.append(gaussian(features.double().numpy()))
    found = [frechet_distance(*gaussians[0], *other) for other in gaussians]
    # 64 eigenvalues of order 1, in double.
    assert found[0] < 1e-10
    assert found == sorted(found)
    assert found[-1] > 10 * found[1]


def test_classifier_names_both_counts_when_they_differ() -> None:
    with pytest.raises(ValueError, match="got 2 images and 1 expectations"):
        attribute_hits(
            load_classifier(), torch.zeros(2, 3, 128, 128), [parse_caption(held_out_prompts(1)[0])]
        )


def test_text_encoders_tell_which_word_has_which_colour(pipeline: FluxPipeline) -> None:
    prompts = ["a red circle on plain blue", "a blue circle on plain red", "snow: 雪 & 42"]
    sequence, pooled, _ = pipeline.encode_prompt(
        prompts, None, max_sequence_length=MAX_SEQUENCE_LENGTH
    )
    assert sequence.shape[:2] == (3, MAX_SEQUENCE_LENGTH)
    for embedding in (sequence.flatten(1), pooled):
        gap = (embedding[0] - embedding[1]).norm() / embedding[0].norm()
        assert gap > 0.1


def test_latents_have_mean_zero_and_deviation_one(pipeline: FluxPipeline) -> None:
    images, _ = draw_series(ImageConfig(), seed=98, start=0, count=16)
    x = torch.from_numpy(images).float() / 127.5 - 1
    with torch.no_grad():
        z = pipeline.vae.encode(x).latent_dist.mean
    z = (z - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    # 16 images are a small sample of colours: the mean of a colour axis has an error near .15.
    assert abs(z.mean()) < 0.2
    assert abs(z.std() - 1) < 0.2


@pytest.mark.slow
def test_samples_show_their_captions(pipeline: FluxPipeline) -> None:
    prompts = held_out_prompts(24)
    images = pipeline(
        prompts,
        height=128,
        width=128,
        num_inference_steps=24,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        generator=torch.Generator().manual_seed(11),
        output_type="pt",
    ).images
    hits = attribute_hits(load_classifier(), images, [parse_caption(p) for p in prompts])
    shares = {name: hit.float().mean().item() for name, hit in hits.items()}
    assert min(shares.values()) >= 0.9, shares
