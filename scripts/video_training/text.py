"""Stage `text`: a tokenizer over the caption words and a small UMT5 encoder.

The encoder learns to name the attributes of a caption from the mean of its tokens, which forces
word order in: 'a red circle .. on blue dots' is not 'a blue circle .. on red dots'.
"""

import torch
import torch.nn.functional as F
from demo_training.settings import Settings, load_checkpoint, save_checkpoint
from demo_training.text import build_pieces
from tqdm import tqdm
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from ddit_rt.lab.demo.videos import (
    COLOURS,
    DIRECTIONS,
    GROUND_COLOURS,
    GROUNDS,
    SHAPES,
    VIDEO_ATTRIBUTE_SIZES,
    all_video_attributes,
)

MAX_SEQUENCE_LENGTH = 16
WIDTH = 64
_OTHER_WORDS = ("a", "an", "on", "moving", "moves", "and", "the")
_BATCH = 128


def build_tokenizer() -> T5TokenizerFast:
    """Unigram pieces: the caption words, then single printable ASCII characters."""
    words = dict.fromkeys(
        (*SHAPES, *COLOURS, *DIRECTIONS, *GROUNDS, *GROUND_COLOURS, *_OTHER_WORDS)
    )
    return T5TokenizerFast(vocab=build_pieces(list(words)), extra_ids=0, model_max_length=512)


def build_encoder(tokenizer: T5TokenizerFast) -> UMT5EncoderModel:
    """The untrained encoder."""
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=16,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config)


def train_text(settings: Settings, steps: int = 600) -> None:
    """Train the encoder to name the attributes; a minute on a CPU."""
    path = settings.work / "text.pt"
    if path.exists():
        tqdm.write(f"text: {path} exists, kept")
        return
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer()
    encoder = build_encoder(tokenizer)
    head = torch.nn.Linear(WIDTH, sum(VIDEO_ATTRIBUTE_SIZES.values()))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    everything = all_video_attributes()
    tokens = tokenizer(
        [attributes.caption for attributes in everything],
        padding="max_length",
        max_length=MAX_SEQUENCE_LENGTH,
        return_tensors="pt",
    )
    labels = torch.tensor([attributes.labels for attributes in everything])
    for step in range(steps):
        rows = torch.randint(len(everything), (_BATCH,))
        mask = tokens.attention_mask[rows]
        states = encoder(tokens.input_ids[rows], mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        loss = _attribute_loss(head(mean), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            tqdm.write(f"text: step {step} loss {loss.item():.4f}")
    save_checkpoint(path, {"encoder": encoder.state_dict()})


def load_text(settings: Settings) -> tuple[T5TokenizerFast, UMT5EncoderModel]:
    """Tokenizer and trained encoder."""
    state = load_checkpoint(settings.work / "text.pt", "cpu")
    if state is None:
        raise ValueError(f"no text encoder in {settings.work}; run the stage 'text' first")
    tokenizer = build_tokenizer()
    encoder = build_encoder(tokenizer)
    encoder.load_state_dict(state["encoder"])
    return tokenizer, encoder.eval()


def _attribute_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy of the attributes, whose scores lie one after another."""
    parts = torch.split(scores, list(VIDEO_ATTRIBUTE_SIZES.values()), dim=1)
    losses = [F.cross_entropy(part, labels[:, i]) for i, part in enumerate(parts)]
    return torch.stack(losses).sum()
