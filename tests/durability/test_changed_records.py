"""Whole caches with changed records, as somebody who knows the format would change them."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import logitcache
from logitcache.data.transforms import build_transform
from logitcache.data.views import Mixing, ViewPlan
from logitcache.digest import sha256_hex
from logitcache.encodings import LowRank
from tests.contract.test_refusals import CLASSES, SAMPLES, forge_manifest, labels, table, used
from tests.durability.test_trust import VALUES, damaged_tree


def with_everything(folder: Path) -> list[Path]:
    """Caches of several encodings, each with samples, views, class names, a card and another output."""
    plan = ViewPlan(
        transform=build_transform(
            [{"RandomCrop": {"size": 8}}, {"RandomApply": {"transforms": ["RandomHorizontalFlip"]}}]
        ),
        seed=3,
        mixing=Mixing(mixup=0.4, probability=0.5),
        preprocess=build_transform([{"Normalize": {"mean": [0.5], "std": [0.5]}}, {"tests.models:shift": {"by": 1}}]),
        num_classes=CLASSES,
    )
    settings: dict[str, Any] = {
        "num_samples": SAMPLES, "num_classes": CLASSES, "rows_per_block": 8, "samples": table(), "view_plan": plan,
        "teacher": "net@1", "class_names": list("abcdef"), "calibration": labels(), "card": {"tags": ["x"]},
        "outputs": {"features": logitcache.Output(shape=(2, 3))},
    }  # fmt: skip
    paths = []
    for number, encoding in enumerate([logitcache.TopK(k=2), LowRank(rank=3), logitcache.Dense(dtype="uint8")]):
        paths.append(folder / str(number))
        with logitcache.create(paths[-1], encoding=encoding, **settings) as writer:
            writer.write(view=0, start=0, logits=labels(), outputs={"features": labels().reshape(SAMPLES, 2, 3)})
    return paths


ODD: list[Any] = [
    *VALUES, [1, 2], {"name": "x"}, {"x": [{"RandomCrop": {"size": 3}}]}, ["RandomCrop"], "os:system", 1e308, 2**31, [None],
    {"a": None}, "tests.models:shift@00", {"transforms": [["a"]]},
]  # fmt: skip


def fuzz_caches(rounds: int, seed: int, folder: Path) -> int:
    """Change something in a whole cache's records, as somebody who knows the format, and use it in every way."""
    draw = random.Random(seed)
    originals = with_everything(folder / "originals")
    path = folder / "changed"
    for _ in range(rounds):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(draw.choice(originals), path)
        receipts = json.loads((path / "receipts.json").read_text())

        def change(raw: dict[str, Any], receipts: Any = receipts) -> None:
            where = draw.choice(
                ["identity", "identity", "transform", "transform", "layout", "provenance", "contents", "receipts"]
            )
            holder = raw["identity"] if where == "transform" else raw
            if where == "receipts":
                data = json.dumps(damaged_tree(receipts, draw, ODD)).encode()
                (path / "receipts.json").write_bytes(data)
                raw["receipts"] = sha256_hex(data)
            else:
                holder[where] = damaged_tree(holder[where], draw, ODD)
            if draw.random() < 0.1:
                raw.update(state="open", digest=None)

        try:
            forge_manifest(path, change)
        except (ValueError, TypeError):  # JSON that nobody can write, or an identity of another form
            continue
        used(path)
    return rounds


def test_a_cache_with_odd_records_meets_no_foreign_exception(tmp_path: Path) -> None:
    """`python -m tests.durability.test_changed_records 5000` for more."""
    assert 60 == fuzz_caches(60, 0, tmp_path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{fuzz_caches(int(sys.argv[1]), 1, Path(scratch))} changed caches, no foreign exception")
