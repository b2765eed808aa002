"""A teacher that sees a stream writes the cache of the map-style run: the same id and digest."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import v2

import logitcache
from logitcache.config.schema import Pipeline
from logitcache.data.samples import content_table, sample_table
from logitcache.errors import SampleMismatch, UnreadableSample, UsageError
from logitcache.stages.cache_teacher import cache_teacher, compute_blocks, plan_blocks
from logitcache.stages.plan import plan_pipeline
from logitcache.stages.train_student import train_students
from logitcache.stages.verify_match import verify_match
from logitcache.verify.audit import verify
from tests.needs import need_package
from tests.pictures_in_files import COUNT, samples, write_shards

Make = Callable[..., Pipeline]
HERE = "tests.integration.test_streams_of_teachers"
COMMON = [
    "data.validation=0",
    "views.transform=[{RandomAffine: {degrees: 180}}]",
    "cache.rows_per_block=16",
]


class Counted(IterableDataset[tuple[str, bytes, int]]):
    """(key, file, target) in order; counts how often it was read, and like many streams divides itself by worker."""

    def __init__(self) -> None:
        self.readings = 0
        self.given = 0

    def __iter__(self) -> Iterator[tuple[str, bytes, int]]:
        self.readings += 1
        worker = get_worker_info()
        for item in samples() if worker is None else samples()[worker.id :: worker.num_workers]:
            self.given += 1
            yield item


LAST: list[Counted] = []


def plain() -> Any:
    LAST[:] = [Counted()]
    return logitcache.StreamDataset(LAST[0], decode=logitcache.decode_image, num_classes=10)


def of_webdataset(folder: str) -> Any:
    need_package("webdataset", "test")
    import webdataset

    stream = webdataset.WebDataset(sorted(map(str, Path(folder).glob("*.tar"))), shardshuffle=False)
    return logitcache.StreamDataset(
        stream, fields=("__key__", "png", "cls"), decode=logitcache.decode_image, num_classes=10
    )


def of_hugging_face(folder: str) -> Any:
    """A saved dataset, streamed from several shards."""
    import datasets

    stream = datasets.load_from_disk(folder).to_iterable_dataset(num_shards=3)
    stream = stream.cast_column("image", datasets.Image(decode=False))
    return logitcache.StreamDataset(
        stream, fields=("name", "image", "label"), decode=logitcache.decode_image, num_classes=10
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures in tar files, in a Parquet file and as a saved Hugging Face dataset."""
    need_package("datasets", "hf")
    import datasets

    folder = tmp_path_factory.mktemp("pictures")
    write_shards(folder / "tar")
    columns = {
        "name": [key for key, *_ in samples()],
        "image": [{"bytes": png, "path": None} for _, png, _ in samples()],
        "label": [target for *_, target in samples()],
    }
    features = datasets.Features(
        {"name": datasets.Value("string"), "image": datasets.Image(), "label": datasets.Value("int64")}
    )
    dataset = datasets.Dataset.from_dict(columns, features=features)
    dataset.save_to_disk(folder / "saved")
    (folder / "parquet/train").mkdir(parents=True)
    dataset.to_parquet(folder / "parquet/train/0.parquet")
    return folder


def of_files(tiny: Make, folder: Path, *overrides: str) -> logitcache.LogitCache:
    """The cache of the map-style run."""
    pipeline = tiny(
        "data.name=webdataset",
        f"data.root={folder}/tar",
        "data.args.num_classes=10",
        *COMMON,
        f"cache.path={folder}/files.cache",
        *overrides,
    )
    cache_teacher(pipeline)
    return logitcache.open(pipeline.cache.path)


SOURCES = {
    "an IterableDataset": [f"data.name={HERE}:plain"],
    "WebDataset": [f"data.name={HERE}:of_webdataset", "data.args.folder={folder}/tar"],
    "Hugging Face": [f"data.name={HERE}:of_hugging_face", "data.args.folder={folder}/saved"],
    "saved, by name": ["data.name=huggingface", "data.args={path: {folder}/saved, key: name, streaming: true}"],
    "Parquet, by name": ["data.name=parquet", "data.root={folder}/parquet", "data.args={key: name, streaming: true}"],
}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", SOURCES)
def test_the_cache_of_a_stream_is_that_of_the_files(
    tiny: Make, folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, num_workers: int
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "hf"))
    expected = of_files(tiny, folder)
    pipeline = tiny(*(each.replace("{folder}", str(folder)) for each in SOURCES[source]), *COMMON)
    pipeline = pipeline.model_copy(update={"num_workers": num_workers})
    cache_teacher(pipeline)
    found = logitcache.open(pipeline.cache.path)

    assert (expected.id, expected.digest) == (found.id, found.digest)
    assert [] == verify(pipeline.cache.path, deep=True)
    gc.collect()  # webdataset leaves its files to the garbage collector


