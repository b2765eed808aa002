"""The largest tensor that a computation makes, forward and backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # A view, such as an expanded number, takes no memory.
        self.largest = max([self.largest, *(leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in made)])
        return result


def largest_tensor(compute: Callable[[], object]) -> int:
    """Elements of the largest tensor that any operation of `compute` returns; views count as what they view."""
    with _Watch() as watch:
        compute()
    return watch.largest


def watched(compute: Callable[[], Tensor]) -> int:
    """Likewise, with the gradients of the result."""
    return largest_tensor(lambda: torch.autograd.backward(compute().sum()))
