"""The largest values of rows with many classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# B rows, C classes, K largest, G groups of classes, W classes of a group

MANY_CLASSES = 8192
"""From this number of classes on, rows are searched in groups."""
GROUP = 32
"""Classes of a group: short enough that few candidates remain, long enough that there are few groups."""


def largest(values_BC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row and their classes, (B, K) each, largest first, as `torch.topk`.

    On a CPU, `topk` copies each row. With many classes it is faster to find the k groups of classes with the largest
    maxima, which contain the k largest values, and to search only these.
    """
    num_classes = values_BC.shape[1]
    num_groups = num_classes // GROUP
    if values_BC.device.type != "cpu" or num_classes < MANY_CLASSES or k > num_groups // 4:
        return values_BC.topk(k, dim=1, sorted=True)
    in_groups = num_groups * GROUP
    groups_BGW = values_BC[:, :in_groups].reshape(-1, num_groups, GROUP)
    groups_BK = groups_BGW.amax(dim=2).topk(k, dim=1, sorted=False).indices
    row_starts_B1 = torch.arange(len(values_BC))[:, None] * num_groups
    found_BX = groups_BGW.flatten(0, 1).index_select(0, (row_starts_B1 + groups_BK).flatten()).view(-1, k * GROUP)
    if in_groups == num_classes:
        largest_BK, places_BK = found_BX.topk(k, dim=1, sorted=True)
    else:  # the classes that are in no group form a last one
        groups_BK = F.pad(groups_BK, (0, 1), value=num_groups)
        largest_BK, places_BK = torch.cat([found_BX, values_BC[:, in_groups:]], dim=1).topk(k, dim=1, sorted=True)
    return largest_BK, groups_BK.gather(1, places_BK // GROUP).mul_(GROUP).add_(places_BK % GROUP)
