"""TRL: an `SFTTrainer` that distils from a cache."""

from __future__ import annotations

from typing import Any

from logitcache.errors import UsageError
from logitcache.integrations.huggingface import Distillation

try:
    from datasets import Dataset
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError(f"logitcache.integrations.trl needs pip install 'logitcache[trl]' ({error})") from error

__all__ = ["DistillationSFTTrainer"]


class DistillationSFTTrainer(Distillation, SFTTrainer):  # type: ignore[misc]
    """TRL's `SFTTrainer` with the loss of `DistillationTrainer`, which has the same arguments.

    `train_dataset` is a dataset of token sequences, such as a `TokenDataset`; TRL does not tokenize it. `eval_dataset`
    is a `datasets.Dataset`, which TRL prepares. The training metrics that TRL adds (`entropy`, `mean_token_accuracy`,
    `num_tokens`) are not logged.

    Raises:
        IdentityMismatch, IncompleteCache: as `DistillationTrainer`.
        UsageError: as `DistillationTrainer`; or `packing` or `padding_free`, for which the plan has `collate`.
    """

    def _dataset_for_setup(self) -> Any:
        # SFTTrainer takes a `datasets.Dataset` only, and looks at its columns and its first sample.
        inputs, labels = self._views.dataset[0]
        return Dataset.from_list([{"input_ids": inputs["input_ids"].tolist(), "labels": labels.tolist()}])

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.args.packing or self.args.padding_free:
            raise UsageError(
                "packing and padding_free form sequences that the cache doesn't have; leave them out, and pack batches "
                "with a plan whose `collate` is `logitcache.data.packing.pack`"
            )
