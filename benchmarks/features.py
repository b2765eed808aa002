"""Encodings of features: bytes per row against relative error, beside plain product quantisation.

Two real models: hidden states of SmolLM2-135M-Instruct on the Brown corpus (576 values, a row for each token), and the
pooled features of EfficientNet-Lite0 (1 280 values) on crops of photos. `Components` and product quantisation are
fitted to some texts or photos, and all encodings are measured on others. The error is the root of the sum of squared
errors over that of the deviations from the mean of the rows that were fitted to. Bytes are those of one block,
compressed as in a cache. Product quantisation is our own: groups of neighbouring values, 256 centroids each, by
k-means.

    python benchmarks/top_k.py --states states.npz      # computes the hidden states, if the file is not there
    python benchmarks/features.py --states states.npz --photos photos --write

`benchmarks/student_fidelity.py --help` shows where the photos may come from.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from measuring import conditions, num_cores, options, parse, table, write_result
from student_fidelity import Photos
from torch import Tensor
from torchvision.transforms import v2

import logitcache
from logitcache.cache.layout import encode_block
from logitcache.data.loading import rendered_batches
from logitcache.data.views import ViewDataset
from logitcache.encodings import Components, Encoding, Values
from logitcache.errors import UsageError
from pipelines.foolbox20 import efficientnet_lite0

# M rows, D values, G groups of values, K centroids

ERRORS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
GROUPS = (16, 32, 64, 144)
CENTROIDS = 256
ROUNDS = 12
"""Of k-means."""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--states", type=Path, help="hidden states, as `top_k.py` stores them")
    parser.add_argument("--photos", type=Path, help="a folder")
    parser.add_argument("--limit", type=int, default=450, help="photos at most")
    parser.add_argument("--views", type=int, default=4, help="crops of each photo")
    parser.add_argument("--rows", type=int, default=10_240, help="hidden states at most")
    arguments = parse(parser, rows=600)
    if not arguments.tiny and arguments.states is None and arguments.photos is None:
        parser.error("name one input or both: --states FILE.npz --photos FOLDER")
    torch.set_num_threads(num_cores())
    sections = ["# Encodings of features", conditions()]
    print(sections[-1], flush=True)
    sources = []
    if arguments.states is not None or arguments.tiny:
        sources.append(hidden_states(arguments.states, arguments.rows))
    if arguments.photos is not None:
        sources.append(pooled_features(arguments.photos, arguments.limit, arguments.views))
    for name, rows_MD, groups in sources:
        is_unseen = np.isin(groups, np.unique(groups)[::4])
        to_fit, unseen = rows_MD[~is_unseen], rows_MD[is_unseen]
        about = (
            f"{unseen.shape[1]} values; fitted to {len(to_fit):,} rows, measured on {len(unseen):,} rows of other "
            f"{'texts' if name.startswith('Smol') else 'photos'}."
        )
        sections.append(f"## {name}\n\n{about}\n\n{table(HEADER, results(to_fit, unseen))}")
        print(f"\n{sections[-1]}", flush=True)
    if arguments.write:
        path = write_result("features", "\n\n".join(sections) + "\n", device=CPU)
        print(f"\nwritten to {path}")


CPU = torch.device("cpu")
HEADER = ["encoding", "bytes per row", "relative error", "fixed, KiB", "rows/s encoded"]


def hidden_states(path: Path | None, limit: int) -> tuple[str, Tensor, np.ndarray]:
    """Rows (M, D), and the text of each; random ones without a file."""
    if path is None:
        draw = torch.Generator().manual_seed(0)
        rows_MD = torch.randn(limit, 24, generator=draw) * 0.8 ** torch.arange(24)
        return "Small random rows", rows_MD, np.arange(limit) // 10
    found = np.load(path)
    chosen = np.random.default_rng(0).permutation(len(found["hidden"]))[:limit]
    return "SmolLM2-135M-Instruct, hidden states", torch.from_numpy(found["hidden"][chosen]), found["files"][chosen]


def pooled_features(folder: Path, limit: int, num_views: int) -> tuple[str, Tensor, np.ndarray]:
    """Rows (M, D), and the photo of each."""
    photos = Photos(folder, limit)
    plan = logitcache.ViewPlan(transform=v2.RandomResizedCrop(224, scale=(0.3, 1.0)), seed=0)
    views = ViewDataset(photos, plan, preprocess=v2.Normalize([0.5] * 3, [0.5] * 3))
    teacher = efficientnet_lite0().eval().to(memory_format=torch.channels_last)
    found: list[Tensor] = []
    pooling = next(module for name, module in teacher.named_modules() if name.endswith("avg_pooling"))
    pooling.register_forward_hook(lambda module, inputs, output: found.append(output.flatten(1)))
    places = [(view, index) for view in range(num_views) for index in range(len(photos))]
    batches = [places[start : start + 32] for start in range(0, len(places), 32)]
    with torch.inference_mode():
        for _, inputs, _ in rendered_batches(views, batches, num_workers=0):
            teacher(inputs.contiguous(memory_format=torch.channels_last))
    return "EfficientNet-Lite0, pooled features", torch.cat(found).clone(), np.array([index for _, index in places])


def results(to_fit: Tensor, unseen: Tensor) -> list[list[str]]:
    """A row for each encoding that can be fitted."""
    rows = []
    encodings: list[Encoding] = [Values(dtype="float16"), Values(dtype="uint8"), *(Components(error=e) for e in ERRORS)]
    mean_D = to_fit.mean(dim=0)
    for encoding in encodings:
        try:
            fitted = encoding.fit(to_fit)
        except UsageError as error:
            print(error, flush=True)  # too few rows for this error
            continue
        start = time.perf_counter()
        encoded = fitted.encode(unseen)
        seconds = time.perf_counter() - start
        specs = fitted.arrays(unseen.shape[1])
        stored = sum(len(encode_block(specs[name], each.numpy(), len(each))) for name, each in encoded.items())
        once = sum(each.nbytes for each in fitted.fitted_values().values())
        decoded_MD = fitted.decode(encoded, unseen.shape[1])
        rows.append(row(f"`{encoding!r}`", stored, decoded_MD, unseen, mean_D, once, len(unseen) / seconds))
    for num_groups in GROUPS:
        if unseen.shape[1] % num_groups == 0 and len(to_fit) >= CENTROIDS:
            start = time.perf_counter()
            decoded_MD, codes_MG, once = product_quantised(to_fit, unseen, num_groups)
            spec = logitcache.ArraySpec(dtype="uint8", row_shape=(num_groups,), level=19)
            stored = len(encode_block(spec, codes_MG.numpy(), len(codes_MG)))
            rows.append(row(f"product quantisation, {num_groups} groups", stored, decoded_MD, unseen, mean_D, once))
    return rows


def row(
    name: str, stored: int, decoded_MD: Tensor, rows_MD: Tensor, mean_D: Tensor, once: int, rate: float | None = None
) -> list[str]:
    error = float((decoded_MD - rows_MD).norm() / (rows_MD - mean_D).norm())
    return [
        name,
        f"{stored / len(rows_MD):.1f}",
        f"{error:.2g}",
        f"{once / 1024:,.0f}",
        "" if rate is None else f"{rate:,.0f}",
    ]


def product_quantised(to_fit: Tensor, rows_MD: Tensor, num_groups: int) -> tuple[Tensor, Tensor, int]:
    """Decoded rows, codes uint8 (M, G), and the bytes of the centroids in float32."""
    decoded, codes, once = [], [], 0
    for fitted, part in zip(to_fit.chunk(num_groups, dim=1), rows_MD.chunk(num_groups, dim=1), strict=True):
        centroids_KD = k_means(fitted)
        nearest_M = torch.cdist(part, centroids_KD).argmin(dim=1)
        decoded.append(centroids_KD[nearest_M])
        codes.append(nearest_M.to(torch.uint8))
        once += centroids_KD.nbytes
    return torch.cat(decoded, dim=1), torch.stack(codes, dim=1), once


def k_means(rows_MD: Tensor) -> Tensor:
    """Centroids (K, D)."""
    draw = torch.Generator().manual_seed(0)
    centroids_KD = rows_MD[torch.randperm(len(rows_MD), generator=draw)[:CENTROIDS]].clone()
    for _ in range(ROUNDS):
        nearest_M = torch.cdist(rows_MD, centroids_KD).argmin(dim=1)
        count_K1 = torch.bincount(nearest_M, minlength=CENTROIDS)[:, None]
        sums_KD = torch.zeros_like(centroids_KD).index_add_(0, nearest_M, rows_MD)
        centroids_KD = torch.where(count_K1 > 0, sums_KD / count_K1.clamp(min=1), centroids_KD)
    return centroids_KD


if __name__ == "__main__":
    main()
