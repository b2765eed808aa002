"""Teachers over the same views, averaged; others refused; and a student of the mean."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import logitcache
from logitcache.config.build import resolve_data
from logitcache.config.schema import Pipeline
from logitcache.data.views import ViewDataset
from logitcache.digest import json_digest
from logitcache.errors import CorruptCache, IdentityMismatch, IncompleteCache, InvalidLogits, UsageError
from logitcache.extras.merge import calibration_sample, mean_of_logits, mean_of_probabilities, merge
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import train_students
from logitcache.stages.verify_match import verify_match
from logitcache.verify.audit import verify
from logitcache.verify.repair import repair
from tests.commands import logitcache as run
from tests.conftest import PICTURES
from tests.integration.test_fit import never

Make = Callable[..., Pipeline]
VIEWS, SAMPLES, CLASSES = 2, 100, 12
FLOAT32 = logitcache.Dense(dtype="float32")


def some_logits(seed: int, num_views: int = VIEWS) -> Tensor:
    return torch.randn(num_views, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(seed)) * 4


def built(path: Path, seed: int, *, logits: Tensor | None = None, inputs: Tensor | None = None, **changes: Any) -> str:
    """A cache of one teacher; the path as text."""
    settings: dict[str, Any] = {
        "num_samples": SAMPLES,
        "num_classes": CLASSES,
        "num_views": VIEWS,
        "rows_per_block": 32,
    }
    settings |= {"encoding": FLOAT32, "teacher": f"net@{seed}", "dataset": "pictures"} | changes
    logits = some_logits(seed, settings["num_views"]) if logits is None else logits
    settings.setdefault("calibration", logits.flatten(0, 1))
    with logitcache.create(path, **settings) as writer:
        for view in range(settings["num_views"]):
            writer.write(view=view, start=0, logits=logits[view], inputs=inputs)
    return str(path)


def read_all(path: str | Path) -> Tensor:
    cache = logitcache.open(path)
    return torch.stack([cache.view(view).logits(range(cache.num_samples)) for view in range(cache.num_views)])


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """Caches of three teachers, in blocks of different sizes."""
    sizes = (32, 7, 100)
    return [built(tmp_path / f"{seed}.cache", seed, rows_per_block=size) for seed, size in enumerate(sizes)]


def test_the_mean_of_logits_is_weighted(three: list[str], tmp_path: Path) -> None:
    merge(three, tmp_path / "m.cache", weights=[1, 2, 5])
    expected = some_logits(0) * 0.125 + some_logits(1) * 0.25 + some_logits(2) * 0.625

    assert torch.allclose(expected, read_all(tmp_path / "m.cache"), atol=1e-5)
    assert 32 == logitcache.open(tmp_path / "m.cache").layout.rows_per_block
    assert [] == verify(str(tmp_path / "m.cache"), deep=True)


def test_the_mean_of_probabilities_is_that_of_the_distributions(three: list[str], tmp_path: Path) -> None:
    merge(three, tmp_path / "m.cache", mean="probabilities", weights=[1, 2, 5])
    each = [some_logits(seed).double().softmax(dim=-1) for seed in range(3)]
    expected = each[0] * 0.125 + each[1] * 0.25 + each[2] * 0.625
    found = read_all(tmp_path / "m.cache")

    assert torch.allclose(expected.log().float(), found, rtol=1e-5, atol=1e-5)


def test_the_mean_of_logits_is_the_geometric_mean_at_every_temperature() -> None:
    parts, weights = [some_logits(0)[0], some_logits(1)[0] + 100.0], [0.3, 0.7]  # right up to a constant per row
    for temperature in (0.5, 1.0, 4.0):
        product = (parts[0] / temperature).softmax(1) ** 0.3 * (parts[1] / temperature).softmax(1) ** 0.7
        expected = product / product.sum(dim=1, keepdim=True)
        found = (mean_of_logits(iter(parts), weights) / temperature).softmax(dim=1)
        assert torch.allclose(expected, found, atol=1e-6)


def test_classes_that_are_masked_stay_masked() -> None:
    inf = float("inf")
    one, other = torch.tensor([[1.0, -inf, -inf, 0.0]]), torch.tensor([[1.0, 2.0, -inf, -inf]])
    p, q = one.softmax(dim=1), other.softmax(dim=1)

    assert [[1.0, -inf, -inf, -inf]] == mean_of_logits([one, other], [0.5, 0.5]).tolist()
    assert torch.allclose((p + q) / 2, mean_of_probabilities([one, other], [0.5, 0.5]).exp())
    assert torch.isneginf(mean_of_probabilities([one, other], [0.5, 0.5])[0]).tolist() == [False, False, True, False]


def test_probabilities_far_below_the_smallest_float_keep_their_logarithm() -> None:
    logits = torch.tensor([[0.0, -300.0], [500.0, -500.0]])

    assert torch.allclose(
        torch.tensor([[0.0, -300.0], [0.0, -1000.0]]), mean_of_probabilities([logits] * 2, [0.5, 0.5])
    )


def test_the_order_of_the_sources_does_not_show(three: list[str], tmp_path: Path) -> None:
    """Nor does the scale of the weights; the default encoding and transform are the first one's."""
    one = merge(three, tmp_path / "a.cache", weights=[1, 2, 5]).manifest
    other = merge([three[2], three[0], three[1]], tmp_path / "b.cache", weights=[10, 2, 4]).manifest
    third = merge(three, tmp_path / "c.cache", weights=[5, 2, 1]).manifest

    assert one.identity.teacher.startswith("mean-of-logits:")
    assert one.id == other.id != third.id
    assert torch.equal(read_all(tmp_path / "a.cache"), read_all(tmp_path / "b.cache"))


