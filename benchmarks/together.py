"""Students together against one after another: wall time of the whole, on a pipeline that waits for its augmentation.

Four students of one cache, small nets under the demo's views, trained alone, then together, by turns; the weights that
are left must be the same to the last bit. The bound is a ratio of 0.5.

    python benchmarks/together.py --write
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from measuring import TINY, compare, conditions, options, parse, table, write_result

from logitcache.config.schema import load_pipeline
from logitcache.progress import silence
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import train_students

PIPELINE = Path(__file__).parent.parent / "pipelines" / "mnist5k.yaml"
STUDENTS = """[
  {name: kl, model: mlp, args: {hidden: [256]}, loss: {name: kl, temperature: 2.0}},
  {name: kl-small, model: mlp, args: {hidden: [64]}, loss: kl},
  {name: dist, model: mlp, args: {hidden: [128]}, loss: dist},
  {name: dkd, model: mlp, args: {hidden: [128]}, loss: dkd},
]"""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parse(parser, repeats=1, epochs=1)
    silence()
    stated = conditions()
    print(stated, flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = [
            *(TINY if arguments.tiny else []), f"students={STUDENTS}", "teacher.weights=random", "train.seeds=[0]",
            f"cache.path={folder / 'a.cache'}", f"train.epochs={arguments.epochs}",
        ]  # fmt: skip
        cache_teacher(load_pipeline(PIPELINE, common), trust=True)
        seconds: dict[str, list[float]] = {"alone": [], "together": []}
        for repeat in range(arguments.repeats):
            left = {}
            for how in seconds if repeat % 2 == 0 else reversed(seconds):
                runs = folder / f"{how}-{repeat}"
                pipeline = load_pipeline(PIPELINE, [*common, f"runs.path={runs}", f"together={how == 'together'}"])
                start = time.perf_counter()
                train_students(pipeline, trust=True)
                seconds[how].append(time.perf_counter() - start)
                left[how] = {path.relative_to(runs): path.read_bytes() for path in runs.rglob("*.safetensors")}
            assert left["alone"] == left["together"], "other weights"
    found = compare(seconds["together"], seconds["alone"])
    rows = [
        ["four students, one after another", f"{found.reference_median:.1f} s"],
        ["together", f"{found.median:.1f} s"],
        ["ratio", str(found)],
        ["bound", "<= 0.5"],
        ["weights", "the same to the last bit"],
    ]
    body = (
        f"# Together\n\n{stated}\n\n{arguments.epochs} epochs of the demo's views (affine, mixup), "
        f"{pipeline.num_workers} DataLoader workers; medians of {arguments.repeats}, by turns.\n\n"
        f"{table(['', ''], rows)}\n"
    )
    print(body)
    if arguments.write:
        print(write_result("together", body, device=torch.device("cpu")))


if __name__ == "__main__":
    main()
