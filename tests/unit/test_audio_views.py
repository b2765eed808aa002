"""Time shift, noise, SpecAugment and log-mel: keyed views of audio."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from logitcache.data.transforms import build_transform, describe_transform, normalise_spec
from logitcache.data.views import ViewDataset, ViewPlan
from logitcache.errors import UsageError

RATE = 16_000
SHIFT, NOISE, MEL = {"time_shift": {"fraction": 0.2}}, {"white_noise": {"snr_db": [5, 20]}}, "log_mel"
MASKS = {"spec_augment": {"bands": 2, "band_width": 10, "spans": 1, "span_width": 15}}


class Tones:
    """Clips of one second, each a tone."""

    in_memory = True
    targets = np.arange(3)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.sin(torch.arange(RATE) * 2 * torch.pi * 220 * (index + 1) / RATE), index


def views_of(spec: Any, seed: int = 7) -> ViewDataset:
    return ViewDataset(Tones(), ViewPlan(transform=build_transform(normalise_spec(spec)), seed=seed))


@pytest.mark.parametrize("spec", [[SHIFT], [NOISE], [MEL, MASKS], [SHIFT, NOISE, MEL, MASKS]], ids=str)
def test_a_view_is_a_pure_function_of_seed_view_and_sample(spec: Any) -> None:
    views, others = views_of(spec), views_of(spec)
    first = [views[(view, sample)][1] for view in range(2) for sample in range(3)]

    np.random.seed(1)
    again = [others[(view, sample)][1] for view in reversed(range(2)) for sample in reversed(range(3))]

    for one, other in zip(first, again[::-1], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first[0], first[3])
    assert not torch.equal(first[0], views_of(spec, seed=8)[(0, 0)][1])


def test_a_shift_moves_the_clip_and_leaves_silence() -> None:
    clip, _ = Tones()[0]
    shifts = set()
    for view in range(8):
        shifted = views_of([SHIFT])[(view, 0)][1]
        moved = [shift for shift in range(-3200, 3201) if shift_matches(clip, shifted, shift)]
        assert 1 == len(moved)
        shifts.add(moved[0])

    assert min(shifts) < 0 < max(shifts)


def shift_matches(clip: Tensor, shifted: Tensor, shift: int) -> bool:
    kept = len(clip) - abs(shift)
    return (
        torch.equal(shifted[max(shift, 0) :][:kept], clip[max(-shift, 0) :][:kept])
        and shifted.count_nonzero() >= kept - 2 * 220  # a tone of 220 Hz crosses zero so often
        and not shifted[: max(shift, 0)].any()
        and not shifted[kept + max(shift, 0) :].any()
    )


def test_noise_has_the_ratio_that_was_drawn() -> None:
    clip, _ = Tones()[0]
    noisy = views_of([{"white_noise": {"snr_db": [20, 20]}}])[(0, 0)][1]

    found = 10 * torch.log10(clip.square().mean() / (noisy - clip).square().mean())

    assert abs(float(found) - 20) < 4 * 10 / np.log(10) * (2 / RATE) ** 0.5  # the variance of a sample variance


def test_silence_stays_silent() -> None:
    transform = build_transform([NOISE])

    assert not transform(torch.zeros(100)).any()


def test_masks_cover_bands_and_spans_and_nothing_else() -> None:
    spectrogram = torch.arange(80 * 100, dtype=torch.float32).reshape(1, 80, 100) + 0.25  # no value is the mean
    transform = build_transform([MASKS])
    for seed in range(20):
        np.random.seed(seed)
        masked = transform(spectrogram)[0] == spectrogram.mean()
        bands, spans = masked.all(dim=1), masked.all(dim=0)
        assert int(bands.sum()) <= 20
        assert int(spans.sum()) <= 15
        assert torch.equal(masked, bands[:, None] | spans[None, :])


def test_log_mel_is_that_of_whisper() -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("needs transformers")
    from transformers import WhisperFeatureExtractor

    clip = Tones()[1][0] + torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32))
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1)

    expected = extractor(clip.numpy(), sampling_rate=RATE, return_tensors="pt").input_features

    torch.testing.assert_close(build_transform(normalise_spec(MEL))(clip), expected, rtol=0, atol=1e-4)


def test_a_spectrogram_is_not_transformed_again() -> None:
    clip, _ = Tones()[0]

    assert torch.equal(build_transform([{MEL: {}}])(clip), build_transform([{MEL: {}}, {MEL: {}}])(clip))


def test_the_identity_of_audio_views_is_their_parameters() -> None:
    spec = normalise_spec([SHIFT, MEL, MASKS])

    assert [{**SHIFT}, {"log_mel": {}}, {**MASKS}] == describe_transform(build_transform(spec))


@pytest.mark.parametrize(
    ("spec", "value", "message"),
    [
        (
            [SHIFT],
            torch.zeros(2, 9),
            r"time_shift expects a mono clip, float32 \(samples,\), not torch.float32 \(2, 9\)",
        ),
        ([MEL], "text", "log_mel expects a mono clip, .* not a str"),
        ([MEL], torch.zeros(200), "log_mel needs more than 200 samples, and the clip has 200"),
        ([MASKS], torch.zeros(9), "spec_augment expects a spectrogram, .* not torch.float32 .*put log_mel before it"),
    ],
    ids=["stereo", "text", "short", "no spectrogram"],
)
def test_other_inputs_are_refused(spec: Any, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_transform(normalise_spec(spec))(value)


@pytest.mark.parametrize(
    "step",
    [
        {"time_shift": {"fraction": 1.0}},
        {"white_noise": {"snr_db": [30, 10]}},
        {"white_noise": {"snr_db": [float("nan"), 10]}},
        {"spec_augment": {"bands": -1}},
        {"spec_augment": {"band_width": 0.5}},
        {"log_mel": {"n_fft": 100}},
        {"log_mel": {"n_mels": 0}},
    ],
    ids=str,
)
def test_impossible_parameters_are_refused(step: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        build_transform([step])
