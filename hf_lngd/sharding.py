"""Parameters that FSDP2 (`fully_shard`) has dealt out by rows: what a rank holds of them, whole tensors brought to one.

A sharded parameter is a DTensor with ``Shard(0)`` over the ranks of a mesh, or (HSDP) over those of its second
dimension, and alike over the first. `torch.distributed` is all that is needed; without sharding nothing is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import Ranks


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose import takes a second."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of one that is not sharded. Shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was called on it or a part of it."""
    return any(hasattr(module, "set_requires_gradient_sync") for module in model.modules())


def plain_class(model: nn.Module) -> Any:
    """A model's class without what `fully_shard` has put before it."""
    return next(kind for kind in type(model).__mro__ if not hasattr(kind, "set_requires_gradient_sync"))


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP2 has gathered."""
    for module in model.modules():
        if hasattr(module, "set_requires_gradient_sync"):
            module.reshard()  # type: ignore[operator]


def refuse_flat_parameters(model: nn.Module) -> None:
    """Raise RuntimeError for a model that FSDP1 wraps, from without or within: layers have no matrices any more."""
    managed = not is_fully_sharded(model)  # what torch marks so is FSDP1's then
    for name, module in model.named_modules():
        marked = managed and getattr(module, "_is_fsdp_managed_module", False)
        if marked or type(module).__name__ == "FullyShardedDataParallel":
            raise RuntimeError(
                f"LNGD: got FSDP1 (FullyShardedDataParallel) around '{name or 'the model'}', which flattens what is in "
                "it, accepted: FSDP2 (torch.distributed.fsdp.fully_shard; accelerate: fsdp_version: 2)"
            )


class Shards:
    """Where the rows of sharded parameters are.

    Args:
        model: the model, some of whose modules `fully_shard` was called on.
        parameters: those that are trained, by name.
        process_group: that of LNGD; None: all processes of the job.

    Attributes:
        ranks: among these the rows of a tensor are dealt.
        replicas: those that hold the same rows (HSDP), else this process alone.
        group: all of them, as a process group.

    Raises:
        RuntimeError: another way of sharding than FSDP2's own; names the parameter.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], process_group: Any = None) -> None:
        first_name, first = next((name, p) for name, p in parameters.items() if is_sharded(p))
        if not is_fully_sharded(model):
            raise RuntimeError(
                f"LNGD: parameter '{first_name}' is a DTensor, but fully_shard was not called (tensor parallelism?), "
                "accepted: parameters that fully_shard has sharded, or whole ones"
            )
        mesh = first.device_mesh  # type: ignore[attr-defined]
        for name, parameter in parameters.items():
            self._check(name, parameter, first_name, mesh)
        self.mesh, self.placements = mesh, tuple(first.placements)  # type: ignore[attr-defined]
        self.ranks = Ranks(mesh.get_group(mesh.ndim - 1))
        self.replicas = Ranks(mesh.get_group(0)) if mesh.ndim == 2 else None
        self.group = mesh.get_group() if mesh.ndim == 1 else process_group
        whole = dist.get_world_size(self.group)
        if whole != mesh.size():
            raise RuntimeError(
                f"LNGD: got a mesh of {mesh.size()} ranks in a group of {whole}, accepted: with a mesh of two "
                "dimensions process_group= with just its ranks"
            )

    @staticmethod
    def _check(name: str, parameter: Tensor, first_name: str, mesh: Any) -> None:
        if not is_sharded(parameter):
            raise RuntimeError(
                f"LNGD: parameter '{name}' is whole and '{first_name}' is sharded, accepted: all of them sharded, by "
                "fully_shard(model) around the whole model and without ignored_params that are trained"
            )
        here: Any = parameter
        kinds = [f"{type(p).__name__}({getattr(p, 'dim', '')})" for p in here.placements]
        if kinds not in (["Shard(0)"], ["Replicate()", "Shard(0)"]) or here.device_mesh != mesh:
            raise RuntimeError(
                f"LNGD: parameter '{name}': got {kinds} over {here.device_mesh}, accepted: Shard(0) over one mesh for "
                "all, or Replicate and Shard(0) over a mesh of two dimensions (HSDP)"
            )

    # Rows

    def rows(self, count: int, rank: int | None = None) -> slice:
        """Which of `count` rows a rank holds: as many for each, the last ones have fewer or none."""
        each = -(-count // self.ranks.size)
        first = min(count, each * (self.ranks.rank if rank is None else rank))
        return slice(first, min(count, first + each))

    def shard(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor that is there whole; a copy."""
        return whole[self.rows(whole.shape[0])].clone()

    def as_sharded(self, rows: Tensor, parameter: Tensor) -> Any:
        """This rank's rows of something in a parameter's shape, as a DTensor of their memory."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            rows, self.mesh, self.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )

    # Whole tensors, each on one rank

    def collect(self, rows: Sequence[Tensor], shapes: Sequence[torch.Size], owners: Sequence[int]) -> list[Any]:
        """Sharded tensors, each whole on its owner: one collective for each dtype.

        Args:
            rows: of each tensor what this rank holds.
            shapes: of the whole tensors.
            owners: of each tensor the rank that gets it.

        Returns:
            The tensors that this rank owns, None for the others.
        """
        found: list[Any] = [None] * len(rows)
        for places in _kinds(rows):
            order = sorted(places, key=lambda i: owners[i])
            mine = [i for i in order if owners[i] == self.ranks.rank]
            sent = [sum(rows[i].numel() for i in order if owners[i] == rank) for rank in range(self.ranks.size)]
            got = [sum(self._numel(shapes[i], rank) for i in mine) for rank in range(self.ranks.size)]
            flat = self._exchange(torch.cat([rows[i].reshape(-1) for i in order]), sent, got)
            sizes = [self._numel(shapes[i], rank) for rank in range(self.ranks.size) for i in mine]
            pieces = flat.split(sizes)
            for place, i in enumerate(mine):
                own = torch.cat(pieces[place :: len(mine)]) if self.ranks.size > 1 else pieces[place]
                found[i] = own.view(shapes[i])
        return found

    def spread(self, whole: Sequence[Tensor | None], likes: Sequence[Tensor], shapes: Sequence[torch.Size],
               owners: Sequence[int]) -> list[Tensor]:  # fmt: skip
        """The inverse of :meth:`collect`: this rank's rows of each tensor.

        Args:
            whole: the tensors that this rank owns, None for the others.
            likes: of each tensor one in the shape and dtype of this rank's rows.
            shapes, owners: as of :meth:`collect`.
        """
        found: list[Tensor] = list(likes)
        for places in _kinds(likes):
            order = sorted(places, key=lambda i: owners[i])
            mine = [i for i in order if owners[i] == self.ranks.rank]
            parts, sent = [], []
            for rank in range(self.ranks.size):
                own = [_whole(whole[i])[self.rows(shapes[i][0], rank)].reshape(-1) for i in mine]
                parts += own
                sent.append(sum(part.numel() for part in own))
            got = [sum(likes[i].numel() for i in order if owners[i] == rank) for rank in range(self.ranks.size)]
            flat = self._exchange(torch.cat(parts) if parts else likes[order[0]].new_empty(0), sent, got)
            for i, piece in zip(order, flat.split([likes[i].numel() for i in order]), strict=True):
                found[i] = piece.view(likes[i].shape)
        return found

    def sum_to_owners(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> list[Any]:
        """The sum over all ranks of each tensor, on its owner alone: None elsewhere. One collective for each dtype."""
        found: list[Any] = [None] * len(tensors)
        for places in _kinds(tensors):
            dealt = [[i for i in places if owners[i] == rank] for rank in range(self.ranks.size)]
            most = max(sum(tensors[i].numel() for i in own) for own in dealt)
            buffer = tensors[places[0]].new_zeros(self.ranks.size, most)
            for row, own in zip(buffer, dealt, strict=True):
                if own:
                    flat = torch.cat([tensors[i].reshape(-1) for i in own])
                    row[: flat.numel()] = flat
            flat = buffer[0]
            if self.ranks.size > 1:
                flat = buffer.new_empty(most)
                dist.reduce_scatter_single(flat, buffer.view(-1), group=self.ranks.group)
            if self.replicas is not None and self.replicas.size > 1:
                (flat,) = self.replicas.sum([flat])
            start = 0
            for i in dealt[self.ranks.rank]:
                found[i] = flat[start : start + tensors[i].numel()].view(tensors[i].shape)
                start += tensors[i].numel()
        return found

    def _numel(self, shape: torch.Size, rank: int) -> int:
        rows = self.rows(shape[0], rank)
        return (rows.stop - rows.start) * math.prod(shape[1:])

    def _exchange(self, flat: Tensor, sent: list[int], got: list[int]) -> Tensor:
        if self.ranks.size == 1:
            return flat
        received = flat.new_empty(sum(got))
        dist.all_to_all_single(received, flat, got, sent, group=self.ranks.group)
        return received


def _kinds(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of the tensors of each device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
    return list(kinds.values())


def _whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
