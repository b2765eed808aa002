"""Builds what a pipeline names: dataset, view plan, teacher, students, and the context that they run in.

This is where configuration ends: functions outside `config/` and `stages/` take what is built here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from logitcache.cache.manifest import LOGITS
from logitcache.cache.reader import open_cache
from logitcache.catalog.capture import Tap, captured_shapes
from logitcache.catalog.datasets import Data, load_data
from logitcache.catalog.language_models import check_packing
from logitcache.catalog.models import (
    brings_weights,
    build_model,
    check_model_name,
    check_output,
    fingerprint_args,
    model_fingerprint,
)
from logitcache.catalog.outputs import sources_of, taps_of
from logitcache.config.schema import (
    DataConfig,
    ModelConfig,
    Pipeline,
    StudentConfig,
    ViewsConfig,
    as_pipeline,
    parse_pipeline,
)
from logitcache.context import Context
from logitcache.data.batching import COLLATES, Collate, pad
from logitcache.data.packing import pack
from logitcache.data.recorded import RECORDED, RecordedTransform, build_replay
from logitcache.data.rows import rows_of_dataset
from logitcache.data.samples import Dataset
from logitcache.data.sequences import sequence_rows
from logitcache.data.text_views import complete_spec
from logitcache.data.tokens import MASKED
from logitcache.data.transforms import build_transform, normalise_spec
from logitcache.data.views import Mixing, ViewDataset, ViewPlan
from logitcache.devices import pick_device
from logitcache.encodings import NoLogits, encoding_or_auto
from logitcache.errors import ShapeError, UsageError
from logitcache.losses import Loss, load_code, loss_from_config
from logitcache.randomness import preserved_generators, seed_generators
from logitcache.train.evaluation import Evaluation
from logitcache.train.finished import read_text
from logitcache.train.inference import TeacherRunner
from logitcache.train.labels import Labels
from logitcache.train.runs import RESOLVED
from logitcache.train.tracking import Tracker, load_tracker
from logitcache.verify.fit import TeacherIdentity

TRAINED = "trained"
"""`teacher.weights` of a teacher that `train-teacher` trains."""
RANDOM = "random"
"""`teacher.weights` of a teacher with random weights, on purpose."""
EVALUATION_BATCH_SIZE = 256


def build_context(pipeline: Pipeline, *, trust: bool) -> Context:
    """The pipeline's device and workers; sets torch's CPU threads where the pipeline has `threads`.

    Raises:
        UsageError: the device is not available.
    """
    device = pick_device(pipeline.device, threads=pipeline.threads)
    return Context(device=device, num_workers=pipeline.num_workers, trust=trust)


def resolve_data(pipeline: Pipeline, *, trust: bool) -> Data:
    """The pipeline's dataset."""
    return load_configured(pipeline.data, trust=trust)


def pipeline_data(pipeline: Pipeline | str | os.PathLike[str], *, trust: bool = False) -> Data:
    """The dataset of a pipeline, divided into `train`, `validation` and `test` as in its stages.

    `train` has the samples of the pipeline's cache in the cache's order, without those of `data.validation`. With
    `cache.view_plan` it gives what the teacher saw: `ViewDataset(pipeline_data(file).train, cache.view_plan)`.

    Args:
        pipeline: a pipeline, or the path of its file.
        trust: allow code from outside the working directory.

    Returns:
        The splits, map-style (`validation` and `test` may be None), `num_classes` and `class_names`.

    Raises:
        UsageError: the file is invalid, or names an unknown dataset.
        DatasetUnavailable: files are missing; says how to get them.
    """
    return resolve_data(as_pipeline(pipeline), trust=trust)


def load_configured(config: DataConfig, *, trust: bool) -> Data:
    """A dataset from its configuration."""
    return load_data(
        config.name,
        root=config.root,
        download=config.download,
        validation=config.validation,
        args=config.args,
        part=config.part,
        trust=trust,
    )


