"""Bytes of other tools' caches before and after `logitcache import`.

Each source is imported as it is by default (float32), and with float16 values. Labels and the parameters of views are
counted without what is stored once per cache: the sources have few rows.

    python benchmarks/imports.py --peers ../shared/peers --write
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import conditions, fresh_folder, options, parse, table, write_result

import logitcache
from logitcache.data.recorded import PARAMETERS
from logitcache.encodings import Dense, Encoding, TopK
from logitcache.extras.interchange import import_cache
from logitcache.progress import silence

IMAGENET, VOCABULARY = 1000, 49_152
SOURCES: list[tuple[str, str, int | None]] = [
    ("tinyvit", "tinyvit/k10_index_keys", IMAGENET),
    ("tinyvit", "tinyvit/k100_name_keys", IMAGENET),
    ("fkd", "fkd/k5_fp32", IMAGENET),
    ("fkd", "fkd/k10_fp16", IMAGENET),
    ("ml_dr", "ml_dr/randaug_mixing/reinforced_data", IMAGENET),
    ("ml_dr", "ml_dr/randaug_joblib/reinforced_data", IMAGENET),
    ("distillkit", "distillkit/recommended", VOCABULARY),
    ("distillkit", "distillkit/legacy", VOCABULARY),
    ("open_instruct", "open_instruct/default", VOCABULARY),
    ("axolotl", "axolotl/v2.parquet", VOCABULARY),
    ("axolotl", "axolotl/legacy_v1.jsonl", VOCABULARY),
    ("megatron", "megatron/k64_fp16", VOCABULARY),
    ("maxtext", "maxtext", VOCABULARY),
]
"""Format, place among the files of the tools, and number of classes."""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--peers", type=Path, help="the folder of files that the tools wrote; default: none")
    parser.add_argument("--rows", type=int, default=4096, help="of the .npy file")
    arguments = parse(parser, rows=64)
    silence()
    folder, about = fresh_folder(), conditions()
    logits = np.random.default_rng(0).normal(size=(arguments.rows, IMAGENET)).astype(np.float32)
    np.save(folder / "logits.npy", logits)
    sources: list[tuple[str, Path, int | None]] = [("numpy", folder / "logits.npy", None)]
    if arguments.peers is not None:
        sources += [(format, arguments.peers / place, classes) for format, place, classes in SOURCES]
    rows = []
    for number, (format, source, classes) in enumerate(sources):
        rows.append(measured(folder / str(number), format, source, classes))
        print(table(HEADER, rows[-1:]), flush=True)
    body = f"# Imports\n\n{about}\n\nBytes per row.\n\n{table(HEADER, rows)}\n"
    print(f"\n{table(HEADER, rows)}")
    if arguments.write:
        print(f"\nwritten to {write_result('imports', body, device=torch.device('cpu'))}")


HEADER = ["source", "rows", "before", "labels", "labels in float16", "view parameters"]


def measured(folder: Path, format: str, source: Path, classes: int | None) -> list[str]:
    """One row of the table."""

    def cache_with(encoding: Encoding | None) -> tuple[Any, logitcache.LogitCache]:
        name = "default" if encoding is None else "float16"
        settings: dict[str, Any] = {"teacher": "net", "dataset": "d", "num_classes": classes, "encoding": encoding}
        result = import_cache(format, source, folder / name, **settings)
        return result, logitcache.open(folder / name)

    result, cache = cache_with(None)
    k = getattr(cache.encoding, "k", None)
    _, small = cache_with(Dense(dtype="float16") if k is None else TopK(k=k, dtype="float16"))
    count = cache.num_rows * cache.num_views
    parameters = cache.contents.output_bytes.get(PARAMETERS, 0)
    numbers = [
        result.source_bytes,
        cache.target_bytes - parameters,
        small.target_bytes - small.contents.output_bytes.get(PARAMETERS, 0),
    ]
    name = source.name if source.name != "reinforced_data" else source.parent.name
    return [
        f"`{format}`, {name}",
        f"{count:,}",
        *(f"{number / count:,.0f}" for number in numbers),
        f"{parameters / count:,.1f}" if parameters else "",
    ]


if __name__ == "__main__":
    main()
