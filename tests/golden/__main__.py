"""Write the golden caches of the current format version, each once, when it is new: of samples, of sequences, of
samples with receipts by view, of encodings with arrays of their own, and of outputs other than logits.

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
    "trellislowrank": logitcache.TrellisLowRank(rank=5, bit_price=0.001, soft_weight=1.0),
}
OUTPUTS = {
    "features": logitcache.Output(shape=(5, 6), encoding=logitcache.Components(error=0.1)),
    "half": logitcache.Output(shape=(30,), encoding=logitcache.Values()),
    "bytes": logitcache.Output(shape=(30,), encoding=logitcache.Values(dtype="uint8")),
}
"""The same features in each."""
COUNTS = [3, 0, 1, 5, 2, 1]
"""Rows of each sequence, as many as there are samples in the other cache."""


def main() -> None:
    creation.provenance = dict  # type: ignore[assignment]  # no machine's name or path in a file that is kept
    written = [write(f"format-{FORMAT_VERSION}.cache"), write(f"format-{FORMAT_VERSION}-sequences.cache", COUNTS)]
    for named, encoding in ENCODINGS.items():
        written.append(write(f"format-{FORMAT_VERSION}-{named}.cache", encoding=encoding))
    written.append(write(f"format-{FORMAT_VERSION}-outputs.cache", outputs=OUTPUTS))
    receipts.GATHERED_RECEIPTS = 0
    written.append(write(f"format-{FORMAT_VERSION}-by-view.cache"))
    if not any(written):
        raise SystemExit("the caches are there already; a format that was published is not written again")


def write(
    name: str,
    rows_per_sample: list[int] | None = None,
    *,
    encoding: logitcache.Encoding = LOW_RANK,
    outputs: dict[str, logitcache.Output] | None = None,
) -> bool:
    """Write a cache, and what is read from it, unless it is there."""
    outputs = outputs or {}
    path = HERE / name
    if path.exists():
        return False
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(6, CLASSES, generator=generator)
    logits = torch.randn(VIEWS, SAMPLES, 6, generator=generator) @ factors
    calibration = torch.randn(200, 6, generator=generator) @ factors
    features = 1 + torch.randn(VIEWS * SAMPLES + 200, 6, generator=generator) @ torch.randn(6, 30, generator=generator)
    of_views, to_fit = features[:-200].view(VIEWS, SAMPLES, 30), features[-200:]
    sample = logitcache.Calibration(
        calibration.numpy(), outputs={named: to_fit.view(200, *output.shape) for named, output in outputs.items()}
    )
    num_samples = SAMPLES if rows_per_sample is None else len(rows_per_sample)
    settings = {"num_samples": num_samples, "num_classes": CLASSES, "num_views": VIEWS, "rows_per_block": 8}
    settings |= {"rows_per_sample": rows_per_sample}
    with logitcache.create(
        path, **settings, encoding=encoding, outputs=outputs, calibration=sample, teacher="golden", dataset="golden"
    ) as writer:
        for view in range(VIEWS):
            rows = {named: of_views[view].view(SAMPLES, *output.shape) for named, output in outputs.items()}
            writer.write(view=view, start=0, logits=logits[view], outputs=rows)
    cache = logitcache.open(path)
    for output in cache.outputs:
        decoded = torch.stack([cache.view(view).output(output, range(SAMPLES)) for view in range(VIEWS)])
        np.save(decoded_file(path, output), decoded.numpy())
    return True


def decoded_file(cache: Path, output: str) -> Path:
    """Where what is read from a golden cache is kept."""
    return cache.with_name(cache.stem + ("" if output == "logits" else f"-{output}") + ".npy")


if __name__ == "__main__":
    main()
