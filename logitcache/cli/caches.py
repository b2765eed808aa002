"""Commands on caches that are there."""

from __future__ import annotations

import dataclasses
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from logitcache.cli.application import (
    CacheArgument,
    JsonOption,
    OverridesArgument,
    TrustOption,
    app,
    pipeline_of,
    refuse_overrides,
    show,
)
from logitcache.cli.printing import (
    cache_summary,
    console,
    noise_summary,
    print_caches,
    print_export,
    print_mapping,
    print_merge,
    print_problems,
    print_product,
    print_report,
    print_suspects,
    print_transfer,
)
from logitcache.errors import UsageError


class MeanOf(StrEnum):
    """What `merge` averages."""

    logits = "logits"
    probabilities = "probabilities"


class ExportFormat(StrEnum):
    """What `export` writes."""

    parquet = "parquet"
    safetensors = "safetensors"
    onnx = "onnx"


class Weights(StrEnum):
    """Which of a run's weights `export` takes."""

    last = "last"
    best = "best"


@app.command("info")
def info_command(cache: CacheArgument, as_json: JsonOption = False) -> None:
    """What a cache is."""
    from logitcache.cache.summary import summarise

    summary = cache_summary(summarise(cache))
    show(summary, as_json, lambda: print_mapping(cache, summary))


@app.command("ls")
def ls_command(
    location: Annotated[str, typer.Argument(metavar="URL", help="A directory or URL with caches in or below it.")],
    as_json: JsonOption = False,
) -> None:
    """What caches lie at a location, and in the folders below it; exit 1 if one of them can't be read."""
    from logitcache.cache.summary import Summary, find_caches

    found = find_caches(location)
    caches = [{"url": each.url} | cache_summary(each) for each in found if isinstance(each, Summary)]
    unreadable = [dataclasses.asdict(each) for each in found if not isinstance(each, Summary)]
    show({"caches": caches, "unreadable": unreadable}, as_json, lambda: print_caches(location, caches, unreadable))
    if unreadable:
        raise typer.Exit(1)


