"""Stage `classifier`: train the attribute classifier on drawn images, degraded at random."""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ddit_rt.lab.demo.classifier import AttributeClassifier
from demo_training.data import draw
from demo_training.kind import Kind
from demo_training.settings import Settings
from demo_training.text import attribute_loss

_TEST, _BATCH = 512, 48
_SAMPLES_A_STEP = 6


def train_classifier(kind: Kind, settings: Settings) -> None:
    """Train, write the weights, print the accuracy on undegraded images."""
    steps = settings.count(kind.classifier_steps)
    torch.manual_seed(settings.seed)
    train, test = settings.count(_SAMPLES_A_STEP * kind.classifier_steps), settings.count(_TEST)
    cache = settings.work / "classifier_images.pt"
    images, labels = draw(kind, settings, (128, 128), train + test, settings.seed + 7, cache)
    classifier = AttributeClassifier(kind.attribute_sizes).to(settings.device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="classifier", mininterval=5):
        rows = torch.randint(train, (_BATCH,))
        scores = classifier(_degrade(images[rows].to(settings.device).float().div(255)))
        loss = attribute_loss(scores, labels[rows].to(settings.device), kind.attribute_sizes)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            tqdm.write(f"classifier: step {step} loss {loss.item():.4f}")
    folder = settings.work if settings.quick else kind.classifier.parent
    weights = {name: one.half().cpu() for name, one in classifier.state_dict().items()}
    save_file(weights, folder / kind.classifier.name)
    with torch.no_grad():
        scores = classifier.eval()(images[train:].to(settings.device).float().div(255)).cpu()
    parts = scores.split(list(kind.attribute_sizes.values()), dim=1)
    for place, (name, part) in enumerate(zip(kind.attribute_sizes, parts, strict=True)):
        right = part.argmax(1) == labels[train:, place]
        tqdm.write(f"classifier: {name} {right.float().mean():.1%} of {len(right)} drawn images")


def _degrade(x: Tensor) -> Tensor:
    """Blur a batch (as a 64 or 32 px image would be) and add noise, at random."""
    choice = int(torch.randint(4, ()))
    if choice:
        factor = 4 if choice == 1 else 2
        x = F.interpolate(F.avg_pool2d(x, factor), scale_factor=factor, mode="bilinear")
    return x + 0.06 * float(torch.rand(())) * torch.randn_like(x)
