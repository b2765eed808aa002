"""The schema of a pipeline file: data, views, teacher, cache and students. Every key is validated on loading.

Importing it is cheap: what checks a value is imported when there is one, since most of it needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from logitcache.cache.card_fields import Card
from logitcache.catalog.initialisations import initialisation_of
from logitcache.catalog.parts import PartConfig
from logitcache.config.overrides import parse, read_raw, refuse_namesakes, unknown_key
from logitcache.entry_points import is_entry_point
from logitcache.errors import UsageError
from logitcache.registry import unknown_name
from logitcache.train.tracking import TRACKERS


class Section(BaseModel):
    """A section of a configuration file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _known_encoding(value: Any) -> Any:
    from logitcache.encodings import Auto, Encoding, encoding_or_auto

    return encoding_or_auto(value).config() if isinstance(value, str | Mapping | Encoding | Auto) else value


def _known_loss(value: Any) -> Any:
    from logitcache.losses import loss_from_config

    value = {"name": value} if isinstance(value, str) else value
    loss_from_config(value)
    return value


def _known_transform(value: Any) -> Any:
    if value in (None, "clean", []):
        return None
    from logitcache.data.transforms import normalise_spec

    return normalise_spec(value)


EncodingConfig = Annotated[dict[str, Any], BeforeValidator(_known_encoding)]
"""An encoding: its name, its Python spelling such as `TopK(k=20)`, or a mapping with `name`."""

LossConfig = Annotated[dict[str, Any], BeforeValidator(_known_loss)]
"""A loss: its name, `package.module:function`, or a mapping with `name`."""

TransformConfig = Annotated[Any, AfterValidator(_known_transform)]
"""A list of transforms; null or "clean" for none."""


class DataConfig(Section):
    """The dataset."""

    name: str
    """A built-in dataset, or `package.module:function`."""
    root: str = "data"
    download: bool = False
    validation: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the training split that becomes the validation split, stratified by class."""
    args: dict[str, Any] = {}
    subset: bool = False
    """Allow the dataset to lack some of the cached samples; by default a missing sample is an error."""
    collate: str | None = None
    """Makes a batch of inputs: `pad`, `pack`, or `package.module:function` of a list of inputs; null pads the inputs of
    `text`, and stacks others."""
    part: PartConfig | None = None
    """Use one of several disjoint parts of the training split, as one party of a federation."""

    def source(self) -> tuple[Any, ...]:
        """Dataset, folder and arguments: equal where equal sample keys name the same samples."""
        return self.name, self.root, self.args

    def identity(self) -> dict[str, Any]:
        """The data's part of a run's identity: without its location and unset options."""
        unasked = {name for name in ("part", "collate") if getattr(self, name) is None}
        return self.model_dump(exclude={"root", "download"} | unasked)

    @field_validator("collate")
    @classmethod
    def _known_collate(cls, value: str | None) -> str | None:
        if value is not None and not is_entry_point(value):
            from logitcache.data.batching import COLLATES

            if value not in COLLATES:
                raise ValueError(COLLATES.unknown(value))
        return value


class ViewsConfig(Section):
    """The augmentation that teacher and students share."""

    count: int = Field(default=1, ge=1)
    seed: int = 0
    transform: TransformConfig = None
    """The random augmentation."""
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    mix_probability: float = Field(default=1.0, ge=0, le=1)
    per_decode: int = Field(default=1, ge=1)
    """Views that are made from a sample each time it is loaded; at most `count`."""
    on_device: bool = False
    """Send images to the device as bytes, and mix and normalize them there."""

    @model_validator(mode="after")
    def _has_as_many_views(self) -> ViewsConfig:
        if self.per_decode > self.count:
            raise ValueError(
                f"per_decode is {self.per_decode}, and there are {self.count} views; expected at most {self.count}"
            )
        return self

    def identity(self, *, in_order: bool = True) -> dict[str, Any]:
        """The views' part of a run's identity.

        Args:
            in_order: with `per_decode`, which changes the order of a student's samples, and nothing else.
        """
        left_out = {"count", "on_device"} | (set() if in_order and self.per_decode > 1 else {"per_decode"})
        return self.model_dump(exclude=left_out)


class TrainConfig(Section):
    """How a model is trained."""

    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=128, ge=1)
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    schedule: Literal["constant", "cosine", "one_cycle"] = "cosine"
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs of linear warm-up; for `one_cycle`, epochs until the peak, by default 0.3 of all."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches per batch, whose gradients are accumulated to save memory."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of all gradients together."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the exponential moving average of the weights; the run then evaluates and saves the average."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after this many epochs without a better validation accuracy."""
    chunked_head: bool | Annotated[int, Field(ge=1)] = False
    """Compute the head and the loss a few rows at a time, so that no logits of a whole batch exist; true, or the number
    of rows."""
    compile: bool = False
    """Use `torch.compile`."""
    sync_batchnorm: bool = False
    """Synchronise batch norm over GPUs under `torchrun`."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of autocast; weights stay float32."""
    channels_last: bool = False
    seeds: list[int] = Field(default=[0], min_length=1)
    """One run per seed."""
    checkpoint_steps: int = Field(default=0, ge=0)
    """Steps between resumable checkpoints; 0 saves at the end of each epoch."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _one_seed(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value

    def identity(self, seed: int) -> dict[str, Any]:
        """The training settings' part of a run's identity."""
        unset = set() if self.chunked_head else {"chunked_head"}
        return self.model_dump(exclude={"seeds"} | unset) | {"seed": seed}


class ModelConfig(Section):
    """A model, by name."""

    model: str
    """A built-in model, a torchvision classifier, or `package.module:function`."""
    args: dict[str, Any] = {}
    input: TransformConfig = None
    """The model's own deterministic preprocessing, such as its size and normalization."""
    weights: str | None = None
    """A .safetensors file, the name of torchvision weights, or null for random weights."""


