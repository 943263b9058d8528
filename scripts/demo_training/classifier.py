"""Stage `classifier`: train the attribute classifier on drawn pictures, degraded at random."""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from ddit_rt.lab.demo.classifier import AttributeClassifier, weights_path
from ddit_rt.lab.demo.images import ATTRIBUTE_SIZES
from demo_training.draw_images import ImageConfig
from demo_training.picture_data import draw_set
from demo_training.settings import Settings
from demo_training.text import attribute_loss

_TRAIN, _TEST, _BATCH = 4096, 512, 48


def train_classifier(settings: Settings, steps: int) -> None:
    """Train, write the weights beside the module, print the accuracy on undegraded pictures."""
    torch.manual_seed(settings.seed)
    data = draw_set(
        ImageConfig(),
        _TRAIN + _TEST,
        seed=settings.seed + 7,
        workers=settings.workers,
        cache=settings.work / "pictures_classifier.pt",
    )
    classifier = AttributeClassifier().to(settings.device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="classifier", mininterval=5):
        rows = torch.randint(_TRAIN, (_BATCH,))
        x = data.pictures[rows].to(settings.device).float().div(255)
        loss = attribute_loss(classifier(_degrade(x)), data.labels[rows].to(settings.device))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            tqdm.write(f"classifier: step {step} loss {loss.item():.4f}")
    weights = {name: tensor.half().cpu() for name, tensor in classifier.state_dict().items()}
    save_file(weights, weights_path())
    _test(classifier, data.pictures[_TRAIN:], data.labels[_TRAIN:], settings)


def _degrade(x: torch.Tensor) -> torch.Tensor:
    """Blur a batch (as a 64 or 32 px picture would be) and add noise, at random."""
    choice = int(torch.randint(4, ()))
    if choice:
        factor = 4 if choice == 1 else 2
        x = F.interpolate(F.avg_pool2d(x, factor), scale_factor=factor, mode="bilinear")
    return x + 0.06 * float(torch.rand(())) * torch.randn_like(x)


def _test(
    classifier: AttributeClassifier,
    pictures: torch.Tensor,
    labels: torch.Tensor,
    settings: Settings,
) -> None:
    classifier.eval()
    with torch.no_grad():
        x = pictures.to(settings.device).float().div(255)
        parts = classifier(x).cpu().split(list(ATTRIBUTE_SIZES.values()), dim=1)
    for i, (name, part) in enumerate(zip(ATTRIBUTE_SIZES, parts, strict=True)):
        accuracy = (part.argmax(1) == labels[:, i]).float().mean().item()
        tqdm.write(f"classifier: {name} {accuracy:.1%} of {len(labels)} drawn pictures")
