"""Write logits.npy into the cache of pipeline.yaml."""

import numpy as np
from my_data import load

import logitcache

dataset = load("images.npz")["train"]
logits = np.load("logits.npy")
samples = logitcache.sample_table(dataset, contents=True)

with logitcache.create(
    "caches/starter.cache",
    num_samples=len(dataset),
    num_classes=logits.shape[1],
    encoding=logitcache.Dense(dtype="float16"),  # or logitcache.TopK(k=20) for many classes
    teacher="resnet50",
    samples=samples,
) as writer:
    for start in range(0, len(dataset), 4096):
        writer.write(view=0, start=start, logits=logits[start : start + 4096])