class TeacherConfig(ModelConfig):
    """The teacher. `weights: trained` uses the result of `train-teacher`; `weights: random` allows random weights."""

    start_from: str | None = None
    """Weights that `train-teacher` fine-tunes: a .safetensors file, or the name of torchvision weights."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    batch_size: int = Field(default=256, ge=1)
    """Rows per batch in stage 1; a batch never crosses a block boundary."""
    train: dict[str, Any] = {}
    """Overrides of the pipeline's `train` for `train-teacher`."""

    def identity(self) -> dict[str, Any]:
        """The teacher's part of the identity of its own training run: without settings of inference."""
        return self.model_dump(exclude={"batch_size", "compile", "channels_last", "precision"})


class CacheConfig(Section):
    """Where and how teacher outputs are stored."""

    path: str
    encoding: EncodingConfig = {"name": "dense", "dtype": "float16"}
    calibration: int = Field(default=10_000, ge=2)
    """Rows that the teacher computes first, to fit or choose an encoding."""
    rows_per_block: int = Field(default=16_384, ge=1)
    outputs: dict[str, dict[str, Any]] = {}
    """Further outputs of the teacher: modules by name, each with an encoding; `logits` names the logits' module."""
    memory_budget_mb: float | None = Field(default=None, gt=0)
    """Views larger than this are streamed block by block in stage 2; null keeps each view in memory."""
    card: Card = Card()
    """Additional text of the cache's README.md, such as its license."""

    @property
    def memory_budget(self) -> int | None:
        """`memory_budget_mb` in bytes."""
        return None if self.memory_budget_mb is None else int(self.memory_budget_mb * 2**20)

    @field_validator("outputs", mode="before")
    @classmethod
    def _known_outputs(cls, value: Any) -> Any:
        from logitcache.catalog.outputs import outputs_config

        return outputs_config(value)


class TeachersConfig(Section):
    """Labels of named caches of any teachers: of one, or of several of the same views, combined for each batch."""

    caches: list[str]
    """Paths or URLs; inputs are verified against the first one."""
    combine: Literal["logits", "probabilities", "best"] = "logits"
    """The mean of logits or probabilities, or for each sample the teacher with the lowest loss on its true label."""
    weights: list[float] | None = None
    """Weight of each cache in the mean; equal by default."""

    @model_validator(mode="after")
    def _weights_fit(self) -> TeachersConfig:
        if not self.caches:
            raise ValueError("`caches` is empty; expected at least one path or URL of a cache")
        if self.weights is not None and self.combine == "best":
            raise ValueError("'best' selects one teacher for each sample and has no weights")
        if self.weights is not None and len(self.weights) != len(self.caches):
            raise ValueError(f"{len(self.weights)} weights for {len(self.caches)} caches; give one for each")
        return self


