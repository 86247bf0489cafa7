"""What processes of one job do together: sum statistics, and make sure that they train the same model.

Every collective here runs inside ``LNGD(...)`` and ``LNGD.step()``, at the same steps on every rank: whether it runs
never depends on what a rank has seen. `torch.distributed` is all that is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# So many differences between two ranks are listed by name.
_LISTED = 3


def is_distributed() -> bool:
    """Whether this process is one of a job of `torch.distributed`, of one process or more."""
    return dist.is_available() and dist.is_initialized()


class Ranks:
    """The processes that train one model.

    Args:
        group: theirs, if these are not all processes of the job: the one that DDP was given.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    @property
    def size(self) -> int:
        """How many they are; 1 where nothing is distributed (yet)."""
        if not is_distributed():
            return 1
        return max(1, dist.get_world_size(self.group))

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return dist.get_rank(self.group) if self.size > 1 else 0

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sum over ranks of each tensor, in one collective for each device and dtype (almost always one in all).

        Shapes, dtypes and order must be the same on every rank. A sum that is not finite is so on every rank.
        """
        result: list[Tensor] = list(tensors)
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, tensor in enumerate(tensors):
            kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
        for places in kinds.values():
            flat = torch.cat([tensors[i].reshape(-1) for i in places])
            dist.all_reduce(flat, group=self.group)
            pieces = flat.split([tensors[i].numel() for i in places])
            for i, piece in zip(places, pieces, strict=True):
                result[i] = piece.view(tensors[i].shape)
        return result

    def gather(self, own: Tensor, most: int) -> Tensor:
        """Bytes of every rank: own [n] uint8, n at most `most` (the same on every rank) → [ranks, most]."""
        buffer = own.new_zeros(most)
        buffer[: own.numel()] = own
        everyone = own.new_empty(self.size * most)
        dist.all_gather_single(everyone, buffer, group=self.group)
        return everyone.view(self.size, most)

    def check_same(self, what: str, own: Mapping[str, Any]) -> None:
        """Make sure that every rank says the same of itself: only a digest travels where they do.

        Args:
            what: is compared, for the message.
            own: plain values by name.

        Raises:
            RuntimeError: on every rank; names the ranks, what differs, and both values.
        """
        if self.size == 1:
            return
        text = json.dumps(own, sort_keys=True, default=str)
        digests = self._gather(hashlib.sha256(text.encode()).hexdigest())
        if len(set(digests)) == 1:
            return
        everyone = [json.loads(other) for other in self._gather(text)]
        other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        first, second = everyone[0], everyone[other]
        names = [name for name in [*first, *(n for n in second if n not in first)]]
        differing = [
            f"{name}: rank 0 has {_shown(first, name)}, rank {other} has {_shown(second, name)}"
            for name in names
            if _shown(first, name) != _shown(second, name)
        ]
        more = f" and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
        raise RuntimeError(
            f"LNGD: the ranks disagree about {what}: {'; '.join(differing[:_LISTED])}{more}. Accepted: the same on "
            "every rank"
        )

    def everyone(self, value: Any) -> list[Any]:
        """A plain value of every rank, in their order."""
        return [value] if self.size == 1 else [json.loads(own) for own in self._gather(json.dumps(value))]

    def share(self, value: Any, rank: int) -> Any:
        """What one rank has, on every rank: anything that can be pickled, its tensors on the CPU."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=rank)
        return box[0]

    def _gather(self, value: str) -> list[str]:
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.group)
        return everyone


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "none"
