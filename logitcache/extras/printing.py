"""Output of the extras' commands: JSON objects for scripts, tables for people."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from logitcache.cli.printing import console, number, percent, plain, print_cache, print_mapping, say


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
    say(
        f"Teacher: {result.teacher_macs / 1e6:.1f} million multiply-adds per image, trained on {teacher['samples']:,} "
        f"true labels{accuracy}. Student: {result.student_macs / 1e6:.1f} million multiply-adds."
    )
    table = Table("student trained on", "images", "seeds", "test accuracy, % ± standard error", "seconds per epoch")
    for row in result.rows:
        table.add_row(
            DESCRIPTIONS[row.name],
            f"{row.samples:,}",
            str(len(row.seeds)),
            percent(row.accuracy_mean, _standard_error(row)),
            number(row.epoch_seconds),
        )
    console().print(table)
    for line in result.findings:
        say(line)
    say(f"Report: {report}" if report else "For an HTML report: pip install 'logitcache[report]' and re-run.")
    cache = result.experiment.pipeline.cache.path
    say(f"Cache: {cache}; try `logitcache info {cache}`.")


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
            *map(percent, accuracies),
        )
    console().print(table)
    for turn in turns:
        if turn.round == turns[-1].round:
            say(f"{turn.party}: {turn.weights}")


def print_export(out: str, kind: str, result: Any) -> None:
    """The result of an export to Parquet."""
    there = len(result.files) - len(result.written)
    say(
        f"{out}: {result.rows:,} rows in {len(result.files)} {kind} files, {decimal(result.bytes)}"
        f"{f'; {there} of them already present' if there else ''}"
    )


def print_student_export(exported: Any) -> None:
    """An exported student: accuracy, size and latency of each form."""
    product = exported.metadata
    title = (
        f"{product.student}, seed {product.seed}: {product.parameters:,} parameters, {product.macs:,} MACs per sample"
    )
    table = Table(
        "form", "file", "size", "test accuracy, %", "validation, %", "ms, batch 1", "ms, batch 64",
        title=plain(title), title_justify="left",
    )  # fmt: skip
    for form in product.variants:
        accuracies = [form.test_accuracy, form.validation_accuracy]
        table.add_row(
            form.name,
            form.file or "-",
            "-" if form.bytes is None else decimal(form.bytes),
            *map(percent, accuracies),
            *(f"{form.latency_ms[size]:.3g}" if size in form.latency_ms else "-" for size in ("1", "64")),
        )
    console().print(table)
    seeds = product.seeds
    if seeds.test_sd is not None:
        say(f"Torch, {len(seeds.seeds)} seeds: test accuracy {100 * seeds.test_mean:.2f} ± {100 * seeds.test_sd:.2f} %")
    there = "" if exported.written else "; already complete"
    say(f"{exported.folder}: {', '.join(product.files)}, product.json{there}")


def print_merge(out: str, summary: dict[str, Any]) -> None:
    """A merged cache, and the caches that were averaged."""
    plain = {
        name: value for name, value in summary.items() if name not in ("parts", "left_out_views", "left_out_outputs")
    }
    print_mapping(out, plain)
    for part in summary["parts"]:
        say(f"weight {part['weight']:.4g}: {part['location']}, teacher {part['teacher']}")
    for location, count in summary["left_out_views"].items():
        say(f"The merged cache has the {summary['num_views']} views that all inputs have; {location} has {count} more.")
    for location, outputs in summary["left_out_outputs"].items():
        say(f"Only logits are merged; omitted from {location}: {', '.join(outputs)}.")


def print_import(cache: str, summary: dict[str, Any]) -> None:
    """An imported cache, its bytes before and after, and what the source lacks."""
    rest = ("missing", "source_files", "source_bytes", "tail_mean", "normalised_rows", "details")
    print_cache(cache, {name: value for name, value in summary.items() if name not in rest})
    tail = summary["tail_mean"]
    say(
        f"{summary['source_files']:,} files, {decimal(summary['source_bytes'])} before, {decimal(summary['bytes'])} "
        f"after{'' if tail is None else f'; classes without entry have {tail:.2%} of the probability on average'}"
    )
    if summary["normalised_rows"]:
        say(f"{summary['normalised_rows']:,} rows had probabilities with a sum above 1 and were normalized.")
    for name, text in summary["missing"].items():
        say(f"Not in the source: {name}: {text}.")


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
            plain(each["key"]),
            plain(each["given_name"]),
            f"{each['given_probability']:.3f}",
            plain(each["teacher_name"]),
            f"{each['probability']:.3f}",
        )
    if shown:
        console().print(table)
    unjudged = summary["num_samples"] - summary["num_judged"]
    say(
        f"{cache}: {summary['num_suspects']:,} of {summary['num_judged']:,} labels are probably wrong"
        f"{f' ({len(shown):,} shown)' if len(shown) < summary['num_suspects'] else ''}"
        f"{f'; {unjudged:,} samples were not checked: no label, or no unmixed view' if unjudged else ''}. "
        f"Estimated share of wrong labels: {summary['noise_rate']:.2%}.\n{caution}"
    )


def print_report(written: Any) -> None:
    """The result of `report`."""
    say(f"{written.path}: {decimal(written.bytes)}; opens in any browser, offline.")
