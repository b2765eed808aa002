"""Started by torchrun in two processes: the example of DDP, an accelerated loop, and a Trainer that resumes.

python -m torch.distributed.run --nproc-per-node 2 -m tests.several_processes FOLDER
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

import logitcache
from tests.models import Pictures


class Linear(nn.Module):
    """A model as Trainer takes it, without labels in an evaluation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(64, 10)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(pixel_values.flatten(1))}


def example(folder: Path) -> dict[str, Any]:
    """What the example reads in each epoch, and the weights of its student."""
    sys.argv = ["ddp_loop.py", str(folder)]
    with mock.patch("torch.distributed.destroy_process_group"):  # a second group could meet addresses of the first
        names = runpy.run_path(str(Path(__file__).parents[1] / "examples/ddp_loop.py"))
    read = []
    for epoch in range(4):
        names["sampler"].set_epoch(epoch)
        read.append(list(names["sampler"]))
    return {"read": read, "weights": names["student"].module.state_dict()}


def accelerated(cache: Any, plan: Any) -> list[list[int]]:
    """The index of what a loader that `accelerate` prepared gives in each epoch."""
    from accelerate import Accelerator

    views = logitcache.ViewDataset(Pictures(), plan)
    sampler = logitcache.ViewSampler(views, cycle=cache.views, num_replicas=1, rank=0)
    loader = Accelerator(cpu=True).prepare(DataLoader(views, batch_size=10, sampler=sampler))
    read = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        read.append([number for index, _, _ in loader for number in index.tolist()])
    return read


def trainers(cache: Any, plan: Any, folder: Path) -> dict[str, Any]:
    """The weights and the batches of a Trainer, whole, and resumed in the middle of its second epoch."""
    from transformers import TrainingArguments

    from logitcache.integrations.huggingface import DistillationTrainer

    quiet = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "use_cpu": True}
    size = {"per_device_train_batch_size": 8, "num_train_epochs": 3, "learning_rate": 0.01}
    arguments = TrainingArguments(str(folder / "trainer"), save_strategy="steps", save_steps=1, **quiet, **size)

    def run(checkpoint: str | None) -> dict[str, Any]:
        trainer = DistillationTrainer(Linear(), arguments, train_dataset=Pictures(), cache=cache, plan=plan)
        read: list[list[int]] = []
        compute_loss = trainer.compute_loss

        def recorded(model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            read.append(inputs["index"].tolist())
            return compute_loss(model, inputs, *rest, **options)

        trainer.compute_loss = recorded
        trainer.train(resume_from_checkpoint=checkpoint)
        return {"read": read, "weights": trainer.model.state_dict()}

    whole = run(None)
    return {"whole": whole, "resumed": run(str(folder / "trainer/checkpoint-4"))}


def main() -> None:
    from torchvision.transforms import v2

    folder = Path(sys.argv[1])
    found: dict[str, Any] = {"example": example(folder)}
    rank = dist.get_rank()
    plan = logitcache.ViewPlan(transform=v2.RandomAffine(10), seed=1)
    if rank == 0:
        about: dict[str, Any] = {"num_samples": 40, "num_classes": 10, "num_views": 3, "teacher": "random"}
        samples = logitcache.sample_table(Pictures(), contents=True)
        with logitcache.create(folder / "p.cache", samples=samples, view_plan=plan, **about) as writer:
            for view in range(3):
                logits = torch.randn(40, 10, generator=torch.Generator().manual_seed(view))
                writer.write(view=view, start=0, logits=logits)
    dist.barrier()
    cache = logitcache.open(folder / "p.cache")
    found |= trainers(cache, plan, folder) | {"accelerated": accelerated(cache, plan)}
    torch.save(found, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
