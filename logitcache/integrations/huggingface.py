"""Hugging Face: datasets as sources of samples, and a `Trainer` that distils from a cache."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from logitcache.cache.reader import RESIDENT_BYTES, LogitCache
from logitcache.catalog.audio import AudioReader
from logitcache.catalog.calling import logits_of
from logitcache.catalog.shards import HuggingFaceFiles
from logitcache.catalog.text import text_dataset
from logitcache.data.batching import NO_TARGET, Collate, collate, pad
from logitcache.data.packing import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, is_packed
from logitcache.data.rows import rows_of_dataset
from logitcache.data.sampler import ViewSampler
from logitcache.data.samples import Dataset
from logitcache.data.sequences import batch_rows, sequence_rows
from logitcache.data.tokens import CAUSAL
from logitcache.data.views import ViewDataset, ViewPlan
from logitcache.errors import UsageError
from logitcache.integrations.labels import CheckedLabels
from logitcache.losses import KLDivergence, Loss
from logitcache.losses.protocol import teacher_for
from logitcache.verify.fit import matched_views

try:
    from transformers import PreTrainedModel, Trainer, TrainerCallback, default_data_collator
    from transformers.trainer_utils import get_last_checkpoint
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
except ImportError as error:
    raise ImportError(f"logitcache.integrations.huggingface needs pip install 'logitcache[hf]' ({error})") from error

__all__ = ["DistillationTrainer", "audio_dataset", "image_dataset", "text_dataset"]

# B batch, C classes, L positions of the longest sequence, R rows of the batch

INDEX = "index"
"""The entry of a batch that names view and row of each sample, int64 (B,)."""
LABELS = "labels"


def image_dataset(split: Any, *, image: str = "image", label: str = "label", key: str | None = None) -> Dataset:
    """A split of a Hugging Face dataset with a column of images, as (RGB image, class number).

    Args:
        split: a `datasets.Dataset`.
        image: column of the images.
        label: column of the class numbers.
        key: column of the keys; by default a sample's key is its position.

    Raises:
        UsageError: no such column.
    """
    return HuggingFaceFiles(split, image, label, key)


def audio_dataset(
    split: Any,
    *,
    sample_rate: int,
    num_samples: int | None = None,
    audio: str = "audio",
    label: str = "label",
    key: str | None = None,
) -> Dataset:
    """A split of a Hugging Face dataset with a column of audio files, as (float32 (T,) in [-1, 1], class number).

    Args:
        split: a `datasets.Dataset`.
        sample_rate: in Hz; files with another rate are resampled by torchaudio, if it is installed.
        num_samples: T: longer clips are cut off, shorter ones end with silence; None leaves their lengths.
        audio: column of the audio files.
        label, key: as in `image_dataset`.

    Raises:
        UsageError: no such column.
    """
    return HuggingFaceFiles(
        split, audio, label, key, decode=AudioReader(sample_rate=sample_rate, num_samples=num_samples)
    )


class ViewCollator:
    """Makes batches for a model of `transformers`: its inputs, `labels`, and `index` for the lookup in the cache.

    Args:
        input_name: the model's argument for inputs that are no mapping, such as "pixel_values".
        function: builds a batch of inputs; by default mappings are padded and tensors are stacked.
        pad_token_id: of the model, which some models find the last token by.
        others: the collator of features that don't come from a `ViewDataset`, such as those of an evaluation.
    """

    def __init__(
        self,
        input_name: str,
        *,
        function: Collate | None = None,
        pad_token_id: int | None = None,
        others: Callable[[list[Any]], Any] = default_data_collator,
    ) -> None:
        self._input_name = input_name
        self._function = function
        self._pad_token_id = pad_token_id
        self._others = others

    def __call__(self, features: list[Any]) -> Any:
        """A batch of (index, input, target), or of the features that `others` takes."""
        if not isinstance(features[0], tuple):
            return self._others(features)
        function = self._function or (pad if isinstance(features[0][1], Mapping) else None)
        index, inputs, labels = collate(features, function)
        if not isinstance(inputs, Mapping):
            return {self._input_name: inputs, LABELS: labels, INDEX: index}
        inputs = dict(inputs)
        if is_packed(inputs):
            labels = _packed(labels, inputs[POSITION_IDS])
        elif self._pad_token_id is not None and ATTENTION_MASK in inputs:
            inputs[INPUT_IDS] = inputs[INPUT_IDS].masked_fill(inputs[ATTENTION_MASK] == 0, self._pad_token_id)
        return {**inputs, LABELS: labels, INDEX: index}


def _packed(labels_BL: Tensor, position_ids: Tensor) -> Tensor:
    """Labels of padded sequences at the places of a packed batch, int64 (P, L)."""
    starts_B = torch.nonzero(position_ids.flatten() == 0)[:, 0]
    sequences, positions = torch.nonzero(labels_BL != NO_TARGET, as_tuple=True)
    packed = torch.full((position_ids.numel(),), NO_TARGET)
    packed[starts_B[sequences] + positions] = labels_BL[sequences, positions]
    return packed.reshape(position_ids.shape)


class TokenLabels:
    """A dataset of token sequences with labels as causal models of `transformers` take them: one for each token.

    Item i is (inputs, labels int64 (L,)), where tokens that no row predicts have the label -100.

    Args:
        dataset: with rows, such as a `TokenDataset` for causal models; its targets are the true tokens of the rows.

    Raises:
        UsageError: a dataset for masked models.
    """

    def __init__(self, dataset: Any) -> None:
        if getattr(dataset, "task", CAUSAL) != CAUSAL:
            raise UsageError(
                f"the dataset's task is {dataset.task!r}; this trainer takes causal language models and classification"
            )
        self._dataset = dataset
        self._rows = rows_of_dataset(dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        inputs, target = self._dataset[index]
        rows = self._rows.sample_rows(index)
        labels = torch.full((len(inputs[INPUT_IDS]),), NO_TARGET)
        positions = self._rows.positions_of(np.arange(rows.start, rows.stop))
        labels[torch.from_numpy(positions.astype(np.int64)) + 1] = torch.as_tensor(target)
        return inputs, labels


def labelled(dataset: Dataset) -> Dataset:
    """The dataset, with `TokenLabels` if its samples are sequences with rows."""
    return dataset if rows_of_dataset(dataset).one_each else TokenLabels(dataset)


def _check_kinds(cache: Any, train_dataset: Any, loss: Any) -> None:
    """Raise UsageError for arguments of another kind, such as those of an ordinary `Trainer`."""
    if not isinstance(cache, LogitCache):
        raise UsageError(f"cache is {cache!r}; expected an open cache, logitcache.open(PATH)")
    if not (loss is None or isinstance(loss, Loss)):
        raise UsageError(
            f"loss is {loss!r}; expected a loss object, such as logitcache.losses.KLDivergence(temperature=2.0), or "
            "loss_from_config('kl')"
        )
    if train_dataset is None:
        raise UsageError("train_dataset is missing; expected the dataset of stage 1, with items (input, label)")
    if not hasattr(train_dataset, "__len__"):
        raise UsageError(
            f"train_dataset is a {type(train_dataset).__name__} without a length; expected a map-style dataset. "
            "Students of a stream are trained in a loop with logitcache.StreamViews"
        )
    if not hasattr(train_dataset, "column_names") and len(train_dataset) and isinstance(train_dataset[0], Mapping):
        raise UsageError(
            f"items of train_dataset are mappings with {', '.join(map(str, train_dataset[0]))}; expected pairs (input, "
            "label), as in stage 1. text_dataset(split, tokenizer) makes them of texts"
        )


def _without_effect() -> UsageError:
    return UsageError(
        "label_smoothing_factor and compute_loss_func have no effect on the loss of teacher and student; pass loss=, "
        "such as a Weighted sum with CrossEntropy(label_smoothing=0.1)"
    )


class _Resuming(TrainerCallback):  # type: ignore[misc]
    """Sets the sampler's epoch where training starts or resumes, and completes the weights that `Trainer` loads.

    `Trainer` sets the epoch before each epoch, but its call does not reach the sampler of a loader that skips batches
    in several processes.
    """

    def __init__(self, trainer: Distillation, sampler: ViewSampler) -> None:
        self._trainer = trainer
        self._sampler = sampler
        self.checkpoint: str | None = None
        """That training resumes from."""

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        steps = max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
        self._sampler.set_epoch(state.global_step // steps)
        self._trainer.load_other_names(self.checkpoint)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.load_other_names(state.best_model_checkpoint if args.load_best_model_at_end else None)


def _stored_names(checkpoint: Path) -> set[str]:
    """The names of the weights in a checkpoint; none where they are not a model's, such as those of an adapter."""
    index, file = checkpoint / SAFE_WEIGHTS_INDEX_NAME, checkpoint / SAFE_WEIGHTS_NAME
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not file.is_file():
        return set()
    with safe_open(str(file), framework="pt") as weights:
        return set(weights.keys())


