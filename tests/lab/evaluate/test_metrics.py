"""Every metric against an independent computation, and every refusal.

LPIPS, FID and ImageReward need torchvision, which has no build for a CPU torch: where it is missing
their refusal is tested, where it is there the real thing. The Frechet distance behind FID is tested
here on other features.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from extras import need
from text_encoders import clip_words
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from ddit_rt.lab.demo.classifier import load_classifier
from ddit_rt.lab.evaluate.metrics import (
    Case,
    ClipScore,
    DemoFrechetDistance,
    Fid,
    ImageReward,
    Lpips,
    Psnr,
    Ssim,
    all_metrics,
    usable,
    weights_folder,
)
from ddit_rt.lab.measure.timing import Pixels


def image(seed: int, side: int = 24, scale: int = 256) -> Pixels:
    rng = np.random.default_rng(seed)
    return rng.integers(scale, size=(side, side, 3), dtype=np.uint8)


def case(one: Pixels, other: Pixels, prompt: str = "a cat") -> Case:
    return Case(prompt=prompt, image=one, reference=other)


def reference_ssim(one: Pixels, other: Pixels) -> float:
    """Wang et al. (2004), equation 13: 11 x 11 Gaussian windows of 1.5, mirrored at the edge."""
    place = np.arange(11) - 5
    line = np.exp(-(place**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for channel in range(3):
        x, y = (np.pad(p[..., channel] / 255, 5, mode="reflect") for p in (one, other))
        for row in range(x.shape[0] - 10):
            for column in range(x.shape[1] - 10):
                cut = np.s_[row : row + 11, column : column + 11]
                a, b = x[cut], y[cut]
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * a * a).sum() - ma**2, (window * b * b).sum() - mb**2
                cov = (window * a * b).sum() - ma * mb
                c1, c2 = 0.01**2, 0.03**2
                top = (2 * ma * mb + c1) * (2 * cov + c2)
                values.append(top / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(values))


def test_ssim_is_its_formula() -> None:
    need("torchmetrics")
    one = image(0)
    other = np.clip(one.astype(int) + np.random.default_rng(1).integers(-40, 41, one.shape), 0, 255)
    other = other.astype(np.uint8)
    # Single precision of a difference of squares.
    assert Ssim().score(case(one, other)) == pytest.approx(reference_ssim(one, other), abs=2e-4)
    assert Ssim().score(case(one, one)) == pytest.approx(1)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIPModel with its processor, as `save_pretrained` writes them."""
    words = clip_words()
    text = {
        "vocab_size": len(words),
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "max_position_embeddings": 16,
    }
    vision = {"image_size": 32, "patch_size": 8}
    for config in (text, vision):
        config |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        config["num_attention_heads"] = 2
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    words.model_max_length = 16
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    CLIPProcessor(image_processor=images, tokenizer=words).save_pretrained(folder)
    return folder


def reference_clip(folder: Path, shown: Pixels, prompt: str) -> float:
    """100 max(cos, 0), from the model's own image-text similarity."""
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=[prompt], images=[shown], return_tensors="pt", truncation=True)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    return max(0.0, 100 * float(logits))


@pytest.mark.parametrize("prompt", ["a red cat", "a blue dog on a red square, and more of it"])
def test_clip_score_is_the_models_cosine(clip_folder: Path, prompt: str) -> None:
    need("torchmetrics")
    metric = ClipScore(str(clip_folder))
    assert metric.unavailable() is None
    scores = [metric.score(case(image(s, 32), image(9, 32), prompt)) for s in range(4)]
    wanted = [reference_clip(clip_folder, image(s, 32), prompt) for s in range(4)]
    # Resized by the same code: rounding of single precision is all that is left.
    assert scores == pytest.approx(wanted, abs=1e-3)
    assert len({round(score or 0, 3) for score in scores}) > 1
    assert metric.key != ClipScore("a/c").key


def test_clip_score_without_weights_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    need("torchmetrics")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reason = ClipScore("no-such/clip-model").unavailable()
    assert reason is not None
    assert "OSError" in reason
    assert reason.endswith("--clip-model names a folder or another model")


