"""A student's result against the bytes of its labels: one curve for each encoding and for formats of other systems.

Text: SmolLM2-135M-Instruct (49 152 classes) over files of the Brown corpus, and a Llama of five million parameters
whose embeddings start from the principal components of the teacher's. Photos: EfficientNet-Lite0 (1000 classes) over
random crops of photos, and the small CNN of `student_fidelity.py`. In each domain all students are the same but for
their labels: KL to them at T = 1 for a fixed number of epochs, at the learning rate that suits the live teacher's
student best on validation files. Counted are the KL to the teacher on test files, with the NLL of the text, or how
often the most probable class is the teacher's.

Encodings of this project write caches on disk. Formats of other systems are small writers of our own, see
`token_formats.py`, `peer_formats.py` and `label_autoencoder.py`.

    python pipelines/brown_smollm2.py    # the corpus and the teacher, in data/; --help of student_fidelity.py: photos
    python benchmarks/student_curve.py --photos photos --jobs 2 --seconds 300    # as often as it says: it resumes
    python benchmarks/student_curve.py --photos photos --write

The teachers' outputs are kept in `WORK/data`, finished students in `WORK/runs/COMMIT`. With two jobs the whole takes
about an hour on two cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from label_autoencoder import coded
from measuring import commit, conditions, fresh_folder, options, parse, result_path, table, write_result
from peer_formats import lpqld
from student_fidelity import STUDENT_SIDE, Photos, render
from token_formats import (
    TokenFormat,
    axolotl,
    distillkit,
    entries_of,
    eullm,
    maxtext,
    megatron,
)
from torch import Tensor, nn

import logitcache
from logitcache.cache.fidelity import fidelity_kl
from logitcache.catalog.nets import CNN
from logitcache.encodings import Dense, Encoding, LowRank, PackedTopK, Sampled, TopK, TopLowRank
from logitcache.losses import kl_divergence, linear_cross_entropy, linear_kl_divergence
from logitcache.targets import DenseTargets, SparseTargets, Targets

# B rows of a batch, C classes, D hidden size, L tokens of a sequence, N rows or photos, V views

CPU = torch.device("cpu")
LIVE, TOKENS = "live teacher", "true tokens only"
TEXT, PHOTOS = "text", "photos"
SPLITS = ("train", "val", "test")
STUDENT_WIDTH = 96
CALIBRATION = 2048
MARKERS = "o^sDvPX*hd"
TWO_PARAMETERS = {"LPQLD"}
"""Formats with a second parameter, here the views that share a label: their points form no line."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all students of a domain have in common."""

    epochs: int
    batch: int
    rates: tuple[float, ...]
    """Learning rates that are tried on validation files."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tiny: bool = False


@dataclass(frozen=True)
class Labels:
    """What a student of the text learns from."""

    targets: Targets | None
    """Of all rows; None for the true tokens."""
    num_bytes: dict[str, int] = field(default_factory=dict)
    """Of all rows, by the format's name: formats that are read back as the same numbers share their students."""
    fixed_bytes: int = 0
    others_are_one_class: bool = False


@dataclass(frozen=True)
class Run:
    """One student."""

    domain: str
    arm: str
    method: str
    seed: int
    rate: float
    bytes_per_row: dict[str, float]
    """Empty where nothing is stored."""
    fixed_bytes: int
    kl: float
    other: float
    """NLL in nats, or agreement with the teacher's most probable class."""
    seconds: float
    """CPU time of the training."""


# ------------------------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class Arm:
    """One setting of a method."""

    method: str
    setting: str
    labels: Encoding | Sequence[TokenFormat] | Callable[[Any], Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.method}, {self.setting}" if self.setting else self.method


