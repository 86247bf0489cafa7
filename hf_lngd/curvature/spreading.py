"""Inverses computed once in a job: each rank inverts its share of what is due, and one collective brings all to all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..placement import SPEEDS, placement, spread_pays
from .factor_bank import Bank, index_tensor
from .pooling import Pool

Due = list[tuple[Bank, tuple[int, ...]]]
# A tensor of any dtype can begin at such a multiple of bytes.
_ALIGNMENT = 8


@dataclass
class Share:
    """What a rank inverts of a bank: rows; empty where it has none."""

    bank: Bank
    rows: tuple[int, ...]


class SpreadInverses:
    """Spreads what is due over ranks.

    Args:
        placement: the config's: auto, spread or replicated.
        pool: the processes.
    """

    def __init__(self, placement: str, pool: Pool) -> None:
        self.placement, self.pool = placement, pool
        self._plans: dict[tuple, list[list[Share]] | None] = {}

    def plan(self, due: Due) -> list[list[Share]] | None:
        """What each rank inverts, or None where every rank inverts all: the same answer on every rank."""
        key = tuple((id(bank), rows) for bank, rows in due)
        if key not in self._plans:
            self._plans[key] = self._make_plan(due)
        return self._plans[key]

    def _make_plan(self, due: Due) -> list[list[Share]] | None:
        devices = {bank.damping.device for bank, _ in due}
        if self.placement == "replicated" or len(devices) != 1:
            return None
        speed = SPEEDS["cpu" if devices.pop().type == "cpu" else "accelerator"]
        tasks = [(i, row) for i, (_, rows) in enumerate(due) for row in rows]
        costs = [due[i][0].seconds(speed) for i, _ in tasks]
        sizes = [sum(_bytes(t) for t in due[i][0].results().values()) for i, _ in tasks]
        owners = placement(costs, self.pool.size)
        if self.placement == "auto" and not spread_pays(costs, sizes, owners, self.pool.size, speed):
            return None
        rows_of: list[list[list[int]]] = [[[] for _ in due] for _ in range(self.pool.size)]
        for (i, row), owner in zip(tasks, owners, strict=True):
            rows_of[owner][i].append(row)
        return [[Share(bank, tuple(rows)) for (bank, _), rows in zip(due, own, strict=True)] for own in rows_of]

    def invert(self, plan: list[list[Share]]) -> None:
        """Invert this rank's share, and take in everyone's."""
        rank = self.pool.rank
        own: list[Tensor] = []
        for share in plan[rank]:
            failures = share.bank.failures.clone()
            if share.rows:
                share.bank.invert(share.rows)
            rows = index_tensor(share.rows, share.bank.damping.device)
            own += [store[rows] for store in share.bank.results().values()]
            own.append(share.bank.failures - failures)
            share.bank.failures.copy_(failures)
        most = max(sum(_padded(_share_bytes(share)) for share in shares) for shares in plan)
        everyone = self.pool.gather(_to_bytes(own), most)
        for shares, found in zip(plan, everyone, strict=True):
            start = 0
            for share in shares:
                rows = index_tensor(share.rows, share.bank.damping.device)
                for store in share.bank.results().values():
                    size = _bytes(store) * len(share.rows)
                    store[rows] = found[start : start + size].view(store.dtype).view(-1, *store.shape[1:])
                    start += _padded([size])
                share.bank.failures += found[start : start + _ALIGNMENT].view(torch.int64)[0]
                start += _ALIGNMENT


def _bytes(store: Tensor) -> int:
    """Of one row."""
    return math.prod(store.shape[1:]) * store.element_size()


def _share_bytes(share: Share) -> list[int]:
    return [_bytes(store) * len(share.rows) for store in share.bank.results().values()] + [_ALIGNMENT]


def _padded(sizes: list[int]) -> int:
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


def _to_bytes(tensors: list[Tensor]) -> Tensor:
    pieces = []
    for tensor in tensors:
        piece = tensor.contiguous().view(-1).view(torch.uint8)
        pieces.append(torch.nn.functional.pad(piece, (0, -piece.numel() % _ALIGNMENT)))
    return torch.cat(pieces)
