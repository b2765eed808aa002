"""Output of commands: JSON objects for scripts, tables for people."""

from __future__ import annotations

import dataclasses
import math
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Column, Table


def cache_summary(summary: Any) -> dict[str, Any]:
    """The keys of `info`."""
    manifest, contents = summary.manifest, summary.contents
    outputs = {"outputs": summary.outputs} if summary.outputs else {}
    created = manifest.provenance.get("created")
    return {
        "id": manifest.id,
        "digest": manifest.digest,
        "sealed": manifest.state == "sealed",
        "num_samples": manifest.layout.num_samples,
        "num_rows": manifest.layout.num_rows,
        "num_views": len(manifest.layout.views),
        "num_classes": manifest.layout.num_classes,
        "encoding": summary.encoding,
        "bytes": None if contents is None else contents.bytes,
        "bytes_per_sample": summary.bytes_per_sample,
        "bytes_per_row": summary.bytes_per_row,
        "teacher_name": summary.names.teacher,
        "dataset_name": summary.names.dataset,
        "teacher": manifest.identity.teacher,
        "dataset": manifest.identity.dataset,
        "views": f"{manifest.layout.first_view}:{manifest.layout.num_views}",
        "kl_mean": None if contents is None else contents.kl_mean,
        "created": created if isinstance(created, str) else None,
        **({"encoding_packages": summary.packages} if summary.packages else {}),
        **outputs,
    }


def print_caches(location: str, caches: list[dict[str, Any]], unreadable: list[dict[str, Any]]) -> None:
    """The table of `ls`, and a line to stderr for each cache that can't be read."""
    for each in unreadable:
        print(_plain_line(f"error: {each['error']}"), file=sys.stderr, flush=True)
    if not caches:
        if not unreadable:
            console().print(f"{location}: no cache found", highlight=False, markup=False)
        return
    columns = (Column(name, overflow="fold") for name in ("cache", "id", "teacher", "dataset"))
    table = Table(*columns, "views", "samples", "size", "state")
    for cache in caches:
        shown = [cache["url"], cache["id"][:12], cache["teacher_name"], cache["dataset_name"], cache["views"]]
        size = "-" if cache["bytes"] is None else decimal(cache["bytes"])
        state = "sealed" if cache["sealed"] else "open"
        table.add_row(*map(_plain, [*shown, f"{cache['num_samples']:,}", size, state]))
    console().print(table)


def print_transfer(where: str, transfer: Any) -> None:
    """The result of a push or a pull."""
    pin = f"To pin this content: --expect {transfer.pin}"
    if transfer.digest != transfer.source_digest:
        pin += f" for the source; the digest of the copy is {transfer.digest}"
    if transfer.matched == "digest":
        pin += ".\nThe given digest is of format 1, which covers the labels but not their positions. "
        pin += "The new pin covers both"
    rate = f", {decimal(int(transfer.copied_bytes / transfer.seconds))}/s" if transfer.copied_bytes else ""
    console().print(
        f"{where}: views {transfer.views}; {transfer.copied_objects:,} objects copied "
        f"({decimal(transfer.copied_bytes)}{rate}), {transfer.kept_objects:,} already present.\n{pin}",
        highlight=False,
        markup=False,
    )


def _plain(text: Any) -> str:
    """Untrusted text without markup and control characters."""
    return escape(_plain_line(text))


def _plain_line(text: Any) -> str:
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(text))


def plan_summary(plan: Any) -> dict[str, Any]:
    """The keys of `plan`."""

    def finite(nats: float) -> float | None:
        return nats if math.isfinite(nats) else None

    return {
        "num_rows": plan.num_rows,
        "num_classes": plan.num_classes,
        "recommended": repr(plan.recommended.encoding),
        "encodings": [
            {
                "encoding": repr(each.encoding),
                "bytes_per_sample": each.bytes_per_sample,
                "fixed_bytes": each.fixed_bytes,
                "total_bytes": plan.total_bytes(each),
                "kl": {f"{temperature:g}": finite(nats) for temperature, nats in each.kl.items()},
                "kl_max": finite(each.kl_max),
                "top1_agreement": each.top1_agreement,
            }
            for each in plan.fidelities
        ],
        "num_samples": plan.num_samples,
        "num_views": plan.num_views,
        "samples_per_second": plan.samples_per_second,
        "output_bytes": plan.output_bytes,
        "hours": plan.hours,
    }