def text_arms(num_classes: int, *, tiny: bool) -> list[Arm]:
    live, tokens = Arm(LIVE, ""), Arm(TOKENS, "")
    if tiny:
        return [
            live,
            tokens,
            Arm("TopLowRank", "rank 8", TopLowRank(rank=8, k=2)),
            Arm("Sampled", "9 draws", Sampled(draws=9, packed=True)),
            Arm("DistillKit", "k=8", [distillkit(8, 3, 2, num_classes)]),
            Arm("MaxText, axolotl", "k=4", [maxtext(4), axolotl(4)]),
            Arm("Megatron-LM", "k=4", [megatron(4)]),
            Arm("EULLM", "k=4", [eullm(4)]),
        ]
    arms = [live, tokens]
    arms += [Arm("TopK, uint8", f"k={k}", TopK(k=k, dtype="uint8")) for k in (8, 16, 32, 64)]
    arms += [Arm("TopK, float16", f"k={k}", TopK(k=k)) for k in (8, 16, 32, 64)]
    arms += [Arm("PackedTopK", f"k={k}", PackedTopK(k=k, prior=True, step=0.5)) for k in (16, 32, 64, 128)]
    arms += [Arm("Sampled", f"{draws} draws", Sampled(draws=draws, packed=True)) for draws in (16, 32, 64, 128)]
    arms += [
        Arm("TopLowRank", "rank 128, price 0.003", TopLowRank(rank=128, bit_price=0.003)),
        Arm("TopLowRank", "default", TopLowRank()),
        Arm("TopLowRank", "rank 256, price 0.0007", TopLowRank(rank=256, bit_price=0.0007, search=16)),
        Arm("TopLowRank", "rank 576, price 0.0002", TopLowRank(rank=576, bit_price=0.0002, soft_weight=1.0, search=16)),
    ]
    polynomials = {16: (4, 3), 32: (8, 4), 64: (16, 5), 128: (16, 6)}
    arms += [
        Arm("DistillKit", f"k={k}", [distillkit(k, exact, terms, num_classes)])
        for k, (exact, terms) in polynomials.items()
    ]
    for k in (8, 16, 32, 128):
        arms += [
            Arm("MaxText, axolotl", f"k={k}", [maxtext(k), axolotl(k)]),
            Arm("Megatron-LM", f"k={k}", [megatron(k)]),
            Arm("EULLM", f"k={k}", [eullm(k)]),
        ]
    return arms


def photo_arms(*, tiny: bool) -> list[Arm]:
    if tiny:
        return [
            Arm(LIVE, ""),
            Arm("LowRank", "rank 8", LowRank(rank=8)),
            Arm("LPQLD", "k=10, half the views", functools.partial(lpqld_labels, k=10, share=2)),
            Arm("VQ autoencoder", "4 codes", functools.partial(autoencoder_labels, num_vectors=4, epochs=5)),
        ]
    arms = [Arm(LIVE, "")]
    arms += [Arm("Dense", dtype, Dense(dtype=dtype)) for dtype in ("float16", "uint8")]
    arms += [Arm("TopK, uint8", f"k={k}", TopK(k=k, dtype="uint8")) for k in (5, 13, 26, 52, 104)]
    arms += [
        Arm("LowRank", "price 0.002", LowRank(rank=128, k=0, step=0.32, bit_price=2e-3, search=8)),
        Arm("LowRank", "price 0.0004", LowRank(rank=256, k=0, step=0.16, bit_price=4e-4, search=8)),
        Arm("LowRank", "default", LowRank()),
        Arm("LowRank", "rank 512", LowRank(rank=512, step=0.03, bit_price=1e-5)),
    ]
    arms += [Arm("LPQLD", f"k={k}", functools.partial(lpqld_labels, k=k, share=1)) for k in (5, 10, 25, 100)]
    arms += [
        Arm("LPQLD", f"k=50, 1 of {share} views", functools.partial(lpqld_labels, k=50, share=share))
        for share in (12, 4, 2)
    ]
    arms += [
        Arm("VQ autoencoder", f"{m} codes", functools.partial(autoencoder_labels, num_vectors=m, epochs=40))
        for m in (4, 8, 16, 32, 64)
    ]
    return arms


# ------------------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Text:
    """A language model's head, and some tokens with its hidden states and logits, by split."""

    weight: Tensor
    """Float32 (C, D)."""
    ids: Mapping[str, Tensor]
    """int64 (sequences, L + 1): tokens of the teacher's vocabulary."""
    hidden: Mapping[str, Tensor]
    """Float32 (rows, D)."""
    logits: Mapping[str, Tensor]
    """Float32 (rows, C), on disk."""

    @property
    def num_classes(self) -> int:
        return len(self.weight)


