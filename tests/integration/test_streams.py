"""Students of a stream that is joined to the cache by key have the labels and inputs of the map-style run."""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import v2

import logitcache
from logitcache.config.schema import Pipeline
from logitcache.data.batching import pad
from logitcache.data.rows import rows_of_dataset
from logitcache.data.tokens import TokenDataset
from logitcache.data.transforms import build_transform
from logitcache.errors import IdentityMismatch, SampleMismatch, UsageError
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import train_students
from tests.needs import need_package
from tests.pictures_in_files import COUNT, samples, write_shards, write_tar

Item = tuple[str, bytes, int]
FIELDS = ("__key__", "png", "cls")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def pipeline(shards: list[Path], tiny: Callable[..., Pipeline]) -> Pipeline:
    return tiny(
        "data.name=webdataset",
        f"data.root={shards[0].parent}",
        "data.validation=0",
        "data.args.num_classes=10",
        "views.transform=[{RandomAffine: {degrees: 180}}]",  # views of small pictures must differ
        "cache.rows_per_block=16",
    )


@pytest.fixture
def cache(pipeline: Pipeline) -> logitcache.LogitCache:
    cache_teacher(pipeline)
    return logitcache.open(pipeline.cache.path)


class Samples(IterableDataset[Item]):
    """(key, file, target) in an order that the global generators choose; workers share the samples."""

    def __init__(self, items: list[Item], *, shared: bool = True) -> None:
        self.items = items
        self.shared = shared

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        ours = self.items if worker is None or not self.shared else self.items[worker.id :: worker.num_workers]
        remaining = list(ours)
        while remaining:  # a shuffle that draws while it is read
            yield remaining.pop(random.randrange(len(remaining)))


def views_of(cache: logitcache.LogitCache, items: list[Item] | None = None, **options: Any) -> logitcache.StreamViews:
    stream = Samples(samples() if items is None else items)
    return logitcache.StreamViews(stream, cache, **{"decode": logitcache.decode_image} | options)


def by_row(batches: Any) -> dict[int, tuple[torch.Tensor, int]]:
    """Input and target by index."""
    return {int(index): (value, int(target)) for batch in batches for index, value, target in zip(*batch, strict=True)}


def same(expected: dict[int, tuple[torch.Tensor, int]], found: dict[int, tuple[torch.Tensor, int]]) -> bool:
    return expected.keys() == found.keys() and all(
        torch.equal(value, found[index][0]) and target == found[index][1] for index, (value, target) in expected.items()
    )


def rendered(cache: logitcache.LogitCache, shards: list[Path], view: int) -> dict[int, tuple[torch.Tensor, int]]:
    """The view as `ViewDataset` gives it."""
    dataset = logitcache.ViewDataset(logitcache.TarShards(shards), cache.view_plan)
    dataset.set_view(view)
    return by_row(DataLoader(dataset, batch_size=8))


def web_dataset(shards: list[Path]) -> Any:
    need_package("webdataset", "test")
    import webdataset

    return webdataset.WebDataset([str(path) for path in shards], shardshuffle=3, seed=0).shuffle(10)


def hugging_face(shards: list[Path]) -> Any:
    need_package("datasets", "hf")
    import datasets

    def generate(numbers: list[int]) -> Iterator[dict[str, Any]]:
        found = samples()
        for number in numbers:
            key, png, target = found[number]
            yield {"__key__": key, "png": {"bytes": png, "path": None}, "cls": target}

    features = datasets.Features(
        {"__key__": datasets.Value("string"), "png": datasets.Image(decode=False), "cls": datasets.Value("int64")}
    )
    stream = datasets.IterableDataset.from_generator(
        generate, features=features, gen_kwargs={"numbers": list(range(COUNT))}
    )
    return stream.shuffle(seed=3, buffer_size=10)