class StudentConfig(ModelConfig):
    """A student: its model, its labels, its loss and its overrides of `train`."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    loss: LossConfig = {"name": "kl"}
    labels: Literal["cache", "live"] | TeachersConfig = "cache"
    """Where the teacher's logits come from: the pipeline's cache, other caches, or the teacher, run on every batch."""
    samples: float = Field(default=1.0, gt=0, le=1)
    """Fraction of the training samples that this student is trained on, stratified by class."""
    sample_weights: dict[str, Any] = {"name": "none"}
    """Weight of each sample's loss: by class size, teacher confidence or teacher agreement."""
    sampler: Literal["none", "class_balanced"] = "none"
    """Each sample once per epoch, or every class equally often."""
    hints: list[dict[str, Any]] = []
    """Losses between modules of the student and further outputs of the teacher, added to `loss`."""
    init: dict[str, Any] | None = None
    """Initialise the student from the teacher's weights."""
    train: dict[str, Any] = {}
    """Overrides of the pipeline's `train`."""
    vocab_size: int | None = Field(default=None, ge=2)
    """Classes of a language model, if it has only the first ones of the teacher's, whose head may be padded."""

    @field_validator("labels", mode="before")
    @classmethod
    def _known_labels(cls, value: Any) -> Any:
        known = list(TeachersConfig.model_fields)
        for key in value if isinstance(value, Mapping) else ():
            if key not in known:
                raise ValueError(unknown_key(str(key), str(key), known))
        if isinstance(value, Mapping):
            return TeachersConfig.model_validate(value)
        if value not in ("cache", "live") and not isinstance(value, TeachersConfig):
            raise ValueError("expected 'cache', 'live', or a mapping such as {caches: [a.cache]}")
        return value

    @field_validator("sample_weights", mode="before")
    @classmethod
    def _known_weights(cls, value: Any) -> Any:
        from logitcache.train.weighting import weights_config, weights_from_config

        return weights_config(weights_from_config(value))

    @field_validator("hints", mode="before")
    @classmethod
    def _known_hints(cls, value: Any) -> Any:
        from logitcache.train.hint_config import hints_config

        return hints_config(value)

    @field_validator("init", mode="before")
    @classmethod
    def _known_init(cls, value: Any) -> Any:
        return None if value is None else initialisation_of(value).config(value)

    @model_validator(mode="after")
    def _fits_together(self) -> StudentConfig:
        if self.init is not None and self.weights is not None:
            raise ValueError("a student starts from `weights` or from its teacher (`init`); set only one of them")
        if self.hints and isinstance(self.labels, TeachersConfig) and len(self.labels.caches) > 1:
            raise ValueError("`hints` need the labels of one cache; several teachers give combined logits only")
        return self

    def identity(self) -> dict[str, Any]:
        """The student's part of its run's identity: without `train`, which has a part of its own, and unset options."""
        from logitcache.losses import recorded_loss

        unset: dict[str, Any] = {"init": None, "sample_weights": {"name": "none"}, "sampler": "none", "hints": []}
        unset |= {"vocab_size": None}
        identity = self.model_dump(exclude={"train"})
        identity |= {"loss": recorded_loss(self.loss), "hints": recorded_loss(self.hints)}
        return {key: value for key, value in identity.items() if key not in unset or value != unset[key]}

    def ensemble_identity(self) -> dict[str, Any]:
        """`identity` of a student of named caches, without their locations: a run resumes with copies of them."""
        assert isinstance(self.labels, TeachersConfig)
        return self.identity() | {"labels": self.labels.model_dump(exclude={"caches"})}


class EvaluationConfig(Section):
    """How students are measured on the test split."""

    teacher: str = "auto"
    """The teacher that they are compared with: "live" runs it, "none" compares with none, and a path or URL names a
    cache of the test split. "auto" is "live" for sequences where a student of the pipeline has `labels: live`."""


class RunsConfig(Section):
    """Where runs are stored and logged."""

    path: str = "runs"
    tracker: str | None = None
    """The name of a tracker, or `package.module:function`; see `logitcache.train.tracking`."""

    @field_validator("tracker")
    @classmethod
    def _known_tracker(cls, value: str | None) -> str | None:
        if value is not None and value not in TRACKERS and not is_entry_point(value):
            raise ValueError(TRACKERS.unknown(value))
        return value


