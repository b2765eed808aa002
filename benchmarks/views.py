"""Making views faster: several from each decoded image, and their last steps in batches.

Decoding: JPEG photos of 500 x 375 pixels (windows of scikit-learn's two sample photos, quality 90) in a folder, random
resized crops of 224 pixels and flips; images a second with 1, 2, 4 and 8 views of each decoded image in a batch, by
turns. With 1 an image is decoded for every view.

Device: small images in memory, random crops and flips, normalised, with and without mixup and CutMix; images a second
of batches on the device with the last steps on the workers (floats cross), against the last steps on the device (bytes
cross). On the CPU the device computes on the same cores, so this measures the cost of these steps alone. At least 1.

Batched: the same small images with random resized crops, flips and colours: torchvision's on the workers, and those of
`data.batched_views` on the workers, one image at a time, and on the device, in batches. At least 1.

    python benchmarks/views.py --write
    python benchmarks/views.py --only decoding --workers 2
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import compare, conditions, fresh_folder, options, parse, table, write_result
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from logitcache.data.batched_views import BatchedColor, BatchedCrop
from logitcache.data.loading import rendered_batches
from logitcache.data.order import epoch_order, pairs_of_epoch
from logitcache.data.views import Mixing, ViewDataset, ViewPlan
from logitcache.devices import pick_device, to_device

WIDTH, HEIGHT = 500, 375
PER_DECODE = (1, 2, 4, 8)
NORMALIZE = v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])

Places = list[list[tuple[int, int]]]


class Photos:
    """JPEG files."""

    def __init__(self, folder: Path, count: int) -> None:
        self.paths = [folder / f"{number}.jpg" for number in range(count)]
        photos = load_sample_images().images
        generator = np.random.default_rng(0)
        for number, path in enumerate(self.paths):
            photo = photos[number % len(photos)]
            top, left = (
                generator.integers(0, size - part) for size, part in zip(photo.shape[:2], (HEIGHT, WIDTH), strict=True)
            )
            Image.fromarray(photo[top : top + HEIGHT, left : left + WIDTH]).save(path, quality=90)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.paths[index]) as image:
            return image.convert("RGB"), 0


class SmallImages:
    """Images in memory."""

    def __init__(self, count: int, size: int) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), index % 10


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", choices=["decoding", "device", "batched"], help="one of the measurements")
    parser.add_argument("--photos", type=int, default=256)
    parser.add_argument("--small", type=int, default=4096, help="images of the device's measurement")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side of the small images")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="DataLoader workers")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=9, help="of each measurement")
    arguments = parse(parser, photos=16, small=64, batch_size=16, repeats=2)
    device = pick_device(arguments.device, threads=1)
    sections = ["# Views", conditions()]
    print(sections[-1], flush=True)
    if arguments.only in (None, "decoding"):
        sections.append(decoding_section(arguments.photos, arguments.batch_size, arguments.workers, arguments.repeats))
        print(f"\n{sections[-1]}", flush=True)
    images = SmallImages(arguments.small, arguments.size)
    for name, section in {"device": device_section, "batched": batched_section}.items():
        if arguments.only in (None, name):
            sections.append(section(images, arguments.batch_size, arguments.workers, device, arguments.repeats))
            print(f"\n{sections[-1]}", flush=True)
    if arguments.write:
        subject = "views" if arguments.only is None else f"views-{arguments.only}"
        path = write_result(subject, "\n\n".join(sections) + "\n", device=device)
        print(f"\nwritten to {path}")


def decoding_section(count: int, batch_size: int, workers: int, repeats: int) -> str:
    """Images a second by the number of views of each decoded image."""
    transform = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()])
    views = ViewDataset(Photos(fresh_folder(), count), ViewPlan(transform=transform, preprocess=NORMALIZE))
    arms = {
        per_decode: lambda epoch, per_decode=per_decode: spend(
            views, batches(len(views), per_decode, epoch, batch_size), workers, torch.device("cpu")
        )
        for per_decode in PER_DECODE
    }
    seconds, cpu_seconds = by_turns(arms, repeats)
    rows = []
    for per_decode in PER_DECODE:
        rate, cpu = compare(seconds[1], seconds[per_decode]), compare(cpu_seconds[1], cpu_seconds[per_decode])
        images_a_second = count / statistics.median(seconds[per_decode])
        rows.append([per_decode, f"{images_a_second:.0f}", rate.quartiles, cpu.quartiles])
    header = ["views per decoded image", "images/s", "rate / rate with 1", "the same in CPU time"]
    return (
        f"## Decoding\n\n{count} photos, batches of {batch_size}, {workers} workers, {repeats} runs of each by "
        f"turns.\n\n{table(header, rows)}"
    )


def device_section(images: SmallImages, batch_size: int, workers: int, device: torch.device, repeats: int) -> str:
    """Images a second with the last steps on the workers or on the device."""
    transform = v2.Compose([v2.RandomCrop(images.images.shape[1], padding=4), v2.RandomHorizontalFlip()])
    rows = []
    for name, mixing in {"none": Mixing(), "mixup and CutMix": Mixing(mixup=0.8, cutmix=1.0)}.items():
        plan = ViewPlan(transform=transform, preprocess=NORMALIZE, mixing=mixing, num_classes=10)
        views = {on_device: ViewDataset(images, plan, on_device=on_device) for on_device in (False, True)}
        arms = {
            on_device: lambda epoch, views=each: spend(
                views, batches(len(images), 1, epoch, batch_size), workers, device
            )
            for on_device, each in views.items()
        }
        seconds, cpu_seconds = by_turns(arms, repeats)
        rate, cpu = compare(seconds[False], seconds[True]), compare(cpu_seconds[False], cpu_seconds[True])
        rates = [f"{len(images) / statistics.median(seconds[arm]):.0f}" for arm in arms]
        rows.append([name, *rates, rate.quartiles, cpu.quartiles])
    header = ["mixing", "images/s, workers", "images/s, device", "device / workers", "the same in CPU time"]
    return (
        f"## Last steps on the device\n\n{len(images)} images of {images.images.shape[1]} pixels, batches of "
        f"{batch_size} on {device}, {workers} workers, {repeats} pairs of runs by turns.\n\n{table(header, rows)}"
    )


def batched_section(images: SmallImages, batch_size: int, workers: int, device: torch.device, repeats: int) -> str:
    """Images a second with random steps on the workers or on the device."""
    size = images.images.shape[1]
    strengths = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
    torchvision = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.ColorJitter(**strengths)])
    batched = v2.Compose([BatchedCrop(size=size), BatchedColor(**strengths)])
    views = {
        "torchvision, workers": ViewDataset(images, ViewPlan(transform=torchvision, preprocess=NORMALIZE)),
        "batched, workers": ViewDataset(images, ViewPlan(transform=batched, preprocess=NORMALIZE)),
        "batched, device": ViewDataset(images, ViewPlan(transform=batched, preprocess=NORMALIZE), on_device=True),
    }
    arms = {
        name: lambda epoch, views=each: spend(views, batches(len(images), 1, epoch, batch_size), workers, device)
        for name, each in views.items()
    }
    seconds, cpu_seconds = by_turns(arms, repeats)
    rows = []
    for name in arms:
        rate, cpu = (compare(times["torchvision, workers"], times[name]) for times in (seconds, cpu_seconds))
        images_a_second = len(images) / statistics.median(seconds[name])
        rows.append([name, f"{images_a_second:.0f}", rate.quartiles, cpu.quartiles])
    header = ["random crops, flips and colours", "images/s", "rate / torchvision's", "the same in CPU time"]
    return (
        f"## Batched random steps\n\n{len(images)} images of {size} pixels, batches of {batch_size} on {device}, "
        f"{workers} workers, {repeats} rounds.\n\n{table(header, rows)}"
    )


def batches(count: int, per_decode: int, epoch: int, batch_size: int) -> Places:
    """(view, index) of each batch of one epoch, as in stage 2."""
    group, turn = divmod(epoch, per_decode)
    samples, views = pairs_of_epoch(epoch_order(count, seed=0, epoch=group), per_decode, turn)
    places = list(zip((group * per_decode + views).tolist(), samples.tolist(), strict=True))
    return [places[start : start + batch_size] for start in range(0, count, batch_size)]


def spend(views: ViewDataset, places: Places, workers: int, device: torch.device) -> None:
    """Render batches and bring them to the device, as a model takes them."""
    for _, inputs, _ in rendered_batches(views, places, num_workers=workers, pin_memory=device.type == "cuda"):
        views.finish(to_device(inputs, device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def by_turns(arms: dict[Any, Callable[[int], None]], repeats: int) -> tuple[dict[Any, list[float]], ...]:
    """Wall and CPU seconds of each arm, called with the number of the epoch; who begins changes each time."""
    seconds: dict[Any, list[float]] = {name: [] for name in arms}
    cpu_seconds: dict[Any, list[float]] = {name: [] for name in arms}
    for repeat in range(-1, repeats):  # the first one warms up
        order: Iterable[Any] = arms if repeat % 2 == 0 else reversed(arms)
        for name in order:
            start, cpu_start = time.perf_counter(), time.process_time()
            arms[name](repeat + 1)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(time.process_time() - cpu_start)
    return seconds, cpu_seconds


if __name__ == "__main__":
    main()
