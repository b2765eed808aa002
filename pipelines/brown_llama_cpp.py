"""A cache from llama.cpp instead of `transformers`: the 64 most probable tokens of each position, by `write_sparse`.

    pip install llama-cpp-python          # compiles llama.cpp: minutes
    python pipelines/brown_smollm2.py     # the corpus and the GGUF file
    python pipelines/brown_llama_cpp.py
    logitcache train-student pipelines/brown_smollm2.yaml distilled \\
        'students.distilled.labels={caches: [caches/brown_llama_cpp.cache]}'

Overrides of the pipeline, such as `data.args.max_length=64`, follow the name of the script. An interrupted run resumes.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from llama_cpp import Llama

import logitcache
from logitcache.config.build import resolve_data, resolve_plan
from logitcache.config.schema import load_pipeline
from logitcache.progress import track

KEPT = 64
CACHE = "caches/brown_llama_cpp.cache"


def main(overrides: list[str]) -> None:
    """Run llama.cpp over the training split, and write its most probable tokens to the cache."""
    pipeline = load_pipeline(Path(__file__).with_name("brown_smollm2.yaml"), [f"cache.path={CACHE}", *overrides])
    data = resolve_data(pipeline, trust=False)
    dataset, gguf = data.train, Path(pipeline.teacher.args["path"])
    rows_per_sample = np.asarray(dataset.rows_per_sample)
    longest = max(len(dataset[index][0]["input_ids"]) for index in range(len(dataset)))
    engine = Llama(model_path=str(gguf), logits_all=True, n_ctx=max(512, longest), verbose=False)
    with logitcache.create(
        pipeline.cache.path,
        num_samples=len(dataset),
        num_classes=data.num_classes,
        encoding=logitcache.TopK(k=KEPT),
        teacher=f"llama.cpp@{hashlib.sha256(gguf.read_bytes()).hexdigest()}",
        samples=logitcache.sample_table(dataset, contents=True),
        view_plan=resolve_plan(pipeline, data, trust=False),
        rows_per_sample=rows_per_sample,
        row_positions=dataset.row_positions,
        tokenization=dataset.tokenization,
        rows_per_block=pipeline.cache.rows_per_block,
    ) as writer:
        missing = writer.missing_blocks()
        samples = [sample for block in missing for sample in writer.row_map.block_samples(block.number)]
        with track("running llama.cpp", len(samples), unit="samples") as meter:
            for sample in samples:
                rows = writer.row_map.sample_rows(sample)
                if rows:
                    ids, log_probs = most_probable(engine, dataset[sample][0]["input_ids"])
                    at = writer.row_map.positions_of(np.array(rows))
                    writer.write_sparse(view=0, start=rows.start, ids=ids[at], log_probs=log_probs[at])
                meter.advance()


def most_probable(engine: Llama, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, log-probabilities) of the next token after each position, (L, 64) each."""
    engine.reset()
    engine.eval(token_ids.tolist())
    logits = torch.from_numpy(np.array(engine.scores[: len(token_ids)]))
    log_probs, ids = logits.log_softmax(dim=1).topk(KEPT, dim=1)
    return ids, log_probs


if __name__ == "__main__":
    main(sys.argv[1:])
