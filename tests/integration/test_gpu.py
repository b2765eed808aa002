"""Caches and losses on a GPU: the same values as on the CPU, up to rounding. Skipped where there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import logitcache
from logitcache.cache.fidelity import fidelity_kl
from logitcache.config.schema import Pipeline
from logitcache.data.batched_views import TOLERANCE
from logitcache.data.transforms import build_transform
from logitcache.data.views import Mixing, ViewDataset, ViewPlan
from logitcache.errors import InvalidLogits
from logitcache.losses import kl_divergence, linear_cross_entropy, linear_kl_divergence
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.train_student import train_students
from logitcache.stages.verify_match import verify_match
from logitcache.targets import SparseTargets
from logitcache.verify.audit import verify
from tests.needs import need_package

# B rows, C classes, D hidden size, K entries

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    # Of torch.compile itself, in some versions.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:(?s).*Online softmax.*:UserWarning"),
]

Make = Callable[..., Pipeline]
ROWS, CLASSES, MANY = 300, 200, 9000

ENCODINGS: dict[str, logitcache.Encoding] = {
    "float32": logitcache.Dense(dtype="float32"),
    "float16": logitcache.Dense(dtype="float16"),
    "uint8": logitcache.Dense(dtype="uint8"),
    "topk": logitcache.TopK(k=8),
    "sampled": logitcache.Sampled(draws=40),
    "lowrank": logitcache.LowRank(rank=16, k=4),
    "packedtopk": logitcache.PackedTopK(k=8),
    "packedtopk-prior": logitcache.PackedTopK(k=8, most=24, prior=True),
    "sampled-packed": logitcache.Sampled(draws=40, packed=True),
    "toplowrank": logitcache.TopLowRank(rank=16, k=4),
    "trellislowrank": logitcache.TrellisLowRank(rank=16),
}


def logits_of(num_classes: int, rows: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 24, generator=generator) @ torch.randn(24, num_classes, generator=generator)


@pytest.mark.parametrize("num_classes", [CLASSES, MANY])
@pytest.mark.parametrize("name", ENCODINGS)
def test_a_cache_written_on_the_gpu_decodes_to_what_the_cpu_writes(tmp_path: Path, name: str, num_classes: int) -> None:
    logits = logits_of(num_classes)
    mean_kl = []
    for device in ("cpu", "cuda"):
        with logitcache.create(
            tmp_path / device,
            num_samples=ROWS,
            num_classes=num_classes,
            encoding=ENCODINGS[name],
            calibration=logits,
            teacher="random",
            dataset="random",
            rows_per_block=128,
        ) as writer:
            for start in range(0, ROWS, 70):
                writer.write(view=0, start=start, logits=logits[start : start + 70].to(device))
        assert [] == verify(str(tmp_path / device), deep=True)
        mean_kl.append(
            float(fidelity_kl(logitcache.open(tmp_path / device).view(0).logits(range(ROWS)), logits).mean())
        )
    cache = logitcache.open(tmp_path / "cuda")
    on_gpu = cache.view(0, device="cuda").logits(torch.arange(ROWS))

    assert "cuda" == on_gpu.device.type
    torch.testing.assert_close(on_gpu.cpu(), cache.view(0).logits(range(ROWS)), rtol=1e-4, atol=1e-4)
    assert mean_kl[1] == pytest.approx(mean_kl[0], rel=0.05, abs=1e-6)
    stated = math.inf if cache.kl_mean is None else cache.kl_mean  # of `sampled`, which drops classes
    assert stated == pytest.approx(mean_kl[1], rel=0.2, abs=1e-5)


def test_features_written_on_the_gpu_are_those_that_the_cpu_writes(tmp_path: Path) -> None:
    features = logits_of(60).view(ROWS, 15, 4)
    encoding = logitcache.Components(error=0.1).fit(features)
    read = {}
    for device in ("cpu", "cuda"):
        with logitcache.create(
            tmp_path / device,
            num_samples=ROWS,
            num_classes=0,
            outputs={"features": logitcache.Output(shape=(15, 4), encoding=encoding)},
            teacher="random",
            dataset="random",
        ) as writer:
            for start in range(0, ROWS, 70):
                writer.write(view=0, start=start, outputs={"features": features[start : start + 70].to(device)})
        assert [] == verify(str(tmp_path / device), deep=True)
        view = logitcache.open(tmp_path / device).view(0, device=device)
        read[device] = view.output("features", torch.arange(ROWS)).cpu()

    assert 0.2 > float((read["cuda"] - features).norm() / (features - features.mean(dim=0)).norm())
    # A coefficient between two steps may be rounded either way.
    assert 0.02 > float((read["cuda"] - read["cpu"]).norm() / features.norm())


@pytest.mark.parametrize("name", ["topk", "float32"])
def test_masked_classes_and_bad_rows_are_found_on_the_gpu(tmp_path: Path, name: str) -> None:
    logits = logits_of(MANY, rows=4)
    logits[1, 100:] = -torch.inf
    logits[2, 3:] = -torch.inf
    create = lambda path: logitcache.create(  # noqa: E731
        path, num_samples=4, num_classes=MANY, encoding=ENCODINGS[name], teacher="random", dataset="random"
    )
    with create(tmp_path / "masked") as writer:
        writer.write(view=0, start=0, logits=logits.cuda())
    decoded = logitcache.open(tmp_path / "masked").view(0).logits(range(4))

    assert torch.equal(logits[1:3].argmax(dim=1), decoded[1:3].argmax(dim=1))
    logits[3, 0] = torch.nan
    with pytest.raises(InvalidLogits, match="row 3"), create(tmp_path / "nan") as writer:
        writer.write(view=0, start=0, logits=logits.cuda())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chunked_heads_have_the_gradients_of_all_logits(compiled: bool, dtype: torch.dtype, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(100, 32, generator=generator).to(dtype)
    weight = (torch.randn(MANY, 32, generator=generator) / 4).to(dtype)
    labels = torch.randint(MANY, (100,), generator=generator)
    teacher = logits_of(MANY, rows=100)
    top, ids = teacher.log_softmax(dim=1).topk(20, dim=1)
    tail = torch.log1p(-top.exp().sum(dim=1))
    targets = SparseTargets(ids, top, tail, MANY)

    def expected() -> list[Tensor]:
        wide = [each.double().requires_grad_() for each in (hidden, weight)]
        logits = wide[0] @ wide[1].T
        loss = kl_divergence(logits, targets.dense().double(), temperature=temperature)
        loss = loss + 0.5 * torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        loss.mean().backward()
        return [loss.mean().detach(), *(each.grad for each in wide)]  # type: ignore[list-item]

    on_gpu = [each.detach().cuda().requires_grad_() for each in (hidden, weight)]
    loss = linear_kl_divergence(
        *on_gpu,
        targets.to("cuda"),
        temperature=temperature,
        labels=labels.cuda(),
        label_weight=0.5,
        chunk_rows=40,
        compiled=compiled,
    )
    loss.backward()
    rounding = 1e-4 if dtype == torch.float32 else 3e-2

    for found, wanted in zip([loss.detach(), on_gpu[0].grad, on_gpu[1].grad], expected(), strict=True):
        assert found is not None
        error = (found.cpu().double() - wanted).norm() / wanted.norm()
        assert float(error) < rounding
    plain = linear_cross_entropy(*on_gpu, labels.cuda(), compiled=compiled)
    wanted = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, labels)
    assert float(plain.detach()) == pytest.approx(float(wanted), rel=rounding)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="float32"),
        pytest.param(
            ["teacher.precision=bfloat16", "teacher.model=cnn", "teacher.args={}", "teacher.channels_last=true"],
            id="bfloat16",
        ),
        pytest.param(["cache.encoding={name: lowrank, rank: 6, k: 2}", "num_workers=2"], id="lowrank"),
    ],
)
def test_both_stages_and_recomputation(tiny: Make, overrides: list[str]) -> None:
    pipeline = tiny("device=cuda", *overrides)
    cache_teacher(pipeline)
    _, labels = train_students(pipeline)

    assert [] == verify_match(pipeline, recompute=50)
    assert labels.accuracy_mean is not None
    assert labels.accuracy_mean > 0.15


@pytest.mark.parametrize("chunked", ["false", "true"])
def test_a_language_model_from_the_cache_and_with_the_live_teacher(tiny: Make, chunked: str) -> None:
    need_package("transformers", "hf")
    llama = """{model: transformers, args: {config: {model_type: llama, hidden_size: 16, intermediate_size: 24,
        num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 32, tie_word_embeddings: true}}"""
    pipeline = tiny(
        "device=cuda",
        "data={name: 'tests.texts:sentences', collate: pad}",
        "views={count: 1}",
        f"teacher={llama}, weights: random, batch_size: 4}}",
        "cache.encoding={name: dense, dtype: float32}",
        f"train={{epochs: 1, batch_size: 5, lr: 0.05, optimizer: sgd, chunked_head: {chunked}}}",
        f"students=[{llama}, name: cached, loss: kl}}, {llama}, name: live, loss: kl, labels: live}}]",
    )
    cache_teacher(pipeline)
    train_students(pipeline)
    logs = [(Path(pipeline.runs.path) / name / "seed-0/metrics.jsonl").read_text() for name in ("cached", "live")]
    cached, live = ([json.loads(line).get("train_loss") for line in log.splitlines()] for log in logs)

    assert cached[0] == pytest.approx(live[0], rel=1e-3)
    assert math.isfinite(cached[0])


@pytest.mark.parametrize("mixing", [Mixing(), Mixing(mixup=0.4), Mixing(cutmix=1.0)], ids=["plain", "mixup", "cutmix"])
@pytest.mark.parametrize("batched", [False, True])
def test_views_finished_on_the_gpu_are_those_of_the_workers(mixing: Mixing, batched: bool) -> None:
    """Up to the tolerances that docs/training.md states, in pixels from 0 to 1."""
    steps = [{"Resize": {"size": [24, 24]}}, {"batched_crop": {"size": 16}}, {"batched_color": {"contrast": 0.4}}]
    transform = build_transform(steps if batched else [{"RandomCrop": {"size": 16}}])
    plan = ViewPlan(transform=transform, seed=1, mixing=mixing, num_classes=10)
    images = [(torch.randint(256, (3, 24, 24), dtype=torch.uint8), number % 10) for number in range(32)]
    there, here = ViewDataset(images, plan, on_device=True), ViewDataset(images, plan)
    places = [(view, sample) for view in (0, 1) for sample in range(32)]
    (_, sent, _), (_, expected, _) = there.collate(there.__getitems__(places)), here.collate(here.__getitems__(places))
    sent = {name: value.cuda() for name, value in sent.items()} if isinstance(sent, dict) else sent.cuda()
    found = there.finish(sent)

    assert "cuda" == found.device.type
    assert float((found.cpu() - expected).abs().max()) <= (TOLERANCE if batched else 2.0**-23)
