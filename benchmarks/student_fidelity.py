"""Does fidelity matter to students? One student on real photos, from caches that differ in their encoding alone.

EfficientNet-Lite0 labels random crops of a folder's photos, as many views as are asked for. The same small CNN, on the
same crops at 40 pixels, learns from each encoding at about 60 and about 30 bytes a sample, and from float32. A fifth
of the photos is unseen: there the student's KL to the teacher and its agreement with the teacher's first class count.
No label of a photo is known or used. Nothing is tuned: one learning rate for all, T = 1, the last epoch counts.

The photos may come from Debian's packages:

    apt-get download opencv-doc gcompris-qt-data plasma-workspace-wallpapers tuxpaint-stamps-default
    for package in *.deb; do dpkg -x $package photos; done
    python benchmarks/student_fidelity.py --photos photos --write
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import conditions, num_cores, options, parse, table, write_result
from PIL import Image, ImageStat, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.transforms import v2

import logitcache
from logitcache.cache.fidelity import fidelity_kl
from logitcache.catalog.nets import CNN
from logitcache.data.loading import rendered_batches
from logitcache.data.views import BothInputs, ViewDataset
from logitcache.encodings import Dense, Encoding, LowRank, Sampled, TopK
from logitcache.losses import kl_divergence

sys.path.insert(0, str(Path(__file__).parent.parent))
from pipelines.foolbox20 import efficientnet_lite0, images

# B batch, C classes, N photos, V views

SMALLEST_SIDE = 200
STORED_SIDE = 320
"""Photos are held in memory, scaled so that their shorter side has so many pixels."""
STUDENT_SIDE = 40
MIN_PHOTOS = 10
ENCODINGS: dict[str, list[Encoding]] = {
    "exact": [Dense(dtype="float32")],
    "about 60 bytes": [LowRank(), TopK(k=26, dtype="uint8"), Sampled(draws=66)],
    "about 30 bytes": [
        LowRank(rank=256, k=0, step=0.16, bit_price=4e-4, search=8),
        TopK(k=13, dtype="uint8"),
        Sampled(draws=33),
    ],
}


class Photos:
    """The photos of a folder, each once, without labels."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.images: list[Image.Image] = []
        seen = set()
        for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")):
            image = read_photo(path)
            if image is not None and (key := hash(image.resize((8, 8)).tobytes())) not in seen:
                seen.add(key)
                self.images.append(image)
        order = np.random.default_rng(0).permutation(len(self.images))[:limit]
        self.images = [self.images[index] for index in order]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], 0


