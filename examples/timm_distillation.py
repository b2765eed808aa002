"""Distil a timm model from a cache with the parts of timm's train.py: pip install 'logitcache[timm]' scikit-learn"""

from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm import create_model
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import accuracy

import logitcache
from logitcache.integrations.timm import CachedLogitDistillationTask, create_cached_loader, view_plan

for number, (pixels, digit) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
    folder = Path("digits", "train" if number < 600 else "validation", str(digit))
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 15).astype("uint8").reshape(8, 8)).save(folder / f"{number:04}.png")
data, size = {"root": "digits", "input_img_mode": "L"}, {"input_size": (1, 16, 16), "mean": (0.3,), "std": (0.35,)}
augmentation = {"scale": (0.7, 1.0), "hflip": 0.0, "color_jitter": None}
options = size | augmentation | {"batch_size": 50, "is_training": True, "use_prefetcher": False}


def train(task: ClassificationTask, loader, epochs: int) -> float:
    """Trains as train.py does; returns the accuracy on the validation images in percent."""
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=3e-3)
    for epoch in range(epochs):
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        for images, target in loader:
            optimizer.zero_grad()
            task(images, target)["loss"].backward()
            optimizer.step()
    dataset = create_dataset("", split="validation", **data)
    [(images, target)] = create_loader(dataset, **size, batch_size=len(dataset), use_prefetcher=False)
    with torch.inference_mode():
        return accuracy(task.get_eval_model().eval()(images), target)[0].item()


torch.manual_seed(0)
net = {"in_chans": 1, "num_classes": 10, "output_stride": 8}
teacher = create_model("test_byobnet", **net)
loader = create_loader(create_dataset("", split="train", **data), **options)
print(f"teacher: {train(ClassificationTask(teacher), loader, 5):.1f} %")

dataset, plan = create_dataset("", split="train", **data), view_plan(**size, **augmentation)
views = logitcache.ViewDataset(dataset, plan)  # stage 1: the teacher's logits for four views of the images
create = {"num_samples": 600, "num_classes": 10, "num_views": 4, "teacher": "byobnet", "dataset": "digits"}
with logitcache.create("digits.cache", **create, view_plan=plan) as writer, torch.inference_mode():
    for view in range(4):
        views.set_view(view)
        for number, (_, images, _) in enumerate(torch.utils.data.DataLoader(views, batch_size=100)):
            writer.write(view=view, start=100 * number, logits=teacher(images), inputs=images)

loader = create_cached_loader(logitcache.open("digits.cache"), dataset, **options)  # stage 2, without the teacher
student = create_model("test_efficientnet", **net)
task = CachedLogitDistillationTask(student, loader, distill_loss_weight=1.0, task_loss_weight=0.0, temperature=2.0)
print(f"student: {train(task, loader, 5):.1f} %")
