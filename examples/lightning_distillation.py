"""Distil in Lightning from a cache: pip install 'logitcache[lightning]' scikit-learn"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import logitcache
from logitcache.integrations.lightning import DistillFromCache

pixels, digits = load_digits(return_X_y=True)
images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
samples = list(zip(images, digits.tolist(), strict=True))
train_set, validation = samples[:1400], DataLoader(samples[1400:], batch_size=397)
plan = logitcache.ViewPlan(transform=v2.RandomAffine(degrees=10, translate=(0.1, 0.1)), seed=0)


class Net(LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch, batch_idx):
        inputs, labels, teacher_logits = batch if len(batch) == 3 else (*batch, None)
        logits = self.net(inputs)
        if teacher_logits is None:
            return nn.functional.cross_entropy(logits, labels)
        return logitcache.losses.kl_divergence(logits, teacher_logits, temperature=2.0, reduction="mean")

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self.net(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.005)


def fit(net: Net, loader: DataLoader, epochs: int, *callbacks) -> float:
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=epochs, callbacks=list(callbacks), **options)
    trainer.fit(net, loader, validation)
    return float(trainer.callback_metrics["accuracy"])


seed_everything(0)
teacher = Net(256)
print(f"teacher: {fit(teacher, DataLoader(train_set, batch_size=64, shuffle=True), 12):.1%}")
views = logitcache.ViewDataset(train_set, plan)  # stage 1: the teacher's logits for four views
about = {"num_samples": 1400, "num_classes": 10, "num_views": 4, "teacher": "mlp-256", "dataset": "digits-1400"}
with logitcache.create("digits.cache", **about, view_plan=plan) as writer:
    for view in range(4):
        views.set_view(view)
        for number, (_, inputs, _) in enumerate(DataLoader(views, batch_size=200)):
            writer.write(view=view, start=200 * number, logits=teacher.net(inputs).detach(), inputs=inputs)
distill = DistillFromCache(logitcache.open("digits.cache"), plan)  # stage 2, without the teacher
print(f"student: {fit(Net(16), distill.loader(train_set, batch_size=64), 8, distill):.1%}")
