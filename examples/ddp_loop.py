"""The loop of the README in several processes: each step averages the gradients of all of them.

torchrun --nproc-per-node 2 examples/ddp_loop.py [FOLDER]        pip install logitcache scikit-learn
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import logitcache

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/ddp_loop")
pixels, classes = load_digits(return_X_y=True)
images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
dataset = [(images[number], int(classes[number])) for number in range(1400)]
plan = logitcache.ViewPlan(transform=v2.RandomAffine(degrees=10, translate=(0.1, 0.1)), seed=0)
views = logitcache.ViewDataset(dataset, plan)

dist.init_process_group("gloo")  # "nccl" with a GPU for each process
if dist.get_rank() == 0:  # stage 1; a nearest-centre teacher keeps this example short
    centres = torch.stack([images[:1400][torch.tensor(classes[:1400]) == digit].mean(dim=0) for digit in range(10)])
    about = {"num_samples": 1400, "num_classes": 10, "num_views": 4, "teacher": "nearest-centre", "dataset": "digits"}
    with logitcache.create(folder / "digits.cache", view_plan=plan, **about) as writer:
        for view in range(4):
            views.set_view(view)
            for batch, (_, inputs, _) in enumerate(DataLoader(views, batch_size=200)):
                logits = -(torch.cdist(inputs.flatten(1), centres.flatten(1)) ** 2)
                writer.write(view=view, start=200 * batch, logits=logits, inputs=inputs)
dist.barrier()

cache = logitcache.open(folder / "digits.cache")
cache.check_plan(plan)
sampler = logitcache.ViewSampler(views, cycle=cache.views)  # this process's share of the samples
loader = DataLoader(views, batch_size=32, sampler=sampler)  # 32 per process
torch.manual_seed(0)
student = DistributedDataParallel(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
for epoch in range(8):
    sampler.set_epoch(epoch)
    for step, (index, inputs, _) in enumerate(loader):
        if step == 0:
            cache.check_batch(index, inputs)
        loss = logitcache.losses.kl_divergence(student(inputs), cache.logits(index), temperature=2.0, reduction="mean")
        optimizer.zero_grad()
        loss.backward()  # averages the gradients
        optimizer.step()

if dist.get_rank() == 0:
    save_file(student.module.state_dict(), folder / "student.safetensors")
    agreement = (student.module(images[1400:]).argmax(dim=1).numpy() == classes[1400:]).mean()
    print(f"student: {agreement:.1%}")
dist.destroy_process_group()
