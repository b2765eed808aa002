"""What an importer provides: the shape of another tool's cache, and its rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from logitcache.cache.outputs import Output
from logitcache.errors import UsageError

# B batch, C classes, K entries, N samples

ROWS_AT_ONCE = 4096
"""Rows that importers yield at once, at most."""


@dataclass(frozen=True)
class DenseRows:
    """Logits of consecutive rows of one view."""

    view: int
    start: int
    """Number of the first row."""
    logits: np.ndarray
    """Float (B, C); (B, 0) where the tool stores only outputs."""
    file: Path | Sequence[Path]
    """Where they come from, for messages: one file, or one for each row."""
    parameters: np.ndarray | None = None
    """What is stored of the views, float (B, D), if the importer states `recorded`."""
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Float (B, *shape) of each of the importer's `outputs`."""


@dataclass(frozen=True)
class SparseRows:
    """Some log-probabilities of consecutive rows of one view."""

    view: int
    start: int
    """Number of the first row."""
    ids: np.ndarray
    """Classes, int (B, K); -1 marks an unused entry."""
    log_probs: np.ndarray
    """Float (B, K). What a row lacks of a mass of 1 belongs to the other classes, evenly."""
    file: Path | Sequence[Path]
    """Where they come from, for messages: one file, or one for each row."""
    parameters: np.ndarray | None = None
    """What is stored of the views, float (B, D), if the importer states `recorded`."""


@dataclass(frozen=True)
class ViewParameters:
    """What is stored of consecutive samples of one view."""

    view: int
    start: int
    """Number of the first sample."""
    values: np.ndarray
    """Float (B, D)."""
    files: Sequence[Path]
    """Where each comes from, for messages."""


@dataclass(frozen=True)
class RecordedViews:
    """What a format stores of each view of each sample, from which students render it."""

    columns: tuple[str, ...]
    """Names of the D numbers. A seed has two columns, `seed_high` and `seed_low`, of 16 bits each."""
    replay: Mapping[str, Any] | None
    """What renders a view from them, as `{name: parameters}`; None if the format lacks the transform."""
    preprocess: Any = None
    """Specification of the teacher's preprocessing, if the format states it."""


class Importer(ABC):
    """A cache in another tool's format.

    Making one reads the shape and no labels. An installed package adds a format with an entry point in the group
    `logitcache.importers`: a subclass of this class, whose `name` is the entry point's.

    Args:
        source: the file or folder to import.
        num_classes: all classes of the teacher, where the caller states them.

    Raises:
        UsageError: the source is not of this format, or lacks what the caller must state.
        InvalidSource: a file is damaged.
    """

    name: ClassVar[str]
    """As on the command line."""
    tool: ClassVar[str]
    """The tool that writes the format, for the card."""

    num_classes: int
    num_samples: int
    num_views: int = 1
    k: int | None = None
    """The most entries of a row; None if rows are dense."""
    dtype: str = "float32"
    """Of the stored values: "float32" unless the source has less precision."""
    rows_per_sample: np.ndarray | None = None
    """int (N,); None is one row per sample."""
    keys: Sequence[str] | None = None
    """One key per sample in row order; None if the format names samples by position, or not at all."""
    contents: np.ndarray | None = None
    """Digests of the samples' token ids, uint8 (N, 16); None if the format stores no inputs."""
    excess: float = 1e-2
    """By how much the probabilities of a row may exceed 1, from rounding or a lossy codec; such rows are normalized."""
    rows_per_block: int | None = None
    """The most rows of a block; None for the default."""
    outputs: Mapping[str, Output] = {}
    """Outputs beside the logits, such as hidden states; dense rows then have them."""
    takes_head: ClassVar[bool] = False
    """Whether the files need the teacher's head, which is then the argument `head`."""
    recorded: RecordedViews | None = None
    """The views, if the format stores what renders them. `batches` then yields `parameters` too."""
    files: Sequence[Path]
    """All files that are read."""

    def __init__(self, source: Path, *, num_classes: int | None = None) -> None:
        if not source.exists():
            raise UsageError(f"{source} does not exist; `import` reads local files and folders")
        self.source = source
        if num_classes is not None:
            self.num_classes = num_classes
        self.missing: dict[str, str] = {}
        """What the format lacks: "view", "identity", "tail" or "normaliser", and the consequence."""
        self.notes: dict[str, Any] = {}
        """Facts that the format states, as JSON."""

    @abstractmethod
    def batches(self) -> Iterator[DenseRows | SparseRows]:
        """All rows of all views, in any order.

        Raises:
            InvalidSource: a file is damaged.
        """

    def parameters(self) -> Iterator[ViewParameters]:
        """What is stored of the views, without labels, in the order of rows within each view; see `recorded`.

        Raises:
            InvalidSource: a file is damaged.
        """
        for batch in self.batches():
            assert batch.parameters is not None, "an importer with `recorded` yields parameters"
            files = [batch.file] * len(batch.parameters) if isinstance(batch.file, Path) else batch.file
            yield ViewParameters(batch.view, batch.start, batch.parameters, files)

    def details(self) -> dict[str, np.ndarray]:
        """What the format stores of each sample and view beside labels, such as seeds or crop boxes; by name."""
        return {}

    def select(self, order: np.ndarray) -> None:
        """Keep only some samples, in this order; called before rows are read, if the format has keys.

        Args:
            order: for each sample of the cache its number in the source, int (N,).

        Raises:
            UsageError: the format has no keys.
        """
        raise UsageError(f"{self.tool} files do not name their samples, so they can't be matched with a dataset's keys")

    def require_classes(self, hint: str = "") -> None:
        """Refuse to guess the number of classes.

        Raises:
            UsageError: the caller did not state it.
        """
        if not hasattr(self, "num_classes"):
            raise UsageError(
                f"{self.tool} files do not state the number of classes; add --num-classes (num_classes=), the "
                f"size of the teacher's output{hint}"
            )


NO_VIEW = "not stored; the cache has no view plan, and the labels belong to the inputs that the tool itself renders"
NO_IDENTITY = "teacher and dataset are not stored; the names are those given at import"
TAIL_KNOWN = "not stored; it is what the stored probabilities lack of 1, spread evenly over the other classes"
