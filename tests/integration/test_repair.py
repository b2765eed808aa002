"""Making bad blocks good again, and asking the teacher whether labels are still its own."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from logitcache.config.schema import Pipeline
from logitcache.errors import CorruptCache, IdentityMismatch, UsageError
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.verify_match import verify_match
from logitcache.verify.audit import verify
from logitcache.verify.repair import repair


def chunks(path: str) -> list[Path]:
    return sorted(file for file in Path(path, "labels.zarr", "logits", "c").rglob("*") if file.is_file())


def test_only_bad_blocks_are_recomputed_and_the_digest_comes_back(tiny: Callable[..., Pipeline]) -> None:
    pipeline = tiny()
    digest = cache_teacher(pipeline).manifest.digest
    path = pipeline.cache.path
    first, second, *others = chunks(path)
    first.write_bytes(first.read_bytes()[:-3])
    second.unlink()
    untouched = {file: file.stat().st_mtime_ns for file in others}
    result = repair(path, recompute=lambda: cache_teacher(pipeline).manifest.digest)

    assert (2, 2, digest) == (len(result.problems), len(result.recomputed), result.digest)
    assert [] == result.remaining == verify(path, deep=True)
    assert untouched == {file: file.stat().st_mtime_ns for file in others}
    assert [] == repair(path, recompute=lambda: cache_teacher(pipeline).manifest.digest).problems


def test_an_interrupted_repair_goes_on_as_a_build(tiny: Callable[..., Pipeline]) -> None:
    pipeline = tiny()
    digest = cache_teacher(pipeline).manifest.digest
    for file in chunks(pipeline.cache.path)[:2]:
        file.write_bytes(b"damaged")

    def interrupted() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(pipeline.cache.path, recompute=interrupted)
    assert 2 == len(cache_teacher(pipeline).computed_blocks)
    assert digest == repair(pipeline.cache.path).digest


def test_blocks_come_from_a_copy_whatever_was_damaged(tiny: Callable[..., Pipeline], tmp_path: Path) -> None:
    pipeline = tiny()
    digest = cache_teacher(pipeline).manifest.digest
    path, copy = Path(pipeline.cache.path), tmp_path / "copy.cache"
    shutil.copytree(path, copy)
    draw = random.Random(0)
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        original = bytearray(file.read_bytes())
        original[draw.randrange(len(original))] ^= 64
        file.write_bytes(original)
    result = repair(str(path), source=str(copy))

    assert (digest, []) == (result.digest, result.remaining)
    for file in copy.rglob("*"):
        if file.is_file() and file.name != "README.md":  # the card is for people: theirs to edit, and no receipt has it
            assert file.read_bytes() == (path / file.relative_to(copy)).read_bytes()


def test_a_copy_of_another_cache_is_refused(tiny: Callable[..., Pipeline], tmp_path: Path) -> None:
    pipeline, other = tiny(), tiny(f"cache.path={tmp_path}/other.cache", "views.seed=4")
    cache_teacher(pipeline)
    cache_teacher(other)
    with pytest.raises(IdentityMismatch, match="is no copy of"):
        repair(pipeline.cache.path, source=other.cache.path)


def test_what_can_not_be_repaired_is_told(tiny: Callable[..., Pipeline]) -> None:
    pipeline = tiny()
    cache_teacher(pipeline)
    path = Path(pipeline.cache.path)
    victim = chunks(str(path))[0]
    original = victim.read_bytes()
    victim.write_bytes(b"")
    with pytest.raises(UsageError, match=r"v00000/b00000 can't be repaired without a copy .*--from.* or the pipeline"):
        repair(str(path))
    victim.write_bytes(original)
    (path / "labels.zarr/sample_targets/c/0").write_bytes(b"")
    with pytest.raises(UsageError, match=r"the teacher can't recompute them; give a copy \(--from\)"):
        repair(str(path), recompute=lambda: cache_teacher(pipeline).manifest.digest)
    (path / "receipts.json").write_text("{}")
    with pytest.raises(CorruptCache, match=r"receipts\.json"):
        repair(str(path), recompute=lambda: cache_teacher(pipeline).manifest.digest)


def test_metadata_for_other_readers_is_written_anew(tiny: Callable[..., Pipeline]) -> None:
    pipeline = tiny()
    cache_teacher(pipeline)
    metadata = Path(pipeline.cache.path, "labels.zarr/logits/zarr.json")
    original = metadata.read_bytes()
    metadata.write_text("{}")
    result = repair(pipeline.cache.path)

    assert original == metadata.read_bytes()
    assert (["wrong bytes"], []) == ([problem.kind for problem in result.problems], result.remaining)


@pytest.mark.parametrize("encoding", ["Dense(dtype='float32')", "TopK(k=3)", "Sampled(draws=20)"])
def test_the_teacher_knows_its_labels_again(tiny: Callable[..., Pipeline], encoding: str) -> None:
    pipeline = tiny(f"cache.encoding={encoding}")
    cache_teacher(pipeline)

    assert [] == verify_match(pipeline, recompute=100)


def test_labels_that_are_not_the_teachers_are_named(tiny: Callable[..., Pipeline]) -> None:
    """A consistent cache with other labels: written by hand under the identity of this teacher."""
    import torch

    from logitcache.cache.creation import create
    from logitcache.cache.reader import open_cache

    pipeline = tiny()
    cache_teacher(pipeline)
    honest = open_cache(pipeline.cache.path)
    plan, samples = honest.view_plan, honest.samples
    shutil.rmtree(pipeline.cache.path)
    identity, layout = honest.manifest.identity, honest.layout
    with create(
        pipeline.cache.path, num_samples=layout.num_samples, num_classes=10, num_views=2, encoding=identity.encoding,
        teacher=identity.teacher, samples=samples, view_plan=plan, class_names=identity.class_names,
        rows_per_block=layout.rows_per_block,
    ) as writer:  # fmt: skip
        for view in range(2):
            writer.write(view=view, start=0, logits=torch.randn(layout.num_samples, 10))

    problems = verify_match(pipeline, recompute=40)
    assert {"other logits"} == {problem.kind for problem in problems}
    assert len(problems) > 30


def test_the_commands_exit_with_1_while_a_problem_remains(
    tiny: Callable[..., Pipeline], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from logitcache.cli import app

    pipeline = tiny()
    file = tmp_path / "tiny.yaml"
    file.write_text(pipeline.as_yaml())
    cache_teacher(pipeline)
    runner = CliRunner()
    checked = runner.invoke(app, ["verify", pipeline.cache.path, "--recompute", "20", "--data", str(file), "--json"])
    assert (0, True) == (checked.exit_code, json.loads(checked.stdout)["ok"])
    chunks(pipeline.cache.path)[0].write_bytes(b"")
    assert 1 == runner.invoke(app, ["verify", pipeline.cache.path]).exit_code
    repaired = runner.invoke(app, ["repair", pipeline.cache.path, "--data", str(file), "--json"])
    assert (0, ["v00000/b00000"]) == (repaired.exit_code, json.loads(repaired.stdout)["recomputed"])
    assert 0 == runner.invoke(app, ["verify", pipeline.cache.path, "--deep"]).exit_code
