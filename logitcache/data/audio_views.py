"""Random changes of audio, and its log-mel spectrogram, as steps of `views.transform` or of a model's `input`.

The random ones draw from the global NumPy generator, which `ViewDataset` seeds for each view and row, so a view of a
clip is a pure function of its samples, the view seed, the view and the row. They keep the length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.errors import UsageError

# T samples of a clip, M mel bands, F frames, K frequencies

DYNAMIC_RANGE = 8.0
"""Powers of ten that a log-mel spectrogram keeps below its maximum."""


class TimeShift:
    """Moves a clip in time by a random part of its length; the gap is silent.

    Args:
        fraction: the largest shift to either side, as a fraction of the length.
    """

    def __init__(self, *, fraction: float = 0.1) -> None:
        if not 0 <= fraction < 1:
            raise UsageError(f"fraction is {fraction}; expected at least 0 and below 1")
        self.fraction = fraction

    def __call__(self, value: Any) -> Tensor:
        clip_T = _clip("time_shift", value)
        shift = round((2 * np.random.random_sample() - 1) * self.fraction * len(clip_T))
        shifted_T = torch.zeros_like(clip_T)
        kept = len(clip_T) - abs(shift)
        shifted_T[max(shift, 0) :][:kept] = clip_T[max(-shift, 0) :][:kept]
        return shifted_T


class WhiteNoise:
    """Adds Gaussian noise at a random signal-to-noise ratio; a silent clip stays silent.

    Args:
        snr_db: the smallest and the largest ratio, in decibels.
    """

    def __init__(self, *, snr_db: Sequence[float] = (10.0, 30.0)) -> None:
        if len(snr_db) != 2 or not -np.inf < snr_db[0] <= snr_db[1] < np.inf:
            raise UsageError(f"snr_db is {list(snr_db)}; expected the smallest and the largest ratio, in decibels")
        self.snr_db = (float(snr_db[0]), float(snr_db[1]))

    def __call__(self, value: Any) -> Tensor:
        clip_T = _clip("white_noise", value)
        low, high = self.snr_db
        ratio = 10 ** ((low + (high - low) * np.random.random_sample()) / 20)
        noise_T = torch.from_numpy(np.random.standard_normal(len(clip_T)).astype(np.float32))
        return clip_T + noise_T * (clip_T.square().mean().sqrt() / ratio)


class SpecAugment:
    """Masks random bands and random spans of time of a spectrogram (Park et al. 2019, arXiv:1904.08779, section 2).

    Masked places get the mean of the spectrogram. There is no time warping.

    Args:
        bands: number of masked bands.
        band_width: most mel bands of each.
        spans: number of masked spans of time.
        span_width: most frames of each.
    """

    def __init__(self, *, bands: int = 1, band_width: int = 15, spans: int = 1, span_width: int = 20) -> None:
        settings = {"bands": bands, "band_width": band_width, "spans": spans, "span_width": span_width}
        for name, number in settings.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise UsageError(f"{name} is {number!r}; expected an integer of at least 0")
        self.bands = bands
        self.band_width = band_width
        self.spans = spans
        self.span_width = span_width

    def __call__(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
            raise UsageError(
                f"spec_augment expects a spectrogram, floats (…, mel bands, frames), not {_described(value)}; put "
                "log_mel before it"
            )
        masked = value.clone()
        mean = value.mean()
        for _ in range(self.bands):
            masked[..., _random_part(value.shape[-2], self.band_width), :] = mean
        for _ in range(self.spans):
            masked[..., _random_part(value.shape[-1], self.span_width)] = mean
        return masked


class LogMel:
    """The log-mel spectrogram of a clip, float32 (1, M, F), as Whisper computes it (Radford et al. 2022, section 2.2).

    Power of a short-time Fourier transform with a Hann window, mel bands of the Slaney scale, the logarithm to base 10,
    clamped to 8 below its maximum, plus 4, divided by 4. A spectrogram is returned unchanged, so that a model's `input`
    can have this step where only some views end with it.

    Args:
        sample_rate: of the clips, in Hz.
        n_mels: M.
        n_fft: samples of a window.
        hop_length: samples between two frames; F = T // hop_length.
    """

    def __init__(self, *, sample_rate: int = 16_000, n_mels: int = 80, n_fft: int = 400, hop_length: int = 160) -> None:
        for name, number in (("sample_rate", sample_rate), ("n_mels", n_mels), ("hop_length", hop_length)):
            if number < 1:
                raise UsageError(f"{name} is {number}; expected at least 1")
        if n_fft < 2 * hop_length:
            raise UsageError(f"n_fft is {n_fft}; expected at least {2 * hop_length}, twice the hop_length")
        self.sample_rate = sample_rate
        self.n_mels = n_mels
        self.n_fft = n_fft
        self.hop_length = hop_length

    def __call__(self, value: Any) -> Tensor:
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == (1, self.n_mels):
            return value
        clip_T = _clip("log_mel", value)
        if len(clip_T) <= self.n_fft // 2:
            raise UsageError(
                f"log_mel needs more than {self.n_fft // 2} samples, and the clip has {len(clip_T)}; remove it, or set "
                "data.args.seconds, which pads clips with silence"
            )
        window = torch.hann_window(self.n_fft)
        spectrum_KF = torch.stft(clip_T, self.n_fft, self.hop_length, window=window, return_complex=True)[:, :-1]
        mel_MF = mel_filters(self.sample_rate, self.n_fft, self.n_mels) @ spectrum_KF.abs().square()
        log_MF = mel_MF.clamp(min=1e-10).log10()
        log_MF = torch.maximum(log_MF, log_MF.max() - DYNAMIC_RANGE)
        return ((log_MF + 4.0) / 4.0)[None]


AUDIO_VIEWS = {"time_shift": TimeShift, "white_noise": WhiteNoise, "spec_augment": SpecAugment, "log_mel": LogMel}


@functools.lru_cache(maxsize=8)
def mel_filters(sample_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """Triangular filters of unit area on the Slaney mel scale, from 0 Hz to half the sample rate, float32 (M, K)."""
    frequencies_K = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    edges = _mel_to_hz(np.linspace(0, _hz_to_mel(sample_rate / 2), n_mels + 2))
    lower_M, centre_M, upper_M = (edges[start : start + n_mels, None] for start in range(3))
    rising_MK = (frequencies_K - lower_M) / (centre_M - lower_M)
    falling_MK = (upper_M - frequencies_K) / (upper_M - centre_M)
    filters_MK = np.maximum(0, np.minimum(rising_MK, falling_MK)) * 2 / (upper_M - lower_M)
    return torch.from_numpy(filters_MK.astype(np.float32))


_LINEAR_HZ, _LINEAR_MELS, _LOG_STEP = 1000.0, 15.0, np.log(6.4) / 27
"""The Slaney scale is linear up to 1000 Hz, which is 15 mels, and logarithmic above."""


def _hz_to_mel(frequency: float) -> float:
    if frequency <= _LINEAR_HZ:
        return frequency * _LINEAR_MELS / _LINEAR_HZ
    return float(_LINEAR_MELS + np.log(frequency / _LINEAR_HZ) / _LOG_STEP)


def _mel_to_hz(mels: np.ndarray) -> np.ndarray:
    linear = mels * _LINEAR_HZ / _LINEAR_MELS
    return np.where(mels <= _LINEAR_MELS, linear, _LINEAR_HZ * np.exp(_LOG_STEP * (mels - _LINEAR_MELS)))


def _random_part(length: int, most: int) -> slice:
    width = int(np.random.randint(min(most, length) + 1))
    start = int(np.random.randint(length - width + 1))
    return slice(start, start + width)


def _clip(name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.ndim != 1:
        raise UsageError(f"{name} expects a mono clip, float32 (samples,), not {_described(value)}")
    return value


def _described(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"a {type(value).__name__}"
