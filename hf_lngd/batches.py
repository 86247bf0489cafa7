"""Layers of one shape, whose steps are computed together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .factors import Bank
from .layers import Layer
from .linalg import index_tensor

# A batch's gradients have at most so many elements: bounds the step's temporaries, which are as large.
_MOST_ELEMENTS = 1 << 24


@dataclass
class LayerBatch:
    """L layers with one shape of the weight, one layout of Φ, one dtype and device.

    Attributes:
        members: the layers of all processes; `layers`: those that this one computes.
        bank: holds the factors of the latter (None: there are none), `rows` [L · units] are those of their matrices.
        momentum: in the layout's form, see `parallel.layout`.
        state: the direction's: name → [L · units, …], of `layers`.
        rate: [L], α_l of the last step."""

    members: list[Layer]
    layers: list[Layer]
    bank: Bank | None
    rows: Tensor
    momentum: list[Tensor] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    rate: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def units(self) -> int:
        """Matrices a layer."""
        return self.members[0].units

    def index(self, layers: Sequence[int], units: int | None = None) -> slice | Tensor:
        """The rows of these of `layers`' matrices (or of tensors with `units` rows a layer); a slice where it is
        all."""
        if len(layers) == len(self.layers):
            return slice(None)
        units = self.units if units is None else units
        return index_tensor(tuple(i * units + j for i in layers for j in range(units)), self.rows.device)


@dataclass
class Job:
    """A batch in one step: the places of the layers that have a gradient in `members`, and in `layers`."""

    batch: LayerBatch
    present: list[int]
    own: list[int]

    @property
    def layers(self) -> list[Layer]:
        """Those that this process computes."""
        return [self.batch.layers[i] for i in self.own]

    @property
    def members(self) -> list[Layer]:
        """Those that are present, of all processes."""
        return [self.batch.members[i] for i in self.present]


def layer_batches(
    layers: Sequence[Layer],
    key_of: Callable[[Layer], Hashable],
    group_of: Mapping[str, str],
    bank_of: Mapping[str, Bank],
) -> list[LayerBatch]:
    """The batches of these layers, the same on every process.

    Args:
        key_of: layer → what decides which bank its factor is in.
        group_of: layer → the name of its group; `bank_of`: group → its bank, of those that this process keeps."""
    keyed: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        like, kind, shape = layer.like, layer.geometry.kind, (layer.units, layer.m, tuple(layer.weight.shape))
        key = (*shape, layer.bias is None, kind, like.device, like.dtype, key_of(layer))
        keyed.setdefault(key, []).append(layer)
    batches = []
    for members in keyed.values():
        first = members[0]
        most = max(1, _MOST_ELEMENTS // (first.units * first.m * first.columns))
        for start in range(0, len(members), most):
            chunk = members[start : start + most]
            own = [layer for layer in chunk if group_of[layer.name] in bank_of]
            groups = [group_of[layer.name] for layer in own]
            bank = bank_of[groups[0]] if own else None
            rows = () if bank is None else bank.rows_of(groups)
            index = torch.tensor(rows, dtype=torch.int64, device=first.weight.device)
            batches.append(LayerBatch(chunk, own, bank, index, rate=first.like.new_zeros(len(own))))
    return batches
