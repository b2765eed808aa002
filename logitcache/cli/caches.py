"""Commands on existing caches."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from logitcache.cli.application import (
    CACHES,
    FLAG,
    SHARING,
    CacheArgument,
    DataOverridesArgument,
    JsonOption,
    TrustOption,
    app,
    pipeline_of,
    show,
)
from logitcache.cli.printing import (
    cache_summary,
    print_cache,
    print_caches,
    print_problems,
    print_repair,
    print_transfer,
)
from logitcache.errors import UsageError

ADVICE = (
    "`logitcache repair CACHE --data PIPELINE` computes damaged and missing blocks again, `--from COPY` copies "
    "them. An unfinished build is resumed by the program that writes it."
)


@app.command("info", rich_help_panel=CACHES)
def info_command(cache: CacheArgument, as_json: JsonOption = False) -> None:
    """Show a cache's metadata: shape, encoding, size, teacher, dataset and digest."""
    from logitcache.cache.summary import summarise

    found = summarise(cache)
    summary = cache_summary(found)
    show(summary, as_json, lambda: print_cache(f"{found.names.title} ({cache})", summary))
    _note(found.missing_packages)


@app.command("ls", rich_help_panel=CACHES)
def ls_command(
    location: Annotated[
        str, typer.Argument(metavar="FOLDER|URL", help="Folder or URL to search, subfolders included.")
    ] = ".",
    as_json: JsonOption = False,
) -> None:
    """List the caches in a folder or at a URL, by default in the current folder; exit 1 if a cache is unreadable."""
    from logitcache.cache.summary import Summary, find_caches

    found = find_caches(location)
    caches = [{"url": each.url} | cache_summary(each) for each in found if isinstance(each, Summary)]
    unreadable = [dataclasses.asdict(each) for each in found if not isinstance(each, Summary)]
    show({"caches": caches, "unreadable": unreadable}, as_json, lambda: print_caches(location, caches, unreadable))
    if unreadable:
        raise typer.Exit(1)


@app.command("verify", rich_help_panel=CACHES)
def verify_command(
    cache: CacheArgument,
    overrides: DataOverridesArgument = None,
    deep: Annotated[
        bool, typer.Option("--deep", metavar=FLAG, help="Read every byte and compare its SHA-256.")
    ] = False,
    recompute: Annotated[
        int,
        typer.Option(
            metavar="N", help="Run the teacher of --data again on N samples drawn over all views, and compare."
        ),
    ] = 0,
    data: Annotated[
        Path | None, typer.Option(help="Pipeline whose data, views and teacher are compared with the cache.")
    ] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check a cache's receipts and sizes. Add --deep for every byte, or --data to compare it with a pipeline.

    Exit 1 on a problem.
    """
    from logitcache.cache.summary import missing_packages_of
    from logitcache.verify.audit import verify

    if recompute and data is None:
        raise UsageError("--recompute runs the teacher, so it needs a pipeline: add --data PIPELINE")
    pipeline = pipeline_of(cache, data, overrides)
    problems = verify(cache, deep=deep)
    advice = ADVICE if problems else ""
    if pipeline is not None and not problems:
        from logitcache.config.build import has_teacher
        from logitcache.stages.verify_match import verify_match

        problems = verify_match(pipeline, recompute=recompute, trust=trust)
        if not has_teacher(pipeline):
            print(
                f"{data}: the teacher's weights are not on this machine, so only its name was compared", file=sys.stderr
            )
    found = {"ok": not problems, "problems": [dataclasses.asdict(problem) for problem in problems]}
    show(found, as_json, lambda: print_problems(cache, problems, advice=advice))
    _note(missing_packages_of(cache))
    if problems:
        raise typer.Exit(1)


@app.command("repair", rich_help_panel=CACHES)
def repair_command(
    cache: CacheArgument,
    overrides: DataOverridesArgument = None,
    source: Annotated[str | None, typer.Option("--from", help="A copy of the cache to fetch blocks from.")] = None,
    data: Annotated[Path | None, typer.Option(help="The cache's pipeline, to recompute blocks.")] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Copy or recompute the damaged and missing blocks of a cache; exit 1 if a problem remains."""
    from logitcache.verify.repair import repair

    pipeline = pipeline_of(cache, data, overrides)

    def recompute() -> str | None:
        from logitcache.stages.cache_teacher import cache_teacher

        assert pipeline is not None
        return cache_teacher(pipeline, trust=trust).manifest.digest

    result = repair(cache, source=source, recompute=None if pipeline is None else recompute)
    found = {"ok": not result.remaining, **dataclasses.asdict(result)}

    show(found, as_json, lambda: print_repair(cache, result))
    if result.remaining:
        raise typer.Exit(1)


@app.command("seal", rich_help_panel=CACHES)
def seal_command(cache: CacheArgument, as_json: JsonOption = False) -> None:
    """Mark a cache as complete, after several programs have written its blocks; names blocks that are missing."""
    from logitcache.cache.sealing import seal
    from logitcache.cache.summary import summarise

    seal(cache)
    summary = cache_summary(summarise(cache))
    show(summary, as_json, lambda: print_cache(cache, summary))


@app.command("push", rich_help_panel=SHARING)
def push_command(
    cache: CacheArgument,
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="Destination: s3://, gs://, az://, hf://datasets/, file:// or a directory."),
    ],
    anonymous: Annotated[
        bool,
        typer.Option("--anonymous", metavar=FLAG, help="Omit machine, command and paths from the copy's manifest."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Copy a cache to a store; it becomes visible there once complete. Safe to interrupt: re-run to resume."""
    from logitcache.share.transfer import push

    result = push(cache, url, anonymous=anonymous)
    show(dataclasses.asdict(result), as_json, lambda: print_transfer(url, result))


@app.command("pull", rich_help_panel=SHARING)
def pull_command(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL", help="Source: s3://, gs://, az://, hf://datasets/, https://, file:// or a directory."
        ),
    ],
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="Destination directory.")],
    views: Annotated[
        str | None,
        typer.Option(metavar="FIRST:END", help="Copy only these views, such as 0:8 or 8:16; END is excluded."),
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(
            metavar="DIGEST",
            help="Fail if the content digest differs, and leave no copy. The first 12 digits detect accidents; pass "
            "all 64 to detect tampering.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a cache here, or add views to a copy; every SHA-256 is checked. Safe to interrupt: re-run to resume."""
    from logitcache.cache.summary import missing_packages_of
    from logitcache.share.transfer import pull

    result = pull(url, cache, views=views, expect=expect)
    show(dataclasses.asdict(result), as_json, lambda: print_transfer(cache, result))
    _note(missing_packages_of(cache))


def _note(text: str | None) -> None:
    if text is not None:
        print(f"note: {text}", file=sys.stderr)
