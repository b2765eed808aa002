"""Random changes of token ids, as steps of `views.transform`.

Both draw from the global NumPy generator, which `ViewDataset` seeds for each view and row, so a view of a text is a
pure function of its token ids, the view seed, the view and the row. They keep the length: every view has the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.errors import UsageError

# L length

INPUT_IDS = "input_ids"
SELECTED = "selected_tokens"
"""Of a masked text: which tokens were selected, bool (L,). `ViewDataset` removes it and hides the targets of others."""


class TokenDropout:
    """Replaces a random part of the tokens by one token (Bowman et al. 2016, arXiv:1511.06349, section 3.1).

    Args:
        p: probability of each token to be replaced.
        token_id: the replacement, such as the tokenizer's unknown, padding or mask token.
        special_ids: ids that are kept.
    """

    def __init__(self, *, p: float, token_id: int, special_ids: Sequence[int] = ()) -> None:
        _check_probability("p", p)
        self.p = p
        self.token_id = token_id
        self.special_ids = list(special_ids)

    def __call__(self, value: Any) -> dict[str, Any]:
        inputs, ids = _token_ids(value)
        dropped = (np.random.random_sample(len(ids)) < self.p) & ~np.isin(ids, self.special_ids)
        return inputs | {INPUT_IDS: torch.from_numpy(np.where(dropped, self.token_id, ids))}


class TokenMasking:
    """Selects a random part of the tokens, and masks most of them (BERT: Devlin et al. 2019, arXiv:1810.04805, 3.1).

    Args:
        p: probability of each token to be selected.
        mask_id: id of the mask token.
        vocab_size: random replacements are drawn from the ids below it.
        special_ids: ids that are kept and never drawn.
        masked: share of the selected tokens that become the mask token.
        random: share of them that become a random token; the others stay.
    """

    def __init__(
        self,
        *,
        p: float = 0.15,
        mask_id: int,
        vocab_size: int,
        special_ids: Sequence[int] = (),
        masked: float = 0.8,
        random: float = 0.1,
    ) -> None:
        for name, share in (("p", p), ("masked", masked), ("random", random), ("masked + random", masked + random)):
            _check_probability(name, share)
        if not 0 <= mask_id < vocab_size:
            raise UsageError(f"mask_id is {mask_id}, beyond a vocabulary of {vocab_size} (0 to {vocab_size - 1})")
        self.p = p
        self.mask_id = mask_id
        self.masked = masked
        self.random = random
        self.special_ids = list(special_ids)
        self._ordinary = np.setdiff1d(np.arange(vocab_size), [*self.special_ids, mask_id])

    def __call__(self, value: Any) -> dict[str, Any]:
        inputs, ids = _token_ids(value)
        # Three numbers for each token, whatever is done with them, so that a token's fate depends on its position only.
        selects, decides, draws = np.random.random_sample((3, len(ids)))
        selected = (selects < self.p) & ~np.isin(ids, self.special_ids)
        replacements = self._ordinary[(draws * len(self._ordinary)).astype(np.int64)]
        changed = np.where(selected & (decides < self.masked), self.mask_id, ids)
        at_random = selected & (decides >= self.masked) & (decides < self.masked + self.random)
        changed = np.where(at_random, replacements, changed)
        selected |= np.asarray(inputs.get(SELECTED, False))  # by an earlier step
        return inputs | {INPUT_IDS: torch.from_numpy(changed), SELECTED: torch.from_numpy(selected)}


TEXT_VIEWS = {"token_dropout": TokenDropout, "token_masking": TokenMasking}


def complete_spec(spec: Any, dataset: Any) -> Any:
    """A transform's specification in which text views have the ids of a dataset's tokenizer that they leave out.

    Args:
        spec: in its normal form: a list of {name: parameters}.
        dataset: its `special_ids`, `mask_id` and `vocab_size` are used.

    Raises:
        UsageError: `mask_id` is left out, and the tokenizer has no mask token.
    """
    return [_completed(step, dataset) for step in spec]


def _completed(step: Mapping[str, Any], dataset: Any) -> dict[str, Any]:
    name, given = next(iter(step.items()))
    if name not in TEXT_VIEWS or not hasattr(dataset, "special_ids"):
        return dict(step)
    known: dict[str, Any] = {"special_ids": [int(token) for token in dataset.special_ids]}
    if name == "token_masking":
        known |= {"mask_id": dataset.mask_id, "vocab_size": dataset.vocab_size}
        if dataset.mask_id is None and "mask_id" not in given:
            raise UsageError("token_masking: the tokenizer has no mask token; set `mask_id`, or use token_dropout")
    return {name: known | dict(given)}


def _token_ids(value: Any) -> tuple[dict[str, Any], np.ndarray]:
    ids = value.get(INPUT_IDS) if isinstance(value, Mapping) else None
    if ids is None:
        raise UsageError(f"text views change a mapping with 'input_ids', not a {type(value).__name__}")
    array = ids.numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(f"'input_ids' must be integers (L,), found {array.dtype} {array.shape}")
    assert isinstance(value, Mapping)
    return dict(value), array.astype(np.int64)


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UsageError(f"{name} is {value}; expected 0 to 1")
