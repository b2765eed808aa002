"""The pipeline file: data, views, teacher, cache and students, in YAML; every key is checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from logitcache.cache.card import Card
from logitcache.catalog.initialisations import initialisation_of
from logitcache.catalog.outputs import outputs_config
from logitcache.catalog.parts import PartConfig
from logitcache.config.overrides import parse, read_raw, refuse_namesakes, unknown_key
from logitcache.data.batching import COLLATES
from logitcache.data.transforms import normalise_spec
from logitcache.encodings import Auto, Encoding, encoding_or_auto
from logitcache.entry_points import is_entry_point
from logitcache.errors import UsageError
from logitcache.losses import Loss, loss_from_config
from logitcache.registry import nearest
from logitcache.train.hint_config import hints_config
from logitcache.train.tracking import TRACKERS
from logitcache.train.weighting import weights_config, weights_from_config


class Section(BaseModel):
    """A part of a file that people write: keys that it does not have are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _known_encoding(value: Any) -> Any:
    return encoding_or_auto(value).config() if isinstance(value, str | Mapping | Encoding | Auto) else value


def _known_loss(value: Any) -> Any:
    value = {"name": value} if isinstance(value, str) else value
    loss_from_config(value)
    return value


EncodingConfig = Annotated[dict[str, Any], BeforeValidator(_known_encoding)]
"""An encoding as its name, as it is spelled in Python, or as a mapping with `name`."""

LossConfig = Annotated[dict[str, Any], BeforeValidator(_known_loss)]
"""A loss as its name, or as a mapping with `name`."""


class DataConfig(Section):
    """Where the samples come from."""

    name: str
    """One of the catalog's datasets, or `package.module:function`."""
    root: str = "data"
    download: bool = False
    validation: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the training split that is set apart, stratified; hyperparameters are chosen on it."""
    args: dict[str, Any] = {}
    subset: bool = False
    """Train students on a part of the cached samples; otherwise a sample that is missing here is an error."""
    collate: str | None = None
    """What makes a batch of samples: `pad`, or `package.module:function` of a list of inputs; none stacks them."""
    part: PartConfig | None = None
    """Take the place of one of several parties, whose parts of the training split have nothing in common."""

    def source(self) -> tuple[Any, ...]:
        """What its samples are taken from, whichever of them: keys of one source name the same samples."""
        return self.name, self.root, self.args

    def identity(self) -> dict[str, Any]:
        """The data as part of what a run is: not where they lie, nor what was not asked for."""
        unasked = {name for name in ("part", "collate") if getattr(self, name) is None}
        return self.model_dump(exclude={"root", "download"} | unasked)

    @field_validator("collate")
    @classmethod
    def _known_collate(cls, value: str | None) -> str | None:
        if value is not None and value not in COLLATES and not is_entry_point(value):
            raise ValueError(COLLATES.unknown(value))
        return value


class ViewsConfig(Section):
    """How the dataset is augmented, the same for teacher and students."""

    count: int = Field(default=1, ge=1)
    seed: int = 0
    transform: Any = None
    """The shared random part: a list of transforms, or "clean" for none."""
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    mix_probability: float = Field(default=1.0, ge=0, le=1)

    @field_validator("transform")
    @classmethod
    def _normal_form(cls, value: Any) -> Any:
        return None if value in (None, "clean", []) else normalise_spec(value)


class TrainConfig(Section):
    """How one net is trained."""

    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=128, ge=1)
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    schedule: Literal["constant", "cosine", "one_cycle"] = "cosine"
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Linear; of `one_cycle`, the epochs of its rise, by default 0.3 of all."""
    accumulate: int = Field(default=1, ge=1)
    """Parts that a batch is computed in, one after another, where it is too large for the device."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Of all gradients together, at most."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the moving average of the weights, which then are the run's weights."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Epochs without a better validation accuracy after which training stops."""
    compile: bool = False
    """Train through `torch.compile`."""
    sync_batchnorm: bool = False
    """Batch norm over the whole batch where `torchrun` shares it out to GPUs."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of autocast; weights stay float32."""
    channels_last: bool = False
    seeds: list[int] = Field(default=[0], min_length=1)
    """One run for each."""
    checkpoint_steps: int = Field(default=0, ge=0)
    """Steps between resumable checkpoints; 0 saves at the end of each epoch."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _one_seed(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value


class ModelConfig(Section):
    """A net, by name."""

    model: str
    """One of the catalog's nets, a torchvision classifier, or `package.module:function`."""
    args: dict[str, Any] = {}
    input: Any = None
    """The model's own deterministic part (size, normalisation): a list of transforms."""
    weights: str | None = None
    """A .safetensors file, a name of torchvision's, or none."""

    @field_validator("input")
    @classmethod
    def _normal_form(cls, value: Any) -> Any:
        return None if value in (None, []) else normalise_spec(value)


