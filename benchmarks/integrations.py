"""The cost of distilling from a cache in other tools' loops, against the same tool on true labels.

Each function below prepares one tool: an epoch from the cache with the integration, and an epoch on the true labels
with what the tool itself has, on the same samples, transform, model and batches. Both run in this process by turns. The
ratios are of CPU time and of wall time: at most 1.05.

    python benchmarks/integrations.py --write
    python benchmarks/integrations.py --only trainer_images --pairs 15
"""

from __future__ import annotations

import gc
import itertools
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import compare, conditions, fresh_folder, options, parse, table, write_result
from torchvision.transforms import v2

import logitcache
from logitcache.catalog.datasets import load_data
from logitcache.data.views import to_float_image
from logitcache.progress import silence

MAX_RATIO = 1.05
CLASSES = 10
VOCABULARY = 1000
Epochs = tuple[Callable[[], object], Callable[[], object]]
"""An epoch from the cache, and one on true labels."""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", choices=list(TOOLS), nargs="+", help="some of the tools")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of epochs")
    parser.add_argument("--samples", type=int, default=2000, help="images, or texts")
    arguments = parse(parser, pairs=1, samples=32)
    silence()
    warnings.filterwarnings("ignore", message="'pin_memory' argument")
    torch.set_num_threads(1)
    rows, about = [], conditions()
    print(about, flush=True)
    for name in arguments.only or TOOLS:
        wall, cpu = ratios(*TOOLS[name](fresh_folder(), arguments.samples), pairs=arguments.pairs)
        rows.append([f"`{name}`", cpu.quartiles, wall.quartiles, f"{cpu.median:.2f} s"])
        print(table(HEADER, rows[-1:]), flush=True)
    body = f"# Integrations\n\n{about}\n\nTarget: at most {MAX_RATIO}.\n\n{table(HEADER, rows)}\n"
    print(f"\n{table(HEADER, rows)}")
    if arguments.write:
        print(f"\nwritten to {write_result('integrations', body, device=torch.device('cpu'))}")


HEADER = ["tool", "CPU time, cache / labels", "wall time, cache / labels", "CPU time of an epoch from the cache"]


def ratios(from_cache: Callable[[], object], on_labels: Callable[[], object], *, pairs: int) -> Any:
    """Wall and CPU time of epochs from the cache against those on labels, by turns; the first pair warms up."""
    seconds: dict[Callable[[], object], list[tuple[float, float]]] = {from_cache: [], on_labels: []}
    for number in range(pairs + 1):
        for epoch in (from_cache, on_labels) if number % 2 else (on_labels, from_cache):
            gc.collect()
            started = time.perf_counter(), time.process_time()
            epoch()
            seconds[epoch].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    measured, reference = (list(zip(*each[1:], strict=True)) for each in seconds.values())
    return [compare(measured[kind], reference[kind]) for kind in (0, 1)]


def plan() -> logitcache.ViewPlan:
    return logitcache.ViewPlan(transform=v2.RandomAffine(10, translate=(0.1, 0.1)))


def images(count: int) -> Any:
    """The first images of the demo."""
    train = load_data("mnist5k").train
    return [train[number] for number in range(count)]


def image_cache(folder: Path, dataset: Any) -> logitcache.LogitCache:
    """One view with random logits: their values cost nothing."""
    about = {"num_samples": len(dataset), "num_classes": CLASSES, "teacher": "random", "dataset": "mnist5k"}
    with logitcache.create(folder / "images.cache", view_plan=plan(), **about) as writer:
        writer.write(view=0, start=0, logits=torch.randn(len(dataset), CLASSES))
    return logitcache.open(folder / "images.cache")


class Augmented(torch.utils.data.Dataset):
    """Images and labels as a loop without cache reads them, with the same transform."""

    def __init__(self, dataset: Any, item: Callable[[Any, int], Any]) -> None:
        self.dataset = dataset
        self.item = item
        self.transform = plan().transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        image, label = self.dataset[index]
        return self.item(to_float_image(self.transform(image)), label)


def trainer_arguments(folder: Path, batch_size: int) -> Any:
    from transformers import TrainingArguments

    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    return TrainingArguments(str(folder), num_train_epochs=1, per_device_train_batch_size=batch_size, **quiet)


