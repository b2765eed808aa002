"""Output of commands: JSON objects for scripts, tables for people."""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Column, Table

from logitcache.cache.cut_classes import cut_classes_of


def cache_summary(summary: Any) -> dict[str, Any]:
    """The keys of `info`."""
    manifest, contents = summary.manifest, summary.contents
    outputs = {"outputs": summary.outputs} if summary.outputs else {}
    created = manifest.provenance.get("created")
    cut = cut_classes_of(manifest)
    return {
        "id": manifest.id,
        "digest": manifest.digest,
        "sealed": manifest.state == "sealed",
        "num_samples": manifest.layout.num_samples,
        "num_rows": manifest.layout.num_rows,
        "num_views": len(manifest.layout.views),
        "num_classes": manifest.layout.num_classes if manifest.identity.has_logits else 0,
        "encoding": summary.encoding,
        "bytes": None if contents is None else contents.bytes,
        "bytes_per_sample": summary.bytes_per_sample,
        "bytes_per_row": summary.bytes_per_row,
        "teacher_name": summary.names.teacher,
        "dataset_name": summary.names.dataset,
        "teacher": manifest.identity.teacher,
        "dataset": manifest.identity.dataset,
        **({"tokenization": manifest.identity.tokenization} if manifest.identity.tokenization else {}),
        "views": f"{manifest.layout.first_view}:{manifest.layout.num_views}",
        "kl_mean": None if contents is None else contents.kl_mean,
        **({} if contents is None else {f"kl_at_{temperature}": nats for temperature, nats in contents.kl_at.items()}),
        "created": created if isinstance(created, str) else None,
        **({"cut_classes": cut.classes, "cut_mass_mean": cut.mass_mean, "cut_mass_max": cut.mass_max} if cut else {}),
        **({"encoding_packages": summary.packages} if summary.packages else {}),
        **outputs,
        **({"progress": dataclasses.asdict(summary.progress)} if summary.progress else {}),
    }


def print_cache(title: str, summary: dict[str, Any]) -> None:
    """The table of `info`, without values that repeat another one."""
    repeated = {
        "teacher_name": summary["teacher"].partition("@")[0] == summary["teacher_name"],
        "dataset_name": summary["dataset"] == summary["dataset_name"],
        "num_rows": summary["num_rows"] == summary["num_samples"],
        "bytes_per_row": summary["num_rows"] == summary["num_samples"],
        "views": summary["views"] == f"0:{summary['num_views']}",
    }
    labels = {
        "bytes_per_sample": "bytes of logits per sample and view",
        "bytes_per_row": "bytes of logits per row",
        "kl_mean": "kl mean, nats",
        "kl_at_2": "kl mean at T = 2, nats",
        "kl_at_4": "kl mean at T = 4, nats",
        "dataset": "dataset" if repeated["dataset_name"] else "dataset hash",
    }
    shown: dict[str, Any] = {}
    for key, value in summary.items():
        if key != "progress" and not repeated.get(key, False):
            shown[labels.get(key, key)] = value
        if key == "bytes" and summary["sealed"]:
            of_logits = round(summary["bytes_per_row"] * summary["num_rows"] * summary["num_views"])
            shown |= {"bytes of logits": of_logits, "bytes stored once (samples, encoding)": value - of_logits}
    print_mapping(title, shown)
    if "progress" in summary:
        _say_progress(summary["progress"])


def _say_progress(progress: dict[str, Any]) -> None:
    """The progress of a build, and who computes what."""
    last = progress["seconds_since_commit"]
    ago = "" if last is None else f", the last one {_duration(last)} ago"
    say(f"blocks: {progress['blocks']:,} of {progress['total_blocks']:,} committed{ago}")
    rate, left = progress["rows_per_second"], progress["seconds_left"]
    if rate is None:
        say("rate: not known, because fewer than two blocks were committed in the last 10 minutes")
    else:
        say(f"rate of all workers: {rate:,.0f} rows/s in the last 10 minutes, {_duration(left)} left")
    for claim in progress["claims"]:
        age = claim["seconds_since_renewal"]
        renewed = "" if age is None else f", renewed {_duration(age)} ago"
        late = ": expired, so another worker takes it over" if claim["expired"] else ""
        say(_plain_line(f"  {claim['name']}: {claim['worker']}{renewed}{late}"))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else str(timedelta(seconds=round(seconds)))