def test_provenance_and_card_name_the_sources(three: list[str], tmp_path: Path) -> None:
    merge(three[:2], tmp_path / "m.cache", weights=[1, 3])
    merged = logitcache.open(tmp_path / "m.cache").manifest.provenance["merged"]
    caches = [logitcache.open(path) for path in three[:2]]

    assert "logits" == merged["mean"]
    assert [(cache.id, cache.digest) for cache in caches] == [(part["id"], part["digest"]) for part in merged["parts"]]
    assert [("net@0", 0.25, three[0]), ("net@1", 0.75, three[1])] == [
        (part["teacher"], part["weight"], part["location"]) for part in merged["parts"]
    ]
    card = (tmp_path / "m.cache/README.md").read_text()
    assert "  - `net@0`, weight 0.25\n  - `net@1`, weight 0.75\n- Dataset: `pictures`\n" in card
    assert "# Logits of the mean of 2 teachers on pictures" in card
    assert str(tmp_path) not in card


def test_a_merge_run_again_does_nothing(three: list[str], tmp_path: Path) -> None:
    first = merge(three, tmp_path / "m.cache")
    second = merge(three, tmp_path / "m.cache")

    assert (8, []) == (len(first.computed_blocks), second.computed_blocks)
    assert first.manifest == second.manifest


@pytest.mark.parametrize(
    "encoding",
    ["lowrank(rank=4)", "topk(k=3)", "auto(max_kl=0.5)"],
)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_merge_ends_in_the_digest_of_an_undisturbed_one(
    three: list[str], tmp_path: Path, encoding: str
) -> None:
    start = time.perf_counter()
    whole = merge(three, tmp_path / "whole.cache", encoding=encoding).manifest
    seconds = time.perf_counter() - start
    draw = random.Random(0)
    killed = 0
    for number in range(60):
        path = tmp_path / f"killed-{number}.cache"
        child = os.fork()
        if child == 0:
            try:
                merge(three, path, encoding=encoding)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, 0.7 * seconds))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert whole.digest == merge(three, path, encoding=encoding).manifest.digest
        assert [] == verify(str(path), deep=True)
        shutil.rmtree(path)
        if killed == 5:
            break

    assert 5 == killed