def text_data(folder: Path, arguments: argparse.Namespace) -> Text:
    """What is in the folder, computed if it is not there."""
    if not (folder / "states.npz").exists():
        folder.mkdir(parents=True, exist_ok=True)
        arrays = tiny_states() if arguments.tiny else teacher_states(arguments)
        weight = torch.from_numpy(arrays["weight"])
        for split in SPLITS:
            hidden = torch.from_numpy(arrays[f"{split}_hidden"])
            shape = (len(hidden), len(weight))
            logits = np.lib.format.open_memmap(folder / f"{split}.npy", "w+", np.float32, shape)
            for start in range(0, len(hidden), 256):
                logits[start : start + 256] = (hidden[start : start + 256] @ weight.T).numpy()
            logits.flush()
        np.savez(folder / "states.npz", **arrays)  # last: a folder with it is complete
    with np.load(folder / "states.npz") as found:
        arrays = {name: torch.from_numpy(values) for name, values in found.items()}
    # "c" never writes to the file, and PyTorch takes no memory that it must not write to.
    logits = {split: torch.from_numpy(np.load(folder / f"{split}.npy", mmap_mode="c")) for split in SPLITS}
    ids, hidden = ({split: arrays[f"{split}_{name}"] for split in SPLITS} for name in ("ids", "hidden"))
    return Text(arrays["weight"], ids, hidden, logits)


def tiny_states() -> dict[str, np.ndarray]:
    """Random ones."""
    draw = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"weight": draw.normal(size=(400, 24)).astype(np.float32)}
    for split, num_sequences in zip(SPLITS, (20, 2, 2), strict=True):
        arrays[f"{split}_ids"] = draw.integers(400, size=(num_sequences, 17))
        arrays[f"{split}_hidden"] = draw.normal(size=(num_sequences * 16, 24)).astype(np.float32)
    return arrays


