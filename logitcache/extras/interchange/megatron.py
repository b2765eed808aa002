"""Megatron-LM's offline logits: tar archives of zstd frames of `torch.save`."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from logitcache.errors import InvalidSource, UsageError
from logitcache.extras.interchange.files import decompress_zstd, load_torch, matching, reading
from logitcache.extras.interchange.protocol import NO_IDENTITY, Importer, SparseRows
from logitcache.strict_json import parse_json

# S positions, B batch, K entries

MASKED = -1000.0
"""Value of an entry outside of the nucleus. Its id is not preserved."""
MAX_FRAME_BYTES = 2**30


class Megatron(Importer):
    """`cp{C}_dp{D}__{last iteration}.tar`.

    A sample is a sequence of a microbatch. Samples are in the order of the data loader: by iteration, microbatch,
    data-parallel rank and place in the microbatch.
    """

    name: ClassVar[str] = "megatron"
    tool: ClassVar[str] = "Megatron-LM"

    def __init__(self, source: Path, *, num_classes: int | None = None) -> None:
        super().__init__(source, num_classes=num_classes)
        self.require_classes(", padding of the vocabulary included")
        found = matching(source, r"cp(\d{1,4})_dp(\d{1,6})__(\d{1,12})\.tar")
        if not found:
            raise UsageError(f"{source} has no file cp0_dp0__{{iteration}}.tar")
        self.files = [path for _, path in found]
        if any(int(match[1]) for match, _ in found):
            raise UsageError(
                f"{source} was written with context parallelism, which divides each sequence over several files; that "
                "is not supported. Write the logits with a context-parallel size of 1"
            )
        places: dict[int, dict[int, Path]] = {}
        metas = []
        for match, file in found:
            with reading(file), tarfile.open(file, "r:") as archive:
                for member in archive:
                    if member.name == "_meta.json":
                        metas.append(parse_json(_content(archive, member, 2**20), max_bytes=2**20))
                    elif member.name.removesuffix(".pt.zst").isdecimal():
                        of_ranks = places.setdefault(int(member.name.removesuffix(".pt.zst")), {})
                        if of_ranks.setdefault(int(match[2]), file) != file:
                            raise InvalidSource(f"{file}: iteration {member.name} is also in {of_ranks[int(match[2])]}")
                    else:
                        raise InvalidSource(f"{file} has the unknown member {member.name!r:.80}")
        if not places or not metas:
            raise InvalidSource(f"{source} has no iterations, or no _meta.json")
        if any(meta != metas[0] for meta in metas):
            raise UsageError(f"{source} has files of different runs: their _meta.json differ")
        ranks = list(range(max(max(each) for each in places.values()) + 1))
        if any(sorted(each) != ranks for each in places.values()):
            raise UsageError(
                f"{source} lacks files: an iteration has no file of one of {len(ranks)} data-parallel ranks"
            )
        self._places = [(iteration, [places[iteration][rank] for rank in ranks]) for iteration in sorted(places)]
        lengths, entries = [], 1
        for _, ids, _ in self._microbatches():
            lengths += [ids.shape[0]] * ids.shape[1]
            entries = max(entries, ids.shape[2])
        self.k = entries
        self.num_samples = len(lengths)
        self.rows_per_sample = np.array(lengths, dtype=np.int64)
        self.missing = {
            "identity": f"{NO_IDENTITY}. Neither keys nor token ids are stored: the order of samples is that of a data "
            "loader with the seed, blend and sizes in the notes",
            "tail": "not stored; it is what the stored probabilities lack of 1, spread evenly over the other classes",
        }
        self.notes = {"meta": metas[0], "iterations": [self._places[0][0], self._places[-1][0]], "dp": len(ranks)}

    def _microbatches(self) -> Iterator[tuple[Path, np.ndarray, Tensor]]:
        """File, classes (S, B, K) and values (S, B, K) of each microbatch, in the order of samples."""
        for iteration, files in self._places:
            of_ranks = [self._iteration(file, iteration) for file in files]
            if len({len(each) for each in of_ranks}) != 1:
                raise InvalidSource(f"iteration {iteration} has different numbers of microbatches on its ranks")
            for microbatches in zip(*of_ranks, strict=True):
                for file, (ids, values) in zip(files, microbatches, strict=True):
                    yield file, ids, values

    def _iteration(self, file: Path, iteration: int) -> list[tuple[np.ndarray, Tensor]]:
        with reading(file), tarfile.open(file, "r:") as archive:
            member = archive.getmember(f"{iteration}.pt.zst")
            frame = decompress_zstd(_content(archive, member, MAX_FRAME_BYTES), MAX_FRAME_BYTES)
            saved = load_torch(frame)
            parts = list(zip(saved["values"], saved["indices_low"], saved["bit_17"], strict=True))
            return [_entries(*part) for part in parts]

    def batches(self) -> Iterator[SparseRows]:
        start = 0
        for file, ids_SBK, values_SBK in self._microbatches():
            for place in range(ids_SBK.shape[1]):
                log_probs = values_SBK[:, place].float().numpy()
                # The id of a masked entry is not preserved: the value marks it.
                ids = np.where(log_probs <= MASKED, -1, ids_SBK[:, place])
                yield SparseRows(0, start, ids, log_probs, file)
                start += len(ids)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    opened = archive.extractfile(member)
    if opened is None or not member.isreg() or member.size > limit:
        raise InvalidSource(f"member {member.name!r:.80} is no regular file of at most {limit:,} bytes")
    return opened.read()


def _entries(values: Any, low: Any, high: Any) -> tuple[np.ndarray, Tensor]:
    """Classes (S, B, K), and values (S, B, K) as they are stored."""
    same = all(
        isinstance(each, Tensor) and each.ndim == 3 and each.shape == values.shape for each in (values, low, high)
    )
    if not same or not values.is_floating_point() or low.dtype != torch.uint16 or high.dtype != torch.bool:
        raise InvalidSource("a microbatch without values (float), indices_low (uint16) and bit_17 (bool) of one shape")
    return low.numpy().astype(np.int64) + (high.numpy().astype(np.int64) << 16), values
