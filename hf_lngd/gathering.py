"""The whole state of an optimizer of which each rank has a share: brought together on rank 0, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .fallback import ROW_WISE
from .preconditioner import Preconditioner
from .sharding import Shards

if TYPE_CHECKING:
    from .optimizer import LNGD

# What bfloat16 weights lack, see `curvature.rounding`: in their shape, and sharded as they are.
LOST = "lost"
# What ranks other than 0 have in place of the whole state.
OTHERS = {"rank": "not 0"}


def gather_state(optimizer: LNGD, own: dict[str, Any], named: Mapping[str, Tensor]) -> dict[str, Any]:
    """The whole state on rank 0, on the CPU; `OTHERS` elsewhere. A collective.

    Args:
        own: what of the state is on this rank.
        named: parameters by the names under which AdamW's moments are kept.
    """
    shards, made = optimizer._shards, optimizer._preconditioner
    assert shards is not None
    state = {**own, "flags": gather_flags(shards, own["flags"]), "groups": {}, "layers": {}}
    for kind, name, key, shape, like, owner in [] if made is None else _dealt(made):
        found = own[kind][name][key] if owner == shards.ranks.rank else None
        state[kind].setdefault(name, {})[key] = _bring(shards, found, owner, shape, like)
    for kind, row_wise in (("fallback", ROW_WISE), ("rounding", (LOST,))):
        state[kind] = {name: _rows(shards, kept, row_wise, named[name].shape) for name, kept in own[kind].items()}
    state["embeddings"] = {
        e.name: _rows(shards, own["embeddings"][e.name], e.row_wise, e.table.shape) for e in optimizer._embeddings
    }
    return state if shards.ranks.rank == 0 else dict(OTHERS)


def gather_flags(shards: Shards, own: Mapping[str, list[Any]]) -> dict[str, list[int]]:
    """Of each bank: what any rank says of itself, counts summed."""
    everyone = shards.ranks.everyone({name: [int(value) for value in values] for name, values in own.items()})
    join: dict[str, Any] = {"inverted": max, "started": max}
    return {
        name: [join.get(name, sum)(values) for values in zip(*(one[name] for one in everyone), strict=True)]
        for name in own
    }


def _dealt(made: Preconditioner) -> Iterator[tuple[str, str, str, torch.Size, Tensor, int]]:
    """Kind, name, key, shape, a tensor of that dtype, and owner of all that is one rank's."""
    owners = made.owners
    assert owners is not None
    for bank, members in zip(made.factor_banks, made.factor_members, strict=True):
        for spec in members:
            for key, t in bank.tensors().items():
                yield "groups", spec.name, key, torch.Size((spec.units, *t.shape[1:])), t, owners.of_group[spec.name]
    for layer_bank in made.layer_banks:
        for layer in layer_bank.members:
            for key, t in layer_bank.tensors().items():
                shape = torch.Size((layer_bank.count(key), *t.shape[1:]))
                yield "layers", layer.name, key, shape, t, owners.of_layer[layer.name]


def _rows(shards: Shards, own: Mapping[str, Tensor], row_wise: tuple[str, ...], shape: torch.Size) -> dict[str, Any]:
    """Tensors by key, those of `row_wise` whole: of this shape."""
    found: dict[str, Any] = {}
    for key, value in own.items():
        if key not in row_wise:
            found[key] = value.cpu()
            continue
        pieces: list[Any] = []
        for rank in range(shards.ranks.size):
            rows = shards.rows(shape[0], rank)
            if rows.stop > rows.start:
                part = torch.Size((rows.stop - rows.start, *shape[1:]))
                pieces.append(_bring(shards, value if rank == shards.ranks.rank else None, rank, part, value))
        found[key] = torch.cat(pieces) if shards.ranks.rank == 0 else None
    return found


def _bring(shards: Shards, own: Tensor | None, source: int, shape: torch.Size, like: Tensor) -> Tensor | None:
    """A rank's tensor on rank 0, a copy on the CPU; None elsewhere."""
    if own is not None:
        if source == 0:
            return own.detach().to("cpu", copy=True)
        dist.send(own.contiguous(), group=shards.ranks.group, group_dst=0)
    elif shards.ranks.rank == 0:
        buffer = like.new_empty(shape)
        dist.recv(buffer, group=shards.ranks.group, group_src=source)
        return buffer.cpu()
    return None