class Pipeline(Section):
    """A whole pipeline, with every default filled in."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    data: DataConfig
    views: ViewsConfig = ViewsConfig()
    teacher: TeacherConfig
    cache: CacheConfig
    train: TrainConfig = TrainConfig()
    students: list[StudentConfig] = []
    together: bool = False
    """Render each batch once for all students whose batches are the same; results don't change."""
    evaluation: EvaluationConfig = EvaluationConfig()
    runs: RunsConfig = RunsConfig()
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1", "mps"."""
    num_workers: int = Field(default=2, ge=0)
    """DataLoader workers; results don't depend on them."""
    threads: int | None = Field(default=None, ge=1)
    """Torch's CPU threads in the main process, all cores by default; rounding on the CPU depends on them."""

    @model_validator(mode="after")
    def _consistent(self) -> Pipeline:
        refuse_namesakes("students", [student.name for student in self.students])
        self.train_config(self.teacher)
        for student in self.students:
            self.train_config(student)
        return self

    def train_config(self, owner: TeacherConfig | StudentConfig) -> TrainConfig:
        """The training settings of the teacher or a student: the pipeline's `train` with its overrides."""
        return overridden(self.train, owner.train)

    @property
    def teacher_name(self) -> str:
        """A readable name of the teacher, such as "resnet50", or that of its files."""
        path = self.teacher.args.get("path")
        if self.teacher.model == "transformers" and isinstance(path, str):
            return Path(path).name.removesuffix(".gguf")
        return self.teacher.model.rpartition(":")[2]

    @property
    def dataset_name(self) -> str:
        """A readable name of the dataset, such as "mnist".

        The folder's name if it holds the user's own files; the pipeline's if a function of the user loads it.
        """
        if is_entry_point(self.data.name):
            return self.name
        own = self.data.name in ("image_folder", "audio_folder", "text")
        return Path(self.data.root).stem if own else self.data.name

    def student(self, name: str) -> StudentConfig:
        """A student by name.

        Raises:
            UsageError: the pipeline has no such student.
        """
        for student in self.students:
            if student.name == name:
                return student
        names = [student.name for student in self.students]
        raise UsageError(unknown_name(f"student of pipeline {self.name}", name, names))

    def run_identity(self, owner: TeacherConfig | StudentConfig, seed: int) -> dict[str, Any]:
        """What one run of training computes, as `run.yaml` records it; a student's label source adds to it."""
        return {
            "teacher" if isinstance(owner, TeacherConfig) else "student": owner.identity(),
            "train": self.train_config(owner).identity(seed),
            "data": self.data.identity(),
            "views": self.views.identity(in_order=not isinstance(owner, TeacherConfig)),
        }

    def as_yaml(self) -> str:
        """The resolved pipeline as YAML, with every default."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def overridden(settings: TrainConfig, overrides: Mapping[str, Any]) -> TrainConfig:
    """Training settings with overrides.

    Raises:
        ValueError: unknown key or invalid value.
    """
    known = list(TrainConfig.model_fields)
    for key in overrides:
        if key not in known:
            raise ValueError(unknown_key(f"train.{key}", key, known))
    return TrainConfig.model_validate(settings.model_dump() | dict(overrides))


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read a pipeline file, and apply overrides such as `cache.encoding.k=20`.

    Raises:
        UsageError: the file is missing or not YAML, a key is unknown (the message suggests the nearest one), or a value
            is invalid.
    """
    raw = read_raw(path, Pipeline, overrides)
    if "parties" in raw:
        raise UsageError(f"{path} has `parties`, so it describes a federation: run `logitcache federate {path}`")
    return parse_pipeline(raw, source=str(path))


def as_pipeline(pipeline: Pipeline | str | os.PathLike[str]) -> Pipeline:
    """A pipeline as it is, or read from its file."""
    return pipeline if isinstance(pipeline, Pipeline) else load_pipeline(os.fspath(pipeline))


def parse_pipeline(raw: Mapping[str, Any], *, source: str) -> Pipeline:
    """A pipeline from plain data.

    Raises:
        UsageError: lists every problem on a line of its own, with its key.
    """
    return parse(Pipeline, raw, source=source)