class Distillation:
    """What `DistillationTrainer` adds to a `Trainer`; also for subclasses of `Trainer`, as their first base class."""

    args: Any
    model: Any
    state: Any
    accelerator: Any
    data_collator: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    compute_loss_func: Any

    def __init__(
        self,
        *arguments: Any,
        cache: LogitCache,
        train_dataset: Dataset,
        loss: Loss | None = None,
        plan: ViewPlan | None = None,
        preprocess: Callable[[Any], Any] | None = None,
        eval_dataset: Any = None,
        memory_budget: int = RESIDENT_BYTES,
        **options: Any,
    ) -> None:
        _check_kinds(cache, train_dataset, loss)
        if hasattr(train_dataset, "column_names"):
            raise UsageError(
                f"the training data has the columns {', '.join(train_dataset.column_names)}; expected items (input, "
                "label), as image_dataset(split), audio_dataset(split) or text_dataset(split, tokenizer) make them"
            )
        given = options.get("args", arguments[1] if len(arguments) > 1 else None)
        if getattr(given, "label_smoothing_factor", 0):  # `Trainer` itself fails on it with modules that have no config
            raise _without_effect()
        views = matched_views(cache, train_dataset, plan, preprocess=preprocess)
        self._views = ViewDataset(labelled(views.dataset), views.plan, preprocess=views.preprocess, rows=views.rows)
        self._rows = sequence_rows(self._views)
        self._takes_mapping = isinstance(self._views[(cache.views.start, 0)][1], Mapping)
        self._cache = cache
        self._labels = CheckedLabels(cache, self._views, memory_budget=memory_budget)
        self._loss = KLDivergence() if loss is None else loss
        super().__init__(  # type: ignore[call-arg]
            *arguments,
            train_dataset=self._dataset_for_setup(),
            eval_dataset=self._for_evaluation(eval_dataset),
            **options,
        )
        self._check_arguments()
        self.train_dataset = self._views
        self._input_name = _input_name(self.model)
        self.data_collator = ViewCollator(
            self._input_name,
            function=self._views.plan.collate,
            pad_token_id=getattr(getattr(self.model, "config", None), "pad_token_id", None),
            others=self.data_collator,
        )
        self._sampler = ViewSampler(
            self._views,
            cycle=cache.views,
            shuffle=self.args.train_sampling_strategy == "random",
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            num_replicas=1,  # accelerate divides the batches between the processes
            rank=0,
        )
        self._resuming = _Resuming(self, self._sampler)
        self.add_callback(self._resuming)  # type: ignore[attr-defined]

    def _check_arguments(self) -> None:
        if self.args.n_gpu > 1:
            raise UsageError(
                f"{self.args.n_gpu} GPUs are visible to one process, and Trainer would divide each batch between them; "
                "start one process for each GPU with torchrun or `accelerate launch`, or set CUDA_VISIBLE_DEVICES"
            )
        if self.args.train_sampling_strategy not in ("random", "sequential"):
            raise UsageError(
                f"train_sampling_strategy is {self.args.train_sampling_strategy!r}; expected 'random' or 'sequential', "
                "because a sampler of views chooses the samples"
            )
        if self.compute_loss_func is not None:
            raise _without_effect()

    def _dataset_for_setup(self) -> Any:
        """The training dataset that `__init__` of the other base class gets."""
        return self._views

    def _for_evaluation(self, dataset: Any) -> Any:
        """A dataset of (input, label) without augmentation; other datasets as they are."""
        if isinstance(dataset, dict):
            return {name: self._for_evaluation(part) for name, part in dataset.items()}
        is_other = dataset is None or isinstance(dataset, str | ViewDataset) or hasattr(dataset, "column_names")
        if is_other or not hasattr(dataset, "__len__") or not isinstance(dataset[0], tuple):
            return dataset
        return ViewDataset(labelled(dataset), ViewPlan(preprocess=self._views.preprocess))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The loader of an evaluation; `eval_dataset` may also be a dataset of (input, label)."""
        return super().get_eval_dataloader(self._for_evaluation(eval_dataset))  # type: ignore[misc]

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The loader of a prediction; `test_dataset` may also be a dataset of (input, label)."""
        return super().get_test_dataloader(self._for_evaluation(test_dataset))  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> ViewSampler:
        # TRL's trainers override this method too. `get_train_dataloader` has no argument for a sampler.
        return self._sampler

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> Any:
        """As `Trainer.train`, also from a checkpoint whose weights have other names than those of the model."""
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        self.load_other_names(checkpoint)  # before the optimizer's state is loaded: refuses another model
        self._resuming.checkpoint = checkpoint
        return super().train(resume_from_checkpoint, *arguments, **options)  # type: ignore[misc]

    def load_other_names(self, checkpoint: str | None) -> None:
        """Load weights that a checkpoint has under other names than the model.

        transformers saves the layers of some models, such as ViT, under older names. Its Trainer does not convert them
        back: it logs a warning, and continues with weights that were never trained.

        Raises:
            UsageError: the checkpoint is that of another model.
        """
        of_engine = self.is_deepspeed_enabled or self.is_fsdp_enabled  # which loads its own files
        if checkpoint is None or of_engine or not isinstance(self.model, PreTrainedModel):
            return
        stored = _stored_names(Path(checkpoint))
        if not stored or stored == set(self.model.state_dict()):
            return
        kind, config = type(self.model), self.model.config
        loaded, found = kind.from_pretrained(checkpoint, config=config, output_loading_info=True)
        if found["missing_keys"] or found["unexpected_keys"]:
            raise UsageError(
                f"the weights in {checkpoint} are those of another model: missing are {sorted(found['missing_keys'])}, "
                f"unknown {sorted(found['unexpected_keys'])}"
            )
        self.model.load_state_dict(loaded.state_dict())

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch: of student and teacher in training, the model's own in an evaluation."""
        inputs = dict(inputs)
        index = inputs.pop(INDEX, None)
        if index is None or not model.training:
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        labels, index = inputs.pop(LABELS), index.cpu()
        self._labels.check_batch(index, inputs if self._takes_mapping else inputs[self._input_name])
        outputs = model(**inputs)
        loss_R = self._losses(index, inputs, logits_of(outputs), labels)
        count = len(loss_R) if num_items_in_batch is None else num_items_in_batch
        loss = loss_R.sum() / torch.as_tensor(count).clamp(min=1)  # a tensor that stays on its device
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # it is the number of all processes; gradients are averaged
        return (loss, outputs) if return_outputs else loss

    def _losses(self, index: Tensor, inputs: Mapping[str, Any], student: Tensor, labels: Tensor) -> Tensor:
        """The loss of each row of a batch, (R,)."""
        num_classes = self._cache.num_classes
        if student.shape[-1] != num_classes:
            raise UsageError(
                f"the model has {student.shape[-1]} classes, the cache {num_classes}; create the model with "
                f"num_labels={num_classes}, or a language model with vocab_size={num_classes}"
            )
        loss = self._loss.at(min(1.0, self.state.global_step / max(1, self.state.max_steps)))
        if self._rows is None:
            return loss(student, self._teacher(loss, index), labels)
        of_batch = batch_rows(index, self._rows, inputs, student)
        is_row_BL = of_batch.index >= 0
        if not is_row_BL.any():  # sequences of one token
            return of_batch.of_output(student).sum(dim=1)
        next_BL = F.pad(labels[:, 1:], (0, 1), value=NO_TARGET)
        teacher = self._teacher(loss, of_batch.index[is_row_BL])
        return loss(of_batch.of_output(student), teacher, next_BL[is_row_BL.to(labels.device)])

    def _teacher(self, loss: Loss, index: Tensor) -> Any:
        """The teacher's distributions of rows, (R, C), as the loss takes them."""
        return teacher_for(loss, self._labels.targets(index, self.args.device)) if loss.needs_teacher else None


