"""Stage 2: trains students, from one cache, several caches, the live teacher, or true labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.cache.averaging import combination, refuse_sampled
from logitcache.cache.manifest import LOGITS
from logitcache.cache.reader import LogitCache
from logitcache.catalog.datasets import Data, selected, stratified_split
from logitcache.catalog.initialisations import initialisation_of
from logitcache.catalog.outputs import declared_outputs, taps_of
from logitcache.config.build import (
    build_context,
    build_evaluation,
    build_runner,
    build_tracker,
    clean_plan,
    clean_views,
    evaluation_of,
    has_teacher,
    input_part,
    resolve_data,
    resolve_loss,
    resolve_model,
    resolve_plan,
    resolve_teacher,
    student_folder,
    teacher_identity,
)
from logitcache.config.schema import Pipeline, StudentConfig, TeachersConfig
from logitcache.context import Context
from logitcache.data.order import batches, run_seed
from logitcache.data.rows import rows_of_dataset
from logitcache.data.samples import Dataset, sample_table
from logitcache.data.streamed import refuse_stream
from logitcache.data.views import BothInputs, ViewDataset, ViewPlan
from logitcache.devices import to_device
from logitcache.digest import array_digest, json_digest
from logitcache.errors import IdentityMismatch, IncompleteCache, NotACache, SampleMismatch, UsageError
from logitcache.randomness import keyed_permutation
from logitcache.train.evaluation import Evaluation
from logitcache.train.hint_config import hint_from_config
from logitcache.train.hints import Hints
from logitcache.train.inference import output_shapes
from logitcache.train.job import Job, TrainingData
from logitcache.train.labels import CachedLabels, EnsembleLabels, Labels, LiveLabels
from logitcache.train.loop import train
from logitcache.train.ranks import Ranks, joined
from logitcache.train.table import Row as Row
from logitcache.train.table import summarise as summarise
from logitcache.train.together import groups, train_together
from logitcache.train.weighting import (
    CLASS_BALANCED,
    NONE,
    class_balanced_weights,
    of_mean_one,
    teacher_weights,
    weights_from_config,
)
from logitcache.verify.fit import TeacherIdentity, open_fitting_cache, open_fitting_caches, views_of_cache

# M samples of a run, N samples of a cache

AUTO, LIVE, NOT_COMPARED = "auto", "live", "none"
"""Of `evaluation.teacher`; "live" is also the `labels` of a student."""
PROOF_SAMPLES = 4
"""Samples on which a choice of channels is checked."""
CALIBRATION_BATCH = 64
CUT_JSON = "cut_classes.json"
"""File of a run folder: the probability of the teacher's classes that the student lacks."""
INIT_JSON, INIT_TABLE = "init.json", "init.txt"
"""Files of a run folder that list where each initial parameter comes from."""


def train_students(pipeline: Pipeline, names: Sequence[str] = (), *, trust: bool = False) -> list[Row]:
    """Train students of a pipeline, each with every seed. Finished runs are skipped, interrupted ones resume.

    Args:
        pipeline: its cache is complete, where a student needs it.
        names: which students; all by default.
        trust: allow entry points outside the working directory.

    Raises:
        IdentityMismatch: the cache was built from other data, views or teacher; before any step.
    """
    if not pipeline.students:
        raise UsageError(f"pipeline {pipeline.name} names no students; add `students:` with a name, a model and a loss")
    students = [pipeline.student(name) for name in names] if names else pipeline.students
    experiment = Experiment(pipeline, trust=trust)
    experiment.check(students)
    with joined(experiment.device) as ranks:
        if pipeline.together:
            results = train_by_turns(experiment, students, ranks)
        else:
            results = {
                student.name: [train(experiment.job(student, seed), ranks) for seed in experiment.seeds(student)]
                for student in students
            }
    return [summarise(student.name, results[student.name]) for student in students]


def train_by_turns(
    experiment: Experiment, students: Sequence[StudentConfig], ranks: Ranks
) -> dict[str, list[dict[str, Any]]]:
    """Train students batch by batch, sharing each rendered batch where possible; returns results by student name."""
    results: dict[str, dict[int, dict[str, Any]]] = {student.name: {} for student in students}
    for seed in sorted({seed for student in students for seed in experiment.seeds(student)}):
        jobs = [experiment.job(student, seed) for student in students if seed in experiment.seeds(student)]
        for group in groups(jobs):
            for job, result in zip(group, train_together(group, ranks), strict=True):
                results[job.name][seed] = result
    return {student.name: [results[student.name][seed] for seed in experiment.seeds(student)] for student in students}