def resolve_plan(pipeline: Pipeline, data: Data, *, trust: bool) -> ViewPlan:
    """The view plan that teacher and students share."""
    views = pipeline.views
    return ViewPlan(
        transform=shared_transform(pipeline, data.train, trust=trust),
        seed=views.seed,
        mixing=mixing_of(pipeline),
        preprocess=input_part(pipeline.teacher, trust=trust),
        num_classes=data.num_classes,
        num_samples=len(data.train),
        collate=resolve_collate(pipeline, trust=trust),
        rows=rows_of_dataset(data.train, pipeline.cache.rows_per_block),
    )


def mixing_of(pipeline: Pipeline) -> Mixing:
    """How the views mix samples."""
    views = pipeline.views
    return Mixing(mixup=views.mixup, cutmix=views.cutmix, probability=views.mix_probability)


def shared_transform(pipeline: Pipeline, dataset: Dataset, *, trust: bool) -> Callable[[Any], Any] | None:
    """The random transform of `views.transform`, with the token ids of the dataset's tokenizer that it leaves out."""
    transform = pipeline.views.transform
    recorded = recorded_views(pipeline.views, pipeline.cache.path, trust=trust)
    if transform is None or recorded is not None:
        return recorded
    return build_transform(complete_spec(transform, dataset), trust=trust)


def recorded_views(views: ViewsConfig, location: str, *, trust: bool) -> RecordedTransform | None:
    """The views that another tool recorded, from an imported cache, where `views.transform` is `recorded`; else None.

    Args:
        views: of a pipeline.
        location: of its cache, which has the views unless the transform names another one.
        trust: allow code from outside the working directory.

    Raises:
        UsageError: an unknown parameter, or a cache without recorded views.
        UntrustedCode: the replay is code from outside the working directory, and `trust` is False.
    """
    steps = views.transform or []
    if not any(RECORDED in step for step in steps):
        return None
    given = steps[0].get(RECORDED, {})
    if len(steps) > 1 or given.keys() - {"cache", "replay"}:
        raise UsageError(
            f"views.transform: `{RECORDED}` is the only step, and has the parameters cache and replay; found "
            f"{steps!r:.200}"
        )
    location, replay = given.get("cache", location), given.get("replay")
    cache = open_cache(location, trust=trust)
    own = None if replay is None else build_replay(normalise_spec(replay)[0], trust=trust)
    plan = cache.view_plan_with(own)
    if not isinstance(plan.transform, RecordedTransform):
        raise UsageError(
            f"views.transform: {location} has no views that another tool recorded; describe its transform instead"
        )
    return plan.transform


def resolve_collate(pipeline: Pipeline, *, trust: bool) -> Collate | None:
    """The function of `data.collate`, which makes a batch of inputs; None stacks them. Texts are padded by default.

    Raises:
        UsageError: the entry point is not a function.
    """
    name = pipeline.data.collate
    if name is None:
        return pad if pipeline.data.name == "text" else None
    function = COLLATES.resolve(name, trust=trust)
    if not callable(function):
        raise UsageError(f"data.collate {name} is a {type(function).__name__}; expected a function of a list of inputs")
    return function


def input_part(config: ModelConfig, *, trust: bool) -> Callable[[Any], Any]:
    """A model's own deterministic transform, from `input`; the identity where `input` is empty."""
    return build_transform(config.input or [], trust=trust)


def resolve_model(
    config: ModelConfig,
    data: Data,
    plan: ViewPlan,
    *,
    weights: str | None,
    seed: int,
    trust: bool,
    new_head: bool = True,
    logits: Tap | None = None,
    has_logits: bool = True,
) -> nn.Module:
    """A model sized for the data, its random weights drawn from `seed`, its output shape checked.

    Args:
        config: names the model.
        data, plan: give the input shape and the number of classes.
        weights: a .safetensors file, a name of torchvision's, or None for random weights.
        seed: of random weights.
        trust: allow entry points outside the working directory.
        new_head: replace the head of pretrained weights where its number of classes differs; else that is an error.
        logits: the module whose output is checked, instead of the model's own output.
        has_logits: whether logits are stored. If not, the model's output is not checked.

    Raises:
        UsageError: the model can't be built.
        ShapeError: the output is not one logit per class.
    """
    views = ViewDataset(data.train, replace(plan, contents=None), preprocess=input_part(config, trust=trust))
    num_classes = _num_classes(config, data, views)
    sample = views[(0, 0)][1]
    with preserved_generators():
        seed_generators(seed)
        model = build_model(
            config.model,
            num_classes=num_classes,
            input_shape=tuple(getattr(sample, "shape", ())),
            weights=weights,
            args=config.args,
            trust=trust,
            new_head=new_head,
            tokenization=getattr(data.train, "tokenization", None),
        )
    if plan.collate is pack:
        check_packing(model, num_classes)
    if not has_logits:
        return model
    if logits is None:
        index, inputs, _ = views.collate(views.__getitems__([(0, 0)]))
        check_output(model, inputs, num_classes, name=config.model, index=index, rows=sequence_rows(views))
    else:
        shape = captured_shapes(model, {LOGITS: logits}, views.batch([(0, 0)] * 2))[LOGITS]
        if shape != (data.num_classes,):
            raise ShapeError(
                f"module {logits.module!r} of {config.model!r} returns {shape} for one sample; expected "
                f"({data.num_classes},), one logit for each of the data's classes"
            )
    return model