def _input_name(model: Any) -> str:
    """The argument of a model for its input."""
    name = getattr(model, "main_input_name", None)
    return name if isinstance(name, str) else next(iter(inspect.signature(model.forward).parameters))


class DistillationTrainer(Distillation, Trainer):  # type: ignore[misc]
    """A `Trainer` whose loss compares student and cached teacher.

    ```python
    trainer = DistillationTrainer(
        model, args, train_dataset=dataset, cache=cache, plan=plan, loss=losses.KLDivergence(temperature=2.0)
    )
    ```

    Before the first step, samples, labels, tokens and view plan are compared with the cache; each epoch has one of the
    cached views. A run that resumes, also within an epoch, continues with the same samples and views. Evaluations use
    the model's own loss on the labels.

    Args:
        arguments: of `Trainer`: model, args.
        cache: sealed.
        train_dataset: map-style, with items (input, label), as in stage 1; or a `ViewDataset` of it.
        loss: by default KL divergence at T = 1. It is divided by the number of labels, as in `Trainer`.
        plan: the view plan; by default `cache.view_plan`.
        preprocess: the student's deterministic preprocessing; by default the teacher's.
        eval_dataset: as in `Trainer`; or map-style with items (input, label), which are not augmented.
        memory_budget: bytes of encoded labels to keep in memory; larger views are streamed.
        options: of `Trainer`.

    Raises:
        IdentityMismatch: the dataset or the plan is not that of the cache; names the first difference.
        IncompleteCache: the cache is not sealed.
        UsageError: the cache has no recorded plan, and none is given; or an option of `Trainer` that can't be used.
    """
