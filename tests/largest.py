"""The largest tensor that a computation makes, forward and backward."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *made])
        return result


def largest_tensor(compute: Callable[[], object]) -> int:
    """Elements of the largest tensor that any operation of `compute` returns, views included."""
    with _Watch() as watch:
        compute()
    return watch.largest