def teacher_states(arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    """The first tokens of some files of each split, and the teacher's hidden states."""
    import transformers

    from logitcache.catalog.language_models import transformers_model, without_head

    gguf: Path = arguments.smollm2
    if not gguf.exists() or not arguments.brown.exists():
        raise SystemExit(f"{gguf} or {arguments.brown} is missing: run `python pipelines/brown_smollm2.py` first")
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = transformers_model(len(tokenizer), task="causal", path=str(gguf)).eval()
    arrays: dict[str, np.ndarray] = {}
    with torch.inference_mode(), without_head(model) as head:
        arrays["weight"] = head.weight.float().numpy()
        for split, count in zip(SPLITS, arguments.files, strict=True):
            paths = sorted((arguments.brown / split).rglob("*.txt"))
            if len(paths) < count:
                raise SystemExit(f"{arguments.brown / split} has {len(paths)} files, {count} are needed")
            chosen = [paths[place] for place in np.linspace(0, len(paths) - 1, count).astype(int)]
            ids = torch.tensor([tokenizer(path.read_text())["input_ids"][: arguments.length + 1] for path in chosen])
            states = torch.cat([model(input_ids=some[:, :-1]).logits for some in ids.split(4)])
            arrays[f"{split}_ids"], arrays[f"{split}_hidden"] = ids.numpy(), states.flatten(0, 1).float().numpy()
            print(f"{split}: {count} files, {len(arrays[f'{split}_hidden']):,} tokens", flush=True)
    return arrays


def text_labels(arm: Arm, data: Text) -> Labels:
    """Of the training tokens, after a way through files."""
    logits_NC = data.logits["train"]
    if arm.method == LIVE:
        return Labels(DenseTargets(logits_NC))
    if arm.labels is None:
        return Labels(None)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(arm.labels, Encoding):
            return cached_labels(arm.labels, data, Path(folder) / "tokens.cache")
        assert isinstance(arm.labels, Sequence)
        entries = entries_of(logits_NC, max(each.k for each in arm.labels))
        sizes: dict[str, int] = {}
        read: list[SparseTargets] = []
        for number, each in enumerate(arm.labels):
            path = Path(folder) / str(number)
            each.write(entries, path)
            sizes[each.name] = path.stat().st_size
            read.append(each.read(path, data.num_classes))
    for each in read:
        assert torch.equal(each.ids, entries.ids)
        assert torch.allclose(each.log_probs, read[0].log_probs, atol=1e-4)
    return Labels(read[0], sizes, 0, arm.labels[0].others_are_one_class)


def cached_labels(encoding: Encoding, data: Text, path: Path) -> Labels:
    logits_NC = data.logits["train"]
    if isinstance(encoding, TopLowRank):
        encoding = encoding.fit_head(data.weight, None, data.hidden["train"])
    else:
        rows = torch.randperm(len(logits_NC), generator=torch.Generator().manual_seed(0))[:CALIBRATION]
        encoding = encoding.fit(logits_NC[rows])
    shape = {"num_samples": len(logits_NC), "num_classes": data.num_classes}
    with logitcache.create(path, **shape, encoding=encoding, teacher="smollm2", dataset="brown") as writer:
        for start in range(0, len(logits_NC), 512):
            writer.write(view=0, start=start, logits=logits_NC[start : start + 512])
    cache = logitcache.open(path)
    targets = cache.view(0).targets(torch.arange(len(logits_NC)))
    fixed = sum(each.nbytes for each in encoding.fitted_values().values()) if encoding.fitted_arrays else 0
    return Labels(targets, {encoding.name: cache.target_bytes}, fixed)


def one_other_class_kl(hidden: Tensor, weight: Tensor, targets: SparseTargets) -> Tensor:
    """Mean KL over the entries and one class for all others: the loss of formats that know only the others' mass."""
    log_q_BK = (hidden @ weight.T).log_softmax(dim=1).gather(1, targets.ids)
    rest_B = (1.0 - log_q_BK.exp().sum(dim=1)).clamp(min=1e-8).log()
    log_p_BK = targets.log_probs
    entries_B = (log_p_BK.exp() * (log_p_BK - log_q_BK)).sum(dim=1)
    return (entries_B + targets.tail.exp() * (targets.tail - rest_B)).mean()


def text_student(data: Text) -> nn.Module:
    """A Llama without its head, which is the embedding."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=data.num_classes,
        hidden_size=STUDENT_WIDTH if data.num_classes > 1000 else 16,
        intermediate_size=3 * STUDENT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    student: nn.Module = transformers.LlamaModel(config)
    student.config.use_cache = False
    _, vectors = torch.linalg.eigh(data.weight.T @ data.weight)  # in ascending order
    with torch.no_grad():
        student.embed_tokens.weight.copy_(data.weight @ vectors[:, -config.hidden_size :])  # type: ignore[union-attr]
    return student


def train_on_text(
    labels: Labels, data: Text, settings: Settings, rate: float, seed: int, split: str
) -> tuple[float, float]:
    """KL to the teacher and NLL on a split, after the last epoch."""
    torch.manual_seed(seed)
    student = text_student(data)
    weight: Tensor = student.embed_tokens.weight  # type: ignore[assignment, union-attr]
    ids = data.ids["train"]
    length = ids.shape[1] - 1
    steps = optimizer_steps(student, settings.epochs * -(-len(ids) // settings.batch), rate)
    for _ in range(settings.epochs):
        for chosen in torch.randperm(len(ids)).split(settings.batch):
            hidden = student(input_ids=ids[chosen, :-1]).last_hidden_state.flatten(0, 1)
            if labels.targets is None:
                loss = linear_cross_entropy(hidden, weight, ids[chosen, 1:].flatten())
            else:
                targets = labels.targets[(chosen[:, None] * length + torch.arange(length)).flatten()]
                if labels.others_are_one_class:
                    assert isinstance(targets, SparseTargets)
                    loss = one_other_class_kl(hidden, weight, targets)
                else:
                    loss = linear_kl_divergence(hidden, weight, targets)
            student.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            next(steps)
    with torch.no_grad():
        unseen = data.ids[split]
        hidden = student(input_ids=unseen[:, :-1]).last_hidden_state.flatten(0, 1)
        kl = linear_kl_divergence(hidden, weight, DenseTargets(data.logits[split]))
        return float(kl), float(linear_cross_entropy(hidden, weight, unseen[:, 1:].flatten()))


def optimizer_steps(student: nn.Module, count: int, rate: float) -> Iterator[None]:
    """Each `next` is a step of AdamW; the rate rises for a tenth of the steps, then falls to zero."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(1.0, 0.1 * count), 1 - step / count)
    )
    while True:
        optimizer.step()
        schedule.step()
        yield


# ----------------------------------------------------------------------------------------------------------- photos


@dataclass(frozen=True)
class Crops:
    """What the student sees of some photos, and the teacher's logits, by split."""

    images: Mapping[str, Tensor]
    """Float32 (V, N, 3, side, side)."""
    logits: Mapping[str, Tensor]
    """Float32 (V, N, C)."""