class Experiment:
    """Builds the training jobs of a pipeline's students, which share data, views, caches and teacher.

    Args:
        pipeline: jobs may be of students that it doesn't list.
        trust: allow entry points outside the working directory.
    """

    def __init__(self, pipeline: Pipeline, *, trust: bool = False) -> None:
        self.pipeline = pipeline
        self.trust = trust
        self.data: Data = resolve_data(pipeline, trust=trust)
        refuse_stream(self.data.train, "training takes samples in any order")
        self.plan: ViewPlan = resolve_plan(pipeline, self.data, trust=trust)
        self.context: Context = build_context(pipeline, trust=trust)
        self._tracker = build_tracker(pipeline, trust=trust)
        self._checked: dict[tuple[str, int], Job] = {}
        self._evaluations: dict[tuple[str, str], Evaluation | None] = {}
        self._teacher_and_fingerprint: tuple[nn.Module, str] | None = None
        self._caches: dict[str, tuple[list[LogitCache], np.ndarray | None]] = {}
        self._shared_labels: dict[tuple[object, ...], CachedLabels] = {}
        self._left_out: dict[tuple[str, int], dict[str, str]] = {}

    @property
    def device(self) -> torch.device:
        """Where students are trained."""
        return self.context.device

    def seeds(self, student: StudentConfig) -> list[int]:
        """The seeds that a student is trained with."""
        return self.pipeline.train_config(student).seeds

    def check(self, students: Sequence[StudentConfig]) -> None:
        """Build the first job of each student, so that errors appear before any training; `job` returns these jobs.

        Raises:
            LogitCacheError: a student does not fit the data or the cache.
        """
        for student in students:
            seed = self.seeds(student)[0]
            self._checked[student.name, seed] = self.job(student, seed)

    def job(self, student: StudentConfig, seed: int, *, labels: Labels | None = None) -> Job:
        """One run of a student.

        Args:
            student: its configuration.
            seed: of the run.
            labels: used instead of the labels that the student's configuration names.

        Raises:
            IdentityMismatch: the student needs the cache, and the cache does not fit.
        """
        checked = self._checked.pop((student.name, seed), None) if labels is None else None
        if checked is not None:
            return checked
        pipeline = self.pipeline
        identity = pipeline.run_identity(student, seed)
        indices = self._samples(student)
        weights_M = self._sample_weights(student, indices, identity)
        model = resolve_model(
            student, self.data, self.plan, weights=student.weights, seed=run_seed(seed), trust=self.trust
        )
        documents = self._start_from_teacher(model, student, indices, seed, identity)
        data = self._training_data(student, indices, labels)
        documents |= self._left_out_classes(student, data)
        rows = data.views.rows
        return Job(
            **vars(data),
            name=student.name,
            model=model,
            loss=resolve_loss(student, trust=self.trust),
            config=pipeline.train_config(student),
            seed=seed,
            validation=self._evaluation("validation", student),
            test=self._evaluation("test", student),
            device=self.context.device,
            num_workers=self.context.num_workers,
            folder=student_folder(pipeline, student.name, seed),
            identity=identity | data.identity_of_labels,
            resolved=pipeline.as_yaml(),
            input_key=json_digest([student.input, isinstance(data.views.preprocess, BothInputs)]),
            sample_weights=_by_row(weights_M, data.indices if rows is None else rows[data.indices]),
            classes=self._targets()[indices] if student.sampler == CLASS_BALANCED else None,
            documents=documents,
            tracker=self._tracker,
            hints=self._hints(student, model, data, seed),
        )

    def cache(self) -> tuple[LogitCache, np.ndarray | None]:
        """The pipeline's cache, and its row of each sample; None where row and sample number are the same.

        Raises:
            IdentityMismatch: names the field or the sample that differs.
            IncompleteCache: the cache is not sealed.
        """
        caches, rows = self._open(None)
        return caches[0], rows

    def _training_data(self, student: StudentConfig, indices: np.ndarray, given: Labels | None) -> TrainingData:
        """The student's views and labels; cache and teacher are not loaded where neither loss nor hints use them."""
        outputs = {hint["output"] for hint in student.hints}
        if resolve_loss(student, trust=self.trust).needs_teacher:
            outputs.add(LOGITS)
        if given is None and not outputs:
            return self._true_labels(student, indices)
        if given is None and student.labels == LIVE:
            return self._live_teacher(student, indices, sorted(outputs))
        return self._cached(student, indices, sorted(outputs), given)

    @property
    def _on_device(self) -> bool:
        """Whether views are finished on the device; students that take turns share one rendering on the workers."""
        return self.pipeline.views.on_device and not self.pipeline.together

    def _true_labels(self, student: StudentConfig, indices: np.ndarray) -> TrainingData:
        """True labels only. The student sees and mixes only its own samples, and every epoch is a new view."""
        everything = len(indices) == len(self.data.train)
        dataset = self.data.train if everything else selected(self.data.train, indices)
        plan = replace(self.plan, num_samples=len(dataset), rows=rows_of_dataset(dataset))
        return TrainingData(
            views=ViewDataset(
                dataset, plan, preprocess=input_part(student, trust=self.trust), on_device=self._on_device
            ),
            indices=np.arange(len(dataset)),
            per_decode=self.pipeline.views.per_decode,
            views_key=json_digest(["fresh", array_digest(indices)]),
            identity_of_labels={"num_views": None},
        )

    def _live_teacher(self, student: StudentConfig, indices: np.ndarray, outputs: list[str]) -> TrainingData:
        """The teacher, run on every batch."""
        pipeline, configs = self.pipeline, self.pipeline.cache.outputs
        teacher, fingerprint = self._teacher()
        labels: dict[str, Any] = {"teacher": fingerprint}
        used = {name: config for name, config in configs.items() if name in outputs}
        if used:
            labels["outputs"] = used
        extra_outputs = {}
        if student.hints:
            shapes = output_shapes(teacher, ViewDataset(self.data.train, self.plan), taps_of(configs))
            extra_outputs = declared_outputs(configs, shapes)
        same_input = student.input == pipeline.teacher.input
        preprocess = input_part(student, trust=self.trust)
        return TrainingData(
            views=ViewDataset(
                self.data.train,
                self.plan,
                preprocess=preprocess if same_input else BothInputs(preprocess, self.plan.preprocess),
                on_device=self._on_device and same_input,
            ),
            indices=indices,
            views_key="live",
            identity_of_labels={"labels": labels, "num_views": pipeline.views.count},
            labels=LiveLabels(
                build_runner(pipeline, teacher, self.context, outputs), needs_teacher_inputs=not same_input
            ),
            per_decode=pipeline.views.per_decode,
            num_views=pipeline.views.count,
            extra_outputs=extra_outputs,
        )

    def _cached(
        self, student: StudentConfig, indices: np.ndarray, outputs: list[str], given: Labels | None
    ) -> TrainingData:
        """The labels of one or several caches of the same views, or the given ones for these views."""
        ensemble = student.labels if isinstance(student.labels, TeachersConfig) else None
        caches, rows = self._open(ensemble)
        cache, num_views = caches[0], self.pipeline.views.count
        if LOGITS in outputs and given is None:
            for each in caches:
                each.check_has_logits(f"the loss of student {student.name!r}")
        outputs = [name for name in outputs if name in cache.outputs]  # `Hints` refuses those that are missing
        preprocess = input_part(student, trust=self.trust)
        views = views_of_cache(cache, self.data.train, self.plan, rows, preprocess, on_device=self._on_device)
        cached = None if given is not None else self._cached_labels(ensemble, caches, views, outputs)
        window_blocks = None if cached is None else cached.window_blocks
        labels: dict[str, Any] = {"cache": cache.id, "window_blocks": window_blocks}
        if given is not None:
            labels["given"] = type(given).__name__
        identity: dict[str, Any] = {"labels": labels, "num_views": num_views}
        if ensemble is not None:
            identity["student"] = student.ensemble_identity()
            labels["caches"] = [each.id for each in caches]
        if cache.views.start:
            identity["first_view"] = cache.views.start
        return TrainingData(
            views=views,
            indices=indices,
            views_key=json_digest(["cache", None if rows is None else array_digest(rows)]),
            identity_of_labels=identity,
            labels=given or cached,
            per_decode=1 if given is not None else self.pipeline.views.per_decode,
            num_views=num_views,
            first_view=cache.views.start,
            window_blocks=window_blocks,
            extra_outputs=cache.extra_outputs,
        )

    def _cached_labels(
        self, ensemble: TeachersConfig | None, caches: list[LogitCache], views: ViewDataset, outputs: list[str]
    ) -> CachedLabels | EnsembleLabels:
        budget = self.pipeline.cache.memory_budget
        in_use = len(caches) * self.pipeline.views.per_decode
        share = None if budget is None else budget // in_use
        members = [self._labels_of(cache, views, share, outputs, prove=cache is caches[0]) for cache in caches]
        if ensemble is None or len(members) == 1:
            return members[0]
        return EnsembleLabels(members, combination(ensemble.combine, ensemble.weights, len(caches)))

    def _labels_of(
        self, cache: LogitCache, views: ViewDataset, memory_budget: int | None, outputs: list[str], *, prove: bool
    ) -> CachedLabels:
        """The labels of one cache; students that take turns share them, so that each view is loaded and proven once."""
        key = (cache.id, memory_budget, prove, *outputs)
        labels = self._shared_labels.get(key)
        if labels is None:
            labels = CachedLabels(
                cache, views, self.context.device, memory_budget=memory_budget, prove=prove, outputs=outputs
            )
        if self.pipeline.together:
            self._shared_labels[key] = labels
        return labels

    def _left_out_classes(self, student: StudentConfig, data: TrainingData) -> dict[str, str]:
        """The probability of the teacher's classes that a student lacks, as a file of its run folder; measured once."""
        if student.vocab_size is None or not isinstance(data.labels, CachedLabels):
            return {}
        key = (data.identity_of_labels["labels"]["cache"], student.vocab_size)
        if key not in self._left_out:
            found = data.labels.left_out(data.first_view, student.vocab_size)
            self._left_out[key] = {} if found is None else {CUT_JSON: found.model_dump_json(indent=1) + "\n"}
        return self._left_out[key]

    def _hints(self, student: StudentConfig, model: nn.Module, data: TrainingData, seed: int) -> Hints | None:
        if not student.hints:
            return None
        hints = [hint_from_config(config) for config in student.hints]
        preprocess = input_part(student, trust=self.trust)
        inputs = ViewDataset(self.data.train, self.plan, preprocess=preprocess).batch([(0, 0)] * 2)
        return Hints(hints, model, inputs, self.data.num_classes, data.extra_outputs, seed=seed)

    def _sample_weights(
        self, student: StudentConfig, indices: np.ndarray, identity: dict[str, Any]
    ) -> np.ndarray | None:
        """The weight of each of the student's samples, float64 (M,); records the cache that they come from."""
        weights = weights_from_config(student.sample_weights)
        if weights.name == NONE:
            return None
        if weights.name == CLASS_BALANCED:
            return class_balanced_weights(self._targets()[indices], beta=weights.beta)
        cache, rows = self.cache()
        cache.check_has_logits(f"sample_weights: {weights.name}")
        identity["weighed_by"] = {"cache": cache.id}
        weights_N = teacher_weights(cache, weights.name, cache.views[: self.pipeline.views.count])
        return of_mean_one(weights_N[indices if rows is None else rows[indices]])

    def _start_from_teacher(
        self, model: nn.Module, student: StudentConfig, indices: np.ndarray, seed: int, identity: dict[str, Any]
    ) -> dict[str, str]:
        """Apply `students[].init`; returns the files that describe the initial weights."""
        if student.init is None:
            return {}
        teacher, fingerprint = self._teacher()
        identity["started_from"] = fingerprint
        student_views, teacher_views = (
            clean_views(self.data.train, config, self.pipeline, trust=self.trust)
            for config in (student, self.pipeline.teacher)
        )
        device = next(teacher.parameters()).device

        def teacher_batches(count: int) -> Iterator[tuple[Any, Tensor]]:
            drawn = indices[keyed_permutation(len(indices), "calibration", seed)[:count]]
            for batch in batches(drawn, CALIBRATION_BATCH):
                _, inputs, targets = teacher_views.collate(
                    teacher_views.__getitems__([(0, int(index)) for index in batch])
                )
                yield to_device(inputs, device), to_device(targets, device)

        report = initialisation_of(student.init).start(
            model,
            teacher,
            student.init,
            seed=run_seed(seed),
            inputs=student_views.batch([(0, int(index)) for index in indices[:PROOF_SAMPLES]]),
            batches=teacher_batches,
        )
        return {INIT_JSON: report.as_json(), INIT_TABLE: report.as_table()}

    def _open(self, ensemble: TeachersConfig | None) -> tuple[list[LogitCache], np.ndarray | None]:
        """The pipeline's cache, or the caches that a student names; they are checked against data and views."""
        key = "" if ensemble is None else str(ensemble)
        if key not in self._caches:
            pipeline = self.pipeline
            needed: dict[str, Any] = {
                "num_views": pipeline.views.count,
                "subset": pipeline.data.subset,
                "trust": self.trust,
            }
            if ensemble is None:
                cache, rows = open_fitting_cache(
                    pipeline.cache.path, self.data, self.plan, self._teacher_identity, **needed
                )
                self._caches[key] = [cache], rows
            else:
                caches, rows = open_fitting_caches(ensemble.caches, self.data, self.plan, **needed)
                if ensemble.combine == "logits" and len(caches) > 1:
                    refuse_sampled(ensemble.caches, caches)
                self._caches[key] = caches, rows
        return self._caches[key]

    def _teacher(self) -> tuple[nn.Module, str]:
        if self._teacher_and_fingerprint is None:
            self._teacher_and_fingerprint = resolve_teacher(self.pipeline, self.data, self.plan, trust=self.trust)
        return self._teacher_and_fingerprint

    @cached_property
    def _teacher_identity(self) -> TeacherIdentity:
        """The teacher's identity, for comparison with caches; a teacher that is built only for it is not kept."""
        if not has_teacher(self.pipeline):
            return teacher_identity(self.pipeline, None)
        built = self._teacher_and_fingerprint or resolve_teacher(self.pipeline, self.data, self.plan, trust=self.trust)
        return teacher_identity(self.pipeline, built[1])

    def _targets(self) -> np.ndarray:
        return sample_table(self.data.train).targets

    def _samples(self, student: StudentConfig) -> np.ndarray:
        """The samples that a student is trained on, int64 (M,)."""
        if student.samples == 1.0:
            return np.arange(len(self.data.train))
        return stratified_split(self._targets(), student.samples, "student")[1]

    def _evaluation(self, split: str, student: StudentConfig) -> Evaluation | None:
        """A split as the student takes it; students with the same `input` share it."""
        key = (split, str(student.input))
        if key not in self._evaluations:
            dataset = getattr(self.data, split)
            compared_with = NOT_COMPARED if dataset is None or split != "test" else self._compared_with(dataset)
            if compared_with == NOT_COMPARED:
                self._evaluations[key] = build_evaluation(self.pipeline, dataset, student, self.context)
            elif compared_with == LIVE:
                self._evaluations[key] = self._beside_the_teacher(dataset, student)
            else:
                self._evaluations[key] = self._beside_a_cache(dataset, student, compared_with)
        return self._evaluations[key]

    def _compared_with(self, dataset: Dataset) -> str:
        """`evaluation.teacher` of the pipeline: "none", "live" or the location of a cache."""
        stated = self.pipeline.evaluation.teacher
        if stated != AUTO:
            return stated
        has_live = any(student.labels == LIVE for student in self.pipeline.students)
        sequences = not rows_of_dataset(dataset).one_each
        return LIVE if has_live and sequences and has_teacher(self.pipeline) else NOT_COMPARED

    def _beside_the_teacher(self, dataset: Dataset, student: StudentConfig) -> Evaluation:
        """The test split, and the teacher that is run on it."""
        teacher, _ = self._teacher()
        of_teacher = clean_plan(dataset, self.pipeline.teacher, self.pipeline, trust=self.trust)
        preprocess = input_part(student, trust=self.trust)
        same_input = student.input == self.pipeline.teacher.input
        inputs = preprocess if same_input else BothInputs(preprocess, of_teacher.preprocess)
        labels = LiveLabels(build_runner(self.pipeline, teacher, self.context), needs_teacher_inputs=not same_input)
        return evaluation_of(ViewDataset(dataset, of_teacher, preprocess=inputs), self.context, labels)

    def _beside_a_cache(self, dataset: Dataset, student: StudentConfig, location: str) -> Evaluation:
        """The test split, and the teacher's labels for it from a cache."""
        pipeline = self.pipeline
        plan = clean_plan(dataset, pipeline.teacher, pipeline, trust=self.trust)
        data = replace(self.data, train=dataset)
        try:
            cache, rows = open_fitting_cache(
                location, data, plan, self._teacher_identity, num_views=1, trust=self.trust
            )
        except (IdentityMismatch, SampleMismatch, IncompleteCache, NotACache) as error:
            raise type(error)(
                f"evaluation.teacher is {location}; expected a cache of the test split: {error}"
            ) from error
        views = views_of_cache(cache, dataset, plan, rows, input_part(student, trust=self.trust))
        labels = CachedLabels(cache, views, self.device, memory_budget=pipeline.cache.memory_budget)
        return evaluation_of(views, self.context, labels)


def _by_row(weights_M: np.ndarray | None, rows_M: np.ndarray) -> Tensor | None:
    """Weights as a float32 table indexed by row number; rows outside the run weigh 1."""
    if weights_M is None:
        return None
    table = torch.ones(int(rows_M.max()) + 1)
    table[torch.from_numpy(rows_M)] = torch.from_numpy(weights_M).float()
    return table