def trainer_images(folder: Path, samples: int) -> Epochs:
    """A ResNet of transformers in `DistillationTrainer` and in `Trainer`."""
    from transformers import ResNetConfig, ResNetForImageClassification, Trainer

    from logitcache.integrations.huggingface import DistillationTrainer

    def net() -> torch.nn.Module:
        sizes = {"embedding_size": 64, "hidden_sizes": [64, 128], "depths": [2, 2], "layer_type": "basic"}
        return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=CLASSES, **sizes))

    dataset = images(samples)
    labelled = Augmented(dataset, lambda image, label: {"pixel_values": image, "labels": label})
    cache = image_cache(folder, dataset)
    arguments = trainer_arguments(folder, 64)
    distilled = DistillationTrainer(net(), arguments, train_dataset=dataset, cache=cache, plan=plan())
    return distilled.train, Trainer(net(), arguments, train_dataset=labelled).train


def trainer_language_model(folder: Path, samples: int) -> Epochs:
    """A Llama in `DistillationTrainer` with the 32 most probable tokens, and in `Trainer` with the true ones."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer

    from logitcache.integrations.huggingface import DistillationTrainer

    tokens = sequences(min(samples, 400))
    with logitcache.create(
        folder / "text.cache",
        num_samples=len(tokens),
        num_classes=VOCABULARY,
        encoding=logitcache.TopK(k=32),
        teacher="random",
        dataset="random",
        view_plan=logitcache.ViewPlan(),
        rows_per_sample=tokens.rows_per_sample,
        tokenization=tokens.tokenization,
    ) as writer:
        for start in range(0, writer.row_map.num_rows, 4096):
            count = min(4096, writer.row_map.num_rows - start)
            writer.write(view=0, start=start, logits=torch.randn(count, VOCABULARY))

    def net() -> torch.nn.Module:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes))

    arguments = trainer_arguments(folder, 8)
    cache = logitcache.open(folder / "text.cache")
    distilled = DistillationTrainer(net(), arguments, train_dataset=tokens, cache=cache)
    features = [tokens[number][0]["input_ids"] for number in range(len(tokens))]
    return distilled.train, Trainer(net(), arguments, padded, train_dataset=features).train


def padded(sequences: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of token ids, as transformers' own collators make it."""
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(ids) for ids in sequences], batch_first=True)
    ids = pad(sequences, batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def sequences(count: int) -> Any:
    """Random token ids, 64 to 128 of each text: their values cost nothing."""
    from logitcache.data.tokens import CAUSAL, TokenDataset

    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(64, 129, (count,), generator=draw).tolist()
    return TokenDataset(
        [torch.randint(1, VOCABULARY, (length,), generator=draw).numpy() for length in lengths],
        keys=[str(number) for number in range(count)],
        task=CAUSAL,
        vocab_size=VOCABULARY,
        tokenization={"tokenizer": "random"},
    )


def lightning(folder: Path, samples: int) -> Epochs:
    """A ResNet in Lightning's `Trainer`, with the batches of `DistillFromCache` and with labelled ones."""
    import logging

    from lightning.pytorch import LightningModule, Trainer

    from logitcache.integrations.lightning import DistillFromCache

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    class Net(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm_net()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            logits = self.net(batch[0])
            if len(batch) == 2:
                return torch.nn.functional.cross_entropy(logits, batch[1])
            return logitcache.losses.kl_divergence(logits, batch[2], temperature=2.0, reduction="mean")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    dataset = images(samples)
    labelled = Augmented(dataset, lambda image, label: (image, label))
    distill = DistillFromCache(image_cache(folder, dataset), plan())
    batches = distill.loader(dataset, batch_size=64, num_workers=0)
    labelled_batches = torch.utils.data.DataLoader(labelled, batch_size=64, shuffle=True)

    def epoch(loader: Any, *callbacks: Any) -> None:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(
            max_epochs=1, callbacks=list(callbacks), accelerator="cpu", enable_model_summary=False, **quiet
        )
        trainer.fit(Net(), loader)

    return lambda: epoch(batches, distill), lambda: epoch(labelled_batches)


def timm(folder: Path, samples: int) -> Epochs:
    """A ResNet with `CachedLogitDistillationTask` and `ClassificationTask`, each with its loader."""
    from timm.data import create_loader
    from timm.optim import create_optimizer_v2
    from timm.task import ClassificationTask

    from logitcache.integrations.timm import CachedLogitDistillationTask, create_cached_loader, view_plan

    class Images(torch.utils.data.Dataset):
        """As timm's datasets are."""

        transform: Any = None

        def __len__(self) -> int:
            return len(dataset)

        def __getitem__(self, index: int) -> Any:
            image, label = dataset[index]
            return image if self.transform is None else self.transform(image), label

    dataset = images(samples)
    size: dict[str, Any] = {"input_size": (1, 28, 28), "mean": (0.13,), "std": (0.31,), "scale": (0.6, 1.0)}
    options = {"batch_size": min(64, samples), "is_training": True, "num_workers": 0, "use_prefetcher": False}
    about = {"num_samples": samples, "num_classes": CLASSES, "teacher": "random", "dataset": "mnist5k"}
    with logitcache.create(folder / "timm.cache", view_plan=view_plan(**size), **about) as writer:
        writer.write(view=0, start=0, logits=torch.randn(samples, CLASSES))
    cached = create_cached_loader(folder / "timm.cache", Images(), **size, **options)
    distilled = CachedLogitDistillationTask(timm_net(), cached, task_loss_weight=0.0, verbose=False)
    labelled = ClassificationTask(timm_net(), verbose=False)

    def epochs(task: Any, loader: Any) -> Callable[[], object]:
        optimizer, numbers = create_optimizer_v2(task.get_trainable_module(), opt="adamw"), itertools.count()

        def epoch() -> None:
            number = next(numbers)
            if hasattr(loader.sampler, "set_epoch"):
                loader.sampler.set_epoch(number)
            for inputs, targets in loader:
                optimizer.zero_grad()
                task(inputs, targets)["loss"].backward()
                optimizer.step()

        return epoch

    return epochs(distilled, cached), epochs(labelled, create_loader(Images(), **size, **options))


def ddp(folder: Path, samples: int) -> Epochs:
    """A ResNet in `DistributedDataParallel`, in a group of one process: the loop of the README, and one on labels."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=0, world_size=1)
    dataset, shared = images(samples), plan()
    cache = image_cache(folder, dataset)
    cache.check_plan(shared)
    views = logitcache.ViewDataset(dataset, shared)
    sampler = logitcache.ViewSampler(views, cycle=cache.views)
    loader = torch.utils.data.DataLoader(views, batch_size=64, sampler=sampler)
    labelled = Augmented(dataset, lambda image, label: (image, label))
    labelled_loader = torch.utils.data.DataLoader(
        labelled, batch_size=64, sampler=torch.utils.data.DistributedSampler(labelled)
    )

    def net() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = DistributedDataParallel(timm_net())
        return model, torch.optim.AdamW(model.parameters())

    (student, optimizer), (other, other_optimizer), numbers = net(), net(), itertools.count()

    def from_cache() -> None:
        sampler.set_epoch(next(numbers))
        for step, (index, inputs, _) in enumerate(loader):
            if step == 0:
                cache.check_batch(index, inputs)
            loss = logitcache.losses.kl_divergence(
                student(inputs), cache.logits(index), temperature=2.0, reduction="mean"
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def on_labels() -> None:
        for inputs, targets in labelled_loader:
            loss = torch.nn.functional.cross_entropy(other(inputs), targets)
            other_optimizer.zero_grad()
            loss.backward()
            other_optimizer.step()

    return from_cache, on_labels


def timm_net() -> torch.nn.Module:
    from timm import create_model

    return create_model("resnet10t", in_chans=1, num_classes=CLASSES)


TOOLS: dict[str, Callable[[Path, int], Epochs]] = {
    "trainer_images": trainer_images,
    "trainer_language_model": trainer_language_model,
    "lightning": lightning,
    "timm": timm,
    "ddp": ddp,
}


if __name__ == "__main__":
    main()