def print_plan(plan: Any) -> None:
    """The table of encodings, and the recommended one."""
    whole = plan.num_samples is not None
    temperatures = list(plan.recommended.kl)
    columns = ["encoding", "bytes/sample", *(["total"] if whole else []), *(f"KL T={t:g}" for t in temperatures)]
    table = Table(
        *columns, "largest KL", "top-1 agreement", title=f"{plan.num_rows:,} rows of {plan.num_classes:,} classes"
    )
    for each in plan.fidelities:
        chosen = each is plan.recommended
        total = [decimal(int(plan.total_bytes(each)))] if whole else []
        nats = [f"{nats:.2g}" if math.isfinite(nats) else "-" for nats in (*each.kl.values(), each.kl_max)]
        cells = [spelled(each.encoding), f"{each.bytes_per_sample:.1f}", *total, *nats, f"{each.top1_agreement:.1%}"]
        table.add_row(*cells, style="bold" if chosen else None)
    console().print(table)
    for name, size in plan.output_bytes.items():
        console().print(f"Output {name}: {size:,.1f} bytes/sample, included in the totals.", highlight=False)
    if plan.hours is not None:
        console().print(
            f"Estimated time of cache-teacher: {timedelta(seconds=round(3600 * plan.hours))} "
            f"({plan.num_views} views of {plan.num_samples:,} samples at {plan.samples_per_second:,.0f} samples/s).",
            highlight=False,
        )
    console().print(f'Recommended: cache.encoding="{spelled(plan.recommended.encoding)}"', highlight=False)


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


def print_mapping(title: str, values: dict[str, Any]) -> None:
    """A two-column table."""
    table = Table(title=title, show_header=False, title_justify="left")
    flat = {key: value for name, value in values.items() for key, value in _rows_of(name, value)}
    for name, value in flat.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        table.add_row(_plain(name.replace("_", " ")), _plain(f"{shown:.4g}" if isinstance(shown, float) else shown))
    console().print(table)


def _rows_of(name: str, value: Any) -> list[tuple[str, Any]]:
    """A value, or one line per entry of a mapping."""
    if not isinstance(value, dict):
        return [(name, value)]
    return [
        (f"{name}: {key}", ", ".join(f"{what} {each}" for what, each in known.items())) for key, known in value.items()
    ]


def print_rows(rows: list[Any]) -> None:
    """The table of students."""
    table = Table("student", "parameters", "samples", "seeds", "test accuracy, %", "validation, %", "s/epoch")
    for row in rows:
        spread = "" if row.accuracy_sd is None else f" ± {100 * row.accuracy_sd:.2f}"
        table.add_row(
            row.name,
            f"{row.parameters:,}",
            f"{row.samples:,}",
            str(len(row.seeds)),
            "-" if row.accuracy_mean is None else f"{100 * row.accuracy_mean:.2f}{spread}",
            "-" if row.validation_accuracy_mean is None else f"{100 * row.validation_accuracy_mean:.2f}",
            "-" if row.epoch_seconds is None else f"{row.epoch_seconds:.2f}",
        )
    console().print(table)


def demo_summary(result: Any, report: Path | None) -> dict[str, Any]:
    """The keys of `demo`."""
    from logitcache.extras.demo import DESCRIPTIONS

    return {
        "rows": [
            {
                **dataclasses.asdict(row),
                "accuracy_standard_error": _standard_error(row),
                "labels": DESCRIPTIONS[row.name],
            }
            for row in result.rows
        ],
        "teacher_accuracy": result.teacher["accuracy"],
        "teacher_macs": result.teacher_macs,
        "student_macs": result.student_macs,
        "cost": None if result.cost is None else dataclasses.asdict(result.cost),
        "view_matching": dataclasses.asdict(result.view_matching),
        "few_labels": dataclasses.asdict(result.few_labels),
        "findings": result.findings,
        "cache": result.experiment.pipeline.cache.path,
        "report": None if report is None else str(report),
    }


