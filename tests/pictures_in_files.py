"""Forty small pictures as PNG files in tar files, in Parquet files and as Hugging Face datasets."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from tests.models import Pictures

COUNT = 40


def samples() -> list[tuple[str, bytes, int]]:
    """(key, PNG file, target) of each picture."""
    pictures = Pictures(COUNT)
    found = []
    for number in range(COUNT):
        image, target = pictures[number]
        file = io.BytesIO()
        image.save(file, format="PNG")
        found.append((f"scan/{number:04d}", file.getvalue(), target))
    return found


def write_tar(path: Path, chosen: list[tuple[str, bytes, int]]) -> Path:
    """A tar file of the WebDataset form."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, png, target in chosen:
            for suffix, data in (("png", png), ("cls", str(target).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path) -> list[Path]:
    """Three tar files of 14, 14 and 12 pictures."""
    found = samples()
    return [write_tar(folder / f"part-{number}.tar", found[14 * number : 14 * number + 14]) for number in range(3)]
