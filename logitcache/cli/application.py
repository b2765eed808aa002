"""The application, the arguments that commands share, and how results and errors are printed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from logitcache.errors import LogitCacheError, StorageError, UsageError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 and the signal's number."""

app = typer.Typer(
    name="logitcache",
    help="Offline knowledge distillation: run the teacher once, keep its logits, train any number of students.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

PipelineArgument = Annotated[Path, typer.Argument(help="A pipeline file, such as pipelines/mnist5k.yaml.")]
CacheArgument = Annotated[str, typer.Argument(metavar="CACHE", help="A cache's directory or URL.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Keys of the pipeline to override: views.count=4 cache.encoding='TopK(k=5)'"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
TrustOption = Annotated[
    bool, typer.Option("--trust", help="Run package.module:function code from outside the working folder.")
]


def pipeline_of(cache: str, file: Path | None, overrides: Sequence[str] | None) -> Any:
    """The pipeline of `--data` with its cache at another place, and keys overridden; None where none is given.

    Raises:
        UsageError: overrides of no pipeline.
    """
    if file is None:
        refuse_overrides(overrides)
        return None
    from logitcache.config.schema import load_pipeline

    return load_pipeline(file, [*(overrides or ()), f"cache.path={cache}"])


def refuse_overrides(overrides: Sequence[str] | None) -> None:
    """Keys are those of a pipeline.

    Raises:
        UsageError: there is an override.
    """
    if overrides:
        raise UsageError(f"{overrides[0]!r} overrides a key of a pipeline, and there is none; add --data PIPELINE")


def show(value: dict[str, Any], as_json: bool, print_it: Any) -> None:
    """One JSON object on stdout, or something for people."""
    if as_json:
        print(json.dumps(value))
    else:
        print_it()


def main() -> None:
    """Run the command line; errors become one message and their exit code."""
    try:
        app(standalone_mode=True)
    except SystemExit as leaving:
        if leaving.code != INTERRUPTED:
            raise
        report_failure("KeyboardInterrupt", "interrupted; run the same command again, what is done stays")
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # threads that still wait for a slow network would keep the process
    except LogitCacheError as error:
        fail(error, str(error), error.exit_code)
    except OSError as error:
        fail(
            error, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", StorageError.exit_code
        )


def fail(error: BaseException, message: str, exit_code: int) -> None:
    """Say what went wrong, and leave."""
    report_failure(type(error).__name__, message)
    sys.exit(exit_code)


def report_failure(kind: str, message: str) -> None:
    """On stderr, and with --json on stdout too."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    if "--json" in sys.argv:
        print(json.dumps({"error": message, "kind": kind}))