def print_demo(result: Any, report: Path | None) -> None:
    """The demo's table, and what it shows."""
    from logitcache.extras.demo import DESCRIPTIONS

    teacher = result.teacher
    accuracy = "" if teacher["accuracy"] is None else f"; test accuracy {100 * teacher['accuracy']:.1f} %"
    console().print(
        f"Teacher: {result.teacher_macs / 1e6:.1f} million multiply-adds per image, trained on {teacher['samples']:,} "
        f"true labels{accuracy}. Student: {result.student_macs / 1e6:.1f} million multiply-adds.",
        highlight=False,
    )
    table = Table("student trained on", "images", "seeds", "test accuracy, % ± standard error", "seconds per epoch")
    for row in result.rows:
        error = _standard_error(row)
        spread = "" if error is None else f" ± {100 * error:.2f}"
        table.add_row(
            DESCRIPTIONS[row.name],
            f"{row.samples:,}",
            str(len(row.seeds)),
            "-" if row.accuracy_mean is None else f"{100 * row.accuracy_mean:.2f}{spread}",
            "-" if row.epoch_seconds is None else f"{row.epoch_seconds:.2f}",
        )
    console().print(table)
    for line in result.findings:
        console().print(line, highlight=False)
    console().print(
        f"Report: {report}" if report else "For an HTML report: pip install 'logitcache[report]' and re-run.",
        highlight=False,
        markup=False,
    )
    cache = result.experiment.pipeline.cache.path
    console().print(f"Cache: {cache}; try `logitcache info {cache}`.", highlight=False, markup=False)


def _standard_error(row: Any) -> float | None:
    """Of a row's mean accuracy over seeds; None for a single one."""
    return None if row.accuracy_sd is None else row.accuracy_sd / math.sqrt(len(row.seeds))


def print_turns(turns: list[Any]) -> None:
    """The table of a federation, one row per round and party; then the paths of the parties' final weights."""
    table = Table("round", "party", "own samples", "parameters", "test accuracy, own data, %", "after consensus, %")
    for turn in turns:
        accuracies = (turn.private_accuracy, turn.accuracy)
        table.add_row(
            str(turn.round),
            turn.party,
            f"{turn.private_samples:,}",
            f"{turn.parameters:,}",
            *("-" if accuracy is None else f"{100 * accuracy:.2f}" for accuracy in accuracies),
        )
    console().print(table)
    for turn in turns:
        if turn.round == turns[-1].round:
            console().print(f"{turn.party}: {turn.weights}", highlight=False, markup=False)


def print_export(out: str, kind: str, result: Any) -> None:
    """The result of an export to Parquet."""
    there = len(result.files) - len(result.written)
    console().print(
        f"{out}: {result.rows:,} rows in {len(result.files)} {kind} files, {decimal(result.bytes)}"
        f"{f'; {there} of them already present' if there else ''}",
        highlight=False,
        markup=False,
    )


def print_product(exported: Any) -> None:
    """An exported student: accuracy, size and latency of each form."""
    product = exported.metadata
    title = (
        f"{product.student}, seed {product.seed}: {product.parameters:,} parameters, {product.macs:,} MACs per sample"
    )
    table = Table(
        "form", "file", "size", "test accuracy, %", "validation, %", "ms, batch 1", "ms, batch 64",
        title=_plain(title), title_justify="left",
    )  # fmt: skip
    for form in product.variants:
        accuracies = [form.test_accuracy, form.validation_accuracy]
        table.add_row(
            form.name,
            form.file or "-",
            "-" if form.bytes is None else decimal(form.bytes),
            *("-" if accuracy is None else f"{100 * accuracy:.2f}" for accuracy in accuracies),
            *(f"{form.latency_ms[size]:.3g}" if size in form.latency_ms else "-" for size in ("1", "64")),
        )
    console().print(table)
    seeds = product.seeds
    if seeds.test_sd is not None:
        console().print(
            f"Torch, {len(seeds.seeds)} seeds: test accuracy {100 * seeds.test_mean:.2f} ± {100 * seeds.test_sd:.2f} %",
            highlight=False,
        )
    there = "" if exported.written else "; already complete"
    console().print(
        f"{exported.folder}: {', '.join(product.files)}, product.json{there}", highlight=False, markup=False
    )


