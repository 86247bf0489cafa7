"""Who keeps what where parameters are sharded: each group of layers, with all its state, is one rank's.

The owner of a group keeps its factors and inverses, and the momenta of its layers; it alone gets their whole gradients
and makes their steps. So all of it is computed and kept once in the job, and falls with the number of ranks as far as
groups can be dealt out: a rank has at least the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..placement import placement
from .layers import Layer, factor_blocks
from .pooling import Pool
from .topology import Group


class Dealer(Protocol):
    """Ranks over which parameters are sharded, see `sharding.Shards`."""

    @property
    def ranks(self) -> Pool:
        """Those among which rows are dealt."""

    def sum_to_owners(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> list[Any]:
        """The sum of each tensor on its owner."""


class Owners:
    """The rank of each group and layer.

    Args:
        groups: all of the model.
        layers: all of the model, by name.
        max_factor_dim: the config's.
        shards: the ranks.
    """

    def __init__(
        self, groups: list[Group], layers: Mapping[str, Layer], max_factor_dim: int | str, shards: Dealer
    ) -> None:
        self.shards = shards
        sizes = [_size([layers[name] for name in group.members], max_factor_dim) for group in groups]
        ranks = placement(sizes, shards.ranks.size)
        self.of_group = {group.name: rank for group, rank in zip(groups, ranks, strict=True)}
        self.of_layer = {name: self.of_group[group.name] for group in groups for name in group.members}

    def has_group(self, name: str) -> bool:
        """Whether this rank owns it."""
        return self.of_group[name] == self.shards.ranks.rank

    def has_layer(self, name: str) -> bool:
        """Whether this rank owns it."""
        return self.of_layer[name] == self.shards.ranks.rank

    def sum(self, tensors: list[Tensor], groups: list[str]) -> list[Tensor | None]:
        """The sum over all ranks of each tensor where the group named beside it is owned; None elsewhere."""
        return self.shards.sum_to_owners(tensors, [self.of_group[name] for name in groups])

    def everyone(self, layers: list[Layer], own: Tensor) -> Tensor:
        """What each rank has of its layers, brought to all.

        Args:
            layers: of one shape, those of all ranks.
            own: [n · u, m, columns], this rank's, in the order of `layers`.

        Returns:
            [all · u, m, columns].
        """
        pool, units = self.shards.ranks, layers[0].units
        places = [[i for i, layer in enumerate(layers) if self.of_layer[layer.name] == r] for r in range(pool.size)]
        matrix = own.shape[1:].numel()
        most = max(map(len, places)) * units * matrix * own.element_size()
        found = pool.gather(own.reshape(-1).view(torch.uint8), most)
        whole = own.new_empty(len(layers), units, *own.shape[1:])
        for row, dealt in zip(found, places, strict=True):
            size = len(dealt) * units * matrix * own.element_size()
            whole[dealt] = row[:size].clone().view(own.dtype).view(-1, units, *own.shape[1:])
        return whole.flatten(0, 1)


def _size(members: list[Layer], max_factor_dim: int | str) -> float:
    """Numbers that a group keeps, and roughly what its step costs: momenta, a factor and its inverse."""
    k, b = factor_blocks(members, max_factor_dim)
    momenta = sum(layer.units * layer.out_features * layer.columns for layer in members)
    return float(momenta + members[0].units * k * b * b)