def parquet(shards: list[Path]) -> Any:
    """A stream of Parquet files with the bytes of images."""
    need_package("datasets", "hf")
    import datasets

    rows = [{"__key__": key, "png": {"bytes": png, "path": None}, "cls": target} for key, png, target in samples()]
    folder = shards[0].parent.with_name("parquet")
    for part in range(2):
        datasets.Dataset.from_list(rows[part::2]).to_parquet(str(folder / f"{part}.parquet"))
    stream = datasets.load_dataset("parquet", data_dir=str(folder), split="train", streaming=True)
    return stream.shuffle(seed=3, buffer_size=10)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("make", [web_dataset, hugging_face, parquet])
def test_streams_of_other_libraries_give_the_views_of_the_cache(
    cache: logitcache.LogitCache, shards: list[Path], make: Callable[[list[Path]], Any], num_workers: int
) -> None:
    views = logitcache.StreamViews(make(shards), cache, fields=FIELDS, decode=logitcache.decode_image)
    orders = []
    for epoch in range(2):
        view = views.set_epoch(epoch)
        batches = list(DataLoader(views, batch_size=8, num_workers=num_workers))
        orders.append([index % 2**40 for batch in batches for index in batch[0].tolist()])

        assert epoch == view
        assert same(rendered(cache, shards, view), by_row(batches))
        views.summary().check()
        assert len(cache.input_digests(view)) == cache.verify_inputs(views, view) > 0
    assert sorted(orders[0]) == list(range(COUNT)) != orders[0] != orders[1]
    gc.collect()  # webdataset leaves its files to the garbage collector


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("make", [None, web_dataset, hugging_face, parquet])
def test_students_of_a_stream_have_the_weights_of_students_of_the_files(
    cache: logitcache.LogitCache, shards: list[Path], make: Callable[[list[Path]], Any] | None, num_workers: int
) -> None:
    """The same batches from both: labels, losses and weights are equal bit for bit."""
    views = views_of(cache) if make is None else joined(make(shards), cache)
    dataset = logitcache.ViewDataset(logitcache.TarShards(shards), cache.view_plan)
    students = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)) for _ in range(2)]
    students[1].load_state_dict(students[0].state_dict())
    optimizers = [torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9) for student in students]
    for epoch in range(3):
        views.set_epoch(epoch)
        for step, (index, inputs, targets) in enumerate(DataLoader(views, batch_size=8, num_workers=num_workers)):
            if step == 0:
                assert 2 == cache.check_batch(index, inputs, views=views)
            places = [(int(each) >> 40, int(each) % 2**40) for each in index]
            other_index, other_inputs, other_targets = dataset.collate(
                dataset.__getitems__([(view - 1, row) for view, row in places])
            )
            labels, expected = cache.logits(index), cache.view(epoch % 2).logits(other_index)
            assert torch.equal(expected, labels)
            assert torch.equal(other_targets, targets)
            for student, optimizer, taken, teacher in zip(
                students, optimizers, (inputs, other_inputs), (labels, expected), strict=True
            ):
                loss = logitcache.losses.kl_divergence(student(taken), teacher, temperature=2.0).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    weights, expected_weights = (torch.cat([p.flatten() for p in student.parameters()]) for student in students)

    assert torch.equal(expected_weights, weights)
    gc.collect()  # webdataset leaves its files to the garbage collector


def joined(stream: Any, cache: logitcache.LogitCache, **options: Any) -> logitcache.StreamViews:
    return logitcache.StreamViews(stream, cache, fields=FIELDS, decode=logitcache.decode_image, **options)


def tar_files(folder: Path, parts: list[list[Item]]) -> Any:
    """A stream of tar files, one for each part."""
    need_package("webdataset", "test")
    import webdataset

    paths = [str(write_tar(folder / f"{number}.tar", part)) for number, part in enumerate(parts)]
    return webdataset.WebDataset(paths, shardshuffle=len(parts), seed=0).shuffle(10)


def saved_dataset(folder: Path, parts: list[list[Item]]) -> Any:
    """A Hugging Face dataset of the parts on disk, as a stream of several shards."""
    need_package("datasets", "hf")
    import datasets

    rows = [
        {"__key__": key, "png": {"bytes": png, "path": None}, "cls": target}
        for part in parts
        for key, png, target in part
    ]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(folder / "saved", num_shards=len(parts))
    stream = datasets.load_from_disk(folder / "saved").to_iterable_dataset(num_shards=len(parts))
    return stream.shuffle(seed=3, buffer_size=10)


