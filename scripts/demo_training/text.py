"""Stage `text`: tokenizers over the caption words, and small text encoders.

The encoders learn to name the attributes from their output, which forces word order in: 'red circle
on blue dots' is not 'blue circle on red dots'.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from demo_training.kind import WIDTH, Kind, TextEncoder
from demo_training.settings import Settings, finished, save_checkpoint

_BATCH = 128


def train_text(kind: Kind, settings: Settings) -> None:
    """Train the encoders to name the attributes; minutes on a CPU."""
    path, steps = settings.work / "text.pt", settings.count(kind.text_steps)
    if path.exists():
        tqdm.write(f"text: {path} exists, kept")
        return
    torch.manual_seed(settings.seed)
    encoders = kind.text_encoders()
    classes = sum(kind.attribute_sizes.values())
    heads = torch.nn.ModuleList([torch.nn.Linear(WIDTH, classes) for _ in encoders])
    modules = torch.nn.ModuleList([*(encoder.model for encoder in encoders), heads])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, kind.text_rate, total_steps=steps)
    for step in tqdm(range(steps), desc="text"):
        rows = torch.randint(len(kind.attributes), (_BATCH,)).tolist()
        drawn = [kind.attributes[row] for row in rows]
        phrasings = torch.randint(2, (_BATCH,)) * torch.randint(kind.phrasings, (_BATCH,))
        captions = [kind.phrase(a, n) for a, n in zip(drawn, phrasings.tolist(), strict=True)]
        labels = torch.tensor([attributes.labels for attributes in drawn])
        losses = [
            attribute_loss(head(_read(encoder, captions)), labels, kind.attribute_sizes)
            for encoder, head in zip(encoders, heads, strict=True)
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            tqdm.write(f"text: step {step} loss {loss.item():.4f}")
    save_checkpoint(path, {"encoders": [encoder.model.state_dict() for encoder in encoders]})


def _read(encoder: TextEncoder, captions: list[str]) -> Tensor:
    tokens = encoder.tokenizer(
        captions, padding="max_length", max_length=encoder.length, return_tensors="pt"
    )
    # FLUX gives its encoders no mask; Wan's reads the padding away, as its pipeline does.
    masked = type(encoder.model).__name__ == "UMT5EncoderModel"
    output = encoder.model(tokens.input_ids, *([tokens.attention_mask] if masked else []))
    return encoder.read(output, tokens.attention_mask)


def load_text(kind: Kind, settings: Settings) -> list[TextEncoder]:
    """The trained encoders."""
    states = finished(settings, "text", "cpu")["encoders"]
    encoders = kind.text_encoders()
    for encoder, state in zip(encoders, states, strict=True):
        encoder.model.load_state_dict(state)
        encoder.model.eval()
    return encoders


def attribute_loss(scores: Tensor, labels: Tensor, sizes: Mapping[str, int]) -> Tensor:
    """Summed cross entropy of the attributes.

    Args:
        scores: ``[B, sum of class counts]``, one attribute after another.
        labels: ``[B, attributes]`` class indices.
        sizes: Class counts.
    """
    parts = torch.split(scores, list(sizes.values()), dim=1)
    losses = [F.cross_entropy(part, labels[:, i]) for i, part in enumerate(parts)]
    return torch.stack(losses).sum()
