"""Stage 2: students from one cache; and the supervised training that makes a teacher where none is ready."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from logitcache.cache.averaging import combination
from logitcache.cache.manifest import LOGITS
from logitcache.cache.outputs import Output
from logitcache.cache.reader import LogitCache
from logitcache.catalog.datasets import Data, Selection, stratified_split
from logitcache.catalog.outputs import declared_outputs
from logitcache.config.build import (
    TRAINED,
    clean_views,
    input_part,
    resolve_data,
    resolve_model,
    resolve_plan,
    resolve_teacher,
    teacher_folder,
)
from logitcache.config.schema import ModelConfig, Pipeline, StudentConfig, TeachersConfig
from logitcache.data.order import run_seed
from logitcache.data.samples import Dataset, sample_table
from logitcache.data.views import BothInputs, ViewDataset, ViewPlan
from logitcache.devices import pick_device
from logitcache.digest import array_digest, json_digest
from logitcache.errors import UsageError
from logitcache.losses import CrossEntropy
from logitcache.train.evaluation import Evaluation
from logitcache.train.hint_config import Hint, hint_from_config
from logitcache.train.hints import Hints
from logitcache.train.inference import AskedTeacher, output_shapes
from logitcache.train.job import Job
from logitcache.train.labels import CachedLabels, EnsembleLabels, Labels, LiveLabels
from logitcache.train.loop import train
from logitcache.train.ranks import Ranks, joined
from logitcache.train.student_setup import (
    INIT_JSON,
    INIT_TABLE,
    by_row,
    classes_to_balance,
    start_from_teacher,
    student_identity,
    weights_of_samples,
)
from logitcache.train.table import Row as Row
from logitcache.train.table import summarise as summarise
from logitcache.train.together import groups, train_together
from logitcache.train.tracking import Tracker, load_tracker
from logitcache.train.weighting import weights_from_config
from logitcache.verify.fit import open_fitting_cache, open_fitting_caches


def train_teacher(pipeline: Pipeline, *, trust: bool = False) -> dict[str, Any]:
    """Train the pipeline's teacher on true labels, with the pipeline's own views, a fresh one each epoch.

    Raises:
        UsageError: the pipeline's teacher is not one to be trained.
    """
    config = pipeline.teacher
    if config.weights != TRAINED:
        raise UsageError(
            f"teacher.weights is {config.weights!r}; set teacher.weights={TRAINED} to train one here, and "
            "teacher.start_from to the weights to fine-tune from, if any"
        )
    data = resolve_data(pipeline, trust=trust)
    plan = resolve_plan(pipeline, data, trust=trust)
    settings = pipeline.train_config(config)
    seed = settings.seeds[0]
    model = resolve_model(config, data, plan, weights=config.start_from, seed=run_seed(seed), trust=trust)
    device = pick_device(pipeline.device, threads=pipeline.threads)
    with joined(device) as ranks:
        return train(
            Job(
                name="teacher",
                model=model,
                views=ViewDataset(data.train, plan),
                indices=np.arange(len(data.train)),
                num_views=None,
                labels=None,
                loss=CrossEntropy(),
                config=settings,
                seed=seed,
                validation=_evaluation(pipeline, data.validation, config, trust=trust),
                test=_evaluation(pipeline, data.test, config, trust=trust),
                device=device,
                num_workers=pipeline.num_workers,
                folder=teacher_folder(pipeline),
                identity={
                    "teacher": config.model_dump(exclude={"batch_size", "compile", "channels_last", "precision"}),
                    "train": settings.model_dump(exclude={"seeds"}) | {"seed": seed},
                    "data": pipeline.data.identity(),
                    "views": pipeline.views.model_dump(exclude={"count"}),
                },
                resolved=pipeline.as_yaml(),
                tracker=_tracker(pipeline, trust=trust),
            ),
            ranks,
        )


def train_students(pipeline: Pipeline, names: Sequence[str] = (), *, trust: bool = False) -> list[Row]:
    """Train some or all students of a pipeline from its cache, every seed of each; finished runs are not repeated.

    Raises:
        IdentityMismatch: the cache is not of this data, these views or this teacher; before any step.
    """
    if not pipeline.students:
        raise UsageError(f"pipeline {pipeline.name} names no students; add `students:` with a name, a model and a loss")
    students = [pipeline.student(name) for name in names] if names else pipeline.students
    bench = Bench(pipeline, trust=trust)
    for student in students:
        bench.job(student, bench.seeds(student)[0])  # whatever does not fit is refused before any student's first step
    with joined(bench.device) as ranks:
        results = train_by_turns(bench, students, ranks) if pipeline.together else None
        return [
            summarise(
                student.name,
                [train(bench.job(student, seed), ranks) for seed in bench.seeds(student)]
                if results is None
                else results[student.name],
            )
            for student in students
        ]


def train_by_turns(bench: Bench, students: Sequence[StudentConfig], ranks: Ranks) -> dict[str, list[dict[str, Any]]]:
    """Train students batch by batch, those together whose batches are the same; the results of each, by name."""
    results: dict[str, dict[int, dict[str, Any]]] = {student.name: {} for student in students}
    for seed in sorted({seed for student in students for seed in bench.seeds(student)}):
        jobs = [bench.job(student, seed) for student in students if seed in bench.seeds(student)]
        for group in groups(jobs):
            for job, result in zip(group, train_together(group, ranks), strict=True):
                results[job.name][seed] = result
    return {student.name: [results[student.name][seed] for seed in bench.seeds(student)] for student in students}


class Bench:
    """What all students of a pipeline share: the data, the views, and the cache that was found to fit them.

    Args:
        pipeline: its `students` need not hold those that jobs are asked for.
    """

    def __init__(self, pipeline: Pipeline, *, trust: bool = False) -> None:
        self.pipeline = pipeline
        self.trust = trust
        self.data: Data = resolve_data(pipeline, trust=trust)
        self.plan: ViewPlan = resolve_plan(pipeline, self.data, trust=trust)
        self.device: torch.device = pick_device(pipeline.device, threads=pipeline.threads)
        self._tracker = _tracker(pipeline, trust=trust)
        self._evaluations: dict[tuple[str, str], Evaluation | None] = {}
        self._live: tuple[nn.Module, str] | None = None
        self._caches: dict[str, tuple[list[LogitCache], np.ndarray | None]] = {}
        self._shared_labels: dict[tuple[object, ...], CachedLabels] = {}

    def seeds(self, student: StudentConfig) -> list[int]:
        """The seeds that a student is trained with."""
        return self.pipeline.train_config(student).seeds

    def job(self, student: StudentConfig, seed: int, *, labels: Labels | None = None) -> Job:
        """One run of a student; `labels` stand in for those that the student's configuration names.

        Raises:
            IdentityMismatch: the student needs the cache, and the cache does not fit.
        """
        pipeline, trust = self.pipeline, self.trust
        settings = pipeline.train_config(student)
        loss = pipeline.loss(student)
        student_input = input_part(student, trust=trust)
        rows_per_block = window_blocks = None
        first_view = 0
        num_views: int | None = pipeline.views.count
        identity: dict[str, Any] = {
            "student": student_identity(student),
            "train": settings.model_dump(exclude={"seeds"}) | {"seed": seed},
            "data": pipeline.data.identity(),
            "views": pipeline.views.model_dump(exclude={"count"}),
        }
        chosen = indices = self._chosen(student)
        weights = self._weights(student, chosen, identity)
        model = resolve_model(student, self.data, self.plan, weights=student.weights, seed=run_seed(seed), trust=trust)
        documents = self._started(model, student, chosen, seed, identity)
        kind = "cache"
        hints = [hint_from_config(config) for config in student.hints]
        asked = {hint.output for hint in hints} | ({LOGITS} if loss.needs_teacher else set())
        bound: Hints | None = None
        if not asked and labels is None:
            kind = "fresh"
            # Without a teacher nothing ties a student to the cache: it mixes only with samples whose labels it has, and
            # every epoch has a view of its own, as in any training on true labels.
            num_views = None
            dataset = self.data.train if len(indices) == len(self.data.train) else Selection(self.data.train, indices)
            views = ViewDataset(dataset, replace(self.plan, num_samples=len(dataset)), preprocess=student_input)
            indices = np.arange(len(dataset))
        elif student.labels == "live" and labels is None:
            kind = "live"
            teacher, fingerprint = self._teacher()
            same_input = student.input == pipeline.teacher.input
            others = sorted(asked & pipeline.cache.outputs.keys() - {LOGITS})
            live = AskedTeacher(pipeline, teacher, self.device, others)
            labels = LiveLabels(live, needs_teacher_inputs=not same_input)
            both = BothInputs(student_input, self.plan.preprocess)
            views = ViewDataset(self.data.train, self.plan, preprocess=student_input if same_input else both)
            identity["labels"] = {"teacher": fingerprint}
            if asked & pipeline.cache.outputs.keys():
                identity["labels"]["outputs"] = {
                    name: each for name, each in pipeline.cache.outputs.items() if name in asked
                }
            if hints:
                found = output_shapes(pipeline, teacher, ViewDataset(self.data.train, self.plan))
                declared = declared_outputs(pipeline.cache.outputs, found)
                bound = self._hints(hints, model, student_input, declared, seed)
        else:
            caches, rows = self.caches(student)
            cache = caches[0]
            samples = cache.samples
            plan = replace(
                self.plan, num_samples=cache.num_samples, contents=None if samples is None else samples.contents
            )
            views = ViewDataset(self.data.train, plan, preprocess=student_input, rows=rows)
            given = {} if labels is None else {"given": type(labels).__name__}
            if hints:
                bound = self._hints(hints, model, student_input, cache.extra_outputs, seed)
            if labels is None:
                cached = self._labels(student, caches, views, sorted(asked))
                rows_per_block, window_blocks = cache.layout.rows_per_block, cached.window_blocks
                labels = cached
            identity["labels"] = {"cache": cache.id, "window_blocks": window_blocks, **given}
            if isinstance(student.labels, TeachersConfig):
                # By what they are, not where: a run goes on with copies of the same caches.
                identity["student"]["labels"] = student.labels.model_dump(exclude={"caches"})
                identity["labels"]["caches"] = [each.id for each in caches]
            first_view = cache.views.start
            if first_view:
                identity["first_view"] = first_view
        identity["num_views"] = num_views
        return Job(
            name=student.name,
            model=model,
            views=views,
            indices=indices,
            num_views=num_views,
            labels=labels,
            loss=loss,
            config=settings,
            seed=seed,
            validation=self._evaluation("validation", student),
            test=self._evaluation("test", student),
            device=self.device,
            num_workers=pipeline.num_workers,
            folder=Path(pipeline.runs.path) / student.name / f"seed-{seed}",
            identity=identity,
            resolved=pipeline.as_yaml(),
            views_key=json_digest([kind, array_digest(chosen) if kind == "fresh" else self._rows_key(views)]),
            input_key=json_digest([student.input, isinstance(views.preprocess, BothInputs)]),
            rows_per_block=rows_per_block,
            window_blocks=window_blocks,
            sample_weights=by_row(weights, indices if views.rows is None else views.rows[indices]),
            classes=classes_to_balance(student, self.data, chosen),
            documents=documents,
            first_view=first_view,
            tracker=self._tracker,
            hints=bound,
        )

    def _hints(
        self,
        hints: list[Hint],
        model: nn.Module,
        preprocess: Callable[[Any], Any],
        outputs: Mapping[str, Output],
        seed: int,
    ) -> Hints:
        """What a student learns beside the logits, held to what there is."""
        views = ViewDataset(self.data.train, replace(self.plan, contents=None), preprocess=preprocess)
        return Hints(hints, model, views.batch([(0, 0)] * 2), self.data.num_classes, outputs, seed=seed)

    def _rows_key(self, views: ViewDataset) -> str | None:
        return None if views.rows is None else array_digest(views.rows)

    def _weights(self, student: StudentConfig, chosen: np.ndarray, identity: dict[str, Any]) -> np.ndarray | None:
        """The weight of each sample; where it is the teacher's, the run's identity says of which cache."""
        cached = self.cache() if weights_from_config(student.sample_weights).needs_teacher else None
        if cached is not None:
            identity["weighed_by"] = {"cache": cached[0].id}
        return weights_of_samples(student, self.data, chosen, cached, num_views=self.pipeline.views.count)

    def _started(
        self, model: nn.Module, student: StudentConfig, chosen: np.ndarray, seed: int, identity: dict[str, Any]
    ) -> dict[str, str]:
        """Put the teacher's weights into a student that asks for them; what the run's folder is to say of it."""
        if student.init is None:
            return {}
        teacher, fingerprint = self._teacher()
        identity["started_from"] = fingerprint
        report = start_from_teacher(
            model, teacher, student, self.pipeline, self.data, chosen, seed=seed, trust=self.trust
        )
        return {INIT_JSON: report.as_json(), INIT_TABLE: report.as_table()}

    def cache(self) -> tuple[LogitCache, np.ndarray | None]:
        """The pipeline's cache and the row of each sample at hand (None: the same samples in the same order).

        Raises:
            IdentityMismatch: names the field or the sample that differs.
            IncompleteCache: the cache is not sealed.
        """
        caches, rows = self._opened(None)
        return caches[0], rows

    def caches(self, student: StudentConfig) -> tuple[list[LogitCache], np.ndarray | None]:
        """The caches that a student's labels come from: the pipeline's, or several teachers'.

        Raises:
            IdentityMismatch: one that does not fit, or is not of the same views as the first.
            IncompleteCache: one that is not sealed, or holds too few views.
        """
        return self._opened(student.labels if isinstance(student.labels, TeachersConfig) else None)

    def _opened(self, teachers: TeachersConfig | None) -> tuple[list[LogitCache], np.ndarray | None]:
        key = "" if teachers is None else str(teachers)
        if key not in self._caches:
            if teachers is None:
                cache, rows = open_fitting_cache(self.pipeline, self.data, self.plan, trust=self.trust)
                self._caches[key] = [cache], rows
            else:
                self._caches[key] = open_fitting_caches(teachers, self.pipeline, self.data, self.plan, trust=self.trust)
        return self._caches[key]

    def _labels(
        self, student: StudentConfig, caches: list[LogitCache], views: ViewDataset, outputs: list[str]
    ) -> CachedLabels | EnsembleLabels:
        budget = self.pipeline.cache.memory_budget_mb
        share = None if budget is None else int(budget * 2**20) // len(caches)
        members = [self._labels_of(cache, views, share, outputs, prove=cache is caches[0]) for cache in caches]
        if not isinstance(student.labels, TeachersConfig):
            return members[0]
        return EnsembleLabels(members, combination(student.labels.combine, student.labels.weights, len(caches)))

    def _labels_of(
        self, cache: LogitCache, views: ViewDataset, memory_budget: int | None, outputs: list[str], *, prove: bool
    ) -> CachedLabels:
        """One for all students that take turns and ask for the same: a view is resident once, and proven once."""
        key = (cache.id, memory_budget, prove, *outputs)
        labels = self._shared_labels.get(key)
        if labels is None:
            labels = CachedLabels(cache, views, self.device, memory_budget=memory_budget, prove=prove, outputs=outputs)
        if self.pipeline.together:
            self._shared_labels[key] = labels
        return labels

    def _teacher(self) -> tuple[nn.Module, str]:
        if self._live is None:
            self._live = resolve_teacher(self.pipeline, self.data, self.plan, trust=self.trust)
        return self._live

    def _chosen(self, student: StudentConfig) -> np.ndarray:
        if student.samples == 1.0:
            return np.arange(len(self.data.train))
        return stratified_split(sample_table(self.data.train).targets, student.samples, "student")[1]

    def _evaluation(self, split: str, student: StudentConfig) -> Evaluation | None:
        """A split as the student takes it; students with the same input share what was rendered."""
        key = (split, str(student.input))
        if key not in self._evaluations:
            dataset = getattr(self.data, split)
            self._evaluations[key] = _evaluation(self.pipeline, dataset, student, trust=self.trust)
        return self._evaluations[key]


def _tracker(pipeline: Pipeline, *, trust: bool) -> Callable[[], Tracker] | None:
    name = pipeline.runs.tracker
    return None if name is None else load_tracker(name, trust=trust)


def _evaluation(pipeline: Pipeline, dataset: Dataset | None, config: ModelConfig, *, trust: bool) -> Evaluation | None:
    if dataset is None:
        return None
    views = clean_views(dataset, config, pipeline, trust=trust)
    return Evaluation(views, batch_size=256, num_workers=pipeline.num_workers)