def test_the_default_encoding_is_the_first_ones_fitted_again(tmp_path: Path) -> None:
    lowrank = logitcache.LowRank(rank=4)
    paths = [built(tmp_path / f"{seed}.cache", seed, encoding=lowrank) for seed in range(2)]
    merge(paths, tmp_path / "m.cache")
    cache = logitcache.open(tmp_path / "m.cache")
    teacher = (read_all(paths[0]) + read_all(paths[1])) / 2
    distance = logitcache.losses.kl_divergence(read_all(tmp_path / "m.cache").flatten(0, 1), teacher.flatten(0, 1))

    assert lowrank == cache.encoding
    assert cache.kl_mean is not None
    assert abs(cache.kl_mean - float(distance.mean())) < 1e-4
    fitted = [open_.storage.get("labels.zarr/basis/c/0/0") for open_ in (cache, logitcache.open(paths[0]))]
    assert fitted[0] != fitted[1]


def test_calibration_reads_a_bounded_number_of_blocks(three: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitcache.extras.merge.CALIBRATION_ROWS", 30)
    monkeypatch.setattr("logitcache.extras.merge.CALIBRATION_BLOCKS", 5)
    asked: list[tuple[int, np.ndarray]] = []

    class Recorded:
        def logits(self, view: int, rows: np.ndarray) -> Tensor:
            asked.append((view, rows))
            return torch.zeros(len(rows), CLASSES)

    sample = calibration_sample(Recorded(), logitcache.open(three[0]), VIEWS)  # type: ignore[arg-type]

    assert 5 == len(asked)
    assert {0, 1} == {view for view, _ in asked}
    assert 30 <= len(sample.logits) <= 35
    assert sample.groups is not None
    assert np.array_equal(np.concatenate([rows for _, rows in asked]), sample.groups)


def test_no_more_than_two_blocks_of_a_source_are_in_memory(
    three: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[str, int, int]] = []
    whole = logitcache.LogitCache.read_blocks

    def recorded(self: logitcache.LogitCache, view: int, numbers: Any, output: str) -> Any:
        reads.append((self.storage.url, view, *numbers))
        return whole(self, view, numbers, output)

    monkeypatch.setattr(logitcache.LogitCache, "read_blocks", recorded)
    merge(three[:2], tmp_path / "m.cache")
    per_source = [[read[1:] for read in reads if read[0] == path] for path in three[:2]]

    assert [(view, number) for view in range(2) for number in range(4)] == per_source[0]
    assert sorted(set(per_source[1])) == per_source[1]  # block by block, each once


def test_the_merged_cache_holds_the_views_that_all_have(three: list[str], tmp_path: Path) -> None:
    longer = built(tmp_path / "longer.cache", 7, num_views=5)
    result = merge([longer, three[0]], tmp_path / "m.cache")

    assert (2, {longer: 3}) == (result.manifest.layout.num_views, result.left_out)
    assert torch.allclose((some_logits(7, 5)[:2] + some_logits(0)) / 2, read_all(tmp_path / "m.cache"), atol=1e-5)


PLAN = logitcache.ViewPlan(seed=3)
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dataset": ({}, {"dataset": "photos"}, r"dataset: pictures in \S*0.cache, photos in \S*other.cache"),
    "samples": ({}, {"num_samples": 99}, r"num_samples: 100 in \S*0.cache, 99 in \S*other.cache"),
    "classes": ({}, {"num_classes": 11}, r"outputs.logits\[0\]: 12 in"),
    "class names": ({}, {"class_names": [f"{c}" for c in range(CLASSES)]}, "class_names: null in"),
    "view seed": ({"view_plan": PLAN}, {"view_plan": replace(PLAN, seed=4)}, "view_seed: 3 in"),
    "no view plan": ({}, {"view_plan": logitcache.ViewPlan()}, "transform: null in"),
    "mixing": (
        {"view_plan": PLAN},
        {"view_plan": replace(PLAN, mixing=logitcache.Mixing(mixup=0.5), num_classes=CLASSES)},
        "transform.mixing: null in",
    ),
    "transform": ({"view_plan": PLAN}, {"view_plan": replace(PLAN, transform=np.fliplr)}, "transform.shared: null in"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_views_are_refused_before_anything_is_written(tmp_path: Path, case: str) -> None:
    common, changes, message = OTHERS[case]
    one = built(tmp_path / "0.cache", 0, **common)
    logits = some_logits(1)[:, : changes.get("num_samples", SAMPLES), : changes.get("num_classes", CLASSES)]
    other = built(tmp_path / "other.cache", 1, logits=logits, **(common | changes))

    with pytest.raises(IdentityMismatch, match=message):
        merge([one, other], tmp_path / "m.cache")
    assert not (tmp_path / "m.cache").exists()


REQUESTS: dict[str, tuple[Callable[[list[str], Path], object], type[Exception], str]] = {
    "one cache": (lambda three, out: merge(three[:1], out), UsageError, "merge needs two or more caches, not 1"),
    "the same twice": (
        lambda three, out: merge([three[0], three[1], f"file://{three[0]}"], out), UsageError, "are the same cache",
    ),
    "a source as out": (lambda three, out: merge(three, three[1]), UsageError, r"--output \S+1.cache is the source \S+1.cache"),
    "few weights": (lambda three, out: merge(three, out, weights=[1, 2]), UsageError, "2 weights for 3 caches"),
    "no weight": (lambda three, out: merge(three, out, weights=[1, 0, 2]), UsageError, "a positive number, not 0"),
    "NaN": (lambda three, out: merge(three, out, weights=[1, float("nan"), 2]), UsageError, "a positive number, not nan"),
    "weights far apart": (lambda three, out: merge(three, out, weights=[1e-320, 1e300, 1]), UsageError, "too far apart"),
    "another mean": (lambda three, out: merge(three, out, mean="votes"), UsageError, "one of logits, probabilities"),
    "an unsealed one": (
        lambda three, out: merge([three[0], unsealed(out.parent / "open.cache")], out), IncompleteCache, "is not sealed yet",
    ),
    "drawn classes": (
        lambda three, out: merge([three[0], built(out.parent / "s.cache", 5, encoding="sampled")], out),
        UsageError, "use the mean of probabilities",
    ),
}  # fmt: skip


def unsealed(path: Path) -> str:
    logitcache.create(path, num_samples=SAMPLES, num_classes=CLASSES, teacher="net", dataset="pictures").close()
    return str(path)


@pytest.mark.parametrize("case", REQUESTS)
def test_what_cant_be_merged_is_refused(three: list[str], tmp_path: Path, case: str) -> None:
    request, kind, message = REQUESTS[case]
    with pytest.raises(kind, match=message):
        request(three, tmp_path / "m.cache")

    assert not (tmp_path / "m.cache").exists()
    assert [] == [problem for path in three for problem in verify(path, deep=True)]


def test_another_cache_at_out_is_left_alone(three: list[str], tmp_path: Path) -> None:
    """Whatever the encoding that is asked for, and before any is fitted."""
    other = built(tmp_path / "other.cache", 9)
    for encoding in (None, "lowrank(rank=4)"):
        with pytest.raises(IdentityMismatch, match="holds another cache"):
            merge(three, other, encoding=encoding)

    assert torch.equal(some_logits(9), read_all(other))


def test_drawn_classes_have_a_mean_of_probabilities(three: list[str], tmp_path: Path) -> None:
    sampled = [built(tmp_path / f"s{seed}.cache", seed, encoding="sampled(draws=20)") for seed in range(2)]
    merge(sampled, tmp_path / "m.cache", mean="probabilities", encoding=FLOAT32)
    expected = (read_all(sampled[0]).exp() + read_all(sampled[1]).exp()) / 2

    assert torch.allclose(expected, read_all(tmp_path / "m.cache").exp(), atol=1e-6)


def test_rows_without_a_common_class_are_named(tmp_path: Path) -> None:
    masked = [some_logits(seed).clone() for seed in range(2)]
    masked[0][1, 40, :6] = -torch.inf
    masked[1][1, 40, 6:] = -torch.inf
    paths = [built(tmp_path / f"{seed}.cache", seed, logits=logits) for seed, logits in enumerate(masked)]

    with pytest.raises(InvalidLogits, match="view 1, row 40: every class is masked in at least one of the caches"):
        merge(paths, tmp_path / "m.cache")
    assert torch.isfinite(read_all(merged_probabilities(paths, tmp_path))).all()


def merged_probabilities(paths: list[str], tmp_path: Path) -> Path:
    merge(paths, tmp_path / "p.cache", mean="probabilities")
    return tmp_path / "p.cache"


def test_other_pixels_are_refused(tmp_path: Path) -> None:
    """The identities agree; only the digests of what the teachers were given can tell."""
    pixels = torch.arange(SAMPLES * 4, dtype=torch.float32).reshape(SAMPLES, 4)
    others = pixels.clone()
    row = max(int(row) for row in logitcache.open(built(tmp_path / "0.cache", 0, inputs=pixels)).input_digests(1))
    others[row, 0] += 1
    paths = [str(tmp_path / "0.cache"), built(tmp_path / "1.cache", 1, inputs=others)]

    with pytest.raises(
        IdentityMismatch, match=r"different inputs in view [01], row \d+ .*: the digests are \w{32} and \w{32}"
    ):
        merge(paths, tmp_path / "m.cache")
    assert not (tmp_path / "m.cache").exists()


SECOND = ["teacher.model=mlp", "teacher.args={hidden: [24]}"]


def two_teachers(tiny: Make, tmp_path: Path, *second: str) -> tuple[Pipeline, Pipeline, str]:
    """Two teachers' caches of forty pictures, merged."""
    one = tiny(*PICTURES, "views.mixup=0.3", "views.mix_probability=0.5")
    other = tiny(
        *PICTURES,
        "views.mixup=0.3",
        "views.mix_probability=0.5",
        *SECOND,
        f"cache.path={tmp_path}/second.cache",
        *second,
    )
    cache_teacher(one)
    cache_teacher(other)
    merge([one.cache.path, other.cache.path], tmp_path / "m.cache")
    return one, other, str(tmp_path / "m.cache")


def at(pipeline: Pipeline, path: str, runs: Path) -> Pipeline:
    cache = pipeline.cache.model_copy(update={"path": path})
    return pipeline.model_copy(update={"cache": cache, "runs": pipeline.runs.model_copy(update={"path": str(runs)})})


def test_a_student_trains_from_a_merged_cache_with_the_pipeline_of_either_teacher(tiny: Make, tmp_path: Path) -> None:
    one, other, merged = two_teachers(tiny, tmp_path)
    rows = [train_students(at(each, merged, tmp_path / name), ["small"]) for each, name in ((one, "a"), (other, "b"))]
    weights = [(tmp_path / name / "small/seed-0/last.safetensors").read_bytes() for name in ("a", "b")]
    cache = logitcache.open(merged)

    assert 40 == rows[0][0].samples
    assert weights[0] == weights[1]
    assert [] == verify_match(at(one, merged, tmp_path))
    views = ViewDataset(resolve_data(one, trust=False).train, cache.view_plan)
    assert [8, 8] == [cache.verify_inputs(views, view) for view in range(2)]
    assert torch.allclose((read_all(one.cache.path) + read_all(other.cache.path)) / 2, read_all(merged), atol=1e-6)


def test_a_pipeline_of_another_teacher_or_other_views_is_refused(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = two_teachers(tiny, tmp_path)[2]
    monkeypatch.setattr("logitcache.train.loop.Run.train_step", never)
    common = [*PICTURES, "views.mixup=0.3", "views.mix_probability=0.5", f"cache.path={merged}"]

    with pytest.raises(IdentityMismatch, match=r"the cache is the mean of mlp@\w+, mlp@\w+, none of which is "):
        train_students(tiny(*common, "teacher.args={hidden: [17]}"), ["small"])
    with pytest.raises(IdentityMismatch, match=r"precision: float32 in the cache, bfloat16 here"):
        train_students(tiny(*common, "teacher.precision=bfloat16"), ["small"])
    with pytest.raises(IdentityMismatch, match=r"view_seed: 3 in the cache, 4 here"):
        train_students(tiny(*common, "views.seed=4"), ["small"])


def test_teachers_may_take_the_views_in_sizes_of_their_own(tiny: Make, tmp_path: Path) -> None:
    """The proof is that of the first one's input; a pipeline with the other's is told so."""
    one, other, merged = two_teachers(tiny, tmp_path, "teacher.input=[{Resize: {size: [4, 4]}}]")
    cache = logitcache.open(merged)
    views = ViewDataset(resolve_data(one, trust=False).train, cache.view_plan)

    assert [8, 8] == [cache.verify_inputs(views, view) for view in range(2)]
    assert cache.input_digests(0) == logitcache.open(one.cache.path).input_digests(0)
    assert 1 == len(train_students(at(one, merged, tmp_path / "a"), ["small"]))
    with pytest.raises(IdentityMismatch, match=r"transform.teacher_input .*: null in the cache, "):
        train_students(at(other, merged, tmp_path / "b"), ["small"])


def test_no_one_teacher_is_asked_about_a_mean(tiny: Make, tmp_path: Path) -> None:
    one, _, merged = two_teachers(tiny, tmp_path)
    pipeline = at(one, merged, tmp_path)
    with pytest.raises(UsageError, match="no single teacher can be run again"):
        verify_match(pipeline, recompute=3)
    digest = logitcache.open(merged).digest
    shutil.copytree(merged, tmp_path / "copy.cache")
    victim = next(path for path in Path(merged, "labels.zarr/logits/c").rglob("*") if path.is_file())
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(UsageError, match="no single teacher can recompute; give a copy"):
        repair(merged, recompute=lambda: cache_teacher(pipeline).manifest.digest)

    assert logitcache.open(merged).sealed
    assert (digest, []) == ((result := repair(merged, source=str(tmp_path / "copy.cache"))).digest, result.remaining)


def test_a_provenance_that_names_other_parts_is_refused(tiny: Make, tmp_path: Path) -> None:
    """Somebody who puts his own teacher among the parts, with a checksum that fits."""
    one, _, merged = two_teachers(tiny, tmp_path)
    manifest = Path(merged, "manifest.json")
    raw = json.loads(manifest.read_text())
    raw["provenance"]["merged"]["parts"][0]["teacher"] = "mlp@0000"
    del raw["checksum"]
    raw["checksum"] = json_digest(raw)
    manifest.write_text(json.dumps(raw) + "\n")

    with pytest.raises(CorruptCache, match="don't match the hash in its teacher's name"):
        train_students(at(one, merged, tmp_path), ["small"])


def test_teachers_of_different_precision_make_a_mixed_one(tmp_path: Path) -> None:
    paths = [
        built(tmp_path / f"{seed}.cache", seed, precision=precision)
        for seed, precision in enumerate(("float32", "bfloat16"))
    ]

    assert "mixed" == merge(paths, tmp_path / "m.cache").manifest.identity.precision


def test_the_command_merges_and_says_what_it_left_out(three: list[str], tmp_path: Path) -> None:
    longer = built(tmp_path / "longer.cache", 7, num_views=3)
    out = tmp_path / "m.cache"
    options = ["--mean", "probabilities", "--weight", 1, "--weight", 3, "--encoding", "TopK(k=2)"]
    result = json.loads(run("merge", longer, three[0], "--output", out, *options, "--json").stdout)

    assert ("TopK(k=2, dtype='float16')", "probabilities", 2) == (
        result["encoding"], result["mean"], result["num_views"],
    )  # fmt: skip
    assert [0.25, 0.75] == [part["weight"] for part in result["parts"]]
    assert {longer: 1} == result["left_out_views"]
    text = run("merge", longer, three[0], "--output", out, *options)
    assert (0, True) == (text.returncode, "longer.cache has 1 more." in text.stdout.replace("\n", " "))
    refused = run("merge", three[0], three[0], "--output", tmp_path / "n.cache")
    assert (2, "") == (refused.returncode, refused.stdout)
    assert "are the same cache" in refused.stderr
