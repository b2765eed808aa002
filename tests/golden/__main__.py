"""Write the golden caches of the current format version, each once, when it is new: of samples, of sequences, of
samples with receipts by view, and of encodings with arrays of their own.

python -m tests.golden
"""

from pathlib import Path

import numpy as np
import torch

import logitcache
from logitcache.cache import creation, receipts
from logitcache.cache.manifest import FORMAT_VERSION

HERE = Path(__file__).parent
VIEWS, SAMPLES, CLASSES = 2, 12, 40
LOW_RANK = logitcache.LowRank(rank=8, k=1)
ENCODINGS = {
    "packedtopk": logitcache.PackedTopK(k=6, most=12, prior=True),
    "sampled": logitcache.Sampled(draws=20, packed=True),
    "toplowrank": logitcache.TopLowRank(rank=5, k=3),
}
COUNTS = [3, 0, 1, 5, 2, 1]
"""Rows of each sequence, as many as there are samples in the other cache."""


def main() -> None:
    creation.provenance = dict  # type: ignore[assignment]  # no machine's name or path in a file that is kept
    written = [write(f"format-{FORMAT_VERSION}.cache"), write(f"format-{FORMAT_VERSION}-sequences.cache", COUNTS)]
    for named, encoding in ENCODINGS.items():
        written.append(write(f"format-{FORMAT_VERSION}-{named}.cache", encoding=encoding))
    receipts.GATHERED_RECEIPTS = 0
    written.append(write(f"format-{FORMAT_VERSION}-by-view.cache"))
    if not any(written):
        raise SystemExit("the caches are there already; a format that was published is not written again")


def write(name: str, rows_per_sample: list[int] | None = None, *, encoding: logitcache.Encoding = LOW_RANK) -> bool:
    """Write a cache and its logits, unless it is there."""
    path = HERE / name
    if path.exists():
        return False
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(6, CLASSES, generator=generator)
    logits = torch.randn(VIEWS, SAMPLES, 6, generator=generator) @ factors
    calibration = torch.randn(200, 6, generator=generator) @ factors
    num_samples = SAMPLES if rows_per_sample is None else len(rows_per_sample)
    settings = {"num_samples": num_samples, "num_classes": CLASSES, "num_views": VIEWS, "rows_per_block": 8}
    settings |= {"rows_per_sample": rows_per_sample}
    with logitcache.create(
        path, **settings, encoding=encoding, calibration=calibration, teacher="golden", dataset="golden"
    ) as writer:
        for view in range(VIEWS):
            writer.write(view=view, start=0, logits=logits[view])
    cache = logitcache.open(path)
    decoded = torch.stack([cache.view(view).logits(range(SAMPLES)) for view in range(VIEWS)])
    np.save(path.with_suffix(".npy"), decoded.numpy())
    return True


if __name__ == "__main__":
    main()
