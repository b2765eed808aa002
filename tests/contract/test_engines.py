"""Blocks as the unit of work, and what chooses an engine."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest

import logitcache
from logitcache import registry
from logitcache.config.schema import Pipeline
from logitcache.engines import CacheResult, Claiming, Engine, Job, Local, Shard, Torchrun, engine_from_name
from logitcache.errors import IncompleteCache, NotACache, UsageError
from logitcache.stages.cache_teacher import TeacherJob, cache_teacher
from tests.commands import logitcache as command
from tests.conftest import FEW_DIGITS

Make = Callable[..., Pipeline]


@dataclass(frozen=True, kw_only=True)
class Backwards(Engine):
    """An engine of another package: the last block first."""

    name: ClassVar[str] = "backwards"
    skip: int = 0

    def run(self, job: Job) -> CacheResult:
        with closing(job.load()) as worker:
            worker.open()
            computed = worker.compute(worker.missing_blocks()[::-1][self.skip :])
            missing = worker.missing_blocks(refresh=True)
            if not missing:
                worker.seal()
            return CacheResult(worker.manifest, computed, len(worker.all_blocks()), missing)


@pytest.fixture
def tiny(tiny: Make) -> Make:
    """The tiny pipeline with few samples; its cache has twelve blocks."""
    return lambda *overrides: tiny(*FEW_DIGITS, *overrides)


@pytest.fixture
def file(tiny: Make, tmp_path: Path) -> Path:
    """The file of the tiny pipeline."""
    (tmp_path / "tiny.yaml").write_text(tiny().as_yaml())
    return tmp_path / "tiny.yaml"


@pytest.mark.parametrize("encoding", ["dense", "LowRank(rank=4, k=2)"])
def test_blocks_that_are_planned_computed_and_sealed_are_the_cache_of_one_run(
    encoding: str, tiny: Make, tmp_path: Path
) -> None:
    """Planned once, or again when some are committed; given as a pipeline or as its file."""
    settings = [f"cache.encoding='{encoding}'", "cache.calibration=200"]
    digest = cache_teacher(tiny(*settings, f"cache.path={tmp_path}/single.cache")).manifest.digest
    pipeline = tiny(*settings)
    (tmp_path / "tiny.yaml").write_text(pipeline.as_yaml())
    blocks = logitcache.plan_blocks(pipeline)
    assert [logitcache.Block(view, number) for view in range(2) for number in range(6)] == blocks

    assert blocks[4:6] == logitcache.compute_blocks(tmp_path / "tiny.yaml", blocks[4:6])
    assert blocks[:4] + blocks[6:] == logitcache.plan_blocks(tmp_path / "tiny.yaml")
    with pytest.raises(IncompleteCache, match="10 of 12 blocks are missing"):
        logitcache.seal(pipeline.cache.path)
    assert blocks[:4] + blocks[6:] == logitcache.compute_blocks(pipeline, [*blocks, *blocks])
    assert [] == logitcache.plan_blocks(pipeline)
    assert digest == logitcache.seal(pipeline.cache.path).digest


def test_the_parts_of_a_plan_do_not_depend_on_what_is_missing(file: Path) -> None:
    parts = [logitcache.plan_blocks(file, shard=f"{index}/3") for index in range(3)]
    assert logitcache.plan_blocks(file) == sorted(block for part in parts for block in part)
    assert [4, 4, 4] == [len(part) for part in parts]
    logitcache.compute_blocks(file, parts[1][:3])

    assert [parts[0], parts[1][3:], parts[2]] == [
        logitcache.plan_blocks(file, shard=f"{index}/3") for index in range(3)
    ]


def test_blocks_of_another_cache_are_refused(file: Path) -> None:
    with pytest.raises(UsageError, match=r"no block v00000/b00006; expected blocks of plan_blocks, of 2 views with 6 "):
        logitcache.compute_blocks(file, [logitcache.Block(0, 6)])


def test_a_folder_with_other_files_is_refused_and_left_alone(tiny: Make, tmp_path: Path) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/thesis.tex").touch()
    with pytest.raises(NotACache, match="not empty and no logit cache"):
        logitcache.plan_blocks(tiny(f"cache.path={tmp_path}/papers"))

    assert ["thesis.tex"] == [path.name for path in (tmp_path / "papers").iterdir()]


def test_an_engine_of_ones_own_builds_the_same_cache(tiny: Make, tmp_path: Path) -> None:
    digest = cache_teacher(tiny(f"cache.path={tmp_path}/single.cache")).manifest.digest
    first = cache_teacher(tiny(), engine=Backwards(skip=5))
    assert (7, 12, 5) == (len(first.computed_blocks), first.total_blocks, len(first.missing_blocks))

    assert digest == cache_teacher(tiny(), engine=Backwards()).manifest.digest


def test_workers_with_claims_compute_damaged_blocks_again(tiny: Make, tmp_path: Path) -> None:
    """Blocks with a receipt that can't be read, or with one whose objects are lost."""
    digest = cache_teacher(tiny(f"cache.path={tmp_path}/single.cache")).manifest.digest
    pipeline, cache = tiny(), tmp_path / "tiny.cache"
    logitcache.compute_blocks(pipeline, logitcache.plan_blocks(pipeline)[:6])
    (cache / "receipts/v00000/b00001.json").write_text("{")
    (cache / "labels.zarr/logits/c/0/3/0").unlink()
    result = cache_teacher(pipeline, engine=Claiming())

    assert {(0, 1), (0, 3), *((1, number) for number in range(6))} == {
        (block.view, block.number) for block in result.computed_blocks
    }
    assert ("sealed", digest) == (result.manifest.state, result.manifest.digest)


