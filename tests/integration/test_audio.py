"""Clips in folders, their keyed views, a cache, and students of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import logitcache
from logitcache.config.build import resolve_data
from logitcache.config.schema import Pipeline, parse_pipeline
from logitcache.data.views import ViewDataset
from logitcache.stages.run import run_pipeline
from logitcache.verify.audit import verify
from tests.unit.test_audio import write_wav

RATE = 8000


def tones(root: Path) -> None:
    """Two pitches, eight clips for training and four for the test of each."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name, pitch in (("low", 300), ("high", 1200)):
            for number in range(count):
                times = np.arange(int(RATE * (0.1 + 0.05 * generator.random()))) / RATE
                clip = 0.5 * np.sin(2 * np.pi * pitch * (1 + 0.1 * generator.random()) * times)
                write_wav(root / split / name / f"{number}.wav", clip, rate=RATE)


def pipeline_of(root: Path, transform: Any) -> Pipeline:
    raw = {
        "name": "tones",
        "data": {"name": "audio_folder", "root": str(root / "clips"), "args": {"sample_rate": RATE, "seconds": 0.15}},
        "views": {"count": 2, "transform": transform},
        "teacher": {"model": "cnn", "args": {"widths": [4]}, "weights": "trained", "train": {"epochs": 4}},
        "cache": {"path": str(root / "tones.cache"), "encoding": {"name": "dense", "dtype": "float32"}},
        "train": {"epochs": 2, "batch_size": 8, "lr": 0.05},
        "students": [{"name": "small", "model": "cnn", "args": {"widths": [2]}}],
        "runs": {"path": str(root / "runs")},
        "num_workers": 0,
        "threads": 1,
    }
    for model in (raw["teacher"], *raw["students"]):  # type: ignore[misc]
        model["input"] = [{"log_mel": {"sample_rate": RATE, "n_mels": 20, "n_fft": 200, "hop_length": 80}}]  # type: ignore[index]
    return parse_pipeline(raw, source="tones")


def test_students_train_on_cached_views_of_clips(tmp_path: Path) -> None:
    tones(tmp_path / "clips")
    pipeline = pipeline_of(tmp_path, [{"time_shift": {"fraction": 0.2}}, {"white_noise": {"snr_db": [10, 30]}}])

    rows = run_pipeline(pipeline)

    assert 1 == len(rows)
    assert rows[0].accuracy_mean is not None
    cache = logitcache.open(tmp_path / "tones.cache")
    data = resolve_data(pipeline, trust=False)
    views = ViewDataset(data.train, cache.view_plan)
    assert (1, 20, 15) == tuple(views[(1, 0)][1].shape)
    for view in range(2):
        cache.verify_inputs(views, view)
    assert [] == verify(pipeline.cache.path, deep=True)
    assert torch.isfinite(cache.view(1).logits(torch.arange(16))).all()


def test_clean_views_of_clips_are_the_clips(tmp_path: Path) -> None:
    tones(tmp_path / "clips")
    pipeline = pipeline_of(tmp_path, "clean").model_copy(update={"students": []})

    run_pipeline(pipeline)

    cache = logitcache.open(tmp_path / "tones.cache")
    views = ViewDataset(resolve_data(pipeline, trust=False).train, cache.view_plan)
    assert torch.equal(views[(0, 3)][1], views[(1, 3)][1])