def read_photo(path: Path) -> Image.Image | None:
    """A photo in colour; None for what is small, transparent, flat, or no image."""
    try:
        with Image.open(path) as image:
            if min(image.size) < SMALLEST_SIDE or image.mode not in ("RGB", "L"):
                return None
            image.draft("RGB", (2 * STORED_SIDE, 2 * STORED_SIDE))
            scale = STORED_SIDE / min(image.size)
            photo = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))
    except (UnidentifiedImageError, OSError, ValueError):
        return None
    return photo if sum(ImageStat.Stat(photo).stddev) > 60 else None


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--photos", type=Path, help="a folder; foolbox's images in a tiny run")
    parser.add_argument("--limit", type=int, default=600, help="photos at most")
    parser.add_argument("--views", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parse(parser, limit=15, views=2, epochs=1, seeds=[0])
    folder = images().files[0].parent if arguments.tiny and arguments.photos is None else arguments.photos
    if folder is None:
        parser.error("the photos to label are missing: pass --photos FOLDER; --help says where to get them")

    torch.set_num_threads(num_cores())
    body = ["# Students by encoding", conditions()]
    print(body[-1], flush=True)
    photos = Photos(folder, arguments.limit)
    if len(photos) < MIN_PHOTOS:
        parser.error(
            f"{folder} has {len(photos)} usable photos, expected {MIN_PHOTOS} or more; --help says where to get them"
        )
    num_unseen = len(photos) // 5
    crops, logits = render(photos, arguments.views)
    unseen, seen = slice(0, num_unseen), slice(num_unseen, None)
    test = (crops[0, unseen], logits[0, unseen])
    print(f"{len(photos)} photos rendered and labelled", flush=True)
    rows = []
    for budget, encodings in ENCODINGS.items():
        for encoding in encodings:
            if arguments.tiny and isinstance(encoding, LowRank):
                encoding = replace(encoding, rank=8)  # of few rows to fit a basis to
            row = train_on(encoding, crops[:, seen], logits[:, seen], test, arguments.epochs, arguments.seeds)
            rows.append([budget, f"`{encoding!r}`", *row])
            print(rows[-1], flush=True)
    about = (
        f"{len(photos)} photos, of which {num_unseen} are unseen; {arguments.views} views of each, {arguments.epochs} "
        f"epochs, seeds {arguments.seeds}: mean ± standard deviation. KL(teacher ‖ student) in nats and agreement with "
        "the teacher's first class, on one crop of each unseen photo."
    )
    header = ["", "encoding", "bytes a sample", "KL of the labels", "student's KL", "student's agreement"]
    body.append(f"{about}\n\n{table(header, rows)}")
    print(body[-1])
    if arguments.write:
        print(write_result("student-fidelity", "\n\n".join(body) + "\n", device=torch.device("cpu")))


def render(photos: Photos, num_views: int) -> tuple[Tensor, Tensor]:
    """Every view of every photo as the student sees it, (V, N, 3, 40, 40), and the teacher's logits, (V, N, C)."""
    plan = logitcache.ViewPlan(
        transform=v2.Compose([v2.RandomResizedCrop(224, scale=(0.3, 1.0)), v2.RandomHorizontalFlip()]), seed=0
    )
    student = v2.Compose([v2.Resize(STUDENT_SIDE), v2.Normalize([0.5] * 3, [0.25] * 3)])
    both = BothInputs(student, v2.Normalize([0.5] * 3, [0.5] * 3))
    views = ViewDataset(photos, plan, preprocess=both)
    teacher = efficientnet_lite0().eval().to(memory_format=torch.channels_last)
    places = [(view, index) for view in range(num_views) for index in range(len(photos))]
    batches = [places[start : start + 32] for start in range(0, len(places), 32)]
    crops, logits = [], []
    with torch.inference_mode():
        for _, (small, large), _ in rendered_batches(views, batches, num_workers=0):
            crops.append(small)
            logits.append(teacher(large.contiguous(memory_format=torch.channels_last)))
    shape = (num_views, len(photos))
    return torch.cat(crops).clone().unflatten(0, shape), torch.cat(logits).clone().unflatten(0, shape)


def train_on(
    encoding: Encoding, crops: Tensor, logits: Tensor, test: tuple[Tensor, Tensor], epochs: int, seeds: list[int]
) -> list[str]:
    """A cache of the labels in one encoding, and a student from it for each seed; the cells of a row."""
    num_views, num_photos, num_classes = logits.shape
    with tempfile.TemporaryDirectory() as folder:
        shape: dict[str, Any] = {"num_samples": num_photos, "num_views": num_views, "num_classes": num_classes}
        calibration = logits.flatten(0, 1).numpy()
        settings = shape | {"encoding": encoding, "calibration": calibration, "teacher": "lite0", "dataset": "photos"}
        with logitcache.create(f"{folder}/labels.cache", **settings) as writer:
            for view in range(num_views):
                writer.write(view=view, start=0, logits=logits[view])
        cache = logitcache.open(f"{folder}/labels.cache")
        results = [train_student(cache, crops, test, epochs, seed) for seed in seeds]
        label_kl = "∞" if cache.kl_mean is None else f"{cache.kl_mean:.3g}"
        num_bytes = cache.target_bytes / (num_views * num_photos)
    cells = [f"{num_bytes:.1f}", label_kl]
    for index, form in ((0, "{:.3f} ± {:.3f}"), (1, "{:.1%} ± {:.1%}")):
        values = [result[index] for result in results]
        cells.append(form.format(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0))
    return cells


def train_student(
    cache: logitcache.LogitCache, crops: Tensor, test: tuple[Tensor, Tensor], epochs: int, seed: int
) -> tuple[float, float]:
    """KL to the teacher and agreement with it on the unseen photos, after the last epoch."""
    torch.manual_seed(seed)
    student: nn.Module = CNN((3, STUDENT_SIDE, STUDENT_SIDE), cache.num_classes, widths=(32, 64, 128))
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    num_photos, batch = cache.num_samples, 32
    steps = epochs * -(-num_photos // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        view = cache.view(epoch % cache.num_views)
        for rows_B in torch.randperm(num_photos).split(batch):
            loss = kl_divergence(student(crops[view.number, rows_B]), view.logits(rows_B)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    student.eval()
    with torch.inference_mode():
        student_BC, teacher_BC = student(test[0]), test[1]
        nats = fidelity_kl(student_BC, teacher_BC).mean()
        agreement = (student_BC.argmax(dim=1) == teacher_BC.argmax(dim=1)).float().mean()
    return float(nats), float(agreement)


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s")
