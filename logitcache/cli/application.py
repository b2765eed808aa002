"""The application, arguments that several commands share, and the output of results and errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from logitcache.deprecation import warn_renamed
from logitcache.errors import LogitCacheError, StorageError, UsageError

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 plus the signal's number, as in shells."""

app = typer.Typer(
    name="logitcache",
    help="Offline knowledge distillation: run the teacher once, keep its logits, train any number of students.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

PIPELINES, CACHES, SHARING, MORE = "Pipelines", "Caches", "Sharing", "More"
"""Groups of commands in `--help`, in this order."""

FLAG = ""
"""The `metavar` of an option without a value: `--help` otherwise shows the type `<bool>`."""

PipelineArgument = Annotated[Path, typer.Argument(help="Pipeline file, such as pipeline.yaml.")]
CacheArgument = Annotated[str, typer.Argument(metavar="CACHE", help="Directory or URL of a cache.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Keys of the pipeline to override: views.count=4 cache.encoding='TopK(k=5)'"
    ),
]
DataOverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="With --data: keys of its pipeline to override, such as views.count=4."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", metavar=FLAG, help="Print one JSON object to stdout, and nothing else.")
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust", metavar=FLAG, help="Allow package.module:function code from outside the working directory."
    ),
]


OldOutputOption = Annotated[str | None, typer.Option("--out", hidden=True)]


def chosen_output(output: str | None, old: str | None) -> str | None:
    """The value of `--output`, or of `--out`, its old name; None without both.

    Raises:
        UsageError: both are given.
    """
    if old is None:
        return output
    if output is not None:
        raise UsageError("--out is the old name of --output; give one of them")
    warn_renamed("--out", "--output")
    return old


def pipeline_of(cache: str, file: Path | None, overrides: Sequence[str] | None) -> Any:
    """Load the pipeline of `--data` with its cache path and other keys overridden; None without `--data`.

    Raises:
        UsageError: overrides without `--data`.
    """
    if file is None:
        refuse_overrides(overrides)
        return None
    from logitcache.config.schema import load_pipeline

    return load_pipeline(file, [*(overrides or ()), f"cache.path={cache}"])


def refuse_overrides(overrides: Sequence[str] | None) -> None:
    """Refuse overrides where no pipeline is given.

    Raises:
        UsageError: there is an override.
    """
    if overrides:
        raise UsageError(f"{overrides[0]!r} overrides a pipeline key, but no pipeline is given; add --data PIPELINE")


def show(value: dict[str, Any], as_json: bool, print_it: Any) -> None:
    """Print one JSON object to stdout, or call `print_it` for human-readable output."""
    if as_json:
        print(json.dumps(value))
    else:
        print_it()


def main() -> None:
    """Run the command line; an error becomes one message and its exit code."""
    try:
        app(standalone_mode=True)
    except SystemExit as leaving:
        if leaving.code != INTERRUPTED:
            raise
        report_failure("KeyboardInterrupt", "interrupted; re-run the same command to resume")
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # threads that wait for a slow network would keep the process alive
    except LogitCacheError as error:
        fail(error, str(error), error.exit_code)
    except OSError as error:
        fail(
            error, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", StorageError.exit_code
        )


def fail(error: BaseException, message: str, exit_code: int) -> None:
    """Report an error and exit."""
    report_failure(type(error).__name__, message)
    sys.exit(exit_code)


def report_failure(kind: str, message: str) -> None:
    """Print an error to stderr, and with --json to stdout as well."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    if "--json" in sys.argv:
        print(json.dumps({"error": message, "kind": kind}))