class TeacherConfig(ModelConfig):
    """The teacher: run once, or trained first where `weights` is "trained"; "random" says that none is meant."""

    start_from: str | None = None
    """Weights that `train-teacher` fine-tunes from: a .safetensors file, or a name of torchvision's."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    batch_size: int = Field(default=256, ge=1)
    """Rows that the teacher sees at once in stage 1; batches never straddle blocks."""
    train: dict[str, Any] = {}
    """Overrides of the pipeline's `train` for `train-teacher`."""


class CacheConfig(Section):
    """Where and how the labels are kept."""

    path: str
    encoding: EncodingConfig = {"name": "dense", "dtype": "float16"}
    calibration: int = Field(default=10_000, ge=2)
    """Rows that the teacher is run on beforehand, for encodings that are fitted or chosen."""
    rows_per_block: int = Field(default=16_384, ge=1)
    outputs: dict[str, dict[str, Any]] = {}
    """What else of the teacher is kept: modules by name, each with an encoding; `logits` names another module's."""
    memory_budget_mb: float | None = Field(default=None, gt=0)
    """A view larger than this streams block by block in stage 2; none keeps every view resident."""
    card: Card = Card()
    """What the cache's README.md says of it beside what it knows itself."""

    @field_validator("outputs", mode="before")
    @classmethod
    def _known_outputs(cls, value: Any) -> Any:
        return outputs_config(value)


class TeachersConfig(Section):
    """Several teachers at once: caches over the same views, whose labels are put together for each batch."""

    caches: list[str] = Field(min_length=2)
    """Their paths or URLs; the first one's proofs are rendered."""
    combine: Literal["logits", "probabilities", "best"] = "logits"
    """The mean of the logits or of the probabilities, or each sample's best teacher by its true label."""
    weights: list[float] | None = None
    """How much each counts in a mean; all alike by default."""

    @model_validator(mode="after")
    def _weights_fit(self) -> TeachersConfig:
        if self.weights is not None and self.combine == "best":
            raise ValueError("'best' takes one teacher for each sample, so it takes no weights")
        if self.weights is not None and len(self.weights) != len(self.caches):
            raise ValueError(f"{len(self.weights)} weights for {len(self.caches)} caches; give one for each")
        return self