def print_next(command: str, pipeline: Any, overrides: Sequence[str] | None) -> None:
    """The command of the next stage."""
    say(f"Next: logitcache {command} {shlex.join([str(pipeline), *(overrides or ())])}")


def print_caches(location: str, caches: list[dict[str, Any]], unreadable: list[dict[str, Any]]) -> None:
    """The table of `ls`, and a line to stderr for each cache that can't be read."""
    for each in unreadable:
        print(_plain_line(f"error: {each['error']}"), file=sys.stderr, flush=True)
    if not caches:
        if not unreadable:
            say(f"{location}: no cache found")
        return
    columns = (Column(name, overflow="fold") for name in ("cache", "id", "teacher", "dataset", "encoding"))
    table = Table(*columns, "views", "samples", "size", "state")
    for cache in caches:
        shown = [cache["url"], cache["id"][:12], cache["teacher_name"], cache["dataset_name"]]
        shown += [cache["encoding"], cache["views"]]
        size = "-" if cache["bytes"] is None else decimal(cache["bytes"])
        state = "sealed" if cache["sealed"] else "open"
        table.add_row(*map(plain, [*shown, f"{cache['num_samples']:,}", size, state]))
    console().print(table)


def print_transfer(where: str, transfer: Any) -> None:
    """The result of a push or a pull."""
    pin = f"To pin this content: --expect {transfer.pin}"
    if transfer.digest != transfer.source_digest:
        pin += f" for the source; the digest of the copy is {transfer.digest}"
    if transfer.matched == "digest":
        pin += ".\nThe given digest is of format 1, which covers the logits but not their positions. "
        pin += "The new pin covers both"
    rate = f", {decimal(int(transfer.copied_bytes / transfer.seconds))}/s" if transfer.copied_bytes else ""
    say(
        f"{where}: views {transfer.views}; {transfer.copied_objects:,} objects copied "
        f"({decimal(transfer.copied_bytes)}{rate}), {transfer.kept_objects:,} already present.\n{pin}"
    )


def plain(text: Any) -> str:
    """Untrusted text without markup and control characters."""
    return escape(_plain_line(text))


def _plain_line(text: Any) -> str:
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(text))


