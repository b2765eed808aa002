"""Write a cache in a format of other tools."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from logitcache.data.tokens import TokenDataset
from logitcache.errors import UsageError
from logitcache.extras.interchange.axolotl import export_axolotl
from logitcache.extras.interchange.distillkit import export_distillkit
from logitcache.extras.interchange.huggingface import export_huggingface
from logitcache.extras.interchange.parquet import write_views
from logitcache.extras.interchange.parts import ExportResult, open_exported
from logitcache.registry import unknown_name
from logitcache.storage import local_path

EXPORT_FORMATS = ("parquet", "huggingface", "distillkit", "axolotl")


def export_cache(
    format: str,
    location: str,
    out: str | os.PathLike[str],
    *,
    views: str | None = None,
    top: int | None = None,
    tokens: TokenDataset | Sequence[Any] | None = None,
) -> ExportResult:
    """Write the distributions of a sealed cache in the format of another tool.

    Idempotent: complete files of the same export are not written again. `import_cache` reads every format again.

    Args:
        format: "parquet", "huggingface", "distillkit" or "axolotl".
        location: the cache.
        out: a folder without other files; created if it is missing.
        views: such as "0:2" or "3"; all by default. DistillKit and axolotl store one.
        top: classes kept of each row, 1 <= top < C. For DistillKit and axolotl the default is the k of the encoding
            `TopK`.
        tokens: the token ids of each sample in the cache's order, for DistillKit, and for axolotl if wanted: the
            dataset, or a list of int arrays. They are compared with the cache.

    Raises:
        UsageError: an unknown format, the format can't store this cache, pyarrow is missing, or the folder has other
            files.
        IncompleteCache: the cache is not sealed.
        SampleMismatch: the token ids are not those of the cache.
        CorruptCache: labels are damaged.
    """
    if format not in EXPORT_FORMATS:
        raise UsageError(unknown_name("format", format, EXPORT_FORMATS, f"one of: {', '.join(EXPORT_FORMATS)}"))
    cache, folder = open_exported(location), local_path(out)
    if format in ("parquet", "huggingface"):
        if tokens is not None:
            raise UsageError(f"{format} stores no token ids; leave out tokens (--data)")
        return (write_views if format == "parquet" else export_huggingface)(cache, folder, views=views, top=top)
    return (export_distillkit if format == "distillkit" else export_axolotl)(
        cache, folder, views=views, top=top, tokens=tokens
    )