def _num_classes(config: ModelConfig, data: Data, views: ViewDataset) -> int:
    """The classes of a model: those of the data, or fewer for a student with `vocab_size`."""
    vocab_size = config.vocab_size if isinstance(config, StudentConfig) else None
    if vocab_size is None:
        return data.num_classes
    if sequence_rows(views) is None or vocab_size > data.num_classes:
        raise UsageError(
            f"vocab_size is {vocab_size}; expected at most the {data.num_classes} classes of the data, for a language "
            "model"
        )
    return vocab_size


def resolve_loss(config: StudentConfig, *, trust: bool) -> Loss:
    """A student's loss; imports the code that it names.

    Raises:
        UntrustedCode: the code is outside the working directory, and `trust` is False.
        UsageError: there is no such code.
    """
    return load_code(loss_from_config(config.loss), trust=trust)


def teacher_weights(pipeline: Pipeline) -> str | None:
    """The file or name of the teacher's weights; for "trained", the file that `train-teacher` writes."""
    if pipeline.teacher.weights == TRAINED:
        return str(teacher_folder(pipeline) / "last.safetensors")
    return pipeline.teacher.weights


def teacher_name(pipeline: Pipeline) -> str:
    """The teacher's name in an identity: its model, and the name of its weights where they have one."""
    weights = pipeline.teacher.weights
    named = weights is not None and weights not in (TRAINED, RANDOM) and not weights.endswith(".safetensors")
    return f"{pipeline.teacher.model}/{weights}" if named else pipeline.teacher.model


def teacher_folder(pipeline: Pipeline) -> Path:
    """The run folder of `train-teacher`."""
    return Path(pipeline.runs.path) / "teacher"


def student_folder(pipeline: Pipeline, name: str, seed: int) -> Path:
    """The run folder of one seed of a student."""
    return Path(pipeline.runs.path) / name / f"seed-{seed}"


def resolve_teacher(pipeline: Pipeline, data: Data, plan: ViewPlan, *, trust: bool) -> tuple[nn.Module, str]:
    """The teacher in evaluation mode on the CPU, and its fingerprint.

    Raises:
        UsageError: the weights are missing, or don't fit the model.
    """
    check_model_name(pipeline.teacher.model, trust=trust)
    weights = teacher_weights(pipeline)
    if pipeline.teacher.weights is None and not brings_weights(pipeline.teacher.model, pipeline.teacher.args):
        raise UsageError(
            f"the teacher {pipeline.teacher.model!r} has no weights; set teacher.weights to {TRAINED!r} (and run "
            f"`logitcache train-teacher`), to a .safetensors file, or to {RANDOM!r} for random weights"
        )
    if pipeline.teacher.weights == TRAINED and not Path(str(weights)).is_file():
        raise UsageError(f"the teacher is not trained yet: {weights} is missing; run `logitcache train-teacher` first")
    model = resolve_model(
        pipeline.teacher,
        data,
        plan,
        weights=None if weights == RANDOM else weights,
        seed=0,
        trust=trust,
        new_head=False,
        logits=taps_of(pipeline.cache.outputs).get(LOGITS),
        has_logits=not isinstance(encoding_or_auto(pipeline.cache.encoding), NoLogits),
    )
    untrained: list[str] = getattr(model, "untrained", [])
    if weights is None and untrained:
        raise UsageError(
            f"the teacher's {', '.join(untrained)} are untrained; run `logitcache train-teacher` with "
            f"teacher.weights={TRAINED}, or set teacher.weights to a .safetensors file"
        )
    args = fingerprint_args(pipeline.teacher.model, pipeline.teacher.args)
    fingerprint = model_fingerprint(model, name=teacher_name(pipeline), args=args)
    return model.eval().requires_grad_(False), fingerprint


