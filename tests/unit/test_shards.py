"""Samples are read from tar files at their offsets; damaged tar files are refused."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import logitcache
from logitcache.data import shards
from logitcache.data.samples import load_sample
from logitcache.errors import DatasetUnavailable, LogitCacheError, UnreadableSample, UsageError
from tests.pictures_in_files import COUNT, samples, write_shards, write_tar


def write_members(path: Path, **files: bytes) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_samples_of_tar_files_are_those_that_were_written(tmp_path: Path) -> None:
    written = samples()
    dataset = logitcache.TarShards(write_shards(tmp_path))

    assert [key for key, *_ in written] == dataset.keys
    assert [target for *_, target in written] == dataset.targets.tolist()
    for index in (39, 0, 14, 13):
        _, png, target = written[index]
        image, found = dataset[index]
        assert (png, target) == (dataset.content(index), found)
        assert "RGB" == image.mode
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), np.asarray(image))


def test_threads_and_copies_in_other_processes_read_the_same(tmp_path: Path) -> None:
    dataset = logitcache.TarShards(write_shards(tmp_path))
    expected = [png for _, png, _ in samples()]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(dataset.content, [*range(COUNT)] * 5))

    assert expected * 5 == found
    assert expected == list(map(pickle.loads(pickle.dumps(dataset)).content, range(COUNT)))


def test_many_shards_are_not_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    dataset = logitcache.TarShards(write_shards(tmp_path))

    assert [png for _, png, _ in samples()] == list(map(dataset.content, range(COUNT)))
    assert {} == dataset._open


def test_an_index_is_used_again_until_the_tar_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_shards(tmp_path / "shards")
    first = logitcache.TarShards(paths, index=tmp_path / "index")
    with monkeypatch.context() as patched:
        patched.setattr(shards, "_samples", None)
        again = logitcache.TarShards(paths, index=tmp_path / "index")
    assert [first.content(index) for index in range(COUNT)] == [again.content(index) for index in range(COUNT)]
    write_tar(paths[0], samples()[:3])
    for path in (tmp_path / "index").glob("part-1*"):
        path.write_bytes(path.read_bytes()[:100])
    changed = logitcache.TarShards(paths, index=tmp_path / "index")

    assert 3 == len(list((tmp_path / "index").iterdir()))
    assert first.keys == again.keys
    assert [*first.keys[:3], *first.keys[14:]] == changed.keys


def test_a_label_can_be_an_entry_of_a_json_file(tmp_path: Path) -> None:
    png = samples()[0][1]
    path = write_members(tmp_path / "a.tar", a_png=png, a_json=b'{"label": 3}', a_txt=b"a caption")

    assert [3] == logitcache.TarShards([path], label="json:label").targets.tolist()
    with pytest.raises(UsageError, match=r"the label a.json of .*a.tar is .*expected a JSON object .* 'class'"):
        logitcache.TarShards([path], label="json:class")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param({"a_cls": b"1"}, "sample 'a' of .* has no image; expected a.jpg", id="no image"),
        pytest.param({"a_png": b"1"}, "sample 'a' of .* has no label; expected a.cls", id="no label"),
        pytest.param({"a_png": b"1", "a_cls": b"cat"}, "the label a.cls of .* is b'cat'; expected a class", id="name"),
        pytest.param({"a_png": b"1", "a_jpg": b"", "a_cls": b"1"}, "sample 'a' of .* has two images", id="two images"),
        pytest.param(
            {"a_png": b"1", "a_cls": b"1", "b_png": b"1", "b_cls": b"1", "a_txt": b""},
            "the key 'a' comes twice in",
            id="a key twice",
        ),
        pytest.param({"README": b"no sample"}, "has no samples; expected files such as KEY.jpg", id="no samples"),
    ],
)
def test_tar_files_without_complete_samples_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        logitcache.TarShards([write_members(tmp_path / "a.tar", **files)])


def test_a_key_in_two_tar_files_is_refused(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{name}.tar", samples()[:2]) for name in "ab"]

    with pytest.raises(UsageError, match=r"the key 'scan/0000' is in .*a.tar and in .*b.tar; expected one sample"):
        logitcache.TarShards(paths)


def compressed(data: bytes) -> bytes:
    import gzip

    return gzip.compress(data)


def enlarged(data: bytes) -> bytes:
    """The size of the first file is larger than the tar file; with a right checksum."""
    header = bytearray(data[:512])
    header[124:136] = b"77777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + data[512:]


def negative(data: bytes) -> bytes:
    """The size of the first file is negative, in tar's binary form."""
    header = bytearray(data[:512])
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + data[512:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda data: data[: len(data) // 2 - 700], "no complete tar file|is damaged", id="truncated"),
        pytest.param(lambda data: data[:2048], "no complete tar file: expected its end", id="cut between files"),
        pytest.param(lambda data: data[:1024] + b"\xaa" * 512 + data[1536:], "no complete tar file", id="a header"),
        pytest.param(lambda data: b"\xaa" * 2000, "no complete tar file", id="not tar"),
        pytest.param(lambda data: b"", "no complete tar file", id="empty"),
        pytest.param(compressed, "no complete tar file: it is compressed", id="compressed"),
        pytest.param(enlarged, "is damaged: its file 'scan/0000.png' has 8589934591 bytes", id="too large"),
        pytest.param(negative, "is damaged|no complete tar file", id="negative size"),
    ],
)
def test_a_damaged_tar_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = write_tar(tmp_path / "a.tar", samples()[:3])
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(DatasetUnavailable, match=message):
        logitcache.TarShards([path])


def test_any_changed_byte_of_the_headers_gives_the_same_samples_or_an_error(tmp_path: Path) -> None:
    """No traceback of tarfile's, no hang."""
    path = write_tar(tmp_path / "a.tar", samples()[:2])
    data = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for place in random.integers(0, 512, 60).tolist():
        path.write_bytes(data[:place] + bytes([data[place] ^ int(random.integers(1, 256))]) + data[place + 1 :])
        try:
            logitcache.TarShards([path])
        except LogitCacheError:
            refused += 1

    assert refused > 40


def test_a_tar_file_that_changed_after_it_was_indexed_is_an_unreadable_sample(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    dataset = logitcache.TarShards(paths)
    write_tar(paths[1], samples()[:3])

    with pytest.raises(UnreadableSample, match=r"sample 'scan/0014' \(number 14\) can't be read.*has changed since"):
        load_sample(dataset, 14)
