"""What is public is deliberate, and old names work for one more release."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms import v2

import logitcache
from logitcache.cache.labelview import View
from tests.models import Pictures

SAMPLES, CLASSES = 8, 5

PUBLIC = {
    "LogitCache": """check_batch check_has_logits check_plan contents digest encoding encoding_of extra_outputs has_logits id input_digests kl_mean
        layout logits manifest num_classes num_samples num_views outputs pin prefetch read_blocks read_encoded
        receipts records row_map row_offsets rows samples sealed storage stored_bytes target_bytes verify_inputs view
        view_bytes view_plan view_plan_with
        views window_blocks num_rows""",
    "View": "logits num_classes num_rows number output targets",
    "ViewDataset": """at_hand batch blocks_of check_view collate dataset finish index_of input_digests num_samples on_device plan
        preprocess proofs row rows set_view take_digests""",
    "ViewPlan": """check_view collate contents datasets describe extend_limit limit_views mixes mixes_samples mixing mixture
        num_classes
        num_samples preprocess renderer rows seed transform views""",
    "ViewSampler": "load_state_dict set_epoch state_dict view",
    "CacheWriter": """close committed_blocks encoding flush has_logits is_committed layout manifest missing_blocks outputs row_map seal storage
        write write_sparse""",
}
OLD = {
    "LogitCache": "objects trust others label_bytes check_inputs",
    "ViewDataset": "model_input",
    "ViewPlan": "model_input",
}


def write(path: Path) -> logitcache.CacheWriter:
    return logitcache.create(path, num_samples=SAMPLES, num_classes=CLASSES, teacher="net", dataset="pictures")


@pytest.fixture
def cache(tmp_path: Path) -> logitcache.LogitCache:
    with write(tmp_path / "a") as writer:
        writer.write(view=0, start=0, logits=torch.randn(SAMPLES, CLASSES))
    return logitcache.open(tmp_path / "a")


@pytest.mark.parametrize("name", PUBLIC)
def test_only_deliberate_attributes_are_public(name: str, cache: logitcache.LogitCache, tmp_path: Path) -> None:
    views = logitcache.ViewDataset(Pictures(), logitcache.ViewPlan())
    instances: dict[str, Any] = {
        "LogitCache": cache,
        "View": cache.view(0),
        "ViewDataset": views,
        "ViewPlan": views.plan,
        "ViewSampler": logitcache.ViewSampler(views),
        "CacheWriter": write(tmp_path / "b"),
    }
    inherited = set(dir(torch.utils.data.Dataset)) | set(dir(torch.utils.data.Sampler))
    public = {each for each in dir(instances[name]) if not each.startswith("_")} - inherited

    assert set(PUBLIC[name].split()) == public - set(OLD.get(name, "").split())
    assert isinstance(instances["View"], View)


def renamed(name: str) -> Any:
    return pytest.warns(DeprecationWarning, match=rf"`{name}` is removed in the next release")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("others", lambda cache: cache.others, lambda cache: cache.extra_outputs),
        ("label_bytes", lambda cache: cache.label_bytes, lambda cache: cache.target_bytes),
        ("check_inputs", lambda cache: cache.check_inputs, lambda cache: cache.verify_inputs),
        ("objects", lambda cache: cache.objects, lambda cache: cache._objects),
        ("trust", lambda cache: cache.trust, lambda cache: cache._trust),
    ],
)
def test_old_attributes_of_a_cache_work_with_a_warning(
    cache: logitcache.LogitCache, name: str, old: Callable[[Any], Any], new: Callable[[Any], Any]
) -> None:
    with renamed(f"LogitCache.{name}") as warned:
        assert new(cache) == old(cache)
    assert [__file__] == [warning.filename for warning in warned]


def test_the_old_name_of_preprocessing_works_with_a_warning() -> None:
    resize: Any = v2.Resize(4)
    with renamed(r"ViewPlan\(model_input=\)"):
        plan = logitcache.ViewPlan(model_input=resize)  # type: ignore[call-arg]
    with renamed(r"ViewDataset\(model_input=\)"):
        views = logitcache.ViewDataset(Pictures(), plan, model_input=resize)  # type: ignore[call-arg]
    with renamed("ViewPlan.model_input"):
        assert resize is plan.preprocess is plan.model_input
    with renamed("ViewDataset.model_input"):
        assert resize is views.preprocess is views.model_input
    with pytest.raises(TypeError, match="unexpected keyword argument 'model_inptu'"):
        logitcache.ViewPlan(model_inptu=resize)  # type: ignore[call-arg]