class StudentConfig(ModelConfig):
    """A student: its net, its loss, and what differs from the pipeline's `train`."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    loss: LossConfig = {"name": "kl"}
    labels: Literal["cache", "live"] | TeachersConfig = "cache"
    """Where the teacher's logits come from; "live" runs the teacher on every batch, to compare."""
    samples: float = Field(default=1.0, gt=0, le=1)
    """Fraction of the training samples, stratified by class, that this student sees."""
    sample_weights: dict[str, Any] = {"name": "none"}
    """What each sample's loss is multiplied by: by class size, or by what the teacher thinks of the sample."""
    sampler: Literal["none", "class_balanced"] = "none"
    """Which samples an epoch has: each once, or as many, every class equally often."""
    hints: list[dict[str, Any]] = []
    """What the student's modules learn of the cache's other outputs, beside `loss`."""
    init: dict[str, Any] | None = None
    """Which of the teacher's weights the student starts from."""
    train: dict[str, Any] = {}
    """Overrides of the pipeline's `train`."""

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
            raise ValueError("expected 'cache', 'live', or a mapping such as {caches: [a.cache, b.cache]}")
        return value

    @field_validator("sample_weights", mode="before")
    @classmethod
    def _known_weights(cls, value: Any) -> Any:
        return weights_config(weights_from_config(value))

    @field_validator("hints", mode="before")
    @classmethod
    def _known_hints(cls, value: Any) -> Any:
        return hints_config(value)

    @field_validator("init", mode="before")
    @classmethod
    def _known_init(cls, value: Any) -> Any:
        return None if value is None else initialisation_of(value).config(value)

    @model_validator(mode="after")
    def _fits_together(self) -> StudentConfig:
        if self.init is not None and self.weights is not None:
            raise ValueError("a student starts from `weights` or from its teacher (`init`); give one of the two")
        if self.hints and isinstance(self.labels, TeachersConfig):
            raise ValueError("only logits of several teachers are put together; `hints` take the labels of one cache")
        return self


class RunsConfig(Section):
    """Where runs leave their folders."""

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
    """A whole pipeline, as it was resolved."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    data: DataConfig
    views: ViewsConfig = ViewsConfig()
    teacher: TeacherConfig
    cache: CacheConfig
    train: TrainConfig = TrainConfig()
    students: list[StudentConfig] = []
    together: bool = False
    """Train all students on each rendered batch, where their batches are the same; each ends as it would alone."""
    runs: RunsConfig = RunsConfig()
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1", "mps"."""
    num_workers: int = Field(default=2, ge=0)
    """DataLoader workers; results don't depend on it."""
    threads: int | None = Field(default=None, ge=1)
    """Torch's CPU threads in the main process, all cores by default; rounding on the CPU depends on it."""

    @model_validator(mode="after")
    def _consistent(self) -> Pipeline:
        refuse_namesakes("students", [student.name for student in self.students])
        self.train_config(self.teacher)
        for student in self.students:
            self.train_config(student)
        return self

    def train_config(self, owner: TeacherConfig | StudentConfig) -> TrainConfig:
        """The training settings of one net: the pipeline's, with its own on top."""
        return overridden(self.train, owner.train)

    def encoding(self) -> Encoding | Auto:
        """The cache's encoding, or what it is to be chosen by."""
        return encoding_or_auto(self.cache.encoding)

    def student(self, name: str) -> StudentConfig:
        """A student by name.

        Raises:
            UsageError: no such student.
        """
        for student in self.students:
            if student.name == name:
                return student
        names = [student.name for student in self.students]
        raise UsageError(
            f"no student {name!r} in pipeline {self.name}{nearest(name, names)}; it has: {', '.join(names)}"
        )

    def loss(self, student: StudentConfig) -> Loss:
        """A student's loss."""
        return loss_from_config(student.loss)

    def as_yaml(self) -> str:
        """The resolved pipeline, every default written out."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def overridden(settings: TrainConfig, overrides: Mapping[str, Any]) -> TrainConfig:
    """Training settings with some of them changed.

    Raises:
        ValueError: an unknown key, or a bad value.
    """
    known = list(TrainConfig.model_fields)
    for key in overrides:
        if key not in known:
            raise ValueError(unknown_key(f"train.{key}", key, known))
    return TrainConfig.model_validate(settings.model_dump() | dict(overrides))


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read a pipeline file and lay overrides such as `cache.encoding.k=20` on top.

    Raises:
        UsageError: no such file, no YAML, an unknown key (the message names the nearest known one) or a bad value.
    """
    raw = read_raw(path, Pipeline, overrides)
    if "parties" in raw:
        raise UsageError(f"{path} has parties, so it is a federation's file: run `logitcache federate` on it")
    return parse_pipeline(raw, source=str(path))


def parse_pipeline(raw: Mapping[str, Any], *, source: str) -> Pipeline:
    """A pipeline from plain data.

    Raises:
        UsageError: every problem found, one a line, each with its key.
    """
    return parse(Pipeline, raw, source=source)
