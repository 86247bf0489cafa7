"""The statistics of a step, summed over the processes that train one model as they are over micro-batches.

DDP averages gradients, so the loss is the mean of the ranks' own: with W ranks the gradient of it with respect to a
rank's activation is 1/W of the one that this rank's hooks see. Sums of products of two such gradients carry 1/W².
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..config import LNGDConfig
from .inverses import pack, unpack
from .layers import Layer, factor_blocks
from .sums import GroupSums, RowSamples
from .topology import Group


class Pool(Protocol):
    """Processes that sum together, see `distributed.Ranks`."""

    @property
    def size(self) -> int:
        """How many."""

    @property
    def rank(self) -> int:
        """This one's number."""

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sum of each tensor over all of them."""

    def gather(self, own: Tensor, most: int) -> Tensor:
        """Bytes of every rank, see `distributed.Ranks.gather`."""


def pool_sums(
    sums: Mapping[str, GroupSums],
    groups: list[Group],
    layers: Mapping[str, Layer],
    config: LNGDConfig,
    scalars: list[Tensor | int],
    pool: Pool,
) -> tuple[dict[str, GroupSums], list[Tensor]]:
    """S, v, n and the rows of every group over all ranks, packed, in one collective.

    A rank that saw nothing of a group adds zeros; where no rank saw anything ``kept`` is 0.

    Args:
        sums: of this rank.
        groups: all of the model, in an order that is the same on every rank.
        layers: by name.
        config: the optimizer's.
        scalars: more numbers to sum.

    Returns:
        The sums of each group, with ``seen`` and ``kept`` as tensors; the sums of the scalars.
    """
    parts: list[Tensor] = []
    places: list[tuple[GroupSums, list[int]]] = []
    for group in groups:
        own = sums.get(group.name)
        own = own if own is not None and own.s is not None else _zeros(group, layers, config)
        mine = _parts(own)
        places.append((own, list(range(len(parts), len(parts) + len(mine)))))
        parts += mine
    rows = [float(n) for own, _ in places for n in (own.seen, own.kept)]
    like = parts[0]
    parts.append(_numbers(rows, like))
    parts += [torch.as_tensor(n).to(like.device, like.dtype, non_blocking=True) for n in scalars]
    found = pool.sum(parts)
    counts = found[len(parts) - len(scalars) - 1].view(-1, 2)
    pooled = {}
    for i, (group, (own, where)) in enumerate(zip(groups, places, strict=True)):
        s, *v, n = (found[place] for place in where)
        # as numbers seen and kept would be waited for
        s = unpack(s, own.blocks[1])
        pooled[group.name] = GroupSums(own.blocks, s, v[0] if v else None, n, counts[i, 0], counts[i, 1])
    return pooled, found[len(parts) - len(scalars) :]


def _parts(own: GroupSums) -> list[Tensor]:
    assert own.s is not None and own.n is not None
    v = [] if own.v is None else [own.v.to(own.s.dtype)]
    return [pack(own.s), *v, own.n.to(own.s.dtype)]


def _zeros(group: Group, layers: Mapping[str, Layer], config: LNGDConfig) -> GroupSums:
    """What a rank adds that saw nothing of a group."""
    members = [layers[name] for name in group.members]
    first, blocks = members[0], factor_blocks(members, config.max_factor_dim)
    like = first.weight.new_empty(0, dtype=torch.promote_types(first.weight.dtype, torch.float32))
    s = like.new_zeros(first.units, *blocks, blocks[1])
    estimated = bool(group.links) or config.fisher != "expected"
    return GroupSums(blocks, s, like.new_zeros(first.units, first.out_features) if estimated else None, s.new_zeros(()))


def _numbers(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def pool_curvature(squares: Tensor, rows: list[RowSamples], terms: Tensor | int, pool: Pool) -> tuple[Tensor, Tensor]:
    """DᵀFD of Eq. 13 for some layers over all ranks, in one collective.

    Args:
        squares: [n], Σ q² over the rows that this rank kept.
        rows: n, what this rank kept.
        terms: T of this rank.

    Returns:
        T Σ q² · rows seen / rows kept [n], and where [n] any rank kept a row at all.
    """
    counts = _numbers([float(n) for own in rows for n in (own.seen, own.kept)], squares)
    total = torch.as_tensor(terms).to(squares.device, squares.dtype, non_blocking=True)
    squares, counts, total = pool.sum([squares, counts, total])
    seen, kept = counts.view(-1, 2).unbind(1)
    return squares * (seen / kept.clamp_min(1)) * (total / pool.size**2), kept > 0