@pytest.mark.parametrize(("per_decode", "readings"), [(1, 2), (2, 1)])
def test_a_stream_is_read_once_for_its_keys_and_once_for_the_views_that_are_rendered_together(
    tiny: Make, folder: Path, per_decode: int, readings: int
) -> None:
    pipeline = tiny(*SOURCES["an IterableDataset"], *COMMON, f"views.per_decode={per_decode}")
    cache_teacher(pipeline)

    assert of_files(tiny, folder).digest == logitcache.open(pipeline.cache.path).digest
    # One more reading starts for the shapes of the teacher's output, and the views go on with it.
    assert (1 + readings, (1 + readings) * COUNT) == (LAST[0].readings, LAST[0].given)


def test_an_interrupted_build_goes_on_behind_the_complete_blocks(tiny: Make, folder: Path) -> None:
    pipeline = tiny(*SOURCES["an IterableDataset"], *COMMON)
    first = plan_blocks(pipeline)[1:4]
    compute_blocks(pipeline, first)
    result = cache_teacher(pipeline)

    assert of_files(tiny, folder).digest == logitcache.open(pipeline.cache.path).digest
    assert 3 == len(first) == len(result.computed_blocks)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_fitted_encoding_a_plan_and_the_checks_of_a_cache_read_streams_too(
    tiny: Make, folder: Path, num_workers: int
) -> None:
    lowrank = ["cache.encoding={name: lowrank, rank: 4, k: 2}", "cache.calibration=24"]
    expected = of_files(tiny, folder, *lowrank, f"cache.path={folder}/lowrank.cache")
    pipeline = tiny(*SOURCES["an IterableDataset"], *COMMON, *lowrank)
    pipeline = pipeline.model_copy(update={"num_workers": num_workers})
    cache_teacher(pipeline)

    assert expected.digest == logitcache.open(pipeline.cache.path).digest
    assert [] == verify_match(pipeline, recompute=12)
    assert COUNT == plan_pipeline(pipeline).num_samples


def in_a_loop(path: Path, dataset: Any, teacher: torch.nn.Module) -> logitcache.LogitCache:
    """The cache of the README's loop, in one pass."""
    plan = logitcache.ViewPlan(transform=v2.RandomAffine(degrees=90), contents=logitcache.SeenContents(COUNT))
    views = logitcache.ViewDataset(dataset, plan)
    table = logitcache.sample_table(dataset)
    with logitcache.create(
        path, num_samples=COUNT, num_classes=10, num_views=2, teacher="t", samples=table, view_plan=plan
    ) as writer:
        for view in range(2):
            views.set_view(view)
            start = 0
            for _, inputs, _ in DataLoader(views, batch_size=12):
                writer.write(view=view, start=start, logits=teacher(inputs).detach(), inputs=inputs)
                start += len(inputs)
    return logitcache.open(path)


def test_a_loop_of_ones_own_reads_a_stream_in_the_main_process(tmp_path: Path, folder: Path) -> None:
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    expected = in_a_loop(tmp_path / "files", logitcache.TarShards(sorted((folder / "tar").iterdir())), teacher)
    found = in_a_loop(tmp_path / "stream", plain(), teacher)

    assert (expected.id, expected.digest) == (found.id, found.digest)


def test_access_in_another_order_or_from_workers_is_refused() -> None:
    plan = logitcache.ViewPlan()
    views = logitcache.ViewDataset(plain(), plan)

    with pytest.raises(UsageError, match=r"sample \d+ is requested after sample \d+, and a stream is read in order"):
        list(DataLoader(views, batch_size=12, shuffle=True))
    with pytest.raises(UsageError, match="a stream is read in the main process"):
        list(DataLoader(views, batch_size=12, num_workers=2))
    with pytest.raises(UsageError, match="mixup or CutMix combine each sample with any other one, and a stream"):
        logitcache.ViewDataset(plain(), logitcache.ViewPlan(mixing=logitcache.Mixing(mixup=1.0), num_classes=10))