def has_teacher(pipeline: Pipeline) -> bool:
    """Whether the teacher's weights are on this machine; without them only its name can be compared."""
    weights = teacher_weights(pipeline)
    return weights in (None, RANDOM) or Path(str(weights)).is_file()


def teacher_identity(pipeline: Pipeline, fingerprint: str | None) -> TeacherIdentity:
    """The identity of the pipeline's teacher, for comparison with a cache.

    Args:
        pipeline: names the teacher.
        fingerprint: from `resolve_teacher`; None where the weights are not on this machine.
    """
    return TeacherIdentity(
        name=teacher_name(pipeline) if fingerprint is None else fingerprint,
        has_weights=fingerprint is not None,
        precision=pipeline.teacher.precision,
        sources=sources_of(pipeline.cache.outputs),
    )


def build_runner(
    pipeline: Pipeline, teacher: nn.Module, context: Context, outputs: Sequence[str] = ()
) -> TeacherRunner:
    """The teacher on its device, with hooks for the named outputs of `cache.outputs`; logits are always included."""
    return TeacherRunner(teacher, pipeline.teacher, context, taps_of(pipeline.cache.outputs, [LOGITS, *outputs]))


def clean_plan(dataset: Dataset, config: ModelConfig, pipeline: Pipeline, *, trust: bool) -> ViewPlan:
    """The plan of a split without augmentation, preprocessed for one model, for validation and test.

    The texts of a masked model are masked as in view 0: it predicts nothing else.
    """
    masked = getattr(dataset, "task", None) == MASKED
    return ViewPlan(
        transform=shared_transform(pipeline, dataset, trust=trust) if masked else None,
        seed=pipeline.views.seed,
        preprocess=input_part(config, trust=trust),
        collate=resolve_collate(pipeline, trust=trust),
        rows=rows_of_dataset(dataset),
    )


def clean_views(dataset: Dataset, config: ModelConfig, pipeline: Pipeline, *, trust: bool) -> ViewDataset:
    """A dataset without augmentation, preprocessed for one model, for validation and test."""
    return ViewDataset(dataset, clean_plan(dataset, config, pipeline, trust=trust))


def build_evaluation(
    pipeline: Pipeline, dataset: Dataset | None, config: ModelConfig, context: Context
) -> Evaluation | None:
    """A split ready to measure one model on; None where the dataset lacks the split."""
    if dataset is None:
        return None
    views = clean_views(dataset, config, pipeline, trust=context.trust)
    return evaluation_of(views, context)


def evaluation_of(views: ViewDataset, context: Context, labels: Labels | None = None) -> Evaluation:
    """Views of a split, ready to measure models on, and perhaps a teacher's labels for them."""
    return Evaluation(views, batch_size=EVALUATION_BATCH_SIZE, num_workers=context.num_workers, labels=labels)


def build_tracker(pipeline: Pipeline, *, trust: bool) -> Callable[[], Tracker] | None:
    """Starts the experiment tracker of a run, from `runs.tracker`; None where the pipeline names none."""
    name = pipeline.runs.tracker
    return None if name is None else load_tracker(name, trust=trust)


def recorded_pipeline(run_folder: Path) -> Pipeline:
    """The pipeline that a run recorded in its folder, with downloads switched off: the folder may be untrusted.

    Raises:
        UsageError: `pipeline.yaml` is missing or damaged.
    """
    try:
        raw = yaml.safe_load(read_text(run_folder / RESOLVED))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{RESOLVED} of the run can't be read; name a pipeline with --data") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{RESOLVED} of the run is not a mapping; name a pipeline with --data")
    pipeline = parse_pipeline(raw, source=RESOLVED)
    return pipeline.model_copy(update={"data": pipeline.data.model_copy(update={"download": False})})
