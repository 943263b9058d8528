"""Recordings as WAV files of 16-bit PCM."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Pcm = npt.NDArray[np.int16]
"""A recording, `[channels, samples]`."""

_LARGEST = 2**15 - 1


def as_pcm(samples: Any) -> Pcm:
    """A recording in 16 bits.

    Args:
        samples: `[channels, samples]`, floating-point numbers in [-1, 1]; what lies beyond is cut.
    """
    clipped = np.clip(np.asarray(samples, dtype=np.float32), -1, 1)
    return (clipped * _LARGEST).astype(np.int16)


def wav_bytes(pcm: Pcm, rate: int) -> bytes:
    """A recording of `rate` samples a second as a file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(pcm))
        file.setsampwidth(pcm.itemsize)
        file.setframerate(rate)
        file.writeframes(pcm.T.astype("<i2").tobytes())
    return buffer.getvalue()


def read_wav(path: Path) -> Pcm:
    """The inverse of `wav_bytes`."""
    with wave.open(str(path), "rb") as file:
        frames = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
        return frames.reshape(-1, file.getnchannels()).T.astype(np.int16)