def plan_summary(plan: Any) -> dict[str, Any]:
    """The keys of `plan`."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "num_rows": plan.num_rows,
        "num_classes": plan.num_classes,
        "recommended": repr(plan.recommended.encoding),
        "encodings": [
            {
                "encoding": repr(each.encoding),
                "bytes_per_sample": each.bytes_per_row * plan.rows_per_sample,
                "bytes_per_row": each.bytes_per_row,
                "fixed_bytes": each.fixed_bytes,
                "total_bytes": plan.total_bytes(each),
                "kl": {f"{temperature:g}": finite(nats) for temperature, nats in each.kl.items()},
                "kl_max": finite(each.kl_max),
                "top1_agreement": each.top1_agreement,
                "encode_rows_per_second": finite(each.encode_rows_per_second),
            }
            for each in plan.fidelities
        ],
        "num_samples": plan.num_samples,
        "num_views": plan.num_views,
        "rows_per_view": plan.rows_per_view,
        "rows_per_second": plan.rows_per_second,
        "output_bytes": plan.output_bytes,
        "output_fixed_bytes": plan.output_fixed_bytes,
        "hours": plan.hours,
        "live_passes": plan.live_passes,
    }


def print_plan(plan: Any) -> None:
    """The table of encodings, and the recommended one."""
    whole = plan.num_samples is not None
    temperatures = list(plan.recommended.kl)
    columns = ["encoding", "bytes/row", *(["all rows"] if whole else []), *(f"KL T={t:g}" for t in temperatures)]
    table = Table(
        *columns,
        "largest KL",
        "top-1 agreement",
        "encoded rows/s",
        title=f"{plan.num_rows:,} rows of {plan.num_classes:,} classes",
    )
    for each in plan.fidelities:
        chosen = each is plan.recommended
        total = [decimal(int(plan.total_bytes(each)))] if whole else []
        nats = [f"{nats:.2g}" if math.isfinite(nats) else "-" for nats in (*each.kl.values(), each.kl_max)]
        cells = [spelled(each.encoding), f"{each.bytes_per_row:.1f}", *total, *nats, f"{each.top1_agreement:.1%}"]
        rate = each.encode_rows_per_second
        cells.append(f"{rate:,.0f}" if math.isfinite(rate) else "-")
        table.add_row(*cells, style="bold" if chosen else None)
    console().print(table)
    for name, size in plan.output_bytes.items():
        say(f"Output {name}: {size:,.1f} bytes/row, included in the column 'all rows'.")
    if plan.hours is not None:
        say(
            f"Estimated time of cache-teacher: {timedelta(seconds=round(3600 * plan.hours))} "
            f"({plan.num_views} views of {plan.rows_per_view:,} rows at {plan.rows_per_second:,.0f} rows/s)."
        )
    if plan.live_passes is not None:
        epochs = "epoch" if plan.num_views == 1 else "epochs"
        say(
            f"Passes of the teacher over the data: {plan.num_views:,} for the cache. A live teacher needs one for each "
            f"epoch of each student and seed, {plan.live_passes:,.4g} for the students of this pipeline, so the cache "
            f"pays off after {plan.num_views:,} such {epochs}."
        )
    say(
        f'Recommended: cache.encoding="{spelled(plan.recommended.encoding)}" ({plan.criterion}; for other limits, see '
        "--max-kl, --max-bytes and --temperature)"
    )


def spelled(encoding: Any) -> str:
    """An encoding as Python code, without parameters that have their default value."""
    changed = [
        f"{field.name}={getattr(encoding, field.name)!r}"
        for field in dataclasses.fields(encoding)
        if field.compare and getattr(encoding, field.name) != field.default
    ]
    return f"{type(encoding).__name__}({', '.join(changed)})"


def console() -> Console:
    """Standard output; lines are not wrapped if another program reads them."""
    return Console(soft_wrap=True) if sys.stdout.isatty() else Console(soft_wrap=True, width=1000)


def say(text: str) -> None:
    """Print a text as it is, without markup."""
    console().print(text, highlight=False, markup=False)


def print_mapping(title: str, values: dict[str, Any]) -> None:
    """A two-column table."""
    table = Table(title=title, show_header=False, title_justify="left")
    flat = {key: value for name, value in values.items() for key, value in _rows_of(name, value)}
    for name, value in flat.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        table.add_row(plain(name.replace("_", " ")), plain(f"{shown:.4g}" if isinstance(shown, float) else shown))
    console().print(table)


def _rows_of(name: str, value: Any) -> list[tuple[str, Any]]:
    """A value, or one line per entry of a mapping."""
    if not isinstance(value, dict):
        return [(name, value)]
    return [
        (
            f"{name}: {key}",
            ", ".join(f"{what} {each}" for what, each in known.items()) if isinstance(known, dict) else known,
        )
        for key, known in value.items()
    ]


def print_rows(rows: list[Any]) -> None:
    """The table of students; of sequences with the negative log-likelihood, and the comparison with the teacher."""
    has_nll = any(row.nll_mean is not None for row in rows)
    has_teacher = any(row.teacher_kl_mean is not None for row in rows)
    columns = ["student", "parameters", "samples", "seeds", *(["test NLL, nats"] if has_nll else [])]
    of_teacher = ["KL to teacher, nats", "agreement, %"] if has_teacher else []
    table = Table(*columns, *of_teacher, "test accuracy, %", "validation, %", "s/epoch")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.parameters:,}",
            f"{row.samples:,}",
            str(len(row.seeds)),
            *([number(row.nll_mean, row.nll_sd, digits=4)] if has_nll else []),
            *([number(row.teacher_kl_mean, row.teacher_kl_sd, digits=4)] if has_teacher else []),
            *([percent(row.teacher_agreement_mean, row.teacher_agreement_sd)] if has_teacher else []),
            percent(row.accuracy_mean, row.accuracy_sd),
            percent(row.validation_accuracy_mean),
            number(row.epoch_seconds),
        )
    console().print(table)


def number(value: float | None, spread: float | None = None, *, digits: int = 2) -> str:
    """A number and its spread; "-" for none."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def percent(share: float | None, spread: float | None = None) -> str:
    """A share and its spread in percent, without the sign; "-" for none."""
    return number(None if share is None else 100 * share, None if spread is None else 100 * spread)