class Changing:
    """A stream that differs when it is read again."""

    def __init__(self, change: Callable[[list[Any]], list[Any]]) -> None:
        self.change = change
        self.readings = 0

    def __iter__(self) -> Iterator[Any]:
        self.readings += 1
        for item in samples() if self.readings == 1 else self.change(samples()):
            if item is None:
                raise ConnectionError("reset by peer")
            yield item


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        pytest.param(
            lambda items: random.Random(1).sample(items, COUNT),
            SampleMismatch,
            r"sample 0 of the stream is 'scan/00\d+' with the target \d; expected 'scan/0000' with the target",
            id="shuffled",
        ),
        pytest.param(
            lambda items: items[:30],
            SampleMismatch,
            "the stream ends after 30 samples, and it has 40",
            id="shorter",
        ),
        pytest.param(
            lambda items: [*items, items[0]],
            SampleMismatch,
            "the stream has more samples than the 40 that were counted",
            id="longer",
        ),
        pytest.param(
            lambda items: [(key, png, 3) for key, png, _ in items],
            SampleMismatch,
            "sample . of the stream is 'scan/000.' with the target 3; expected",
            id="other targets",
        ),
        pytest.param(
            lambda items: [*items[:20], None],
            UnreadableSample,
            "the stream fails after 20 samples: ConnectionError: reset by peer",
            id="broken",
        ),
    ],
)
def test_a_stream_that_changes_between_two_readings_is_refused(
    change: Callable[[list[Any]], list[Any]], kind: type[Exception], message: str
) -> None:
    dataset = logitcache.StreamDataset(Changing(change), decode=logitcache.decode_image)
    views = logitcache.ViewDataset(dataset, logitcache.ViewPlan())

    with pytest.raises(kind, match=message):
        list(DataLoader(views, batch_size=8))


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        pytest.param([("a", b"")], {}, "the target of sample 'a' of the stream is None", id="no target"),
        pytest.param([("a", b"", 0.5)], {}, "the target of sample 'a' of the stream is 0.5", id="no class number"),
        pytest.param([{"jpg": b""}], {}, "name those of key, sample and target with `fields`", id="mappings"),
        pytest.param([("a", b"", 0)], {"keys": ["a"]}, "`keys` without `targets`", id="keys alone"),
        pytest.param([("a", b"", 0)], {"targets": [0]}, "`targets` without `keys`", id="targets alone"),
        pytest.param([("a", b"", 0)], {"keys": ["a"], "targets": [0, 1]}, "1 keys and 2 targets", id="lengths"),
    ],
)
def test_invalid_streams_of_a_teacher_are_refused(items: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        logitcache.StreamDataset(items, **options)


def test_keys_that_are_known_or_positions_need_no_reading_in_advance() -> None:
    stream = Counted()
    keys, targets = [key for key, *_ in samples()], [target for *_, target in samples()]
    known = logitcache.StreamDataset(stream, keys=keys, targets=targets, decode=logitcache.decode_image)

    assert 0 == stream.readings
    assert content_table(plain()).tolist() == content_table(known).tolist()
    rows = [{"image": png, "label": target} for _, png, target in samples()]
    without = logitcache.StreamDataset(rows, fields=(None, "image", "label"), decode=logitcache.decode_image)
    assert None is sample_table(without).keys
    assert targets == without.targets.tolist()
    assert 7 == len(logitcache.ViewDataset(without, logitcache.ViewPlan()).__getitems__(range(7)))


def test_a_stream_of_hugging_face_that_does_not_fit_is_refused(tiny: Make, folder: Path) -> None:
    where = ["data.name=huggingface", *COMMON]

    with pytest.raises(UsageError, match="column 'file'"):
        cache_teacher(tiny(*where, f"data.args={{path: {folder}/saved, image: file, streaming: true}}"))


def test_repeated_keys_are_refused_before_the_teacher_runs() -> None:
    with pytest.raises(UsageError, match="1 sample keys repeat, the first being 'scan/0000'"):
        sample_table(logitcache.StreamDataset([*samples(), samples()[0]]))


def test_training_and_parts_of_a_stream_are_refused(tiny: Make) -> None:
    stream = SOURCES["an IterableDataset"]

    with pytest.raises(UsageError, match="training takes samples in any order, and a stream is read in order"):
        train_students(tiny(*stream, *COMMON), ["small"])
    with pytest.raises(UsageError, match=r"a part of the samples is selected .*, and a stream is read in order"):
        cache_teacher(tiny(*stream, "data.validation=0.25"))
