"""`view.targets`: the distributions of `view.logits`, in the form that losses take."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import logitcache
from logitcache.data.index import join_index
from logitcache.errors import UsageError
from logitcache.losses import kl_divergence
from logitcache.targets import FactoredTargets
from logitcache.testing import teacher_like
from tests.largest import largest_tensor

ROWS, CLASSES = 96, 600


def built(path: Path, encoding: logitcache.Encoding, **changes: object) -> logitcache.LogitCache:
    with logitcache.create(
        path,
        num_samples=ROWS,
        num_classes=CLASSES,
        num_views=2,
        encoding=encoding,
        teacher="net",
        dataset="rows",
        rows_per_block=32,
        calibration=teacher_like(400, CLASSES, seed=1) if encoding.fitted_arrays else None,
        **changes,  # type: ignore[arg-type]
    ) as writer:
        for view in range(2):
            outputs = {"features": torch.ones(ROWS, 3)} if "outputs" in changes else {}
            writer.write(view=view, start=0, logits=teacher_like(ROWS, CLASSES, seed=view), outputs=outputs)
    return logitcache.open(path)


@pytest.mark.parametrize("outputs", [{}, {"features": logitcache.Output(shape=(3,))}], ids=["logits", "more outputs"])
@pytest.mark.parametrize(
    ("encoding", "kind"),
    [
        (logitcache.Dense(), logitcache.DenseTargets),
        (logitcache.TopK(k=5), logitcache.SparseTargets),
        (logitcache.Sampled(draws=9), logitcache.SparseTargets),
        (logitcache.Sampled(draws=9, packed=True), logitcache.SparseTargets),
        (logitcache.PackedTopK(k=5, most=8, prior=True), logitcache.SparseTargets),
        (logitcache.LowRank(rank=6, k=1), FactoredTargets),
        (logitcache.TopLowRank(rank=6, k=2), FactoredTargets),
        (logitcache.TrellisLowRank(rank=6), FactoredTargets),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_targets_are_the_distributions_of_the_logits(
    tmp_path: Path, encoding: logitcache.Encoding, kind: type, outputs: dict[str, logitcache.Output]
) -> None:
    """Resident and streamed."""
    cache = built(tmp_path / "a", encoding, **({"outputs": outputs} if outputs else {}))
    indices = [70, 0, 33, 33], torch.tensor([join_index(1, 95), join_index(1, 2)]), []
    for budget, index in itertools.product((None, cache.view_bytes // 2), indices):
        view = cache.view(1, memory_budget=budget)
        targets, logits = view.targets(index), view.logits(index)

        assert kind is type(targets)
        torch.testing.assert_close(targets.dense().log_softmax(dim=1), logits.log_softmax(dim=1))
        assert torch.equal(logits.argmax(dim=1), targets.argmax())


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize(
    "encoding",
    [
        logitcache.TopK(k=5),
        logitcache.Sampled(draws=9),
        logitcache.PackedTopK(k=5),
        logitcache.Sampled(draws=9, packed=True),
    ],
    ids=repr,
)
def test_sparse_targets_are_read_without_a_tensor_of_rows_and_classes(
    tmp_path: Path, encoding: logitcache.Encoding, budget: int | None
) -> None:
    view = built(tmp_path / "a", encoding).view(1, memory_budget=budget)
    view.targets([0])

    assert 3 * CLASSES > largest_tensor(lambda: view.targets([70, 0, 33]))


def test_an_index_is_checked_as_for_logits(tmp_path: Path) -> None:
    view = built(tmp_path / "a", logitcache.TopK(k=5)).view(1)
    with pytest.raises(UsageError, match="these labels are of view 1, but the batch has indices of view 0"):
        view.targets([join_index(0, 3)])
    with pytest.raises(IndexError, match="row 96 is beyond the view"):
        view.targets([96])
    with pytest.raises(UsageError, match="expected integer row numbers"):
        view.targets([0.5])


@pytest.mark.parametrize(
    "encoding",
    [logitcache.Dense(dtype="float32"), logitcache.TopK(k=4, dtype="float32"), logitcache.LowRank(rank=4, step=0.001)],
    ids=lambda each: each.name,
)
def test_the_guides_example_of_a_smaller_vocabulary_runs(tmp_path: Path, encoding: logitcache.Encoding) -> None:
    section = (
        (Path(__file__).parents[2] / "docs/targets.md").read_text().split("## Students with a smaller vocabulary", 1)[1]
    )
    logits, student = torch.randn(60, 5), torch.randn(2, 3)
    about: dict[str, Any] = {"num_samples": 60, "num_classes": 5, "teacher": "t", "dataset": "d"}
    with logitcache.create(tmp_path / "a", encoding=encoding, calibration=logits, **about) as writer:
        writer.write(view=0, start=0, logits=logits)
    names: dict[str, Any] = {"torch": torch, "logitcache": logitcache, "student_logits": student}
    names["view"] = logitcache.open(tmp_path / "a").view(0)
    exec(section.split("```python", 1)[1].split("```", 1)[0], names)

    expected = kl_divergence(student, logits[:2, [1, 4, 2]], temperature=2.0)
    torch.testing.assert_close(expected, names["loss"], atol=0.02, rtol=0.02)
