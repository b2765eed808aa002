"""Reads audio files as mono clips of one sample rate."""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from logitcache.errors import UsageError

# T samples of a clip, H channels

WAV = ".wav"
SUFFIXES = (WAV, ".flac", ".ogg", ".mp3")
_DTYPES = {1: "u1", 2: "<i2", 4: "<i4"}
"""Of PCM, by bytes per sample; three bytes are read as four."""


@dataclass(frozen=True, kw_only=True)
class AudioReader:
    """Reads a file, by its path or its bytes, as float32 (T,) in [-1, 1]: the mean of its channels.

    Raises:
        UsageError: invalid settings, or, when called, a file that can't be read or has another sample rate.
    """

    sample_rate: int
    """In Hz. Files with another rate are resampled by torchaudio, if it is installed."""
    num_samples: int | None = None
    """T: longer clips are cut off, shorter ones end with silence; None leaves their lengths."""

    def __post_init__(self) -> None:
        if self.sample_rate < 1:
            raise UsageError(f"sample_rate is {self.sample_rate}; expected a rate in Hz, such as 16000")
        if self.num_samples is not None and self.num_samples < 1:
            raise UsageError("seconds is too short: clips would have no samples")

    def __call__(self, file: str | Path | bytes) -> Tensor:
        path = "the audio file" if isinstance(file, bytes) else str(file)
        samples_TH, rate = _read(file, path)
        if not len(samples_TH):
            raise UsageError(f"{path} has no samples; remove it")
        clip_T = torch.from_numpy(samples_TH.mean(axis=1, dtype=np.float32))
        if rate != self.sample_rate:
            clip_T = _resampled(clip_T, rate, self.sample_rate, path)
        if self.num_samples is None:
            return clip_T
        clip_T = clip_T[: self.num_samples]
        return torch.nn.functional.pad(clip_T, (0, self.num_samples - len(clip_T)))


def _read(file: str | Path | bytes, path: str) -> tuple[np.ndarray, int]:
    """Samples float32 (T, H), and the sample rate."""

    def source() -> str | io.BytesIO:
        return io.BytesIO(file) if isinstance(file, bytes) else str(file)

    if file[:4] == b"RIFF" if isinstance(file, bytes) else Path(file).suffix.lower() == WAV:
        try:
            return _read_pcm(source(), path)
        except (wave.Error, EOFError) as error:
            reason = str(error) or "it ends too early"
    else:
        reason = f"only {WAV} files with PCM samples can be read without it"
    try:
        import soundfile
    except ImportError:
        raise UsageError(
            f"{path} can't be read without soundfile ({reason}): pip install 'logitcache[audio]'"
        ) from None
    try:
        samples_TH, rate = soundfile.read(source(), dtype="float32", always_2d=True)
    except RuntimeError as error:
        raise UsageError(f"{path} is not an audio file: {error}; remove or repair it") from error
    return samples_TH, int(rate)


def _read_pcm(source: str | io.BytesIO, path: str) -> tuple[np.ndarray, int]:
    with wave.open(source, "rb") as file:
        channels, width, rate, count = file.getparams()[:4]
        data = file.readframes(count)
    if len(data) != count * channels * width:
        raise UsageError(
            f"{path} is cut off: it has {len(data)} of {count * channels * width} bytes of samples; restore it"
        )
    if width == 3:
        data = np.insert(np.frombuffer(data, "u1").reshape(-1, 3), 0, 0, axis=1).tobytes()
        width = 4
    samples = np.frombuffer(data, _DTYPES[width]).astype(np.float64)
    if width == 1:
        samples -= 128
    return (samples / 2.0 ** (8 * width - 1)).astype(np.float32).reshape(-1, channels), rate


def _resampled(clip_T: Tensor, rate: int, sample_rate: int, path: str) -> Tensor:
    try:
        from torchaudio.functional import resample
    except ImportError:
        raise UsageError(
            f"{path} has a sample rate of {rate} Hz; expected {sample_rate} Hz. Set data.args.sample_rate={rate}, "
            "convert the file, or install torchaudio, which resamples it"
        ) from None
    resampled: Tensor = resample(clip_T, rate, sample_rate)
    return resampled
