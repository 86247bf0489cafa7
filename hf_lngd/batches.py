"""Layers of one shape, whose steps are computed together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .factors import Bank
from .layers import Layer
from .linalg import index_tensor

# A batch's gradients have at most so many elements: bounds the step's temporaries, which are as large.
_MOST_ELEMENTS = 1 << 24


@dataclass
class LayerBatch:
    """L layers with one shape of the weight, one layout of Φ, one dtype and device.

    Attributes:
        members: the layers of all processes, in the order of their turns; `layers`: those that this one computes.
        bank: holds the factors of the latter (None: there are none), `rows` [L · units] are those of their matrices.
        state: the direction's: name → [L · units, …], of `layers`.
        rate: [L], α_l of the last step.
        first_rms: [L], root mean square of each weight when training began; 0: not known. None: not asked for yet.
        left: weight → what it has left of its first norm, of those that were asked for."""

    members: list[Layer]
    layers: list[Layer]
    bank: Bank | None
    rows: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    rate: Tensor = field(default_factory=lambda: torch.zeros(0))
    first_rms: Tensor | None = None
    left: dict[nn.Parameter, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place = {layer: i for i, layer in enumerate(self.layers)}

    def forget_norms(self) -> None:
        """They were measured anew."""
        self.first_rms, self.left = None, {}

    @property
    def units(self) -> int:
        """Matrices a layer."""
        return self.members[0].units

    def own(self, layer: Layer) -> slice:
        """The rows of one of `layers`' matrices."""
        first = self.place[layer] * self.units
        return slice(first, first + self.units)

    def index(self, layers: Sequence[Layer], units: int | None = None) -> slice | Tensor:
        """The rows of these of `layers`' matrices (or of tensors with `units` rows a layer); a slice where they stand
        side by side."""
        units = self.units if units is None else units
        first, last = self.place[layers[0]], self.place[layers[-1]]
        if last - first == len(layers) - 1:
            return slice(first * units, (last + 1) * units)
        rows = tuple(self.place[layer] * units + j for layer in layers for j in range(units))
        return index_tensor(rows, self.rows.device)


@dataclass
class Job:
    """A batch in one step: the `members` that have a gradient, of all processes; `layers`: those of them that this one
    computes; `unusable`: [n], of those whose momentum it has, where the gradient is not finite."""

    batch: LayerBatch
    members: list[Layer]
    unusable: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.layers = [layer for layer in self.members if layer in self.batch.place]


def layer_batches(
    layers: Sequence[Layer],
    key_of: Callable[[Layer], Hashable],
    group_of: Mapping[str, str],
    bank_of: Mapping[str, Bank],
    turn_of: Mapping[str, int],
) -> list[LayerBatch]:
    """The batches of these layers, the same on every process.

    Args:
        key_of: layer → what decides which bank its factor is in.
        turn_of: layer → its turn.
        group_of: layer → the name of its group; `bank_of`: group → its bank, of those that this process keeps."""
    keyed: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        like, kind, shape = layer.like, layer.geometry.kind, (layer.units, layer.m, tuple(layer.weight.shape))
        key = (*shape, layer.heads, layer.bias is None, kind, like.device, like.dtype, key_of(layer))
        keyed.setdefault(key, []).append(layer)
    batches = []
    for members in keyed.values():
        first = members[0]
        members.sort(key=lambda layer: turn_of[layer.name])
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


def balanced(costs: Sequence[Sequence[float]], ranks: int) -> list[int]:
    """The rank (or turn) of each task, by its costs in each of several steps: largest first, each to the rank whose
    longest step stays the shortest. Depends on nothing but the arguments. With one step the most loaded rank has at
    most 4/3 of what it would have in the best assignment (Graham 1969)."""
    owners, loads = [0] * len(costs), [[0.0] * len(costs[0]) for _ in range(ranks)] if costs else []
    for task in sorted(range(len(costs)), key=lambda i: (-sum(costs[i]), i)):
        after = [[load + cost for load, cost in zip(own, costs[task], strict=True)] for own in loads]
        owners[task] = min(range(ranks), key=lambda rank: (max(after[rank]), sum(after[rank]), rank))
        loads[owners[task]] = after[owners[task]]
    return owners
