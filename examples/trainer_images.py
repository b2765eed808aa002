"""Distils a ResNet into a smaller one with the Trainer of transformers: python examples/trainer_images.py [FOLDER].

Needs `pip install 'logitcache[hf]' scikit-learn`, and a minute on a CPU.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset, Image
from PIL.Image import fromarray
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import logitcache
from logitcache.integrations.huggingface import DistillationTrainer, image_dataset

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/trainer_images")
images, classes = load_digits(return_X_y=True)
pictures = [fromarray((image.reshape(8, 8) * 15).astype("uint8")) for image in images]
columns = {"image": pictures, "label": classes, "id": [f"digit-{number}" for number in range(len(pictures))]}
split = Dataset.from_dict(columns).cast_column("image", Image()).train_test_split(test_size=900, seed=0)
train, test = (image_dataset(split[name], image="image", label="label", key="id") for name in ("train", "test"))


def resnet(*widths: int) -> ResNetForImageClassification:
    sizes = {"embedding_size": 16, "hidden_sizes": widths, "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_labels=10, **sizes))


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())}


common = {"learning_rate": 3e-3, "report_to": "none", "save_strategy": "no", "dataloader_pin_memory": False}
arguments = TrainingArguments(folder / "trainer", num_train_epochs=5, per_device_train_batch_size=64, **common)

plan = logitcache.ViewPlan(transform=v2.RandomAffine(8, translate=(0.1, 0.1)), preprocess=v2.Resize(16))
views = logitcache.ViewDataset(train, plan)
torch.manual_seed(0)
teacher, student = resnet(32, 64), resnet(16, 32)
features = [{"pixel_values": pixels, "labels": label} for _, pixels, label in map(views.__getitem__, range(len(views)))]
Trainer(teacher, arguments, train_dataset=features).train()

samples = logitcache.sample_table(train, contents=True)  # keys, labels and hashes of the images
about = {"num_samples": len(train), "num_classes": 10, "num_views": 4, "teacher": "resnet-32-64", "samples": samples}
with logitcache.create(folder / "digits.cache", view_plan=plan, **about) as writer, torch.no_grad():
    teacher.eval()
    for view in range(4):
        views.set_view(view)
        for batch, (_, pixels, _) in enumerate(DataLoader(views, batch_size=256)):
            writer.write(view=view, start=256 * batch, logits=teacher(pixel_values=pixels).logits, inputs=pixels)

cache, loss = logitcache.open(folder / "digits.cache"), logitcache.losses.Blend(alpha=0.8, temperature=2.0)
options = {"eval_dataset": test, "compute_metrics": accuracy}
trainer = DistillationTrainer(student, arguments, train_dataset=train, cache=cache, plan=plan, loss=loss, **options)
trainer.train()
print(f"student: {trainer.evaluate()['eval_accuracy']:.1%}")
