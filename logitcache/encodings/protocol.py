"""What every encoding owes: the shapes it writes, and a way there and back."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

# B batch, C classes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One array of an encoding: what is stored for a row."""

    dtype: str
    """NumPy name, such as "float16" or "uint16"."""
    row_shape: tuple[int, ...]
    """Shape of a single row's entry; () for one number a row."""


class Encoding(ABC):
    """A frozen configuration that turns (B, C) logits into named arrays and back.

    Implementations are dataclasses whose fields survive JSON. Rows are encoded independently of each other, so
    how rows are grouped into batches and blocks never shows in what is stored.
    """

    name: ClassVar[str]
    """Its name in manifests and pipelines."""

    @abstractmethod
    def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
        """The arrays that `encode` returns for this many classes.

        Raises:
            UsageError: the encoding can't hold this many classes.
        """

    @abstractmethod
    def encode(self, logits_BC: Tensor) -> dict[str, Tensor]:
        """Encode float32 (B, C) logits on their own device; -inf stands for a masked class.

        Each returned tensor is (B, *row_shape) of the dtype that `arrays` names.
        """

    @abstractmethod
    def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
        """Float32 (B, C) logits, right up to a constant per row, on the arrays' device."""

    def config(self) -> dict[str, Any]:
        """The JSON object that `encoding_from_config` reads back."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"name": self.name, **fields}