def print_checked(checked: list[Any]) -> None:
    """The stages of one pipeline, or the state of several; errors go to stderr."""
    if len(checked) == 1:
        table = Table("stage", "what", "state")
        for step in checked[0].steps:
            state = "conflict" if step.conflict else "done" if step.done else "to do"
            table.add_row(step.stage, plain(step.what), state)
    else:
        table = Table("pipeline", "stages", "state")
        for each in checked:
            table.add_row(plain(each.file), str(len(each.steps)), "invalid" if each.error else _readiness(each))
    console().print(table)
    for each in checked:
        for line in each.unchecked:
            say(f"{each.file}: note: {line}")
        for line in each.missing:
            _say_indented(f"{each.file}: not ready: {line}")
        for step in each.steps:
            if step.conflict:
                _say_indented(f"{each.file}: conflict: {step.stage}: {step.conflict}")
        if each.error:
            print(f"error: {each.error}", file=sys.stderr, flush=True)
        elif len(checked) == 1:
            missing = f"; missing data: {', '.join(each.missing_data)}" if each.missing_data else ""
            say(f"{each.file} is {_readiness(each) if not missing or each.exit_code else 'valid'}{missing}.")


def _readiness(checked: Any) -> str:
    """The state of a valid pipeline."""
    if checked.exit_code:
        return "valid, but in conflict with existing results"
    return "valid, not ready" if checked.missing else "valid"


def _say_indented(text: str) -> None:
    say(text.replace("\n", "\n  "))


DIFFERS = "differs"
"""The kind of a problem whose path is a sentence about a difference."""


def print_problems(cache: str, problems: list[Any], *, advice: str = "") -> None:
    """The problems that `verify` or `repair` found, and what to do about damaged blocks."""
    if not problems:
        say(f"{cache}: no problems found")
        return
    title = plain(f"{cache}: {len(problems)} problem{'s' if len(problems) > 1 else ''}")
    if all(problem.kind == DIFFERS for problem in problems):  # of `verify --data`: sentences instead of paths
        say("\n  ".join([f"{cache} does not match the pipeline; they differ in", *map(_problem_line, problems)]))
        return
    table = Table("block", "path", "kind", title=title, title_justify="left")
    for problem in problems:
        table.add_row(*map(plain, (problem.block, problem.path, problem.kind)))
    console().print(table)
    if advice:
        say(advice)


def _problem_line(problem: Any) -> str:
    return _plain_line(problem.path)


def print_repair(cache: str, result: Any) -> None:
    """What a repair did, and the problems that remain."""
    did = f"{len(result.fetched)} blocks fetched, {len(result.recomputed)} recomputed"
    say(f"{cache}: " + (f"{len(result.problems)} problems found, {did}" if result.problems else "nothing to repair"))
    print_problems(cache, result.remaining)
