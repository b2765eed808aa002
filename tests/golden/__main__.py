"""Write the golden cache of the current format version: once, when the version is new.

python -m tests.golden
"""

from pathlib import Path

import numpy as np
import torch

import logitcache
from logitcache.cache import creation
from logitcache.cache.manifest import FORMAT_VERSION

HERE = Path(__file__).parent
VIEWS, SAMPLES, CLASSES = 2, 12, 40


def main() -> None:
    path = HERE / f"format-{FORMAT_VERSION}.cache"
    if path.exists():
        raise SystemExit(f"{path} is there already; a format that was published is not written again")
    creation.provenance = dict  # type: ignore[assignment]  # no machine's name or path in a file that is kept
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(6, CLASSES, generator=generator)
    logits = torch.randn(VIEWS, SAMPLES, 6, generator=generator) @ factors
    calibration = torch.randn(200, 6, generator=generator) @ factors
    encoding = logitcache.LowRank(rank=8, k=1)
    settings = {"num_samples": SAMPLES, "num_classes": CLASSES, "num_views": VIEWS, "rows_per_block": 8}
    with logitcache.create(
        path, **settings, encoding=encoding, calibration=calibration, teacher="golden", dataset="golden"
    ) as writer:
        for view in range(VIEWS):
            writer.write(view=view, start=0, logits=logits[view])
    cache = logitcache.open(path)
    decoded = torch.stack([cache.view(view).logits(range(SAMPLES)) for view in range(VIEWS)])
    np.save(path.with_suffix(".npy"), decoded.numpy())


if __name__ == "__main__":
    main()