@app.command("verify")
def verify_command(
    cache: CacheArgument,
    overrides: OverridesArgument = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and compare its SHA-256.")] = False,
    recompute: Annotated[
        int, typer.Option(metavar="N", help="Ask the teacher of --data again about N samples drawn over all views.")
    ] = 0,
    data: Annotated[
        Path | None, typer.Option(help="A pipeline whose data, views and teacher are compared with the cache.")
    ] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check receipts and sizes, with --deep every byte, with --data whether the cache fits; exit 1 on a problem."""
    from logitcache.verify.audit import Problem, verify

    if recompute and data is None:
        raise UsageError("--recompute asks the teacher again, so it needs the pipeline that has one: --data PIPELINE")
    pipeline = pipeline_of(cache, data, overrides)
    problems = verify(cache, deep=deep)
    if pipeline is not None and not problems:
        from logitcache.cache.reader import open_cache
        from logitcache.verify.fit import all_differences, has_teacher
        from logitcache.verify.spot_check import spot_check

        differences = all_differences(open_cache(cache, trust=trust), pipeline, trust=trust)
        problems += [Problem("", line, "differs") for line in differences]
        if not has_teacher(pipeline):
            print(f"{data}: the teacher's weights are not at hand, so only its name was compared", file=sys.stderr)
        if recompute and not problems:
            problems += spot_check(pipeline, recompute, trust=trust)
    found = {"ok": not problems, "problems": [dataclasses.asdict(problem) for problem in problems]}
    show(found, as_json, lambda: print_problems(cache, problems))
    if problems:
        raise typer.Exit(1)


@app.command("repair")
def repair_command(
    cache: CacheArgument,
    overrides: OverridesArgument = None,
    source: Annotated[str | None, typer.Option("--from", help="A copy of the cache, to take blocks from.")] = None,
    data: Annotated[Path | None, typer.Option(help="The pipeline that made it, to compute blocks again.")] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make the blocks that `verify --deep` finds bad what they were, and only those; exit 1 if a problem remains."""
    from logitcache.verify.repair import repair

    pipeline = pipeline_of(cache, data, overrides)
    result = repair(cache, source=source, pipeline=pipeline, trust=trust)
    found = {"ok": not result.remaining, **dataclasses.asdict(result)}

    def print_repair() -> None:
        blocks = len(result.fetched) + len(result.recomputed)
        console().print(
            f"{cache}: {len(result.problems)} problems found; {len(result.fetched)} blocks fetched, "
            f"{len(result.recomputed)} recomputed."
            if blocks or result.problems
            else f"{cache}: nothing to repair",
            highlight=False,
        )
        print_problems(cache, result.remaining)

    show(found, as_json, print_repair)
    if result.remaining:
        raise typer.Exit(1)


@app.command("push")
def push_command(
    cache: CacheArgument,
    url: Annotated[str, typer.Argument(metavar="URL", help="Where to: s3://, gs://, az://, or a directory.")],
    anonymous: Annotated[
        bool, typer.Option("--anonymous", help="Leave out machine, command and paths from the manifest there.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Copy a cache to where others find it. Interrupted? Run it again; it shows there once it is whole."""
    from logitcache.share.transfer import push

    result = push(cache, url, anonymous=anonymous)
    show(dataclasses.asdict(result), as_json, lambda: print_transfer(url, result))


@app.command("pull")
def pull_command(
    url: Annotated[str, typer.Argument(metavar="URL", help="The cache: s3://, gs://, az://, https:// or a directory.")],
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="The directory to copy it to.")],
    views: Annotated[
        str | None, typer.Option(metavar="FIRST:END", help="Some of its views only, such as 0:8 or 8:16; END excluded.")
    ] = None,
    expect: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="Refuse any other content digest, before anything is copied.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a cache here, every object held to its SHA-256. Interrupted? Run it again; asked again, it adds views."""
    from logitcache.share.transfer import pull

    result = pull(url, cache, views=views, expect=expect)
    show(dataclasses.asdict(result), as_json, lambda: print_transfer(cache, result))


@app.command("merge")
def merge_command(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE", help="Two or more caches over the same views.")],
    out: Annotated[str, typer.Option("--out", "-o", help="The merged cache.")],
    mean: Annotated[
        MeanOf, typer.Option(help="Of logits (geometric, at any temperature) or of probabilities (at T = 1).")
    ] = MeanOf.logits,
    weight: Annotated[
        list[float] | None, typer.Option(help="How much a cache counts: once for each, in their order.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help='Such as "TopK(k=20)" or auto; the first cache\'s by default.')
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Average several teachers over the same views into one cache. Interrupted? Run it again."""
    from logitcache.cache.summary import summarise
    from logitcache.extras.merge import merge

    result = merge(caches, out, mean=mean.value, weights=weight or None, encoding=encoding)
    summary = cache_summary(summarise(out)) | {
        "mean": mean.value,
        "parts": [part.model_dump(exclude={"teacher_input"}) for part in result.parts],
        "left_out_views": result.left_out,
        "left_out_outputs": result.left_out_outputs,
        "computed_blocks": len(result.computed_blocks),
        "total_blocks": result.total_blocks,
    }
    show(summary, as_json, lambda: print_merge(out, summary))


@app.command("export")
def export_command(
    source: Annotated[str, typer.Argument(metavar="CACHE|RUN", help="A cache; or a run's folder, to get a student.")],
    *,
    overrides: OverridesArgument = None,
    to: Annotated[
        ExportFormat, typer.Option("--to", help="What to make of it: parquet of a cache; the others of a run.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A folder that holds nothing else; of a run, RUN/product by default."),
    ] = None,
    views: Annotated[str | None, typer.Option(help="Of a cache, such as 0:2 or 3; all by default.")] = None,
    top: Annotated[int | None, typer.Option(help="Keep the largest logits of each row only, and the tail.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="With --to onnx: a statically quantised model as well.")] = False,
    weights: Annotated[Weights, typer.Option(help="Of a run: the last, or the best by validation accuracy.")] = (
        Weights.last
    ),
    data: Annotated[
        Path | None, typer.Option(metavar="PIPELINE", help="The pipeline that has a run's data; the run's own else.")
    ] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """A cache's labels as Parquet files; or a run's student as a product: safetensors or ONNX, card and numbers."""
    if data is None:
        refuse_overrides(overrides)
    if to is ExportFormat.parquet:
        _check_is_cache(source, out, int8=int8, weights=weights, data=data)
        assert out is not None
        from logitcache.extras.parquet import export_parquet

        result = export_parquet(source, out, views=views, top=top)
        show(dataclasses.asdict(result), as_json, lambda: print_export(str(out), to.value, result))
        return
    _check_is_run(source, to.value, views=views, top=top)
    from logitcache.config.schema import load_pipeline
    from logitcache.extras.student_export import export_run

    exported = export_run(
        source,
        out,
        to="onnx" if to is ExportFormat.onnx else "safetensors",
        int8=int8,
        weights=weights.value,
        data=None if data is None else load_pipeline(data, overrides or ()),
        trust=trust,
    )
    summary = {"folder": str(exported.folder), "written": exported.written, **exported.metadata.model_dump()}
    show(summary, as_json, lambda: print_product(exported))


def _check_is_cache(source: str, out: Path | None, *, int8: bool, weights: Weights, data: Path | None) -> None:
    if (Path(source) / "run.yaml").is_file():
        raise UsageError(f"{source} is a run, whose student goes --to safetensors or onnx; parquet is made of a cache")
    if int8 or data is not None or weights is not Weights.last:
        raise UsageError("--int8, --weights and --data are for a run's student; Parquet takes --views and --top")
    if out is None:
        raise UsageError("where to? Name a folder with -o")


def _check_is_run(source: str, to: str, *, views: str | None, top: int | None) -> None:
    if "://" in source or (Path(source) / "manifest.json").is_file():
        raise UsageError(
            f"{source} is a cache, whose labels go --to parquet; {to} is made of a run, such as runs/STUDENT/seed-0"
        )
    if views is not None or top is not None:
        raise UsageError("--views and --top are for a cache's labels; a student has neither")


@app.command("suspects")
def suspects_command(
    cache: CacheArgument,
    top: Annotated[int | None, typer.Option(min=1, help="Only the most suspicious ones; 20 on the screen.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="CSV", help="Write the list to a CSV file as well.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Samples whose label is probably wrong, by confident learning on the cached logits."""
    from logitcache.extras.noise import CAUTION, find_suspects, write_suspects

    noise = find_suspects(cache)
    if output is not None:
        write_suspects(noise, output, top=top)
    shown = noise_summary(noise, top if as_json or top is not None else 20)
    show(shown, as_json, lambda: print_suspects(cache, shown, CAUTION))


@app.command("report")
def report_command(
    cache: CacheArgument,
    overrides: OverridesArgument = None,
    runs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder below which students left their runs.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PIPELINE",
            help="The pipeline that has the data: for pictures; students are measured on it, else on their runs' own.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """One page that opens offline: the cache, its teacher, its fidelity, its views, and students side by side."""
    from logitcache.extras.report import write_report

    pipeline = pipeline_of(cache, data, overrides)
    written = write_report(cache, output, runs=runs, data=pipeline, trust=trust)
    summary = {"report": str(written.path), "bytes": written.bytes, **written.headline}
    show(summary, as_json, lambda: print_report(written))