def parts_of(name: str) -> list[list[Item]]:
    """Three shards of 14, 14 and 12 samples, with a defect."""
    first, second, third = ([*samples()[start : start + 14]] for start in (0, 14, 28))
    return {
        "shard missing": [first, third],
        "shard repeated": [first, second, second, third],
        "key duplicated": [first, second, [*third, first[3]]],
        "key duplicated, other content": [first, second, [*third, (first[3][0], first[4][1], first[3][2])]],
        "unknown key": [first, second, [*third, ("new/1", first[3][1], 0)]],
    }[name]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("make", [tar_files, saved_dataset])
@pytest.mark.parametrize(
    ("defect", "rendered_count", "repeated", "absent", "keys"),
    [
        pytest.param("shard missing", 26, 0, 14, [f"scan/{number:04d}" for number in range(14, 19)]),
        pytest.param("shard repeated", 54, 14, 0, [f"scan/{number:04d}" for number in range(14, 19)]),
        pytest.param("key duplicated", 41, 1, 0, ["scan/0003"]),
    ],
)
def test_shards_with_a_defect_are_counted_named_and_refused_by_the_summary(
    cache: logitcache.LogitCache,
    shards: list[Path],
    tmp_path: Path,
    make: Callable[[Path, list[list[Item]]], Any],
    num_workers: int,
    defect: str,
    rendered_count: int,
    repeated: int,
    absent: int,
    keys: list[str],
) -> None:
    views = joined(make(tmp_path, parts_of(defect)), cache)
    for epoch in range(2):
        view = views.set_epoch(epoch)
        batches = list(DataLoader(views, batch_size=8, num_workers=num_workers))
        summary = views.summary()
        found, expected = by_row(batches), rendered(cache, shards, view)

        assert same({index: expected[index] for index in found}, found)
        assert rendered_count == sum(len(index) for index, *_ in batches)
        assert (rendered_count, repeated, absent, 0, True) == (
            summary.rendered,
            summary.repeated,
            summary.not_in_stream,
            summary.not_in_cache,
            summary.finished,
        )
        if num_workers == 0 or not repeated:  # two workers that read one sample each count it as their own
            assert keys == [*summary.repeated_keys, *summary.not_in_stream_keys]
        with pytest.raises(SampleMismatch, match="not those of the cache, each once"):
            summary.check()
    gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("make", [tar_files, saved_dataset])
def test_shards_with_a_defect_are_refused_or_left_out_by_choice(
    cache: logitcache.LogitCache,
    tmp_path: Path,
    make: Callable[[Path, list[list[Item]]], Any],
) -> None:
    numbers = itertools.count()

    def read(defect: str, **options: Any) -> logitcache.StreamViews:
        views = joined(make(tmp_path / str(next(numbers)), parts_of(defect)), cache, **options)
        for _ in DataLoader(views, batch_size=8):
            pass
        return views

    for defect in ("shard repeated", "key duplicated"):
        assert COUNT == read(defect, repeated="skip").summary().rendered
        with pytest.raises(SampleMismatch, match="comes a second time"):
            read(defect, repeated="error")
    with pytest.raises(SampleMismatch, match="sample 'new/1' of the stream is not in the cache"):
        read("unknown key")
    assert ("new/1",) == read("unknown key", missing="skip").summary().not_in_cache_keys
    for choice in ("keep", "skip"):
        with pytest.raises(SampleMismatch, match=r"sample 3 \(scan/0003\) is not what the teacher saw: its content"):
            read("key duplicated, other content", repeated=choice)
    gc.collect()


