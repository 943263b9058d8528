"""The measure of sound: closed forms, and numpy's own Fourier transform beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ddit_rt.lab.measure.measures import (
    IMAGE,
    SOUND,
    VIDEO,
    measure_of,
    signal_to_noise,
    stft_similarity,
)
from ddit_rt.lab.measure.sound_file import as_pcm, read_wav, wav_bytes
from ddit_rt.models import family_named

Sound = npt.NDArray[np.int16]


def sound(seed: int = 0, channels: int = 2, samples: int = 4000) -> Sound:
    drawn = np.random.default_rng(seed).integers(-9000, 9000, (channels, samples))
    return (drawn // 2 * 2).astype(np.int16)


def test_equal_recordings_are_as_similar_as_can_be() -> None:
    found = SOUND.compare([sound(), sound(1)], [sound(), sound(1)])
    assert found == ((1.0, 1.0), (None, None))


def test_half_as_loud_is_half_as_similar_and_a_turned_phase_is_not_heard() -> None:
    whole = sound()
    half = (whole // 2).astype(np.int16)
    assert stft_similarity(half, whole) == pytest.approx(0.5, abs=1e-4)
    assert signal_to_noise(half, whole) == pytest.approx(20 * np.log10(2), abs=1e-3)
    assert stft_similarity(-whole, whole) == pytest.approx(1, abs=1e-6)
    assert signal_to_noise(-whole, whole) == pytest.approx(-20 * np.log10(2), abs=1e-3)


@pytest.mark.parametrize("samples", [1, 300, 4000])
def test_spectrograms_are_numpys(samples: int) -> None:
    """Also of recordings shorter than a window."""
    ours, theirs = sound(0, 1, samples), sound(1, 1, samples)
    expected = []
    for size, hop, width in ((512, 50, 240), (1024, 120, 600), (2048, 240, 1200)):
        left = (size - width) // 2
        hann = np.zeros(size)
        hann[left : left + width] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)

        def magnitudes(one: Sound, size: int = size, hop: int = hop, hann: object = hann) -> object:
            padded = np.pad(one[0].astype(float), size // 2)
            starts = range(0, len(one[0]) + 1, hop)
            return np.array([abs(np.fft.rfft(padded[at : at + size] * hann)) for at in starts])

        reference = magnitudes(theirs)
        expected.append(np.linalg.norm(magnitudes(ours) - reference) / np.linalg.norm(reference))
    assert stft_similarity(ours, theirs) == pytest.approx(1 - np.mean(expected), rel=1e-4)


def test_a_silent_reference_has_a_finite_similarity() -> None:
    silent = np.zeros((1, 3000), dtype=np.int16)
    assert stft_similarity(silent, silent) == 1
    assert np.isfinite(stft_similarity(sound(channels=1, samples=3000), silent))
    ratio = signal_to_noise(sound(channels=1, samples=3000), silent)
    assert ratio is not None
    assert ratio < -90


def test_what_a_family_makes_says_by_what_it_is_compared() -> None:
    named = {"flux": IMAGE, "wan": VIDEO, "longcat-audio": SOUND, "ltx2": VIDEO}
    assert {name: measure_of(family_named(name)) for name in named} == named


def test_a_wav_file_keeps_every_sample(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav_bytes(sound(), 800))
    np.testing.assert_array_equal(read_wav(tmp_path / "a.wav"), sound())
    np.testing.assert_array_equal(as_pcm([[0.0, 1.0, -2.0]]), [[0, 32767, -32767]])
