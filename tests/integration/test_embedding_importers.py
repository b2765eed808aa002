"""Embeddings of other tools arrive as outputs of a cache without classes."""

from __future__ import annotations

import base64
import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import logitcache
from logitcache.data.recorded import OPERATIONS
from logitcache.data.samples import SampleTable
from logitcache.errors import InvalidLogits, InvalidSource, UsageError
from tests.integration.test_importers import Bomb, imported, peers, saved

VIEWS, CAPTIONS, SIZE = 3, 2, 8
Embeddings = dict[str, np.ndarray]


def embeddings(seed: int) -> Embeddings:
    random = np.random.default_rng(seed)
    shapes = {"image_emb": (VIEWS, SIZE), "text_emb": (1, SIZE), "syn_text_emb": (CAPTIONS, SIZE)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def as_npz(values: Embeddings) -> bytes:
    data = io.BytesIO()
    np.savez(data, **values)  # type: ignore[arg-type]
    return data.getvalue()


def as_torch(values: Embeddings) -> bytes:
    return gzip.compress(saved({name: torch.from_numpy(each).bfloat16() for name, each in values.items()}))


def shard(folder: Path, members: dict[str, bytes], name: str = "00000000.tar") -> None:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w") as opened:
        for member, data in members.items():
            header = tarfile.TarInfo(member)
            header.size = len(data)
            opened.addfile(header, io.BytesIO(data))


def lines(
    folder: Path, samples: dict[str, Embeddings], *, pickled: Callable[[np.ndarray], bytes] = pickle.dumps
) -> None:
    folder.mkdir(exist_ok=True)
    encoded = [
        {"uid": uid, "text": "a"}
        | {name: base64.b64encode(gzip.compress(pickled(each))).decode() for name, each in values.items()}
        for uid, values in samples.items()
    ]
    (folder / "00000000.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in encoded))


@pytest.mark.parametrize("form", ["npz", "pth.gz", "jsonl", "jsonl, protocol 5"])
def test_embeddings_become_outputs(tmp_path: Path, form: str) -> None:
    samples = {f"00{number}": embeddings(number) for number in range(3)}
    if form.startswith("jsonl"):
        protocol = 5 if form.endswith("5") else 4
        lines(tmp_path / "in", samples | {"009": {}}, pickled=lambda values: pickle.dumps(values, protocol=protocol))
    else:
        write = as_npz if form == "npz" else as_torch
        members = {f"{uid}.{form}": write(values) for uid, values in samples.items()}
        shard(tmp_path / "in", {"009.jpg": b"without embeddings", "000.jpg": b"x", **members})
    cache = imported(tmp_path / "a", "data_comp_dr", tmp_path / "in")
    exact = {"atol": 0, "rtol": 0} if form != "pth.gz" else {"atol": 1e-4, "rtol": 2**-8}

    assert (3, VIEWS, 2) == (cache.num_samples, cache.num_views, cache.num_classes)
    assert {
        "image_emb": (SIZE,),
        "text_emb": (SIZE,),
        "syn_text_emb": (CAPTIONS, SIZE),
    } == cache.outputs
    for view in range(VIEWS):
        for name, pick in (("image_emb", view), ("text_emb", 0), ("syn_text_emb", slice(None))):
            expected = np.stack([each[name][pick] for each in samples.values()])
            found = cache.view(view).output(name, range(3))
            torch.testing.assert_close(found, torch.from_numpy(expected), **exact)
    provenance = cache.manifest.provenance["imported"]
    assert 1 == provenance["notes"]["samples_without_embeddings"]
    assert "logits" in provenance["missing"]


def test_samples_are_matched_by_uid(tmp_path: Path) -> None:
    samples = {f"00{number}": embeddings(number) for number in range(3)}
    lines(tmp_path / "in", samples)
    table = SampleTable(2, ["002.jpg", "000.jpg"], np.zeros(2, dtype=np.int64), np.zeros((2, 16), dtype=np.uint8))
    cache = imported(tmp_path / "a", "data_comp_dr", tmp_path / "in", samples=table, dataset=None)

    assert torch.equal(torch.from_numpy(samples["002"]["image_emb"][1]), cache.view(1).output("image_emb", [0])[0])


def test_hostile_shards_are_refused_and_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = embeddings(0)
    objects = io.BytesIO()
    np.savez(objects, image_emb=np.array([Bomb()], dtype=object))
    cases: dict[str, tuple[Callable[[Path], object], str]] = {
        "pickle": (lambda to: lines(to, {"0": good}, pickled=lambda _: pickle.dumps(Bomb())), "nothing was run"),
        "torch": (lambda to: shard(to, {"0.pth.gz": gzip.compress(saved({"image_emb": Bomb()}))}), "nothing was run"),
        "objects": (lambda to: shard(to, {"0.npz": objects.getvalue()}), "allow_pickle=False"),
        "bomb": (lambda to: shard(to, {"0.pth.gz": gzip.compress(bytes(2**25))}), "longer than"),
        "shapes": (
            lambda to: shard(to, {"0.npz": as_npz(good), "1.npz": as_npz(good | {"text_emb": np.zeros((1, 9))})}),
            "expected .* as those of the first sample",
        ),
        "twice": (lambda to: shard(to, {"0.npz": as_npz(good), "0.pth.gz": as_torch(good)}), "embeddings twice"),
        "no images": (lambda to: shard(to, {"0.npz": as_npz({"text_emb": good["text_emb"]})}), "expected"),
        "nothing": (lambda to: shard(to, {"0.jpg": b"x"}), "no sample with embeddings"),
    }
    for name, (write, message) in cases.items():
        write(tmp_path / name)
        with pytest.raises(InvalidSource, match=message):
            imported(tmp_path / f"{name}.cache", "data_comp_dr", tmp_path / name)
    with pytest.raises(UsageError, match="without classes; leave out --num-classes"):
        imported(tmp_path / "b", "data_comp_dr", tmp_path / "shapes", num_classes=1000)

    assert not (tmp_path / "exploded").exists()


def test_a_wrong_embedding_is_refused_with_the_name_of_its_shard(tmp_path: Path) -> None:
    wrong = embeddings(2)
    wrong["text_emb"][0, 3] = np.nan
    shard(tmp_path / "in", {"0.npz": as_npz(embeddings(0)), "1.npz": as_npz(embeddings(1))})
    shard(tmp_path / "in", {"2.npz": as_npz(wrong)}, "00000001.tar")

    with pytest.raises(InvalidLogits, match="00000001.tar, view 0: view 0, row 2: the teacher's text_emb hold NaN"):
        imported(tmp_path / "a", "data_comp_dr", tmp_path / "in")


@pytest.mark.parametrize("which", ["wds_bf16", "wds_bf16_paug", "wds_npz", "jsonl"])
def test_files_of_data_comp_dr(tmp_path: Path, which: str) -> None:
    folder, expected = peers("ml_mobileclip_dr")
    details = tmp_path / "keys.npz"
    cache = imported(tmp_path / "a", "data_comp_dr", folder / which, details=details)
    exact = {"atol": 0, "rtol": 0} if "bf16" not in which else {"atol": 1e-6, "rtol": 0}

    assert expected[f"{which}__uid"].tolist() == np.load(details)["keys"].tolist()
    for name in ("image_emb", "text_emb", "syn_text_emb"):
        if f"{which}__{name}" in expected:
            values = torch.from_numpy(expected[f"{which}__{name}"])
            for view in range(cache.num_views):
                wanted = values[:, view] if name == "image_emb" else values[:, 0] if values.shape[1] == 1 else values
                torch.testing.assert_close(cache.view(view).output(name, range(len(wanted))), wanted, **exact)


def test_a_student_renders_the_augmentations_of_data_comp_dr(tmp_path: Path) -> None:
    """With the parameters that the tool's own reader gives, by torchvision's functions."""
    from PIL import Image
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F
    from torchvision.transforms.autoaugment import _apply_op

    folder, expected = peers("ml_mobileclip_dr")
    cache = imported(tmp_path / "a", "data_comp_dr", folder / "wds_bf16_paug")
    with tarfile.open(folder / "wds_bf16_paug/00000000.tar") as opened:
        files = [opened.extractfile(f"{uid}.jpg") for uid in expected["wds_bf16_paug__uid"]]
        images = [Image.open(io.BytesIO(file.read())).convert("RGB") for file in files if file is not None]
    normalize = json.loads((folder / "wds_bf16_paug/config.json").read_text())["normalize"]
    views = logitcache.ViewDataset([(image, 7) for image in images], cache.view_plan)
    for number, stored in enumerate(expected["wds_bf16_paug__param_aug_json"]):
        for view, (crop, operations) in enumerate(json.loads(stored)):
            image = F.resized_crop(images[number], *crop, [32, 32], InterpolationMode.BICUBIC)
            for operation, magnitude in operations:
                image = _apply_op(image, OPERATIONS[operation], magnitude, InterpolationMode.NEAREST, None)
            pixels = F.normalize(F.to_tensor(image), normalize["mean"], normalize["std"])
            _, found, label = views[(view, number)]
            torch.testing.assert_close(found, pixels, atol=2e-6, rtol=0)
            assert 7 == label


def test_augmentations_that_are_not_those_of_the_embeddings_are_refused(tmp_path: Path) -> None:
    config = {"random_resized_crop": {"size": 8}}
    for name, stored, message in (
        ("views", [[[0, 0, 4, 4]]], "parameters of 1 augmentations; expected 3"),
        ("box", [[[0, -1, 4, 4]]] * VIEWS, "crop box that starts outside"),
        ("more", [[[0, 0, 4, 4], 1]] * VIEWS, "parameters of 2 transforms"),
    ):
        data = json.dumps({"param_aug": stored}).encode()
        shard(tmp_path / name, {"0.npz": as_npz(embeddings(0)), "0.paug.json": data})
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        with pytest.raises(InvalidSource, match=message):
            imported(tmp_path / f"{name}.cache", "data_comp_dr", tmp_path / name)


def test_a_cache_of_embeddings_has_no_logits(tmp_path: Path) -> None:
    lines(tmp_path / "in", {str(number): embeddings(number) for number in range(10)})
    cache = imported(tmp_path / "a", "data_comp_dr", tmp_path / "in")

    assert not cache.has_logits
    with pytest.raises(UsageError, match="files have no logits; leave out --encoding"):
        imported(tmp_path / "b", "data_comp_dr", tmp_path / "in", encoding="topk(k=1)")