def test_a_batch_is_checked_while_workers_replace_the_samples_that_are_kept(
    cache: logitcache.LogitCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = views_of(cache)
    index, inputs, _ = next(iter(DataLoader(views, batch_size=8)))
    read = views._kept_samples

    def read_and_replace() -> Any:
        kept = read()
        for path in views._kept.iterdir():
            path.unlink()
        return kept

    monkeypatch.setattr(views, "_kept_samples", read_and_replace)

    assert 2 == cache.check_batch(index, inputs, views=views)


def test_rendering_leaves_the_shuffle_of_the_stream_as_it_was(cache: logitcache.LogitCache) -> None:
    random.seed(0)
    expected = [key for key, *_ in Samples(samples())]
    random.seed(0)
    views = views_of(cache)
    found = [cache.samples.keys[index % 2**40] for index, *_ in views]  # type: ignore[union-attr, index]

    assert expected == found


@pytest.mark.parametrize("num_workers", [0, 2])
def test_missing_unknown_and_repeated_samples_are_counted_and_named(
    cache: logitcache.LogitCache, num_workers: int
) -> None:
    items = samples()
    png = items[0][1]
    views = views_of(cache, [*items[:7], *items[8:], items[30], ("new/1", png, 0), ("new/2", png, 1)], missing="skip")
    loader = DataLoader(views, batch_size=8, num_workers=num_workers)
    for epoch in range(2):
        views.set_epoch(epoch)
        count = sum(len(index) for index, *_ in loader)
        summary = views.summary()

        assert (40, 40, 2, 1, 1, True) == (
            count,
            summary.rendered,
            summary.not_in_cache,
            summary.repeated,
            summary.not_in_stream,
            summary.finished,
        )
        assert {"new/1", "new/2"} == set(summary.not_in_cache_keys)
        assert ("scan/0007",) == summary.not_in_stream_keys
        assert "1 of the cache not seen (scan/0007)" in str(summary)
        if num_workers == 0:
            assert ("scan/0030",) == summary.repeated_keys
        with pytest.raises(SampleMismatch, match="not those of the cache, each once: view .: 40 samples; 2 not in"):
            summary.check()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_that_the_cache_lacks_is_refused(cache: logitcache.LogitCache, num_workers: int) -> None:
    views = views_of(cache, [*samples(), ("new/1", samples()[0][1], 0)])

    with pytest.raises(SampleMismatch, match="sample 'new/1' of the stream is not in the cache, which has 40 samples"):
        list(DataLoader(views, batch_size=8, num_workers=num_workers))


def test_a_repeated_sample_is_kept_left_out_or_refused(cache: logitcache.LogitCache) -> None:
    items = [*samples(), samples()[5], samples()[5]]
    kept, left_out, refused = (views_of(cache, items, repeated=choice) for choice in ("keep", "skip", "error"))

    assert [42, 40] == [len(list(kept)), len(list(left_out))]
    assert [2, 2] == [kept.summary().repeated, left_out.summary().repeated]
    assert [("scan/0005",)] * 2 == [kept.summary().repeated_keys, left_out.summary().repeated_keys]
    with pytest.raises(SampleMismatch, match="sample 'scan/0005' comes a second time"):
        list(refused)
    kept.set_view(0)
    assert 42 == len(list(kept))


def test_workers_that_all_read_the_whole_stream_are_noticed(cache: logitcache.LogitCache) -> None:
    """The common mistake with an `IterableDataset`."""
    stream = Samples(samples(), shared=False)
    views = logitcache.StreamViews(stream, cache, decode=logitcache.decode_image)
    list(DataLoader(views, batch_size=8, num_workers=2))

    assert (80, 40, 0) == (views.summary().rendered, views.summary().repeated, views.summary().not_in_stream)


def test_a_stream_that_is_not_at_its_end_is_no_complete_one(cache: logitcache.LogitCache) -> None:
    views = views_of(cache)
    taken = list(itertools.islice(views, 3))

    assert 3 == len(taken)
    assert not views.summary().finished
    with pytest.raises(SampleMismatch, match="not at its end"):
        views.summary().check()


def test_a_view_that_is_chosen_within_a_pass_is_followed(cache: logitcache.LogitCache, shards: list[Path]) -> None:
    """As an endless stream needs it."""
    views = views_of(cache, samples() * 4)
    found = []
    for item in views:
        found.append(item)
        if len(found) == 64:
            views.set_view(1)
    expected = [rendered(cache, shards, view) for view in range(2)]
    seen = [index // 2**40 - 1 for index, *_ in found]

    assert [0] * 64 + [1] * 96 == seen
    assert all(
        torch.equal(value, expected[view][index][0]) for view, (index, value, _) in zip(seen, found, strict=True)
    )


def changed(name: str) -> Any:
    return {
        "cast": lambda index, inputs: (index, (inputs * 255).byte()),
        "scaled": lambda index, inputs: (index, inputs * 2 - 1),
        "paired with other samples": lambda index, inputs: (index, inputs.roll(1, 0)),
        "another view": lambda index, inputs: (index + 2**40, inputs),
    }[name]


@pytest.mark.parametrize("name", ["cast", "scaled", "paired with other samples", "another view"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_that_changed_on_its_way_is_refused(cache: logitcache.LogitCache, name: str, num_workers: int) -> None:
    views = views_of(cache)
    index, inputs, _ = next(iter(DataLoader(views, batch_size=8, num_workers=num_workers)))

    assert 2 == cache.check_batch(index, inputs.half()) == cache.check_batch(index, inputs)
    with pytest.raises(IdentityMismatch, match=r"of this batch is not view"):
        cache.check_batch(*changed(name)(index, inputs))


@pytest.mark.parametrize("options", [{}, {"preprocess": v2.Resize(16)}], ids=["the teacher's input", "another input"])
def test_a_view_that_renders_differently_is_refused_when_a_proof_sample_arrives(
    cache: logitcache.LogitCache, options: dict[str, Any]
) -> None:
    """As with another version of torchvision: data and description agree, pixels don't."""
    views = views_of(cache, **options)
    for renderer in (views._teacher, views._renderer):
        renderer._shared = v2.RandomAffine(degrees=170)

    with pytest.raises(IdentityMismatch, match=r"view 0 of sample \d+ \(scan/\d+\) is not what the teacher saw"):
        list(views)


def test_a_sample_with_other_content_is_refused(cache: logitcache.LogitCache) -> None:
    items = samples()
    items[3] = (items[3][0], items[4][1], items[3][2])
    decoded = [(key, logitcache.decode_image(png), target) for key, png, target in samples()]

    with pytest.raises(SampleMismatch, match=r"sample 3 \(scan/0003\) is not what the teacher saw: its content"):
        list(views_of(cache, items))
    with pytest.raises(SampleMismatch, match="pass check_contents=False"):
        list(views_of(cache, decoded, decode=None))  # type: ignore[arg-type]
    views = views_of(cache, decoded, decode=None, check_contents=False)  # type: ignore[arg-type]
    assert same(by_row(DataLoader(views_of(cache), batch_size=8)), by_row(DataLoader(views, batch_size=8)))


def test_a_stream_without_targets_has_those_of_the_cache(cache: logitcache.LogitCache) -> None:
    pairs = [(key, png) for key, png, _ in samples()]
    mappings = [{"id": key, "file": png} for key, png in pairs]
    found = by_row(DataLoader(views_of(cache, pairs), batch_size=8))  # type: ignore[arg-type]

    assert same(by_row(DataLoader(views_of(cache), batch_size=8)), found)
    named = views_of(cache, mappings, fields=("id", "file", None))  # type: ignore[arg-type]
    assert same(found, by_row(DataLoader(named, batch_size=8)))


def test_a_student_has_its_own_preprocessing(cache: logitcache.LogitCache, shards: list[Path]) -> None:
    resize = v2.Resize(16)
    dataset = logitcache.ViewDataset(logitcache.TarShards(shards), cache.view_plan, preprocess=resize)

    found = by_row(DataLoader(views_of(cache, preprocess=resize), batch_size=8))
    assert same(by_row(DataLoader(dataset, batch_size=8)), found)
    assert (3, 16, 16) == next(iter(found.values()))[0].shape


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        pytest.param([{"jpg": b""}], {}, "name those of key, sample and target with `fields`", id="mappings"),
        pytest.param(
            [{"jpg": b""}], {"fields": FIELDS}, "a sample of the stream lacks '__key__'; it has 'jpg'", id="field"
        ),
        pytest.param([b""], {}, r"the stream gives a bytes; expected \(key, sample, target\)", id="no tuple"),
        pytest.param([("scan/0001", 3, 0)], {}, "sample 'scan/0001' is a int, and `decode` takes bytes", id="no bytes"),
        pytest.param([("scan/0001", b"", "cat")], {}, "the target of sample 'scan/0001' is 'cat'", id="a class name"),
        pytest.param([("scan/0001", b"1", 0)], {}, "sample 'scan/0001' can't be decoded: Unidentified", id="no image"),
        pytest.param([], {"missing": "ignore"}, "missing is 'ignore'; expected one of 'error', 'skip'", id="option"),
        pytest.param([], {"cycle": [2]}, "there is no view 2; expected 0 to 1", id="view"),
        pytest.param([], {"cycle": []}, "`cycle` is empty", id="no view"),
    ],
)
def test_invalid_streams_and_options_are_refused(
    cache: logitcache.LogitCache, items: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((UsageError, SampleMismatch), match=message):
        list(views_of(cache, items, **options))


def test_a_cache_without_keys_is_joined_by_position_or_not_at_all(tmp_path: Path) -> None:
    images = torch.rand(6, 3, 4, 4)
    data = list(zip(images, [0, 1] * 3, strict=True))
    plan = logitcache.ViewPlan(transform=v2.RandomHorizontalFlip(), seed=1)
    names: list[dict[str, Any]] = [
        {"samples": logitcache.sample_table(data, contents=True)},  # type: ignore[arg-type]
        {"dataset": "named"},
    ]
    for number, how in enumerate(names):
        with logitcache.create(
            tmp_path / str(number), num_samples=6, num_classes=2, teacher="t", view_plan=plan, **how
        ) as writer:
            writer.write(view=0, start=0, logits=torch.randn(6, 2))
    stream = [(number, *data[number]) for number in (5, 0, 3)]
    views = logitcache.StreamViews(stream, logitcache.open(tmp_path / "0"), plan=plan)
    dataset = logitcache.ViewDataset(data, plan)  # type: ignore[arg-type]

    expected = [dataset[0, number] for number in (5, 0, 3)]
    assert [index for index, *_ in expected] == [index for index, *_ in views]
    assert all(torch.equal(value, found) for (_, value, _), (_, found, _) in zip(expected, views, strict=True))
    with pytest.raises(SampleMismatch, match="sample '6' of the stream is not in the cache, which has 6 samples"):
        list(logitcache.StreamViews([(6, *data[0])], logitcache.open(tmp_path / "0"), plan=plan))
    with pytest.raises(UsageError, match="has no table of samples, so a stream can't be joined to it by key"):
        logitcache.StreamViews(stream, logitcache.open(tmp_path / "1"), plan=plan)


def test_mixed_views_of_a_stream_need_partners(tmp_path: Path) -> None:
    images = torch.rand(8, 3, 6, 6)
    data = list(zip(images, [0, 1] * 4, strict=True))
    plan = logitcache.ViewPlan(
        transform=v2.RandomHorizontalFlip(), mixing=logitcache.Mixing(cutmix=1.0, mixup=0.4), num_classes=2
    )
    table = logitcache.sample_table(data, contents=True)  # type: ignore[arg-type]
    with logitcache.create(
        tmp_path / "a", num_samples=8, num_classes=2, teacher="t", samples=table, view_plan=plan
    ) as writer:
        writer.write(view=0, start=0, logits=torch.randn(8, 2))
    cache = logitcache.open(tmp_path / "a")
    stream = [(number, *data[number]) for number in (3, 7, 1)]
    dataset = logitcache.ViewDataset(data, plan)  # type: ignore[arg-type]
    found = list(logitcache.StreamViews(stream, cache, plan=plan, partner=data.__getitem__))

    for (index, value, target), number in zip(found, (3, 7, 1), strict=True):
        expected = dataset[0, number]
        assert expected[0] == index
        assert torch.equal(expected[1], value)
        assert torch.equal(expected[2], target)
    with pytest.raises(UsageError, match="need another sample of the dataset for each one: pass partner="):
        logitcache.StreamViews(stream, cache, plan=plan)


VOCABULARY = 24
TEXT_VIEWS = {
    "clean": None,
    "token dropout": [{"token_dropout": {"p": 0.4, "token_id": 0}}],
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("transform", TEXT_VIEWS.values(), ids=TEXT_VIEWS)
def test_token_sequences_of_a_stream_have_the_views_and_the_labels_of_the_map_style_run(
    tmp_path: Path, transform: Any, num_workers: int
) -> None:
    draw = np.random.default_rng(0)
    ids = [draw.integers(1, VOCABULARY, length) for length in (5, 1, 9, 3, 12, 7, 1, 4)]
    dataset = TokenDataset(
        ids, keys=[f"text/{number}" for number in range(8)], task="causal", vocab_size=VOCABULARY, tokenization={"t": 1}
    )
    rows = rows_of_dataset(dataset, 16)
    plan = logitcache.ViewPlan(transform=transform and build_transform(transform), seed=5, collate=pad, rows=rows)
    table = logitcache.sample_table(dataset, contents=True)
    teacher_views = logitcache.ViewDataset(dataset, plan)
    logits = torch.randn(2, rows.num_rows, VOCABULARY)
    with logitcache.create(
        tmp_path / "a", num_samples=8, num_classes=VOCABULARY, num_views=2, teacher="t", samples=table,
        view_plan=plan, rows_per_sample=dataset.rows_per_sample, rows_per_block=16, tokenization={"t": 1},
        encoding=logitcache.Dense(dtype="float32"),
    ) as writer:  # fmt: skip
        for view in range(2):
            digests = teacher_views.input_digests(view)
            writer.write(view=view, start=0, logits=logits[view], input_digests=digests)
    cache = logitcache.open(tmp_path / "a")
    order = [4, 1, 7, 0, 6, 2, 5, 3]
    stream = Samples([(dataset.keys[number], *dataset[number]) for number in order])  # type: ignore[misc]
    views = logitcache.StreamViews(stream, cache, plan=replace(cache.view_plan, collate=pad))
    expected_views = logitcache.ViewDataset(dataset, cache.view_plan)
    for epoch in range(2):
        view = views.set_epoch(epoch)
        seen = []
        loader = DataLoader(views, batch_size=3, num_workers=num_workers, collate_fn=views.collate)
        for index, inputs, targets in loader:
            at = logitcache.position_index(index, cache.row_map, inputs["input_ids"].shape[1])
            for place in torch.nonzero(index >= 0).flatten().tolist():
                number = int(cache.row_map.samples_of(index[place] % 2**40))
                seen.append(number)
                expected, length = expected_views[view, number], len(ids[number])

                assert expected[0] == index[place]
                assert expected[1]["input_ids"].tolist() == inputs["input_ids"][place, :length].tolist()
                assert length == inputs["attention_mask"][place].sum()
                assert expected[2].tolist() == targets[place][: len(expected[2])].tolist()
            labels = logits[view][at[at >= 0] % 2**40]
            assert torch.allclose(labels.log_softmax(1), cache.logits(at[at >= 0]).log_softmax(1), atol=1e-5)
        assert [0, 2, 3, 4, 5, 7] == sorted(seen)  # two texts of one token predict nothing
        views.summary().check()


def test_other_token_ids_of_a_stream_are_refused(tmp_path: Path) -> None:
    dataset = TokenDataset(
        [[1, 2, 3], [4, 5]], keys=["a", "b"], task="causal", vocab_size=VOCABULARY, tokenization={"t": 1}
    )
    table = logitcache.sample_table(dataset, contents=True)
    with logitcache.create(
        tmp_path / "a", num_samples=2, num_classes=VOCABULARY, teacher="t", samples=table,
        view_plan=logitcache.ViewPlan(), rows_per_sample=dataset.rows_per_sample,
    ) as writer:  # fmt: skip
        writer.write(view=0, start=0, logits=torch.randn(3, VOCABULARY))
    stream = [("a", {"input_ids": torch.tensor([1, 2, 4]), "attention_mask": torch.ones(3)}, None)]

    with pytest.raises(SampleMismatch, match=r"sample 0 \(a\) is not what the teacher saw: its content"):
        list(logitcache.StreamViews(stream, logitcache.open(tmp_path / "a")))


def share_of_rank(folder: str, rank: int, items: list[Item], place: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        views = views_of(logitcache.open(place), items[rank::2])
        indices = [index for index, *_ in views]
        own, summary = views.summary(), views.summary(all_ranks=True)
        np.savez(
            f"{folder}/rank-{rank}.npz",
            indices=indices,
            counts=[own.not_in_stream, summary.rendered, summary.repeated, summary.not_in_stream],
            keys=summary.not_in_stream_keys + summary.repeated_keys,
        )
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_add_up_their_summaries(cache: logitcache.LogitCache, forks: Any, tmp_path: Path) -> None:
    """A sample that two ranks read is repeated; one that no rank read is missing."""
    items = [*samples()[:39], samples()[0]]  # on ranks 0 and 1
    arguments = [(str(tmp_path), rank, items, str(cache.storage.url)) for rank in range(2)]
    ranks = [forks.Process(target=share_of_rank, args=each) for each in arguments]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    found = [np.load(tmp_path / f"rank-{rank}.npz") for rank in range(2)]

    assert 40 == sum(len(each["indices"]) for each in found)
    assert [[20, 40, 1, 1]] * 2 == [each["counts"].tolist() for each in found]
    assert [["scan/0039", "scan/0000"]] * 2 == [each["keys"].tolist() for each in found]


def test_parquet_and_hugging_face_files_teach_and_train_as_tar_files_do(
    pipeline: Pipeline, tiny: Callable[..., Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pipeline, three kinds of files: the same logits, and students with the same weights."""
    need_package("datasets", "hf")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    columns = {
        "name": [key for key, *_ in samples()],
        "image": [{"bytes": png, "path": None} for _, png, _ in samples()],
        "label": [target for *_, target in samples()],
    }
    features = datasets.Features(
        {
            "name": datasets.Value("string"),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list("0123456789")),
        }
    )
    dataset = datasets.Dataset.from_dict(columns, features=features)
    (tmp_path / "parquet/train").mkdir(parents=True)
    dataset.to_parquet(tmp_path / "parquet/train/0.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    turn = "views.transform=[{RandomAffine: {degrees: 180}}]"
    common = ["data.validation=0", "data.args.key=name", "cache.rows_per_block=16", turn]
    expected = cache_teacher(pipeline).manifest
    weights = trained(pipeline)
    for name, where in (
        ("parquet", f"data.root={tmp_path}/parquet"),
        ("huggingface", f"data.args.path={tmp_path}/saved"),
    ):
        places = [f"cache.path={tmp_path}/{name}.cache", f"runs.path={tmp_path}/{name}"]
        other = tiny(f"data.name={name}", where, *common, *places)
        manifest = cache_teacher(other).manifest
        caches = [logitcache.open(each.cache.path) for each in (pipeline, other)]

        assert expected.identity.dataset == manifest.identity.dataset
        assert torch.equal(*(each.view(1).logits(range(COUNT)) for each in caches))
        assert torch.equal(weights, trained(other))


def trained(pipeline: Pipeline) -> torch.Tensor:
    """The weights of a student after its training."""
    train_students(pipeline, ["small"])
    [file] = Path(pipeline.runs.path).glob("**/last.safetensors")
    return torch.cat([tensor.flatten() for _, tensor in sorted(safetensors.torch.load_file(file).items())])
