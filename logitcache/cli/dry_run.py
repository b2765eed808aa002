"""The check of pipeline and federation files, for `run --dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from logitcache.config.overrides import read_raw
from logitcache.config.schema import Pipeline, load_pipeline
from logitcache.errors import LogitCacheError

if TYPE_CHECKING:
    from logitcache.stages.dry_run import RunPlan


def check_files(files: Sequence[Path], overrides: Sequence[str], *, trust: bool, require_data: bool) -> list[RunPlan]:
    """Check each file; an invalid one does not stop the others, unless it is the only one.

    Raises:
        LogitCacheError: the only file is invalid.
    """
    checked = []
    for file in files:
        try:
            checked.append(replace(_plan(file, overrides, trust=trust, load_all=require_data), file=str(file)))
        except LogitCacheError as error:
            if len(files) == 1:
                raise
            from logitcache.stages.dry_run import RunPlan

            checked.append(RunPlan(file=str(file), error=str(error)))
    return checked


def _plan(file: Path, overrides: Sequence[str], *, trust: bool, load_all: bool) -> RunPlan:
    if "parties" in read_raw(file, Pipeline):
        from logitcache.extras.federation.configuration import load_federation

        federation = load_federation(file, overrides)
        from logitcache.extras.federation.plan import plan_federation

        return plan_federation(federation, trust=trust, load_all=load_all)
    pipeline = load_pipeline(file, overrides)
    # Only for a valid file: it imports torch.
    from logitcache.stages.dry_run import plan_run

    return plan_run(pipeline, trust=trust, load_all=load_all)