def reference_frechet(one: Any, other: Any) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), roots by eigenvalues."""
    mean = one.mean(0) - other.mean(0)
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = vectors @ np.diag(np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = np.clip(np.linalg.eigvalsh(root @ second @ root), 0, None)
    return float(mean @ mean + np.trace(first + second) - 2 * np.sqrt(inner).sum())


def classifier_features(images: list[Pixels]) -> Any:
    batch = torch.tensor(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return load_classifier().features(batch).mean((2, 3)).double().numpy()


def test_demo_distance_is_frechets_on_the_classifiers_features() -> None:
    need("torchmetrics")
    references = [image(s, 64) for s in range(8)]
    dark = [image(s, 64, scale=128) for s in range(20, 26)]
    metric = DemoFrechetDistance()
    assert metric.unavailable() is None
    found = metric.distances({"dark": dark, "same": references}, references)
    wanted = reference_frechet(classifier_features(dark), classifier_features(references))
    # Rank-deficient covariances: square roots of eigenvalues that are rounding.
    assert found["dark"] == pytest.approx(wanted, rel=1e-3)
    assert found["same"] == pytest.approx(0, abs=1e-3 * wanted)
    assert "demo_frechet" not in [metric.name for metric in all_metrics()]
    assert metric.label in [metric.label for metric in all_metrics(demo=True)]
    # A second call starts from nothing.
    assert metric.distances({"dark": dark}, references)["dark"] == pytest.approx(found["dark"])


@pytest.mark.parametrize(
    ("metric", "module", "install"),
    [
        (Lpips(), "torchvision", "pip install torchvision"),
        (Fid(), "torch_fidelity", "pip install torch-fidelity"),
        (ImageReward(), "ImageReward", "pip install image-reward"),
    ],
)
def test_missing_package_is_named_with_its_remedy(metric: Any, module: str, install: str) -> None:
    if find_spec(module) is not None:
        pytest.skip(f"{module} is installed here")
    reason = metric.unavailable()
    assert reason.startswith("not installed: ")
    assert module in reason
    assert install in reason


@pytest.mark.parametrize("metric", [Lpips(), Fid()])
def test_real_network_gives_zero_for_equal_images(metric: Any) -> None:
    if reason := metric.unavailable():
        pytest.skip(reason)
    images = [image(s, 64) for s in range(4)]
    if isinstance(metric, Lpips):
        assert metric.score(case(images[0], images[0])) == pytest.approx(0, abs=1e-6)
        assert metric.score(case(images[0], images[1])) > 0.01
    else:
        found = metric.distances({"same": images, "dark": [p // 2 for p in images]}, images)
        assert found["same"] == pytest.approx(0, abs=1e-2)
        assert found["dark"] > 1


def test_image_reward_passes_prompt_image_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrapper alone, on a stand-in: the package needs torchvision and 1.8 GB of weights."""
    calls: dict[str, Any] = {}

    class Model:
        def score(self, prompt: str, images: list[Any]) -> float:
            return float(len(prompt) + np.asarray(images[0]).sum())

    def load(name: str, **options: Any) -> Model:
        calls.update(options, name=name)
        return Model()

    module = ModuleType("ImageReward")
    module.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ImageReward", module)
    shown = image(0)
    metric = ImageReward("cpu", tmp_path)
    assert metric.score(case(shown, image(1), "a fox")) == 5 + shown.sum(dtype=int)
    wanted = {"name": "ImageReward-v1.0", "device": "cpu", "download_root": str(tmp_path)}
    assert calls == wanted


def test_failing_library_is_skipped_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    need("torchmetrics")

    def fail(_: Any) -> None:
        raise RuntimeError("weights are " + "very " * 200 + "broken")

    monkeypatch.setattr(Ssim, "load", fail)
    can, cannot = usable([Psnr(), Ssim()])
    assert [metric.name for metric in can] == ["psnr"]
    assert cannot[0].name == "ssim"
    assert cannot[0].reason.startswith("RuntimeError: weights are very")
    assert len(cannot[0].reason) < 400


def test_weights_folder_is_where_torch_hub_looks(tmp_path: Path) -> None:
    before = torch.hub.get_dir()
    with weights_folder(tmp_path):
        assert torch.hub.get_dir() == str(tmp_path)
    assert torch.hub.get_dir() == before
    with pytest.raises(ValueError, match="there is no folder"), weights_folder(tmp_path / "none"):
        pass