def photo_data(folder: Path, arguments: argparse.Namespace) -> Crops:
    """What is in the folder, computed if it is not there."""
    path = folder / "crops.npz"
    if not path.exists():
        source = arguments.photos
        if arguments.tiny and source is None:
            from pipelines.foolbox20 import images

            source = images().files[0].parent
        if source is None:
            raise SystemExit("the photos are missing: pass --photos FOLDER; student_fidelity.py --help has some")
        folder.mkdir(parents=True, exist_ok=True)
        photos = Photos(source, arguments.limit)
        crops, logits = render(photos, arguments.views)
        np.savez(path, crops=crops.numpy(), logits=logits.numpy())
        print(f"{len(photos)} photos, {arguments.views} views of each", flush=True)
    with np.load(path) as found:
        crops, logits = (torch.from_numpy(found[name]) for name in ("crops", "logits"))
    num_photos = crops.shape[1]
    num_test, num_val = num_photos // 5, num_photos // 10
    bounds = {"test": (0, num_test), "val": (num_test, num_test + num_val), "train": (num_test + num_val, num_photos)}
    parts = {split: slice(*each) for split, each in bounds.items()}
    return Crops(*({split: each[:, part] for split, part in parts.items()} for each in (crops, logits)))


PhotoLabels = tuple[Tensor, int, int]
"""Logits as they are read back, (views, N, C); bytes of all rows; bytes that are stored once."""


def photo_labels(arm: Arm, data: Crops) -> PhotoLabels:
    logits_VNC = data.logits["train"]
    if arm.labels is None:
        return logits_VNC, 0, 0
    if not isinstance(arm.labels, Encoding):
        assert callable(arm.labels)
        found: PhotoLabels = arm.labels(logits_VNC)
        return found
    num_views, num_photos, num_classes = logits_VNC.shape
    encoding = arm.labels.fit(logits_VNC.flatten(0, 1)) if arm.labels.fitted_arrays else arm.labels
    with tempfile.TemporaryDirectory() as folder:
        shape: dict[str, Any] = {"num_samples": num_photos, "num_views": num_views, "num_classes": num_classes}
        path = Path(folder) / "labels.cache"
        with logitcache.create(path, **shape, encoding=encoding, teacher="lite0", dataset="photos") as writer:
            for view in range(num_views):
                writer.write(view=view, start=0, logits=logits_VNC[view])
        cache = logitcache.open(path)
        rows = torch.arange(num_photos)
        decoded = torch.stack([cache.view(view).logits(rows) for view in range(num_views)])
        fixed = sum(each.nbytes for each in encoding.fitted_values().values()) if encoding.fitted_arrays else 0
        return decoded, cache.target_bytes, fixed


