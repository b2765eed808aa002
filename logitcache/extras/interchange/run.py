"""Write the cache of another tool as a cache of logitcache."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from logitcache.cache.card_fields import Card, card_from
from logitcache.cache.creation import create
from logitcache.cache.fidelity import Calibration
from logitcache.cache.manifest import Manifest
from logitcache.cache.outputs import Output
from logitcache.cache.writer import CacheWriter
from logitcache.data.recorded import PARAMETERS, RecordedTransform, build_replay, first_invalid
from logitcache.data.samples import SampleTable
from logitcache.data.tokens import NO_CLASS
from logitcache.data.transforms import build_transform
from logitcache.data.views import ViewPlan
from logitcache.digest import ArrayDigest, sha256_hex
from logitcache.encodings import Auto, Dense, Encoding, NoLogits, PackedTopK, TopK, Values, encoding_or_auto
from logitcache.errors import InvalidLogits, InvalidSource, SampleMismatch, UsageError
from logitcache.extras.interchange.arrays import NumpyArrays
from logitcache.extras.interchange.axolotl import Axolotl
from logitcache.extras.interchange.distillkit import DistillKit, OpenInstruct
from logitcache.extras.interchange.embeddings import DataCompDR
from logitcache.extras.interchange.hidden_states import Head, SpecForge, Speculators
from logitcache.extras.interchange.image_labels import FKD, MlDr
from logitcache.extras.interchange.maxtext import MaxText
from logitcache.extras.interchange.megatron import Megatron
from logitcache.extras.interchange.parquet import ParquetLogits
from logitcache.extras.interchange.protocol import DenseRows, Importer, RecordedViews, SparseRows
from logitcache.extras.interchange.tinyvit import TinyViT
from logitcache.progress import track
from logitcache.registry import Registry
from logitcache.storage.local import LocalStorage

# B batch, K entries, N samples

IMPORTERS: Registry[type[Importer]] = Registry(
    "format",
    {
        each.name: each
        for each in (
            NumpyArrays,
            ParquetLogits,
            TinyViT,
            DistillKit,
            OpenInstruct,
            Axolotl,
            Megatron,
            FKD,
            MlDr,
            DataCompDR,
            SpecForge,
            Speculators,
            MaxText,
        )
    },
    plural="importers",
    base=Importer,
)
"""The formats by name: those of logitcache and of installed packages."""
IMPORTED = "imported"
"""Key of the provenance that describes the source of an imported cache."""
CALIBRATION_ROWS = 10_000
"""The fewest rows that an encoding is fitted to, unless the source has fewer."""
EXACT = Values(dtype="float32")
ROUNDING = 1e-3
"""By how much probabilities exceed 1 from rounding alone; as `write_sparse` allows."""


@dataclass(frozen=True)
class ImportResult:
    """The result of an import."""

    manifest: Manifest
    source_files: int
    source_bytes: int
    missing: dict[str, str]
    """What the format lacks, and the consequence."""
    tail_mean: float | None
    """Mean probability of the classes without entry, of sparse rows; None if no row was read."""
    normalised_rows: int
    """Rows whose probabilities exceeded 1 and were normalized."""
    details: str | None
    """The file with seeds, boxes or parameters of the views."""


def import_cache(
    format: str,
    source: str | os.PathLike[str],
    cache: str | os.PathLike[str],
    *,
    teacher: str,
    dataset: str | None = None,
    samples: SampleTable | None = None,
    num_classes: int | None = None,
    head: Head | None = None,
    encoding: Encoding | Auto | str | Mapping[str, Any] | None = None,
    details: str | os.PathLike[str] | None = None,
    card: Card | Mapping[str, Any] | None = None,
) -> ImportResult:
    """Read the cache of another tool, write it as a cache, and seal it.

    Idempotent; safe to interrupt: run it again to resume. What the format lacks is stated in the manifest's provenance
    (`imported`) and on the card.

    Args:
        format: a name of `IMPORTERS`.
        source: a local file or folder.
        cache: a directory or URL.
        teacher: identity of the teacher, such as "convnext_large@3f9c"; formats do not record it.
        dataset: identity of the dataset: a name. Not needed with `samples`, or if the format stores token ids.
        samples: the samples of your copy of the dataset, from `sample_table(dataset, contents=True)`. Rows get their
            order, matched by key; without keys in the format, or with token ids, the order must be the same.
        num_classes: all classes of the teacher, for formats that don't state it.
        head: the teacher's head, for formats of hidden states: the matrix (C, H), a .safetensors file with it, or a
            function from states float32 (S, H) to logits (S, C).
        encoding: by default float32 (or float16, as the source): `Dense`, or `TopK` with the source's k.
        details: an .npz file to write: keys, and the seeds, crop boxes or parameters that the format stores of views.
        card: as in `create`.

    Raises:
        UsageError: an unknown format, a source of another format, a missing argument or package.
        InvalidSource: a file is damaged or malicious. Nothing of it is executed.
        InvalidLogits: labels that define no distribution; names file and row.
        SampleMismatch: the samples differ from those of the source.
        IdentityMismatch: the path holds another cache.
    """
    kind = IMPORTERS[format]
    if head is not None and not kind.takes_head:
        raise UsageError(f"{kind.tool} files have logits or probabilities; leave out the head")
    options: dict[str, Any] = {"head": head} if kind.takes_head else {}
    importer = kind(Path(source), num_classes=num_classes, **options)
    table = _sample_table(importer, samples)
    if table is None and dataset is None:
        raise UsageError(
            f"{importer.tool} files do not record the dataset; add --dataset NAME (dataset=), or your copy of it "
            "(--data, samples=)"
        )
    notes: dict[str, Any] = {
        "format": format,
        "tool": importer.tool,
        "files": len(importer.files),
        "bytes": sum(file.stat().st_size for file in importer.files),
        "missing": importer.missing,
        "notes": importer.notes,
    }
    if details is not None:
        notes["details_sha256"] = _write_details(importer, table, Path(details))
    chosen = _encoding(importer, encoding)
    recorded = importer.recorded
    with create(
        cache,
        num_samples=importer.num_samples,
        num_classes=importer.num_classes,
        num_views=importer.num_views,
        encoding=chosen,
        calibration=lambda: _calibration(importer),
        teacher=teacher,
        dataset=dataset if table is None else None,
        dataset_name=dataset,
        samples=table,
        view_plan=None if recorded is None else _view_plan(importer, recorded),
        outputs=_outputs(importer),
        precision="unknown",
        rows_per_sample=importer.rows_per_sample,
        rows_per_block=importer.rows_per_block,
        card=_card(importer, card),
        notes={IMPORTED: notes},
    ) as writer:
        tails, normalised = _write(writer, importer) if writer.missing_blocks() else ([], 0)
        manifest = writer.seal()
    return ImportResult(
        manifest=manifest,
        source_files=len(importer.files),
        source_bytes=notes["bytes"],
        missing=importer.missing,
        tail_mean=float(np.concatenate(tails).mean()) if tails else None,
        normalised_rows=normalised,
        details=None if details is None else os.fspath(details),
    )


def _sample_table(importer: Importer, samples: SampleTable | None) -> SampleTable | None:
    """The sample table of the cache: the given one, or that of the token ids in the source."""
    if samples is None:
        if importer.contents is None:
            return None
        targets = np.full(importer.num_samples, NO_CLASS, dtype=np.int64)
        return SampleTable(importer.num_samples, None, targets, importer.contents)
    if importer.keys is not None:
        importer.select(_order(importer.keys, samples))
    elif samples.num_samples != importer.num_samples:
        raise SampleMismatch(
            f"{importer.source} has labels of {importer.num_samples} samples, the dataset has {samples.num_samples}; "
            f"{importer.tool} identifies samples by position, so expected the same dataset"
        )
    elif importer.contents is not None and samples.contents is not None:
        differing = np.flatnonzero((importer.contents != samples.contents).any(axis=1))
        if len(differing):
            raise SampleMismatch(
                f"{len(differing)} of {importer.num_samples} sequences of {importer.source} have other token ids than "
                f"the dataset, the first being number {differing[0]}. Use the same tokenizer, truncation and order"
            )
    return samples


def _order(keys: Any, samples: SampleTable) -> np.ndarray:
    """For each sample of a dataset its number among the keys of the source, int64 (N,).

    A dataset's key may have folders and a file extension that the source's lacks.

    Raises:
        SampleMismatch: a sample has no labels in the source.
    """
    place = {key: number for number, key in enumerate(keys)}
    if len(place) < len(keys):
        raise UsageError("keys of the source repeat; import its splits one by one")
    order = np.empty(samples.num_samples, dtype=np.int64)
    for number in range(samples.num_samples):
        key = samples.key(number)
        path = PurePosixPath(key)
        stem = path.name.partition(".")[0]
        found = [place[each] for each in (key, f"{path.parent.name}/{stem}", path.stem, stem) if each in place]
        if not found:
            raise SampleMismatch(
                f"the source has no labels of sample {number} ({key}); its keys are such as {keys[0]!r}"
            )
        order[number] = found[0]
    if len(np.unique(order)) < len(order):
        raise SampleMismatch("several samples of the dataset have the same key in the source")
    return order


def _encoding(importer: Importer, encoding: Any) -> Encoding | Auto:
    if not importer.num_classes:
        if encoding is not None and not isinstance(encoding_or_auto(encoding), NoLogits):
            raise UsageError(f"{importer.tool} files have no logits; leave out --encoding (encoding=)")
        return NoLogits()
    if encoding is not None:
        chosen = encoding_or_auto(encoding)
        if importer.k is not None and not isinstance(chosen, PackedTopK | TopK):
            raise UsageError(
                f"{importer.tool} stores at most {importer.k} classes of each row, which needs the encoding TopK or "
                f"PackedTopK, not {chosen.name}"
            )
        return chosen
    if importer.k is None:
        return Dense(dtype=importer.dtype)
    return TopK(k=min(importer.k, importer.num_classes - 1), dtype=importer.dtype)


def _calibration(importer: Importer) -> Calibration:
    """10 000 to 20 000 rows of all views, at equal distances; all rows if there are fewer."""
    rows = importer.num_samples if importer.rows_per_sample is None else int(importer.rows_per_sample.sum())
    stride = max(1, rows * importer.num_views // CALIBRATION_ROWS)
    parts, done = [], 0
    for batch in importer.batches():
        assert isinstance(batch, DenseRows)
        parts.append(batch.logits[-done % stride :: stride])
        done += len(batch.logits)
    return Calibration(np.concatenate(parts).astype(np.float32))


def _outputs(importer: Importer) -> dict[str, Output]:
    """The outputs beside the logits: those of the format, and the parameters of its views."""
    if importer.recorded is None:
        return dict(importer.outputs)
    return {**importer.outputs, PARAMETERS: Output(shape=(len(importer.recorded.columns),), encoding=EXACT)}


def _view_plan(importer: Importer, recorded: RecordedViews) -> ViewPlan:
    """A plan that describes the views of the source; reads all parameters once, for their hashes.

    Raises:
        InvalidSource: parameters that the tool does not store; names file and sample.
    """
    replay = None if recorded.replay is None else build_replay(recorded.replay, trust=False)
    shape = importer.num_samples, len(recorded.columns)
    digests = [ArrayDigest("<f4", shape) for _ in range(importer.num_views)]
    rows = [0] * importer.num_views
    for found in importer.parameters():
        values = found.values
        if values.ndim != 2 or values.shape[1] != shape[1] or found.start != rows[found.view]:
            raise InvalidSource(
                f"{found.files[0]}: parameters of view {found.view} are {values.shape} from sample {found.start} on; "
                f"expected (B, {shape[1]}) from sample {rows[found.view]} on: {', '.join(recorded.columns)}"
            )
        invalid = first_invalid(recorded.columns, values, replay, importer.num_samples)
        if invalid is not None:
            number, reason = invalid
            raise InvalidSource(
                f"{found.files[number]}: view {found.view} of sample {found.start + number} has {reason}"
            )
        digests[found.view].update(values)
        rows[found.view] += len(values)
    transform = RecordedTransform(
        recorded.columns, [each.hexdigest() for each in digests], replay=replay, replay_step=recorded.replay
    )
    return ViewPlan(
        transform=transform,
        preprocess=None if recorded.preprocess is None else build_transform(recorded.preprocess),
        num_classes=importer.num_classes,
    )


def _write(writer: CacheWriter, importer: Importer) -> tuple[list[np.ndarray], int]:
    """Write all rows; the probability of the classes without entry, by batch, and the number of normalized rows."""
    tails, normalised = [], 0
    with track("importing", writer.row_map.num_rows * importer.num_views, unit="rows") as meter:
        for batch in importer.batches():
            note = f"view {batch.view + 1}/{importer.num_views}"
            outputs: dict[str, Any] = dict(batch.outputs) if isinstance(batch, DenseRows) else {}
            if importer.recorded is not None:
                outputs[PARAMETERS] = batch.parameters
            try:
                if isinstance(batch, DenseRows):
                    logits = batch.logits if writer.has_logits else None
                    writer.write(view=batch.view, start=batch.start, logits=logits, outputs=outputs)
                    meter.advance(len(batch.logits), note=note)
                else:
                    log_probs, tail, above = _normalised(batch, importer.excess)
                    writer.write_sparse(
                        view=batch.view, start=batch.start, ids=batch.ids, log_probs=log_probs, outputs=outputs
                    )
                    tails.append(tail)
                    normalised += above
                    meter.advance(len(log_probs), note=note)
            except InvalidLogits as error:
                file = _file_of(batch, error.row) or importer.source
                raise InvalidLogits(f"{file}, view {batch.view}: {error}", row=error.row) from None
    return tails, normalised


def _file_of(batch: DenseRows | SparseRows, row: int | None) -> Path | None:
    """The file that a row comes from; None if it is not known."""
    if isinstance(batch.file, Path):
        return batch.file
    place = -1 if row is None else row - batch.start
    return batch.file[place] if 0 <= place < len(batch.file) else None


def _normalised(batch: SparseRows, excess: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Log-probabilities whose sum is at most 1, the mass that they lack, and the number of rows that were changed."""
    log_probs = batch.log_probs.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.where(batch.ids < 0, 0.0, np.exp(log_probs)).sum(axis=1)
        above = (total > 1.0 + ROUNDING) & (total <= 1.0 + excess)
        log_probs[above] -= np.log(total[above])[:, None]
    return log_probs, np.clip(1.0 - total, 0.0, 1.0), int(above.sum())


def _write_details(importer: Importer, table: SampleTable | None, path: Path) -> str:
    """Write keys and view parameters to an .npz file; its SHA-256."""
    arrays = importer.details()
    if table is not None and table.keys is not None:
        arrays["keys"] = np.array(table.keys)
    elif table is None and importer.keys is not None:
        arrays["keys"] = np.array(importer.keys)
    if not arrays:
        raise UsageError(f"{importer.tool} files have no keys and no parameters of views; leave out --details")
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    LocalStorage(path.parent).put(path.name, content.getbuffer())
    return sha256_hex(content.getbuffer())


def _card(importer: Importer, card: Card | Mapping[str, Any] | None) -> dict[str, Any]:
    """The card's fields, with what the format lacks in the description."""
    stated = card_from(card or {}).stated()
    lacks = "\n\n".join(f"{name.capitalize()}: {text}." for name, text in importer.missing.items())
    text = f"Imported from files of {importer.tool}. What they lack:\n\n{lacks}"
    return stated | {"description": "\n\n".join([*filter(None, [stated.get("description")]), text])}
