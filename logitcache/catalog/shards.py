"""Datasets in few large files: tar files of WebDataset, Parquet files, and Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.catalog.tokenization import need_package
from logitcache.data.shards import IMAGE_SUFFIXES, TarShards, decode_image
from logitcache.data.streamed import StreamDataset
from logitcache.errors import DatasetUnavailable, UsageError
from logitcache.registry import unknown_name

SPLITS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
"""Names of folders and of Hugging Face splits."""


def webdataset(
    root: Path,
    *,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    image: str | Sequence[str] = IMAGE_SUFFIXES,
    label: str = "cls",
    index: str | None = None,
    num_classes: int | None = None,
    class_names: list[str] | None = None,
) -> dict[str, TarShards]:
    """Images in tar files, without unpacking them.

    Args:
        root: folder of the tar files, with a subfolder for each split (train, val, test) or without.
        train, validation, test: patterns of the files of each split below the root, such as "imagenet-val-*.tar".
        image: suffix of the images, or several.
        label: suffix of the file with the class number; "json:label" is an entry of a JSON file.
        index: folder for an index of each tar file, so that its headers are read only once.
        num_classes: by default the number of `class_names`, or the largest class number and 1.
        class_names: one for each class.
    """
    files = _files(root, "webdataset", ".tar", {"train": train, "validation": validation, "test": test})
    return {
        split: TarShards(found, image=image, label=label, index=index, num_classes=num_classes, class_names=class_names)
        for split, found in files.items()
    }


def parquet(
    root: Path,
    *,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    image: str = "image",
    label: str = "label",
    key: str | None = None,
    streaming: bool = False,
) -> dict[str, HuggingFaceFiles] | dict[str, StreamDataset]:
    """Images in Parquet files, as bytes or as Hugging Face stores them.

    The library `datasets` copies the files once into an Arrow file in its own cache folder, for random access.

    Args:
        root: folder of the files, with a subfolder for each split (train, val, test) or without.
        train, validation, test: patterns of the files of each split below the root.
        image: column of the images.
        label: column of the class numbers.
        key: column of the keys; by default a sample's key is its position.
        streaming: read the files in order instead, without a copy, for stage 1 only.
    """
    files = _files(root, "parquet", ".parquet", {"train": train, "validation": validation, "test": test})
    datasets = need_package("datasets", "reads Parquet files")
    try:
        loaded = datasets.load_dataset(
            "parquet",
            data_files={split: [str(path) for path in found] for split, found in files.items()},
            streaming=streaming,
        )
    except Exception as error:
        raise DatasetUnavailable(f"parquet: the files of {root} can't be read: {_reason(error)}") from error
    return _images(loaded, image, label, key, streaming=streaming)


def huggingface(
    path: str,
    *,
    config: str | None = None,
    image: str = "image",
    label: str = "label",
    key: str | None = None,
    streaming: bool = False,
) -> dict[str, HuggingFaceFiles] | dict[str, StreamDataset]:
    """A Hugging Face dataset of images: of the Hub, or one saved with `save_to_disk`.

    Args:
        path: a name on the Hub, or a folder.
        config: name of the dataset's configuration.
        image: column of the images.
        label: column of the class numbers.
        key: column of the keys; by default a sample's key is its position.
        streaming: read the dataset in order, without downloading it first, for stage 1 only.
    """
    datasets = need_package("datasets", "reads Hugging Face datasets")
    folder = Path(path)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path, config, streaming=streaming)
    except Exception as error:
        raise DatasetUnavailable(f"huggingface: {path} can't be loaded: {_reason(error)}") from error
    return _images(loaded if isinstance(loaded, Mapping) else {"train": loaded}, image, label, key, streaming=streaming)


class HuggingFaceFiles:
    """A map-style dataset over a split of a Hugging Face dataset with a column of files.

    Items are (input, class number); by default the input is an RGB image.

    Args:
        split: a `datasets.Dataset`.
        column: of the files: `datasets.Image`, `datasets.Audio`, or bytes.
        label: column of the class numbers.
        key: column of the keys; None is the position.
        decode: makes an input of a file's bytes.

    Raises:
        UsageError: no such column.
    """

    def __init__(
        self,
        split: Any,
        column: str = "image",
        label: str = "label",
        key: str | None = None,
        decode: Callable[[bytes], Any] = decode_image,
    ) -> None:
        for name in (column, label, *([] if key is None else [key])):
            if name not in split.column_names:
                raise UsageError(unknown_name("column", name, split.column_names))
        datasets = need_package("datasets", "reads Hugging Face datasets")
        if isinstance(split.features[column], datasets.Image | datasets.Audio):
            split = split.cast_column(column, type(split.features[column])(decode=False))
        names = getattr(split.features[label], "names", None)
        if names:
            self.class_names = list(names)
        self.targets = np.asarray(split[label][:])
        if key is not None:
            self.keys = list(map(str, split[key][:]))
        self._column = column
        self._files = split.select_columns([column])
        self._decode = decode

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._decode(self.content(index)), int(self.targets[index])

    def content(self, index: int) -> bytes:
        """The bytes of the file."""
        value = self._files[int(index)][self._column]
        if isinstance(value, Mapping):
            value = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        if not isinstance(value, bytes):
            raise UsageError(f"the column {self._column!r} has a {type(value).__name__}; expected files or their bytes")
        return value


def _images(
    loaded: Mapping[str, Any], image: str, label: str, key: str | None, *, streaming: bool
) -> dict[str, HuggingFaceFiles] | dict[str, StreamDataset]:
    make: Any = _streamed if streaming else HuggingFaceFiles
    splits = {
        split: make(loaded[name], image, label, key)
        for split, names in SPLITS.items()
        for name in names
        if name in loaded
    }
    if "train" not in splits:
        raise UsageError(f"the dataset has the splits {', '.join(loaded)}; expected `train`")
    return splits


def _streamed(split: Any, image: str, label: str, key: str | None) -> StreamDataset:
    """A split of a Hugging Face dataset, map-style or streaming, as a stream; its keys and targets are read first."""
    datasets = need_package("datasets", "reads Hugging Face datasets")
    stream = split.to_iterable_dataset() if isinstance(split, datasets.Dataset) else split
    columns = [label, *([] if key is None else [key])]
    if stream.features is None:
        raise UsageError(
            "streaming: the dataset does not state its columns; write a function that returns a "
            "`logitcache.StreamDataset` over it, and set data.name to it"
        )
    for name in (image, *columns):
        if name not in stream.column_names:
            raise UsageError(unknown_name("column", name, stream.column_names))
    if isinstance(stream.features[image], datasets.Image):
        stream = stream.cast_column(image, datasets.Image(decode=False))
    rows = [tuple(row[name] for name in columns) for row in stream.select_columns(columns)]
    return StreamDataset(
        stream,
        fields=(key, image, label),
        decode=decode_image,
        keys=None if key is None else [row[1] for row in rows],
        targets=[row[0] for row in rows],
        class_names=getattr(stream.features[label], "names", None),
    )


def _files(root: Path, name: str, suffix: str, patterns: Mapping[str, str | None]) -> dict[str, list[Path]]:
    """The files of each split, sorted."""
    if not root.is_dir():
        raise DatasetUnavailable(f"{name}: the folder {root} does not exist; set data.root to the folder of the files")
    found = {}
    for split, folders in SPLITS.items():
        pattern = patterns[split]
        if pattern is not None:
            found[split] = sorted(root.glob(pattern))
            if not found[split]:
                raise DatasetUnavailable(f"{name}: no file of {root} matches {pattern!r}")
        else:
            for folder in folders:
                found.setdefault(split, []).extend(sorted((root / folder).glob(f"*{suffix}")))
    if not found["train"]:
        found["train"] = sorted(set(root.glob(f"*{suffix}")) - {file for files in found.values() for file in files})
    if not found["train"]:
        raise DatasetUnavailable(
            f"{name}: {root} has no files *{suffix}; expected {root}/train/*{suffix} (and val, test), or "
            f"{root}/*{suffix}. Other names: set data.args.train to a pattern"
        )
    return {split: files for split, files in found.items() if files}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
