"""Stage `text`: tokenizers over the caption words, and small CLIP and T5 encoders.

The encoders learn to name the four attributes from their output (CLIP's pooled vector, the mean of
T5's tokens), which forces word order in: 'red circle on blue dots' is not 'blue circle on red
dots'. FLUX gives all text tokens the same position, so only the encoders can tell the order.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ddit_rt.lab.demo.images import (
    ATTRIBUTE_SIZES,
    BACKGROUND_COLOURS,
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Attributes,
    all_attributes,
)
from demo_training.settings import Settings, load_checkpoint, save_checkpoint

MAX_SEQUENCE_LENGTH = 16
WIDTH = 64
_OTHER_WORDS = ("a", "an", "on", "with", "picture", "of", "background", "the", "and", "in", "front")
PHRASINGS = 4
_BATCH = 128


def phrase(attributes: Attributes, phrasing: int) -> str:
    """One of the ways (0 is the caption) in which training words the same attributes."""
    caption = attributes.caption
    subject, ground = caption.split(" on ")
    bare = subject.split(" ", 1)[1]
    return (
        caption,
        f"{bare} on {ground}",
        f"a picture of {subject} on a {ground} background",
        f"{ground} with {subject}",
    )[phrasing]


def _words() -> list[str]:
    known = (*SHAPES, *COLOURS, *BACKGROUNDS, *BACKGROUND_COLOURS, *_OTHER_WORDS)
    return list(dict.fromkeys(known))


def build_clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE whose merges spell the caption words; any other text falls apart to bytes."""
    letters = list(bytes_to_unicode().values())
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in _words():
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
                vocabulary.append(pieces[0] + pieces[1])
            pieces[:2] = [pieces[0] + pieces[1]]
    tokens = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    numbered = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=numbered, merges=merges, model_max_length=77)


def build_t5_tokenizer() -> T5TokenizerFast:
    """A tokenizer over the caption words."""
    return T5TokenizerFast(vocab=build_pieces(_words()), extra_ids=0, model_max_length=512)


def build_pieces(words: Sequence[str]) -> list[tuple[str, float]]:
    """Unigram pieces and their scores: the words, then single printable ASCII characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -8.0)]
    pieces += [(f"\u2581{word}", -2.0) for word in words]
    return [*pieces, *((chr(code), -10.0) for code in range(33, 127))]


def build_encoders(
    clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast
) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Untrained text encoders of the demo model."""
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.05,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=WIDTH,
        d_kv=16,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return CLIPTextModel(clip), T5EncoderModel(t5)


def train_text(settings: Settings, steps: int = 800) -> None:
    """Train both encoders to name the attributes; seconds on a CPU."""
    path = settings.work / "text.pt"
    if path.exists():
        tqdm.write(f"text: {path} exists, kept")
        return
    torch.manual_seed(settings.seed)
    tokenizers = build_clip_tokenizer(), build_t5_tokenizer()
    clip, t5 = build_encoders(*tokenizers)
    classes = sum(ATTRIBUTE_SIZES.values())
    heads = torch.nn.ModuleList([torch.nn.Linear(WIDTH, classes) for _ in range(2)])
    modules = torch.nn.ModuleList([clip, t5, heads])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    everything = all_attributes()
    for step in tqdm(range(steps), desc="text"):
        drawn = [everything[i] for i in torch.randint(len(everything), (_BATCH,)).tolist()]
        phrasings = torch.randint(2, (_BATCH,)) * torch.randint(PHRASINGS, (_BATCH,))
        captions = [phrase(a, i) for a, i in zip(drawn, phrasings.tolist(), strict=True)]
        ids = [
            tokenizer(captions, padding="max_length", max_length=n, return_tensors="pt").input_ids
            for tokenizer, n in zip(tokenizers, (77, MAX_SEQUENCE_LENGTH), strict=True)
        ]
        outputs = clip(ids[0]).pooler_output, t5(ids[1]).last_hidden_state.mean(1)
        labels = torch.tensor([a.labels for a in drawn])
        scores = [head(output) for head, output in zip(heads, outputs, strict=True)]
        loss = torch.stack([attribute_loss(score, labels) for score in scores]).sum()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            tqdm.write(f"text: step {step} loss {loss.item():.4f}")
    save_checkpoint(path, {"clip": clip.state_dict(), "t5": t5.state_dict()})


def load_text(
    settings: Settings,
) -> tuple[CLIPTokenizer, T5TokenizerFast, CLIPTextModel, T5EncoderModel]:
    """Tokenizers and trained encoders."""
    state = load_checkpoint(settings.work / "text.pt", "cpu")
    if state is None:
        raise ValueError(f"no text encoders in {settings.work}; run the stage 'text' first")
    tokenizers = build_clip_tokenizer(), build_t5_tokenizer()
    clip, t5 = build_encoders(*tokenizers)
    clip.load_state_dict(state["clip"])
    t5.load_state_dict(state["t5"])
    return *tokenizers, clip.eval(), t5.eval()


def attribute_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy of the attributes.

    Args:
        scores: ``[B, sum of class counts]``, one attribute after another.
        labels: ``[B, 4]`` class indices.
    """
    parts = torch.split(scores, list(ATTRIBUTE_SIZES.values()), dim=1)
    losses = [F.cross_entropy(part, labels[:, i]) for i, part in enumerate(parts)]
    return torch.stack(losses).sum()