def lpqld_labels(logits_VNC: Tensor, *, k: int, share: int) -> PhotoLabels:
    """Top-k of one view in `share`: the student sees only those, more often."""
    kept_VNC = logits_VNC[: max(1, len(logits_VNC) // share)]
    form = lpqld(k)
    data = form.write(kept_VNC.flatten(0, 1))
    return form.read(data, kept_VNC.shape[2]).view(kept_VNC.shape), sum(map(len, data)), 0


def autoencoder_labels(logits_VNC: Tensor, *, num_vectors: int, epochs: int) -> PhotoLabels:
    found = coded(logits_VNC.flatten(0, 1), num_vectors, epochs=epochs)
    return found.logits.view(logits_VNC.shape), found.num_bytes, found.fixed_bytes


def train_on_photos(
    labels: PhotoLabels, data: Crops, settings: Settings, rate: float, seed: int, split: str
) -> tuple[float, float]:
    """KL to the teacher and agreement with its first class on a split, after the last epoch."""
    torch.manual_seed(seed)
    logits_VNC, images = labels[0], data.images["train"]
    num_views, num_photos, num_classes = logits_VNC.shape
    student: nn.Module = CNN((3, STUDENT_SIDE, STUDENT_SIDE), num_classes, widths=(32, 64, 128))
    student = student.to(memory_format=torch.channels_last)
    steps = optimizer_steps(student, settings.epochs * -(-num_photos // settings.batch), rate)
    for epoch in range(settings.epochs):
        view = epoch % num_views
        for rows_B in torch.randperm(num_photos).split(settings.batch):
            inputs = images[view, rows_B].contiguous(memory_format=torch.channels_last)
            loss = kl_divergence(student(inputs), logits_VNC[view, rows_B]).mean()
            student.zero_grad()
            loss.backward()
            next(steps)
    student.eval()
    with torch.inference_mode():
        # Every view of an unseen photo counts: a split has few photos.
        student_BC = torch.cat([student(some) for some in data.images[split].flatten(0, 1).split(256)])
        teacher_BC = data.logits[split].flatten(0, 1)
        agreement = (student_BC.argmax(dim=1) == teacher_BC.argmax(dim=1)).float().mean()
        return float(fidelity_kl(student_BC, teacher_BC).mean()), float(agreement)


# ------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Domain:
    """One of the two experiments."""

    name: str
    settings: Settings
    data: Path
    runs: Path
    num_classes: int

    @property
    def arms(self) -> list[Arm]:
        # Made anew in each process: formats are functions within functions, which can't be sent.
        tiny = self.settings.tiny
        return text_arms(self.num_classes, tiny=tiny) if self.name == TEXT else photo_arms(tiny=tiny)

    def path(self, arm: Arm, seed: int) -> Path:
        name = "".join(letter if letter.isalnum() else "-" for letter in arm.name)
        return self.runs / f"{self.name}-{name}-{seed}.json"

    def tuning_path(self, rate: float) -> Path:
        return self.runs / f"{self.name}-rate-{rate:g}.json"

    def best_rate(self) -> float:
        """With the least KL on validation files."""
        found = {rate: json.loads(self.tuning_path(rate).read_text())["kl"] for rate in self.settings.rates}
        return min(found, key=found.__getitem__)

    def finished(self) -> list[Run]:
        paths = [self.path(arm, seed) for arm in self.arms for seed in self.settings.seeds]
        return [Run(**json.loads(path.read_text())) for path in paths if path.exists()]


@functools.cache
def loaded(domain: str, folder: Path) -> Any:
    """The data of a folder that is there."""
    data = text_data if domain == TEXT else photo_data
    return data(folder, argparse.Namespace())


def tune(domain: Domain, rate: float) -> str:
    """The live teacher's student at one learning rate, on validation files."""
    torch.set_num_threads(1)
    data = loaded(domain.name, domain.data)
    arm = domain.arms[0]
    train = train_on_text if domain.name == TEXT else train_on_photos
    labels: Any = text_labels(arm, data) if domain.name == TEXT else photo_labels(arm, data)
    kl, other = train(labels, data, domain.settings, rate, 0, "val")
    domain.tuning_path(rate).write_text(json.dumps({"kl": kl, "other": other}))
    return f"{domain.name}, rate {rate:g}: KL {kl:.4f} on validation files"


def run_arm(domain: Domain, number: int, rate: float) -> str:
    """The students of an arm that are not there yet."""
    torch.set_num_threads(1)
    arm = domain.arms[number]
    data = loaded(domain.name, domain.data)
    start = time.process_time()
    labels: Any = text_labels(arm, data) if domain.name == TEXT else photo_labels(arm, data)
    label_seconds = time.process_time() - start
    if isinstance(labels, Labels):
        sizes, fixed, num_rows = labels.num_bytes, labels.fixed_bytes, len(data.logits["train"])
    else:
        sizes, fixed, num_rows = {arm.method: labels[1]} if labels[1] else {}, labels[2], labels[0].shape[1]
        num_rows *= len(data.logits["train"])  # pruned views count as stored in no bytes
    if len(sizes) == 1:
        sizes = {arm.method: next(iter(sizes.values()))}
    train = train_on_text if domain.name == TEXT else train_on_photos
    found = []
    for seed in domain.settings.seeds:
        path = domain.path(arm, seed)
        if path.exists():
            continue
        start = time.process_time()
        kl, other = train(labels, data, domain.settings, rate, seed, "test")
        seconds = time.process_time() - start
        per_row = {name: size / num_rows for name, size in sizes.items()}
        run = Run(domain.name, arm.name, arm.method, seed, rate, per_row, fixed, kl, other, seconds)
        path.write_text(json.dumps(asdict(run)))
        found.append(run)
    kls = " ".join(f"{run.kl:.4f}" for run in found)
    return (
        f"{domain.name}, {arm.name}: {found[0].bytes_per_row}, KL {kls}; CPU seconds: labels {label_seconds:.0f}, "
        f"student {found[-1].seconds:.0f}"
    )


def turns(arms: list[Arm]) -> list[int]:
    """Of each arm, its number within its method: in order of turns, a part of all work has all methods."""
    return [sum(before.method == arm.method for before in arms[:number]) for number, arm in enumerate(arms)]


def work_through(tasks: list[tuple[Callable[..., str], tuple[Any, ...]]], jobs: int, deadline: float) -> bool:
    """Run tasks in processes of one thread each; False where some did not start before the deadline."""
    if jobs == 1:
        for function, arguments in tasks:
            if time.monotonic() > deadline:
                return False
            print(function(*arguments), flush=True)
        return True
    waiting, complete = list(tasks), True
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = []
        while waiting or running:
            while waiting and len(running) < jobs:
                if time.monotonic() > deadline:
                    waiting, complete = [], False
                    break
                function, arguments = waiting.pop(0)
                running.append(pool.submit(function, *arguments))
            done = [each for each in running if each.done()]
            for each in done:
                print(each.result(), flush=True)
                running.remove(each)
            if not done:
                time.sleep(0.2)
    return complete


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/student-curve"), help="data and finished students")
    parser.add_argument("--brown", type=Path, default=Path("data/brown"))
    parser.add_argument("--smollm2", type=Path, default=Path("data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--files", type=int, nargs=3, default=[64, 16, 20], help="training, validation and test files")
    parser.add_argument("--length", type=int, default=128, help="tokens of each file")
    parser.add_argument("--photos", type=Path, help="a folder; foolbox's images in a tiny run")
    parser.add_argument("--limit", type=int, default=600, help="photos at most")
    parser.add_argument("--views", type=int, default=12)
    parser.add_argument("--only", choices=[TEXT, PHOTOS], help="one of the two experiments")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing new after so many seconds")
    parser.add_argument("--finished", action="store_true", help="train nothing: report what is finished")
    arguments = parse(parser, limit=15, views=2)
    deadline = -math.inf if arguments.finished else time.monotonic() + arguments.seconds
    torch.set_num_threads(arguments.jobs)
    body = ["# Students against bytes", conditions()]
    print(body[-1], flush=True)
    work = fresh_folder() if arguments.tiny else arguments.work
    runs = work / "runs" / commit()
    runs.mkdir(parents=True, exist_ok=True)
    tiny = Settings(epochs=1, batch=8, rates=(0.001,), seeds=(0,), tiny=True)
    domains = []
    if arguments.only != PHOTOS:
        folder = work / "data" / f"text-{'-'.join(map(str, arguments.files))}-{arguments.length}"
        num_classes = text_data(folder, arguments).num_classes
        settings = tiny if arguments.tiny else Settings(epochs=2, batch=2, rates=(0.003, 0.01, 0.02))
        domains.append(Domain(TEXT, settings, folder, runs, num_classes))
    if arguments.only != TEXT:
        folder = work / "data" / f"photos-{arguments.limit}-{arguments.views}"
        num_classes = photo_data(folder, arguments).logits["train"].shape[2]
        settings = tiny if arguments.tiny else Settings(epochs=12, batch=32, rates=(0.002, 0.004, 0.008))
        domains.append(Domain(PHOTOS, settings, folder, runs, num_classes))
    tunings = [
        (tune, (each, rate)) for each in domains for rate in each.settings.rates if not each.tuning_path(rate).exists()
    ]
    complete = work_through(tunings, arguments.jobs, deadline)
    if complete:
        missing = [
            (turn, each, number)
            for each in domains
            for number, (arm, turn) in enumerate(zip(each.arms, turns(each.arms), strict=True))
            if not all(each.path(arm, seed).exists() for seed in each.settings.seeds)
        ]
        missing.sort(key=lambda task: task[0])
        trainings = [(run_arm, (each, number, each.best_rate())) for _, each, number in missing]
        complete = work_through(trainings, arguments.jobs, deadline)
    if not complete and not arguments.finished:
        done = sum(len(each.finished()) for each in domains)
        total = sum(len(each.arms) * len(each.settings.seeds) for each in domains)
        print(f"{done} of {total} students are finished: run the same command again")
        return
    for each in domains:
        body.append(section(each))
        print(f"\n{body[-1]}", flush=True)
    if arguments.write:
        picture = result_path("student-curve", "png", device=CPU)
        plot(domains, picture)
        body.append(f"![KL to the teacher against bytes]({picture.name})")
        print(f"written to {write_result('student-curve', chr(10).join(body) + chr(10), device=CPU)}")


# ----------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Point:
    """One setting of a format, over the seeds."""

    method: str
    setting: str
    bytes_per_row: float | None
    fixed_bytes: int
    kl: list[float]
    other: list[float]
    differences: list[float]
    """In KL from the live teacher's student of the same seed."""


def points_of(domain: Domain) -> list[Point]:
    runs = domain.finished()
    seeds = len(domain.settings.seeds)
    live = {run.seed: run.kl for run in runs if run.method == LIVE}
    points = []
    for arm in domain.arms:
        of_arm = [run for run in runs if run.arm == arm.name]
        if len(of_arm) < seeds:
            continue
        values = (
            [run.kl for run in of_arm],
            [run.other for run in of_arm],
            [run.kl - live[run.seed] for run in of_arm],
        )
        for name, size in of_arm[0].bytes_per_row.items() or [(arm.method, None)]:
            points.append(Point(name, arm.setting, size, of_arm[0].fixed_bytes, *values))
    return points


def spread(values: list[float], form: str = ".3f") -> str:
    """Mean ± standard deviation."""
    return f"{statistics.fmean(values):{form}}" + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def section(domain: Domain) -> str:
    is_text = domain.name == TEXT
    rows = []
    for point in sorted(points_of(domain), key=lambda each: (each.method, each.bytes_per_row or 0.0)):
        error = statistics.stdev(point.differences) / len(point.differences) ** 0.5 if len(point.differences) > 1 else 0
        rows.append(
            [
                point.method,
                point.setting,
                "-" if point.bytes_per_row is None else f"{point.bytes_per_row:,.1f}",
                f"{point.fixed_bytes / 1024:,.0f}" if point.fixed_bytes else "",
                spread(point.kl),
                f"{statistics.fmean(point.differences):+.4f} ± {error:.4f}",
                spread(point.other) if is_text else spread(point.other, ".1%"),
            ]
        )
    header = [
        "labels",
        "setting",
        "bytes per token" if is_text else "bytes per sample and view",
        "once, KiB",
        "KL(teacher ‖ student), nats",
        "minus the live teacher's",
        "NLL, nats" if is_text else "agreement",
    ]
    settings = domain.settings
    finished = {(run.arm, run.seed) for run in domain.finished()}
    missing = [
        arm.name for arm in domain.arms if not all((arm.name, seed) in finished for seed in domain.settings.seeds)
    ]
    about = (
        f"{about_data(domain)} {settings.epochs} epochs, batches of {settings.batch}, learning rate "
        f"{domain.best_rate():g}, chosen among {', '.join(f'{rate:g}' for rate in settings.rates)} with the live "
        f"teacher on validation data; seeds {list(settings.seeds)}. Mean ± standard deviation; the difference from the "
        "live teacher's student of the same seed with its standard error."
        + (f" Left out, since not all students are finished: {'; '.join(missing)}." if missing else "")
    )
    return f"## {domain.name.capitalize()}\n\n{about}\n\n{table(header, rows)}\n"


def about_data(domain: Domain) -> str:
    data = loaded(domain.name, domain.data)
    if isinstance(data, Text):
        counts = {split: len(each) for split, each in data.logits.items()}
        log_p = data.logits["test"]
        nll = float(nn.functional.cross_entropy(log_p, data.ids["test"][:, 1:].flatten()))
        return (
            f"{counts['train']:,} training tokens, {counts['val']:,} of other files for validation and "
            f"{counts['test']:,} for the test, on which the teacher's NLL is {nll:.3f}; {data.num_classes:,} classes."
        )
    counts = {split: each.shape[1] for split, each in data.logits.items()}
    return (
        f"{counts['train']} training photos, {counts['val']} others for validation and {counts['test']} for the test, "
        f"{len(data.logits['train'])} crops of each."
    )


def plot(domains: list[Domain], path: Path) -> None:
    """KL to the teacher against bytes: a panel for each domain, a line for each format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * len(domains), 5.5), layout="constrained")
    panels = figure.subplots(1, len(domains), squeeze=False)[0]
    for axes, domain in zip(panels, domains, strict=True):
        points = points_of(domain)
        live = next(each for each in points if each.method == LIVE)
        mean, deviation = statistics.fmean(live.kl), statistics.stdev(live.kl)
        axes.axhspan(mean - deviation, mean + deviation, color="0.85", label="live teacher ± sd")
        stored = [each for each in points if each.bytes_per_row is not None]
        for number, method in enumerate(dict.fromkeys(each.method for each in stored)):
            line = sorted((each for each in stored if each.method == method), key=lambda each: each.bytes_per_row or 0)
            axes.errorbar(
                [each.bytes_per_row for each in line],
                [statistics.fmean(each.kl) for each in line],
                yerr=[statistics.stdev(each.kl) for each in line],
                marker=MARKERS[number % len(MARKERS)],
                label=method,
                capsize=2,
                linewidth=1,
                linestyle="none" if method in TWO_PARAMETERS else "solid",
            )
        for tokens in (each for each in points if each.method == TOKENS):
            axes.axhline(statistics.fmean(tokens.kl), color="0.5", linestyle="--", label=TOKENS)
        unit = "token" if domain.name == TEXT else "sample and view"
        axes.set(xscale="log", xlabel=f"bytes per {unit}", ylabel="KL(teacher ‖ student), nats", title=domain.name)
        axes.grid(which="both", alpha=0.2)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
