"""Encodings of features: bytes per row against relative error, beside plain product quantisation.

Two real models: hidden states of SmolLM2-135M-Instruct on the Brown corpus (576 values, a row for each token), and the
pooled features of EfficientNet-Lite0 (1 280 values) on crops of photos. `Components` and product quantisation are
fitted to some texts or photos, and all encodings are measured on others. The error is the root of the sum of squared
errors over that of the deviations from the mean of the rows that were fitted to. Bytes are those of one block,
compressed as in a cache. Product quantisation is our own: groups of neighbouring values, 256 centroids each, by
k-means.

With photos, a small CNN also learns the features of crops from each encoding, on the same crops at 40 pixels. Its
error is on the exact features of other crops of these photos, and of photos that neither it nor the encodings have
seen.

    python benchmarks/top_k.py --states states.npz      # computes the hidden states, if the file is not there
    python benchmarks/features.py --states states.npz --photos photos --write

`benchmarks/student_fidelity.py --help` shows where the photos may come from.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measuring import conditions, num_cores, options, parse, table, write_result
from student_fidelity import STUDENT_SIDE, Photos, images
from torch import Tensor, nn
from torchvision.transforms import v2

import logitcache
from logitcache.cache.layout import encode_block
from logitcache.catalog.nets import CNN
from logitcache.data.loading import rendered_batches
from logitcache.data.views import BothInputs, ViewDataset
from logitcache.encodings import Components, Encoding, Values
from logitcache.errors import UsageError
from logitcache.losses import feature_mse
from pipelines.foolbox20 import efficientnet_lite0

# M rows, D values, G groups of values, K centroids

ERRORS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
GROUPS = (16, 32, 64, 144)
LEARNED: tuple[Encoding | int, ...] = (
    Values(dtype="float16"),
    Values(dtype="uint8"),
    Components(error=0.1),
    Components(error=0.3),
    Components(error=0.5),
    64,
    16,
)
"""What students learn from: encodings, and product quantisation with so many groups."""
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
    parser.add_argument("--epochs", type=int, default=24, help="of the students")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students")
    arguments = parse(parser, rows=600, limit=12, epochs=1, seeds=[0])
    if not arguments.tiny and arguments.states is None and arguments.photos is None:
        parser.error("name one input or both: --states FILE.npz --photos FOLDER")
    torch.set_num_threads(num_cores())
    sections = ["# Encodings of features", conditions()]
    print(sections[-1], flush=True)
    sources = []
    if arguments.states is not None or arguments.tiny:
        sources.append(hidden_states(arguments.states, arguments.rows))
    if arguments.photos is not None or arguments.tiny:
        folder = images().files[0].parent if arguments.photos is None else arguments.photos
        sources.append(pooled_features(folder, arguments.limit, arguments.views))
    for source in sources:
        to_fit, unseen = source.rows[~source.is_unseen], source.rows[source.is_unseen]
        about = (
            f"{unseen.shape[1]} values; fitted to {len(to_fit):,} rows, measured on {len(unseen):,} rows of other "
            f"{'texts' if source.crops is None else 'photos'}."
        )
        sections.append(f"## {source.name}\n\n{about}\n\n{table(HEADER, results(to_fit, unseen))}")
        print(f"\n{sections[-1]}", flush=True)
        if source.crops is not None:
            sections.append(students_section(source, arguments.epochs, arguments.seeds))
            print(f"\n{sections[-1]}", flush=True)
    if arguments.write:
        path = write_result("features", "\n\n".join(sections) + "\n", device=CPU)
        print(f"\nwritten to {path}")


CPU = torch.device("cpu")
HEADER = ["encoding", "bytes per row", "relative error", "fixed, KiB", "rows encoded in a second of CPU time"]


@dataclass(frozen=True)
class Source:
    """Features of one model."""

    name: str
    rows: Tensor
    """Float32 (M, D)."""
    groups: np.ndarray
    """The text or photo of each row."""
    crops: Tensor | None = None
    """What a student sees of each row, float32 (M, 3, 40, 40)."""
    views: np.ndarray | None = None
    """The view of each row."""

    @property
    def is_unseen(self) -> np.ndarray:
        """Rows that are only measured, bool (M,): those of one text or photo in four."""
        return np.isin(self.groups, np.unique(self.groups)[::4])


def hidden_states(path: Path | None, limit: int) -> Source:
    """Random rows without a file."""
    if path is None:
        draw = torch.Generator().manual_seed(0)
        rows_MD = torch.randn(limit, 24, generator=draw) * 0.8 ** torch.arange(24)
        return Source("Small random rows", rows_MD, np.arange(limit) // 10)
    found = np.load(path)
    chosen = np.random.default_rng(0).permutation(len(found["hidden"]))[:limit]
    rows_MD = torch.from_numpy(found["hidden"][chosen])
    return Source("SmolLM2-135M-Instruct, hidden states", rows_MD, found["files"][chosen])


def pooled_features(folder: Path, limit: int, num_views: int) -> Source:
    """Of random crops of photos."""
    photos = Photos(folder, limit)
    plan = logitcache.ViewPlan(transform=v2.RandomResizedCrop(224, scale=(0.3, 1.0)), seed=0)
    student = v2.Compose([v2.Resize(STUDENT_SIDE), v2.Normalize([0.5] * 3, [0.25] * 3)])
    views = ViewDataset(photos, plan, preprocess=BothInputs(student, v2.Normalize([0.5] * 3, [0.5] * 3)))
    teacher = efficientnet_lite0().eval().to(memory_format=torch.channels_last)
    found: list[Tensor] = []
    pooling = next(module for name, module in teacher.named_modules() if name.endswith("avg_pooling"))
    pooling.register_forward_hook(lambda module, inputs, output: found.append(output.flatten(1)))
    places = [(view, index) for view in range(num_views) for index in range(len(photos))]
    batches = [places[start : start + 32] for start in range(0, len(places), 32)]
    crops = []
    with torch.inference_mode():
        for _, (small, large), _ in rendered_batches(views, batches, num_workers=0):
            crops.append(small)
            teacher(large.contiguous(memory_format=torch.channels_last))
    view_of_row, groups = np.array(places).T
    rows_MD, crops_M = torch.cat(found).clone(), torch.cat(crops).clone()
    return Source("EfficientNet-Lite0, pooled features", rows_MD, groups, crops_M, view_of_row)


def students_section(source: Source, epochs: int, seeds: Sequence[int]) -> str:
    """A student from each encoding of the features, for each seed."""
    assert source.crops is not None
    assert source.views is not None
    is_last_view = source.views == source.views.max()
    learned = torch.from_numpy(~source.is_unseen & ~is_last_view)
    measured = {
        "other crops": torch.from_numpy(~source.is_unseen & is_last_view),
        "other photos": torch.from_numpy(source.is_unseen),
    }
    to_fit = source.rows[learned]
    mean_D = to_fit.mean(dim=0)
    scale = (to_fit - mean_D).square().mean().sqrt()
    rows = []
    for name, num_bytes, decoded_MD in decoded_features(to_fit):
        scores: dict[str, list[float]] = {}
        for seed in seeds:
            student = trained(source.crops[learned], (decoded_MD - mean_D) / scale, epochs, seed)
            for part, chosen in measured.items():
                wanted_MD = source.rows[chosen] - mean_D
                with torch.inference_mode():
                    found_MD = student(source.crops[chosen]) * scale
                cosine_M = nn.functional.cosine_similarity(found_MD, wanted_MD)
                scores.setdefault(f"{part}, error", []).append(float((found_MD - wanted_MD).norm() / wanted_MD.norm()))
                scores.setdefault(f"{part}, cosine", []).append(float(cosine_M.mean()))
        rows.append([name, f"{num_bytes:.1f}", *map(mean_and_deviation, scores.values())])
        print(rows[-1], flush=True)
    about = (
        f"A CNN on crops of {STUDENT_SIDE} pixels, {epochs} epochs over {len(to_fit):,} crops, loss `feature_mse`, "
        f"seeds {list(seeds)}: mean ± standard deviation. Its relative error, and the cosine of its features and the "
        f"teacher's without their mean, on {int(measured['other crops'].sum()):,} other crops of these photos, and on "
        f"{int(measured['other photos'].sum()):,} crops of other photos."
    )
    header = ["encoding", "bytes per row", *scores]
    return f"## Students of these features\n\n{about}\n\n{table(header, rows)}"


def mean_and_deviation(values: list[float]) -> str:
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.4f}"


def decoded_features(rows_MD: Tensor) -> Iterator[tuple[str, float, Tensor]]:
    """Name, bytes per row, and the features that are read again, of each encoding; fitted to the same rows."""
    for each in LEARNED:
        if isinstance(each, int):
            if len(rows_MD) < CENTROIDS:
                continue
            decoded_MD, codes_MG, _ = product_quantised(rows_MD, rows_MD, each)
            yield f"product quantisation, {each} groups", pq_bytes(codes_MG) / len(rows_MD), decoded_MD
            continue
        try:
            fitted = each.fit(rows_MD)
        except UsageError as error:
            print(error, flush=True)  # too few rows for this error
            continue
        encoded = fitted.encode(rows_MD)
        stored = stored_bytes(fitted, encoded, rows_MD.shape[1])
        yield f"`{each!r}`", stored / len(rows_MD), fitted.decode(encoded, rows_MD.shape[1])


def trained(crops: Tensor, targets_MD: Tensor, epochs: int, seed: int) -> nn.Module:
    """A student after the last epoch."""
    torch.manual_seed(seed)
    student: nn.Module = CNN((3, STUDENT_SIDE, STUDENT_SIDE), targets_MD.shape[1], widths=(32, 64, 128))
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    batch = 32
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(crops) // batch))
    for _ in range(epochs):
        for rows_B in torch.randperm(len(crops)).split(batch):
            loss = feature_mse(student(crops[rows_B]), targets_MD[rows_B]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return student.eval()


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
        start = time.process_time()
        encoded = fitted.encode(unseen)
        seconds = time.process_time() - start
        stored = stored_bytes(fitted, encoded, unseen.shape[1])
        once = sum(each.nbytes for each in fitted.fitted_values().values())
        decoded_MD = fitted.decode(encoded, unseen.shape[1])
        rows.append(row(f"`{encoding!r}`", stored, decoded_MD, unseen, mean_D, once, len(unseen) / seconds))
    for num_groups in GROUPS:
        if unseen.shape[1] % num_groups == 0 and len(to_fit) >= CENTROIDS:
            decoded_MD, codes_MG, once = product_quantised(to_fit, unseen, num_groups)
            name = f"product quantisation, {num_groups} groups"
            rows.append(row(name, pq_bytes(codes_MG), decoded_MD, unseen, mean_D, once))
    return rows


def stored_bytes(encoding: Encoding, encoded: dict[str, Tensor], num_values: int) -> int:
    """Of one block, compressed as in a cache."""
    specs = encoding.arrays(num_values)
    return sum(len(encode_block(specs[name], each.numpy(), len(each))) for name, each in encoded.items())


def pq_bytes(codes_MG: Tensor) -> int:
    """Of one block, compressed likewise."""
    spec = logitcache.ArraySpec(dtype="uint8", row_shape=(codes_MG.shape[1],), level=19)
    return len(encode_block(spec, codes_MG.numpy(), len(codes_MG)))


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
