"""The interface of an encoding: the arrays that it writes, and how logits become arrays and back."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from logitcache.arrays import ArraySpec
from logitcache.errors import UsageError
from logitcache.registry import parameters
from logitcache.targets import DenseTargets, Targets

P = ParamSpec("P")
Result = TypeVar("Result")

# B batch, C classes, K entries of a row, M calibration rows


class Encoding(ABC):
    """A frozen configuration that turns (B, C) logits into named arrays and back.

    Subclass it to add an encoding of your own: a dataclass whose fields survive JSON, with `name`, `arrays`, `encode`
    and `decode`. Each row is encoded independently of the others in its batch. Decoded logits may be off by a constant
    per row. For example, in `my_package.py`:

    ```python
    from collections.abc import Mapping
    from dataclasses import dataclass
    from typing import ClassVar

    import torch
    from torch import Tensor

    from logitcache import ArraySpec, Encoding


    @dataclass(frozen=True, kw_only=True)
    class Grid(Encoding):
        # Every logit as a number of equal steps below its row's largest logit.

        name: ClassVar[str] = "grid"
        holds_masks: ClassVar[bool] = False

        step: float = 0.01

        def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
            return {"steps": ArraySpec(dtype="uint16", row_shape=(num_classes,))}

        def encode(self, logits_BC: Tensor, *, view: int = 0, start: int = 0) -> dict[str, Tensor]:
            below_max_BC = logits_BC.amax(dim=1, keepdim=True) - logits_BC
            return {"steps": (below_max_BC / self.step).round().clamp(max=65_535).to(torch.uint16)}

        def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
            return encoded["steps"].float() * -self.step
    ```

    Offer it under its `name` with an entry point in the package's `pyproject.toml`. Pipelines, `create` and the readers
    of caches then find it wherever the package is installed:

    ```toml
    [project.entry-points."logitcache.encodings"]
    grid = "my_package:Grid"
    ```

    A cache records the package and its version. Keep `decode` compatible with every version that has written caches,
    and choose a name that no other package uses. `logitcache.testing.EncodingContract` tests all of this.
    """

    name: ClassVar[str]
    """Its name in manifests and pipelines: the name of the class in lower case."""
    fitted_arrays: ClassVar[Mapping[str, int]] = {}
    """Arrays that `fit` determines, stored once per cache: name -> number of dimensions."""
    holds_masks: ClassVar[bool] = True
    """Whether a logit may be -inf."""
    masked_arrays: ClassVar[tuple[str, ...]] = ()
    """Float arrays that may contain -inf, for classes that are masked or left out; all other arrays are finite."""
    keeps_constants: ClassVar[bool] = False
    """Whether decoding also restores a constant per row: outputs such as features need it, logits don't."""
    largest: ClassVar[float] = math.inf
    """The largest magnitude of a value that can be encoded."""

    @abstractmethod
    def arrays(self, num_classes: int) -> dict[str, ArraySpec]:
        """The arrays that `encode` returns for this many classes, by name.

        A name has lowercase letters only. A row is a number or one-dimensional, of uint8, uint16, uint32, int8, int64,
        float16 or float32.

        Raises:
            UsageError: the encoding does not support this many classes.
        """

    def rows_at_once(self, num_classes: int) -> int:
        """Consecutive rows that the writer encodes at once on a CPU, at least 1; 4 MB of them by default.

        Enough to amortize small operations, few enough for the processor's cache. Stored values can depend on it by
        rounding.
        """
        return max(1, 2**20 // num_classes)

    @abstractmethod
    def encode(self, logits_BC: Tensor, *, view: int = 0, start: int = 0) -> dict[str, Tensor]:
        """Encode float32 (B, C) logits on their device; -inf marks a masked class.

        Each returned tensor is (B, *row_shape), of the dtype that `arrays` states.

        Args:
            logits_BC: consecutive rows of one view.
            view: the view's number, and
            start: the first row's number: seeds for encodings that draw random numbers.
        """

    def encode_with_kl(
        self, logits_BC: Tensor, *, view: int = 0, start: int = 0
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What `encode` returns, and KL(teacher ‖ decoded) of each row in nats, float32 (B,).

        The divergence is None where an encoding has no faster way than to decode the rows; on a CPU it can also be NaN
        in some rows.
        """
        return self.encode(logits_BC, view=view, start=start), None

    @abstractmethod
    def decode(self, encoded: Mapping[str, Tensor], num_classes: int) -> Tensor:
        """Float32 (B, C) logits, correct up to a constant per row, on the arrays' device."""

    def targets(self, encoded: Mapping[str, Tensor], num_classes: int) -> Targets:
        """The rows in the form that losses consume; `dense()` of it equals `decode` up to a constant per row.

        An encoding of few numbers per row overrides it, so that losses never expand a row to all classes.
        """
        return DenseTargets(self.decode(encoded, num_classes))

    def encode_sparse(
        self, ids_BK: Tensor, log_probs_BK: Tensor, num_classes: int, *, start: int = 0
    ) -> dict[str, Tensor]:
        """Encode rows of which only some log-probabilities are known, such as those of a serving engine.

        Args:
            ids_BK: int (B, K): classes, in any order; -1 marks an unused entry.
            log_probs_BK: float (B, K): their log-probabilities at T = 1.
            num_classes: all classes; what the entries lack of a mass of 1 belongs to those without one.
            start: the first row's number, for messages.

        Raises:
            UsageError: the encoding needs the logits of all classes.
            InvalidLogits: a row is not part of a distribution.
        """
        del ids_BK, log_probs_BK, num_classes, start
        raise UsageError(
            f"{type(self).__name__} needs the logits of all classes; entries of some classes can be stored with TopK "
            "or PackedTopK"
        )

    def refused(self, logits_BC: Tensor) -> Tensor:
        """Which rows are not distributions, or can't be encoded, bool (B,)."""
        # A row's largest logit is NaN, +inf or -inf exactly where the row is not a distribution.
        refused_B = ~torch.isfinite(logits_BC.amax(dim=1))
        return refused_B if self.holds_masks else refused_B | ~torch.isfinite(logits_BC.amin(dim=1))

    def accepts(self, name: str, values: Tensor) -> bool:
        """Whether stored rows, (rows, *row_shape), decode to logits without NaN, +inf or rows of only -inf."""
        if not values.is_floating_point() or not values.numel():
            return True
        # NaN is both the largest and the smallest of its row; `isfinite` on every value would take ten times as long.
        if name not in self.masked_arrays:
            return all(map(math.isfinite, map(float, values.aminmax())))
        if values.ndim == 1:  # one number for several classes, all of which may be masked
            return float(values.amax()) < math.inf
        return bool(torch.isfinite(values.amax(dim=1)).all())

    def fit(self, calibration: Any) -> Encoding:
        """The same encoding, fitted to a sample of the teacher's logits; itself if it needs no fit.

        Args:
            calibration: (M, C) floats that can be sliced by row: a tensor, an array or a memory map.

        Raises:
            UsageError: too few rows.
        """
        del calibration
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether it can encode and decode without `fit`."""
        return True

    def fitted_values(self) -> dict[str, np.ndarray]:
        """The arrays that `fitted_arrays` names."""
        return {}

    def with_fitted(self, arrays: Mapping[str, np.ndarray]) -> Encoding:
        """The same encoding with fitted arrays that were read from a cache."""
        del arrays
        return self

    def config(self) -> dict[str, Any]:
        """Name and parameters as a JSON object, which `encoding_from_config` reads."""
        return {"name": self.name, **{name: getattr(self, name) for name in parameters(type(self))}}


def smallest_id_dtype(num_classes: int) -> str:
    """The smallest unsigned integer type for class ids."""
    return "uint8" if num_classes <= 2**8 else "uint16" if num_classes <= 2**16 else "uint32"


def float_tensor(logits: Any) -> Tensor:
    """A tensor, an array or a slice of a memory map as a float32 tensor on the CPU."""
    if isinstance(logits, Tensor):
        return logits.detach().float().cpu()
    return torch.from_numpy(np.array(logits, dtype=np.float32))  # a copy: a memory map may be read-only


def full_precision(method: Callable[P, Result]) -> Callable[P, Result]:
    """Disable autocast in a method: its matrix products keep full precision."""

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Result:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return method(*args, **kwargs)

    return wrapped
