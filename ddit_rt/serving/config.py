"""What an operator sets of a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddit_rt import checks


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The most that one request may ask for.

    Attributes:
        prompt: Most characters of a prompt, and of a negative prompt.
        pixels: Most pixels of an image, or of a video's frame.
        n: Most images.
        steps: Most denoising steps.
        frames: Most frames of a video.
        body: Most bytes of a request's body, uploads among them.
        upload_pixels: Most pixels of an uploaded image.
    """

    prompt: int = 4000
    pixels: int = 2048 * 2048
    n: int = 8
    steps: int = 100
    frames: int = 241
    body: int = 32 * 2**20
    upload_pixels: int = 16 * 2**20

    def __post_init__(self) -> None:
        for name in self.__slots__:
            checks.settle(self, **{name: checks.whole(name, getattr(self, name), 1)})


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Settings of a server.

    Attributes:
        model: The model's name in the interface.
        keys: API keys, one of which a request must carry; none is asked for where it is empty.
        max_queue: Number of images that may wait; a request beyond it is refused with 429.
        batch_window_ms: How long from its arrival an image waits for others to share its run;
            one that nobody else's request is about does not.
        max_batch: Most images of a run; 1 turns batching off.
        deadline_seconds: Time from a request's arrival to its answer; beyond it the answer is 503.
        limits: The most that one request may ask for.
        call: Arguments of every call of the pipeline, such as `max_sequence_length`.
        lora_dir: Folder with the style LoRAs that requests may name; None: there are none.
        lora_bytes: Bytes of LoRAs that stay loaded, for the next request with one of them.
        embedding_bytes: Bytes of prompt embeddings that are kept.
        warmup_steps: Steps of the run before the server is ready; None: the pipeline's default;
            0: no such run.
        fps: Frames per second of a video.
        video_bytes: Bytes of videos that are kept for download; the oldest make room.
    """

    model: str
    keys: tuple[str, ...] = ()
    max_queue: int = 64
    batch_window_ms: float = 5.0
    max_batch: int = 4
    deadline_seconds: float = 300.0
    limits: Limits = field(default_factory=Limits)
    call: Mapping[str, Any] = field(default_factory=dict)
    lora_dir: Path | None = None
    lora_bytes: int = 4 * 2**30
    embedding_bytes: int = 256 * 2**20
    warmup_steps: int | None = None
    fps: int = 16
    video_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_batch", "fps"):
            checks.whole(name, getattr(self, name), 1)
        for name in ("lora_bytes", "embedding_bytes", "video_bytes"):
            checks.whole(name, getattr(self, name), 0)
        for name in ("batch_window_ms", "deadline_seconds"):
            checks.number(name, getattr(self, name), 0)
        checks.optional(checks.whole, "warmup_steps", self.warmup_steps, 0)
        if self.lora_dir is not None and not self.lora_dir.is_dir():
            raise ValueError(f"no such folder: {self.lora_dir}; lora_dir holds style LoRAs")


def read_keys(path: Path) -> tuple[str, ...]:
    """API keys of a file, one a line.

    Raises:
        OSError, ValueError: No such file, or none with a key; a key is visible ASCII.
    """
    keys = tuple(checks.text_lines(path))
    if not keys:
        raise ValueError(f"{path} holds no key; write one a line, or leave --api-key-file out")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise ValueError(f"{path} holds a key that no header can carry; keys are visible ASCII")
    return keys