def test_the_engine_of_the_guide_builds_the_cache(tiny: Make) -> None:
    guide = (Path(__file__).parents[2] / "docs/clusters.md").read_text()
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(re.findall(r"^```python\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)[-1], namespace)
    result = cache_teacher(tiny(), engine=namespace["NewestViewFirst"]())

    assert ("sealed", 12) == (result.manifest.state, len(result.computed_blocks))


def test_an_engine_of_a_package_is_chosen_by_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("backwards", "tests.contract.test_engines:Backwards", "logitcache.engines")
    monkeypatch.setattr(registry, "offered", lambda group: {"backwards": [entry]} if group == entry.group else {})
    ended = command("cache-teacher", file, "--engine", "backwards", "--engine-option", "skip=2", "--json")

    told = json.loads(ended.stdout)
    assert (0, 10, 12, 2) == (ended.returncode, *(told[f"{kind}_blocks"] for kind in ("computed", "total", "missing")))


def test_a_shard_states_what_is_missing_and_the_last_one_seals(file: Path) -> None:
    first, last = (command("cache-teacher", file, "--shard", f"{index}/2", "--json") for index in range(2))

    assert "6 of 12 blocks are missing" in first.stderr
    assert "logitcache seal" in first.stderr
    assert [False, True] == [json.loads(ended.stdout)["sealed"] for ended in (first, last)]
    assert "missing" not in last.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "4/4"], "there is no shard 4 of 4; shards are numbered from 0: 0/4 to 3/4"),
        (["--shard", "1of4"], "'1of4' is not a shard; expected INDEX/COUNT"),
        (["--shard", "0/2", "--engine", "claims"], "exclude each other"),
        (["--engine-option", "seconds=3"], "--engine-option needs --engine"),
        (["--engine", "clams"], "unknown engine 'clams'; did you mean 'claims'?"),
        (["--engine", "claims", "--engine-option", "second=3"], "no parameter 'second'; did you mean 'seconds'?"),
        (["--engine", "claims", "--engine-option", "seconds=0"], "seconds is 0; expected a number above 0"),
        (["--engine", "claims", "--engine-option", "seconds"], "expected KEY=VALUE"),
        (["--engine", "ray", "--engine-option", "workers=0"], "workers is 0; expected a number of 1 or more"),
        (["--engine", "ray", "--engine-option", "num_cpus=0"], "num_cpus is 0; expected a number above 0"),
        (["--engine", "ray", "--engine-option", "num_gpus=-1"], "num_gpus is -1; expected 0 or more"),
        (["--engine", "torchrun"], "needs processes that torchrun started: torchrun --nproc-per-node"),
    ],
)
def test_an_impossible_engine_is_refused_before_any_work(options: list[str], message: str, file: Path) -> None:
    ended = command("cache-teacher", file, *options)

    assert 2 == ended.returncode
    assert message in ended.stderr
    assert not (file.parent / "tiny.cache").exists()


def test_torchrun_divides_the_blocks_by_itself(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UsageError, match="the engine is 'local', but torchrun started this process"):
        cache_teacher(tiny(), engine=Local())


def test_engines_are_equal_where_their_options_are() -> None:
    assert Shard(index=1, count=4) == Shard.parse(" 1/4") == engine_from_name("shard", {"index": 1, "count": 4})
    assert Torchrun() == engine_from_name("torchrun", {})


def test_a_job_can_be_sent_to_another_process(tiny: Make) -> None:
    job = TeacherJob(tiny(), trust=False)

    assert job == pickle.loads(pickle.dumps(job))
