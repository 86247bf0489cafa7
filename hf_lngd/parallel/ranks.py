"""The processes of one job, and the collectives that LNGD needs of them.

Every collective here runs inside ``LNGD(...)``, ``LNGD.step()`` or a call that says so, at the same steps on every
rank: whether it runs never depends on what a rank has seen. `torch.distributed` is all that is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.9 has these collectives by older names, of which newer versions warn.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
# So many differences between two ranks are listed by name.
_LISTED = 3


def is_distributed() -> bool:
    """Whether this process is one of a job of `torch.distributed`, of one process or more."""
    return dist.is_available() and dist.is_initialized()


def by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of the tensors of each device and dtype: what can travel together."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
    return list(kinds.values())


class Ranks:
    """The processes that train one model; `group`: their process group, if these are not all processes of the job: the
    one that DDP was given."""

    def __init__(self, group: Any = None) -> None:
        self.group = group

    @property
    def size(self) -> int:
        """How many they are; 1 where nothing is distributed (yet)."""
        return max(1, dist.get_world_size(self.group)) if is_distributed() else 1

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return dist.get_rank(self.group) if self.size > 1 else 0

    def all_reduce(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum over ranks of each tensor, in one collective for each device and dtype (almost always one in all).

        Shapes, dtypes and order must be the same on every rank. A sum that is not finite is so on every rank."""
        result = list(tensors)
        for places in by_dtype(tensors) if self.size > 1 else ():
            flat = torch.cat([tensors[i].reshape(-1) for i in places])
            dist.all_reduce(flat, group=self.group)
            pieces = flat.split([tensors[i].numel() for i in places])
            for i, piece in zip(places, pieces, strict=True):
                result[i] = piece.view(tensors[i].shape)
        return result

    def all_gather(self, own: Tensor, most: int) -> Tensor:
        """A flat tensor of every rank: own [n], n at most `most` (the same on every rank) → [ranks, most]."""
        buffer = own.new_zeros(most)
        buffer[: own.numel()] = own
        everyone = own.new_empty(self.size * most)
        getattr(dist, ALL_GATHER)(everyone, buffer, group=self.group)
        return everyone.view(self.size, most)

    def reduce_scatter(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> list[Tensor | None]:
        """The sum over ranks of each tensor, on its owner alone: None elsewhere. One collective for each dtype."""
        found: list[Tensor | None] = [None] * len(tensors)
        for places in by_dtype(tensors):
            shares = [[i for i in places if owners[i] == rank] for rank in range(self.size)]
            most = max(sum(tensors[i].numel() for i in share) for share in shares)
            buffer = tensors[places[0]].new_zeros(self.size, most)
            for row, share in zip(buffer, shares, strict=True):
                if share:
                    flat = torch.cat([tensors[i].reshape(-1) for i in share])
                    row[: flat.numel()] = flat
            own = buffer[0]
            if self.size > 1:
                own = buffer.new_empty(most)
                getattr(dist, REDUCE_SCATTER)(own, buffer.view(-1), group=self.group)
            start = 0
            for i in shares[self.rank]:
                found[i] = own[start : start + tensors[i].numel()].view(tensors[i].shape)
                start += tensors[i].numel()
        return found

    def all_to_all(self, flat: Tensor, sent: list[int], got: list[int]) -> Tensor:
        """A flat tensor of which `sent[r]` numbers go to rank r → those of all ranks for this one, `got[r]` of each."""
        if self.size == 1:
            return flat
        received = flat.new_empty(sum(got))
        dist.all_to_all_single(received, flat, got, sent, group=self.group)
        return received

    def check_same(self, what: str, own: Mapping[str, Any]) -> None:
        """Make sure that every rank says the same of itself.

        Raises:
            RuntimeError: on every rank; names `what` is compared, the ranks, what differs, and both values."""
        everyone = self.all_gather_value(dict(own))
        first = everyone[0]
        other = next((rank for rank, found in enumerate(everyone) if found != first), 0)
        if not other:
            return
        second = everyone[other]
        shown = {n: (_shown(first, n), _shown(second, n)) for n in first | second}
        differing = [f"{n}: rank 0 has {a}, rank {other} has {b}" for n, (a, b) in shown.items() if a != b]
        more = f" and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
        raise RuntimeError(
            f"LNGD: the ranks disagree about {what}: {'; '.join(differing[:_LISTED])}{more}. Accepted: the same on "
            "every rank"
        )

    def all_gather_value(self, value: Any) -> list[Any]:
        """A plain value of every rank, in their order."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.group)
        return everyone

    def broadcast_value(self, value: Any, rank: int) -> Any:
        """What one rank has, on every rank: anything that can be pickled, its tensors on the CPU."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=rank)
        return box[0]


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "none"
