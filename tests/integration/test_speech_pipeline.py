"""The script that fetches the clips of `spoken_words_whisper.yaml`; what it would download is made here."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from logitcache.catalog.models import model_fingerprint
from pipelines import spoken_words_whisper as words
from tests.unit.test_audio import write_wav


def test_training_and_test_voices_are_different_and_cover_every_word(tmp_path: Path) -> None:
    recorded = list(words.recordings(tmp_path / "sounds", tmp_path / "letters"))

    assert 47 == len(words.WORDS)
    assert set(words.WORDS) == {word for word, _, _ in recorded}
    assert 21 + 26 * 3 - 1 == len(recorded) == len({file for _, _, file in recorded})
    assert not set(words.VOICES["train"]) & set(words.VOICES["val"])


def test_a_clip_is_trimmed_band_limited_and_as_loud_as_all_others() -> None:
    times = np.arange(22_050) / 22_050
    tone = 0.1 * np.sin(2 * np.pi * 500 * times) + 0.05 * np.sin(2 * np.pi * 6000 * times)

    clip = words.prepared(np.concatenate([np.zeros(9000), tone, np.zeros(9000)]), 22_050)

    assert not clip[: round(words.SILENCE * words.RATE)].any()
    assert abs(len(clip) - (1 + words.SILENCE) * words.RATE) < 0.02 * words.RATE
    assert 0.5 == np.abs(clip).max()
    spectrum = np.abs(np.fft.rfft(clip[words.RATE // 4 :][: words.RATE // 2]))  # in steps of 2 Hz
    assert 250 == spectrum.argmax()
    assert spectrum[2000:].max() < 0.01 * spectrum.max()


def test_clips_are_written_in_one_folder_per_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **options: Any) -> None:
        commands.append(command)
        file = command[command.index("-o" if "flite" in command[0] else "-w") + 1]
        write_wav(Path(file), np.sin(np.arange(1000)), rate=8000)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(words.shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    monkeypatch.setattr(words, "VOICES", {"train": words.FLITE[:1], "val": words.ESPEAK[:1]})
    monkeypatch.setattr(words, "WORDS", {"number-one": "one", "letter-w": "double you"})
    monkeypatch.setattr(words, "unpacked", lambda packages, folder: folder)
    monkeypatch.setattr(words, "read", lambda file: (np.sin(np.arange(1000)), 8000))
    monkeypatch.setattr(words, "recordings", lambda sounds, letters: [("number-one", "somebody", tmp_path / "1.gsm")])

    words.clips(tmp_path / "clips")

    written = sorted(path.relative_to(tmp_path / "clips").as_posix() for path in (tmp_path / "clips").rglob("*.wav"))
    assert [
        "test/number-one/somebody.wav",
        "train/letter-w/flite-00.wav",
        "train/number-one/flite-00.wav",
        "val/letter-w/espeak-ng-00.wav",
        "val/number-one/espeak-ng-00.wav",
    ] == written
    assert "double you" == commands[-1][-1]


def test_only_the_head_of_an_encoder_is_trained_and_its_file_identifies_it() -> None:
    def encode(mel: torch.Tensor) -> torch.Tensor:
        return mel.transpose(1, 2)[:, ::2, :4]

    model = words.EncodedWords(encode, b"\1" * 32, 4, 3)
    other = words.EncodedWords(encode, b"\2" * 32, 4, 3)
    other.head.load_state_dict(model.head.state_dict())

    assert (2, 3) == tuple(model(torch.rand(2, 1, 8, 20)).shape)
    assert ["head.weight", "head.bias"] == [name for name, _ in model.named_parameters()]
    assert model_fingerprint(model, name="whisper") != model_fingerprint(other, name="whisper")


def test_whisper_is_read_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Whisper:
        n_mels = 80

        def __init__(self, path: str, **options: Any) -> None:
            self.path = path

        def encode(self, features: np.ndarray, to_cpu: bool) -> np.ndarray:
            return np.zeros((len(features), features.shape[2] // 2, 384), dtype=np.float32)

    fake = SimpleNamespace(
        models=SimpleNamespace(Whisper=Whisper), StorageView=SimpleNamespace(from_array=lambda array: array)
    )
    monkeypatch.setitem(__import__("sys").modules, "ctranslate2", fake)
    (tmp_path / "model.bin").write_bytes(b"weights")

    model = words.whisper(47, path=str(tmp_path))

    assert (2, 47) == tuple(model(torch.zeros(2, 1, 80, 128)).shape)
