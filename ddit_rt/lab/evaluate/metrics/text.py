"""How well an image shows its prompt: CLIP score, ImageReward."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from ddit_rt.lab.evaluate.metrics.base import Case, ImageMetric, as_tensor
from ddit_rt.lab.evaluate.metrics.fidelity import TORCHMETRICS

CLIP_MODEL = "openai/clip-vit-large-patch14"


class _Embeddings:
    """A CLIPModel as torchmetrics knows it: its feature methods return tensors.

    Since transformers 5 they return outputs with the tensor inside.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.config = model.config

    def to(self, device: Any) -> _Embeddings:
        self._model.to(device)
        return self

    def get_image_features(self, *args: Any) -> torch.Tensor:
        return self._tensor(self._model.get_image_features(*args))

    def get_text_features(self, *args: Any) -> torch.Tensor:
        return self._tensor(self._model.get_text_features(*args))

    @staticmethod
    def _tensor(output: Any) -> torch.Tensor:
        features = output if isinstance(output, torch.Tensor) else output.pooler_output
        assert isinstance(features, torch.Tensor)
        return features


class ClipScore(ImageMetric):
    """CLIP score (Hessel et al., 2021): 100 max(cos, 0) of image and prompt, by torchmetrics."""

    higher_is_better, needs_reference, name = True, False, "clip"
    packages: ClassVar = TORCHMETRICS
    hint = "--clip-model names a folder or another model"

    def __init__(self, model: str = CLIP_MODEL, device: str = "cpu") -> None:
        """A folder or Hub name of a CLIPModel with its processor, and the device to run on."""
        self.label = f"CLIP score ({Path(model).name})"
        self._name = model
        self._device = device

    @property
    def key(self) -> str:
        """See `Metric.key`."""
        return f"{self.name}:{self._name}"

    @cached_property
    def network(self) -> Any:
        """See `Metric.network`: the model and its processor."""
        from transformers import CLIPModel, CLIPProcessor

        classes = (CLIPModel, CLIPProcessor)
        try:  # the cache first: without a network, asking the Hub takes a minute to fail
            parts = [c.from_pretrained(self._name, local_files_only=True) for c in classes]
        except OSError:
            parts = [c.from_pretrained(self._name) for c in classes]
        return _Embeddings(parts[0].eval()), _Truncating(parts[1])

    def score(self, case: Case) -> float | None:
        """See `ImageMetric.score`. Prompts are cut to the tokens that the model reads."""
        from torchmetrics.functional.multimodal import clip_score

        image = as_tensor(case.image, self._device)[0]
        with torch.no_grad():
            return float(clip_score(image, case.prompt, lambda: self.network))


class _Truncating:
    """A CLIPProcessor that cuts long prompts, which torchmetrics would otherwise warn of each."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, **arguments: Any) -> Any:
        if "text" in arguments:
            arguments["truncation"] = True
        return self._processor(**arguments)


class ImageReward(ImageMetric):
    """ImageReward (Xu et al., 2023), by the authors' package."""

    name, label = "image_reward", "ImageReward"
    higher_is_better, needs_reference = True, False
    packages: ClassVar = {
        "ImageReward": "pip install image-reward",
        "torchvision": "pip install torchvision, the build that fits this torch",
    }
    hint = "--weights names a folder with its weights"

    def __init__(self, device: str = "cpu", weights: Path | None = None) -> None:
        """The device to run on, and a folder with its weights if not the package's own cache."""
        self._device = device
        self._weights = weights

    @cached_property
    def network(self) -> Any:
        """See `Metric.network`."""
        import ImageReward as Library

        folder = None if self._weights is None else str(self._weights)
        return Library.load("ImageReward-v1.0", device=self._device, download_root=folder)

    def score(self, case: Case) -> float | None:
        """See `ImageMetric.score`."""
        with torch.no_grad():
            return float(self.network.score(case.prompt, [Image.fromarray(case.image)]))