def print_merge(out: str, summary: dict[str, Any]) -> None:
    """A merged cache, and the caches that were averaged."""
    plain = {
        name: value for name, value in summary.items() if name not in ("parts", "left_out_views", "left_out_outputs")
    }
    print_mapping(out, plain)
    for part in summary["parts"]:
        console().print(
            f"weight {part['weight']:.4g}: {part['location']}, teacher {part['teacher']}", highlight=False, markup=False
        )
    for location, count in summary["left_out_views"].items():
        console().print(
            f"The merged cache has the {summary['num_views']} views that all inputs have; {location} has {count} more.",
            highlight=False,
            markup=False,
        )
    for location, outputs in summary["left_out_outputs"].items():
        console().print(
            f"Only logits are merged; omitted from {location}: {', '.join(outputs)}.", highlight=False, markup=False
        )


def noise_summary(noise: Any, top: int | None) -> dict[str, Any]:
    """The keys of `suspects`."""
    return {
        "num_suspects": len(noise.suspects),
        "num_judged": noise.num_judged,
        "num_samples": noise.num_samples,
        "noise_rate": noise.noise_rate,
        "suspects": [
            dataclasses.asdict(each) | {"given_name": noise.name(each.given), "teacher_name": noise.name(each.teacher)}
            for each in noise.suspects[:top]
        ],
    }


def print_suspects(cache: str, summary: dict[str, Any], caution: str) -> None:
    """The table of `suspects`."""
    shown = summary["suspects"]
    table = Table("rank", "row", "key", "label", "probability", "teacher's label", "probability")
    for each in shown:
        table.add_row(
            str(each["rank"]),
            str(each["row"]),
            _plain(each["key"]),
            _plain(each["given_name"]),
            f"{each['given_probability']:.3f}",
            _plain(each["teacher_name"]),
            f"{each['probability']:.3f}",
        )
    out = console()
    if shown:
        out.print(table)
    unjudged = summary["num_samples"] - summary["num_judged"]
    out.print(
        f"{cache}: {summary['num_suspects']:,} of {summary['num_judged']:,} labels are probably wrong"
        f"{f' ({len(shown):,} shown)' if len(shown) < summary['num_suspects'] else ''}"
        f"{f'; {unjudged:,} samples were not checked: no label, or no unmixed view' if unjudged else ''}. "
        f"Estimated share of wrong labels: {summary['noise_rate']:.2%}.\n{caution}",
        highlight=False,
        markup=False,
    )


def print_checked(checked: list[Any]) -> None:
    """The stages of one pipeline, or the state of several; errors go to stderr."""
    if len(checked) == 1:
        table = Table("stage", "what", "state")
        for step in checked[0].steps:
            table.add_row(step.stage, _plain(step.what), "done" if step.done else "to do")
    else:
        table = Table("pipeline", "stages", "state")
        for each in checked:
            state = "invalid" if each.error else "valid, not ready" if each.missing else "valid"
            table.add_row(_plain(each.file), str(len(each.steps)), state)
    console().print(table)
    for each in checked:
        for line in each.missing:
            indented = line.replace("\n", "\n  ")
            console().print(f"{each.file}: missing: {indented}", highlight=False, markup=False)
        for line in each.unchecked:
            console().print(f"{each.file}: not checked: {line}", highlight=False, markup=False)
        if each.error:
            print(f"error: {each.error}", file=sys.stderr, flush=True)


def print_report(written: Any) -> None:
    """The result of `report`."""
    console().print(f"{written.path}: {decimal(written.bytes)}; opens in any browser, offline.", highlight=False)


def print_problems(cache: str, problems: list[Any]) -> None:
    """The problems that `verify` or `repair` found."""
    if not problems:
        console().print(f"{cache}: no problems found", highlight=False)
        return
    table = Table(
        "block",
        "path",
        "kind",
        title=f"{cache}: {len(problems)} problem{'s' if len(problems) > 1 else ''}",
        title_justify="left",
    )
    for problem in problems:
        table.add_row(problem.block, problem.path, problem.kind)
    console().print(table)
