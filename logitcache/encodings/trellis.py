"""Trellis-coded quantization with adaptive frequencies.

Whether a value is even or odd follows from the numbers before it. So each value is coarse, but the search has a choice
among many paths, and finds better values at the same number of bits. How large the values before it were determines the
frequencies with which a number is coded.

Sources: Marcellin and Fischer 1990, "Trellis coded quantization of memoryless and Gauss-Markov sources"; Ungerboeck
1982, "Channel coding with multilevel/phase signals", table I, for the trellis of eight states; Joshi, Crump and
Fischer 1995, "Image subband coding using arithmetic coded trellis coded quantization", for frequencies by state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# B rows, R numbers of a row, S states, K numbers, G tables, L activity levels

STATES = 8
FEEDBACK, INPUT = 0b101, 0b010
"""How parity of a value and of its number change the state: the octal numbers 13 and 04, without their last digit."""
DECAY, UNIT = 5, 8
"""Activity forgets one part in 2 ** DECAY for each number, and grows by UNIT times the magnitude of its value."""


def value(number: Tensor, state: Tensor) -> Tensor:
    """The value of a number: even or odd, as the state demands."""
    return 2 * number + (state & 1)


def next_state(state: Tensor, number: Tensor) -> Tensor:
    """The state after a number."""
    return (state >> 1) ^ ((state & 1) * FEEDBACK) ^ ((number & 1) * INPUT)


def next_activity(activity: Tensor, value: Tensor) -> Tensor:
    """How large recent values were, a whole number."""
    return activity - (activity >> DECAY) + UNIT * value.abs()


@dataclass(frozen=True, kw_only=True, eq=False)
class Frequencies:
    """What determines the table of frequencies of a number, on a device."""

    tables: Tensor
    """int64 (R,): the first of the tables of each number."""
    thresholds: Tensor
    """int64 (R, L): activity above each moves a number to the next table."""
    start: int
    """Activity before the first number."""

    def table(self, place: int, activity: Tensor, state: Tensor) -> Tensor:
        """The table of the number at a place."""
        level = (activity[..., None] > self.thresholds[place]).sum(dim=-1)
        return 2 * (self.tables[place] + level) + (state & 1)


def best_path(
    wanted_BR: Tensor,
    factor_BRR: Tensor,
    weight_BR: Tensor,
    price: float,
    frequencies: Frequencies,
    bits_GK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers at the least cost: squared errors of their values, and bits.

    The Viterbi algorithm, in which each survivor carries its own errors: the best value of a number depends on the
    errors of those before it.

    Args:
        wanted_BR: the values that the numbers should have.
        factor_BRR: with unit diagonal, lower triangular.
        weight_BR: the cost of errors e is the sum of `weight * (factor @ e) ** 2`.
        price: the cost of a bit.
        bits_GK: of each number from -K to K, in each table.

    Returns:
        The numbers, int64 (B, R); their values in whole units, float32 (B, R); and the tables that code them, int64
        (B, R).
    """
    num_rows, num_numbers = wanted_BR.shape
    device = wanted_BR.device
    num_symbols = bits_GK.shape[1]
    most = num_symbols // 2
    most_even, most_odd = most - most % 2, most - 1 + most % 2
    state_S = torch.arange(STATES, device=device)
    odd_S = (state_S & 1).float()
    arrivals = torch.stack([next_state(state_S, parity) for parity in state_S[:2]], dim=1).flatten()
    from_S2 = arrivals.argsort(stable=True).view(STATES, 2)  # numbers 2 * state before + parity
    cost_BS = torch.full((num_rows, STATES), 1e30, device=device)
    cost_BS[:, 0] = 0.0
    error_BSR = torch.zeros(num_rows, STATES, num_numbers, device=device)
    activity_BS = torch.full((num_rows, STATES), frequencies.start, dtype=torch.int64, device=device)
    history = []
    row_B1 = torch.arange(num_rows, device=device)[:, None] * STATES
    for place in range(num_numbers):
        wanted_BS = wanted_BR[:, place, None].expand(-1, STATES)
        if place:
            known_B1R = factor_BRR[:, place, None, :place]
            wanted_BS = wanted_BS + (error_BSR[:, :, :place] @ known_B1R.transpose(1, 2))[:, :, 0]
        even_BS = 2 * ((wanted_BS - odd_S) / 4).round()
        odd_BS = 2 * ((wanted_BS - odd_S - 2) / 4).round() + 1
        even_BS.clamp_(-most_even, most_even)
        odd_BS.clamp_(-most_odd, most_odd)
        # 0 is often cheap.
        number_BS3 = torch.stack([even_BS, odd_BS, torch.zeros_like(even_BS)], dim=2)
        value_BS3 = 2 * number_BS3 + odd_S[:, None]
        table_BS = frequencies.table(place, activity_BS, state_S)
        bits_BS3 = bits_GK.flatten()[table_BS[:, :, None] * num_symbols + most + number_BS3.long()]
        total_BS3 = weight_BR[:, place, None, None] * (wanted_BS[:, :, None] - value_BS3).square_()
        total_BS3 += price * bits_BS3
        is_zero_BS = total_BS3[:, :, 2] < total_BS3[:, :, 0]
        for each_BS3 in (total_BS3, number_BS3, value_BS3):
            each_BS3[:, :, 0] = torch.where(is_zero_BS, each_BS3[:, :, 2], each_BS3[:, :, 0])
        total_BS2 = total_BS3[:, :, :2] + cost_BS[:, :, None]
        cost_BS, which_BS = total_BS2.flatten(1)[:, from_S2.flatten()].view(num_rows, STATES, 2).min(dim=2)
        came_BS = torch.where(which_BS == 0, from_S2[:, 0], from_S2[:, 1])
        before_BS = came_BS >> 1
        number_BS = number_BS3[:, :, :2].flatten(1).gather(1, came_BS)
        value_BS = value_BS3[:, :, :2].flatten(1).gather(1, came_BS)
        error_BSR = error_BSR.flatten(0, 1).index_select(0, (row_B1 + before_BS).flatten()).view_as(error_BSR)
        error_BSR[:, :, place] = wanted_BR[:, place, None] - value_BS
        activity_BS = next_activity(activity_BS.gather(1, before_BS), value_BS.long())
        history.append((before_BS, number_BS, value_BS, table_BS.gather(1, before_BS)))
    state_B1 = cost_BS.argmin(dim=1, keepdim=True)
    chosen: list[tuple[Tensor, Tensor, Tensor]] = []
    for before_BS, *of_number in reversed(history):
        number_B, value_B, table_B = (each_BS.gather(1, state_B1)[:, 0] for each_BS in of_number)
        chosen.append((number_B.long(), value_B, table_B))
        state_B1 = before_BS.gather(1, state_B1)
    numbers_BR, values_BR, tables_BR = (torch.stack(each[::-1], dim=1) for each in zip(*chosen, strict=True))
    return numbers_BR, values_BR, tables_BR
