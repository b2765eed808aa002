"""The dataset `audio_folder`."""

from __future__ import annotations

import sys
import wave
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from logitcache.catalog.audio import AudioReader
from logitcache.catalog.datasets import Data, load_data
from logitcache.data.samples import load_sample, sample_table
from logitcache.errors import DatasetUnavailable, UsageError
from tests.needs import need_package


def write_wav(path: Path, samples: np.ndarray, *, width: int = 2, rate: int = 8000) -> None:
    """Samples (T,) or (T, channels) in [-1, 1) as PCM."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.round(samples * 2.0 ** (8 * width - 1)).astype("<i8")
    values = values if samples.ndim == 2 else values[:, None]
    data = (values + 128).astype("u1") if width == 1 else values.view("u1").reshape(*values.shape, 8)[..., :width]
    with wave.open(str(path), "wb") as file:
        file.setparams((values.shape[1], width, rate, 0, "NONE", "not compressed"))
        file.writeframes(np.ascontiguousarray(data).tobytes())


@pytest.fixture
def words(tmp_path: Path) -> Path:
    for number, (split, name) in enumerate([("train", "no"), ("train", "yes"), ("val", "no"), ("val", "yes")]):
        write_wav(tmp_path / split / name / "a.wav", np.full(8 + number, number / 8))
    return tmp_path


def load(root: Path, **args: object) -> Data:
    return load_data("audio_folder", root=root, args={"sample_rate": 8000, **args})


def test_splits_classes_keys_and_contents_are_those_of_the_folders(words: Path) -> None:
    data = load(words)
    clip, target = data.train[1]

    assert (["no", "yes"], 2, None) == (data.class_names, data.num_classes, data.test)
    assert ["no/a.wav", "yes/a.wav"] == list(sample_table(data.train).keys or [])
    assert 1 == target
    assert torch.equal(torch.full((9,), 0.125), clip)
    assert (words / "train/yes/a.wav").read_bytes() == data.train.content(1)  # type: ignore[attr-defined]
    assert data.validation is not None
    assert 2 == len(data.validation)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_pcm_of_any_width_is_read(tmp_path: Path, width: int) -> None:
    samples = np.array([0.0, 0.5, -1.0, 0.25, -0.125])
    write_wav(tmp_path / "a.wav", samples, width=width)

    assert samples.tolist() == AudioReader(sample_rate=8000)(tmp_path / "a.wav").tolist()


def test_channels_are_averaged_and_lengths_made_equal(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.array([[0.5, 0.0], [0.25, 0.25]]))

    assert [0.25, 0.25, 0.0] == AudioReader(sample_rate=8000, num_samples=3)(tmp_path / "a.wav").tolist()
    assert [0.25] == AudioReader(sample_rate=8000, num_samples=1)(tmp_path / "a.wav").tolist()


def test_another_sample_rate_is_refused_without_torchaudio(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)

    with pytest.raises(UsageError, match=r"a\.wav has a sample rate of 8000 Hz; expected 16000 Hz.*sample_rate=8000"):
        load_sample(load(words, sample_rate=16_000).train, 0)


def test_torchaudio_resamples(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functional = ModuleType("torchaudio.functional")
    functional.resample = lambda clip, rate, new: clip.repeat_interleave(new // rate)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchaudio", ModuleType("torchaudio"))
    monkeypatch.setitem(sys.modules, "torchaudio.functional", functional)

    assert 16 == len(load_sample(load(words, sample_rate=16_000).train, 0)[0])


def test_damaged_files_are_named(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = words / "train/no/a.wav"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(UsageError, match=r"a\.wav is cut off: it has 13 of 16 bytes"):
        load_sample(load(words).train, 0)

    write_wav(path, np.zeros((0, 1)))
    with pytest.raises(UsageError, match=r"a\.wav has no samples"):
        load_sample(load(words).train, 0)

    path.write_bytes(b"text")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UsageError, match=r"a\.wav can't be read without soundfile"):
        load_sample(load(words).train, 0)


def test_other_formats_are_read_by_soundfile(tmp_path: Path) -> None:
    need_package("soundfile", "audio")
    import soundfile

    samples = np.array([0.0, 0.5, -0.25], dtype=np.float32)
    soundfile.write(tmp_path / "a.flac", samples, 8000)
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    (tmp_path / "b.ogg").write_bytes(b"text")

    reader = AudioReader(sample_rate=8000)
    assert samples.tolist() == reader(tmp_path / "a.flac").tolist() == reader(tmp_path / "a.wav").tolist()
    with pytest.raises(UsageError, match=r"b\.ogg is not an audio file"):
        reader(tmp_path / "b.ogg")


def test_missing_folders_and_classes_are_named(words: Path) -> None:
    with pytest.raises(DatasetUnavailable, match=r"audio_folder: the folder .* does not exist; .*train/CLASS/CLIP"):
        load(words / "nowhere")
    (words / "train/maybe").mkdir()
    with pytest.raises(DatasetUnavailable, match=r"audio_folder: .*maybe.*expected .*/CLASS/FILE"):
        load(words)


@pytest.mark.parametrize("args", [{"sample_rate": 0}, {"seconds": 0}, {"speed": 2}], ids=str)
def test_impossible_options_are_refused(words: Path, args: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="sample_rate is 0|seconds is too short|no parameter 'speed'"):
        load(words, **args)
