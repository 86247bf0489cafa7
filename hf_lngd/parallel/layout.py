"""Which process keeps and computes what: one interface, three layouts. *Whole*: every process has whole parameters and
computes all (one process, DDP). *Owned* (DDP): a process computes the steps of its share of layers, and has their
momentum and curvature alone; updates are all-gathered. *Rows* (FSDP2): parameters and what has their shape are sharded
by rows; gradients go whole to the process that owns a layer, updates come back as rows: two all-to-alls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..batches import Job, LayerBatch, balanced
from ..config import LNGDConfig
from ..layers import Layer
from ..linalg import state_dtype
from ..torch_internals import is_fully_sharded, is_sharded
from .ranks import Ranks, by_dtype

Sums = tuple[list[Tensor | None], list[Tensor]]


class Piece(NamedTuple):
    """A tensor that travels between its rows and its owner; `like`: an empty one of its dtype and device."""

    shape: torch.Size
    owner: int
    like: Tensor


class Whole:
    """Every process computes and keeps all. Momentum is averaged in stacks [n · units, m, columns] of the layers that
    this process computes.

    Attributes:
        everyone: all processes that train the model.
        ranks: those among which layers, or rows, are shared out.
        owners: layer → the process whose it is, with those of its group (which is named after one); none: each has all.
        has_owners: whether each group of layers is one process's alone.
        shards_rows: whether parameters are sharded."""

    name = "whole"
    has_owners = False
    shards_rows = False

    def __init__(self, ranks: Ranks) -> None:
        self.everyone = self.ranks = ranks
        self.owners: dict[str, int] = {}

    def assign(self, costs: Mapping[str, Sequence[float]], group_of: Mapping[str, str]) -> None:
        """Decide which process owns each group of layers, the same on all. `costs`: group → what it keeps and costs in
        each turn, roughly; `group_of`: layer → its group."""

    def reduce(self, parts: list[Tensor], groups: list[str], numbers: list[Tensor]) -> Sums:
        """Sums over processes of the statistics of the groups named beside them, for those who keep them (None for the
        others), and of numbers, for all."""
        found = self.ranks.all_reduce(parts + numbers)
        return [*found[: len(parts)]], found[len(parts) :]

    def complete(self, squares: list[Tensor]) -> list[Tensor]:
        """Sums of squares of what this process has of tensors → of the whole tensors."""
        return squares

    def rows(self, count: int, rank: int | None = None) -> slice:
        """Which of `count` rows of a parameter a process has."""
        return slice(0, count)

    def rounds(self, jobs: list[Job]) -> Iterator[list[Job]]:
        """The jobs of a step that are done together: one by one, so that one batch's updates are there at a time."""
        yield from ([job] for job in jobs if job.layers)

    def with_momentum(self, of: LayerBatch | Job) -> list[Layer]:
        """The layers whose momentum this process has, whole or in part."""
        return of.layers

    def stack(self, layers: list[Layer], get: Callable[[nn.Parameter], Tensor]) -> list[Tensor]:
        """What `get` gives for the parameters of layers of one shape, in their shapes, as copies in one tensor, or none
        for no layers; under *rows* one of weights and one of biases in the factor."""
        if not layers:
            return []
        parameters = [[get(p) for p in layer.parameters] for layer in layers]
        dtype = state_dtype(layers[0].weight.dtype)
        return [torch.cat([y.matrices(own, dtype) for y, own in zip(layers, parameters, strict=True)])]

    def unstack(self, layers: list[Layer], parts: list[Tensor]) -> Iterator[tuple[Layer, list[Tensor]]]:
        """Each layer with what :meth:`stack` was made of, views where that is possible."""
        for layer, own in zip(layers, parts[0].unflatten(0, (-1, layers[0].units)).unbind(0), strict=True):
            yield layer, layer.like_parameters(own)

    def to_owners(self, jobs: list[Job], parts: list[list[Tensor]]) -> list[Tensor | None]:
        """Stacks → [n · units, m, columns] of the layers that this process computes; None: none of a job."""
        return [own[0] if own else None for own in parts]

    def from_owners(self, jobs: list[Job], updates: list[Tensor | None]) -> list[list[Tensor]]:
        """The inverse of :meth:`to_owners`, of all present layers."""
        return [[whole] for whole in self.all_matrices(jobs, updates)]

    def all_matrices(self, jobs: list[Job], own: list[Tensor | None]) -> list[Tensor]:
        """Matrices of the layers that this process computes → of all present ones: all that there are."""
        return [matrices for matrices in own if matrices is not None]

    def export(self, value: Tensor | None, group: str, shape: torch.Size, like: Tensor) -> Any:
        """What only a group's owner has, as a checkpoint has it; `shape`, `like`: its shape, and a tensor with its
        dtype and device. A collective where groups have owners."""
        return value


class Owned(Whole):
    """DDP: each process computes the steps of its share of groups."""

    name = "owned"
    has_owners = True

    def assign(self, costs: Mapping[str, Sequence[float]], group_of: Mapping[str, str]) -> None:
        owner = dict(zip(costs, balanced(list(costs.values()), self.ranks.size), strict=True))
        self.owners = {layer: owner[group] for layer, group in group_of.items()}

    def reduce(self, parts: list[Tensor], groups: list[str], numbers: list[Tensor]) -> Sums:
        """Statistics to their owners by reduce-scatter, numbers to all."""
        return self.ranks.reduce_scatter(parts, [self.owners[g] for g in groups]), self.ranks.all_reduce(numbers)

    def rounds(self, jobs: list[Job]) -> Iterator[list[Job]]:
        if jobs:
            yield jobs

    def all_matrices(self, jobs: list[Job], own: list[Tensor | None]) -> list[Tensor]:
        """Matrices [n · units, m, columns] of the layers that each process computes → of all present ones, everywhere:
        one collective for each dtype."""
        likes = [job.batch.members[0].like for job in jobs]
        found = [[like] * len(job.members) for job, like in zip(jobs, likes, strict=True)]
        for places in by_dtype(likes):
            every = [(i, j, layer) for i in places for j, layer in enumerate(jobs[i].members)]
            shares = [[one for one in every if self.owners[one[2].name] == rank] for rank in range(self.ranks.size)]
            sizes = [[layer.units * layer.m * layer.columns for *_, layer in share] for share in shares]
            flat = [matrices.reshape(-1) for i in places if (matrices := own[i]) is not None]
            everyone = self.ranks.all_gather(torch.cat(flat) if flat else likes[places[0]], max(map(sum, sizes)))
            for row, share, counts in zip(everyone, shares, sizes, strict=True):
                for (i, j, layer), part in zip(share, row[: sum(counts)].split(counts), strict=True):
                    found[i][j] = part.view(layer.units, layer.m, layer.columns)
        return [torch.cat(parts) for parts in found]

    def export(self, value: Tensor | None, group: str, shape: torch.Size, like: Tensor) -> Any:
        """Sent to all."""
        buffer = like.new_empty(shape) if value is None else value.detach().clone()
        dist.broadcast(buffer, group=self.ranks.group, group_src=self.owners[group])
        return buffer


class Rows(Owned):
    """FSDP2: parameters are sharded by rows over a mesh, or (HSDP) over its second dimension and alike over the first.

    Momentum is averaged in stacks of the weights' rows [n, rows, …] and, where biases are in the factor, of the biases'
    [n, rows], of all layers. `replicas`: the processes that hold the same rows (HSDP), else none.

    Args:
        model: some of its modules `fully_shard` was called on.
        parameters: those that are trained, by name.
        group: the processes of LNGD; None: all of the job.

    Raises:
        RuntimeError: another way of sharding than FSDP2's own; names the parameter."""

    name = "rows"
    shards_rows = True

    def __init__(self, model: Any, parameters: Mapping[str, Tensor], group: Any = None) -> None:
        first_name, first = next((name, p) for name, p in parameters.items() if is_sharded(p))
        if not is_fully_sharded(model):
            raise RuntimeError(
                f"LNGD: parameter '{first_name}' is a DTensor, but fully_shard was not called (tensor parallelism?), "
                "accepted: parameters that fully_shard has sharded, or whole ones"
            )
        mesh = first.device_mesh  # type: ignore[attr-defined]
        for name, parameter in parameters.items():
            _check_sharding(name, parameter, first_name, mesh)
        super().__init__(Ranks(mesh.get_group(mesh.ndim - 1)))
        self.mesh, self._placements = mesh, tuple(first.placements)  # type: ignore[attr-defined]
        self.replicas = Ranks(mesh.get_group(0)) if mesh.ndim == 2 else None
        self.everyone = Ranks(mesh.get_group() if mesh.ndim == 1 else group)
        if self.everyone.size != mesh.size():
            raise RuntimeError(
                f"LNGD: got a mesh of {mesh.size()} ranks in a group of {self.everyone.size}, accepted: with a mesh of "
                "two dimensions process_group= with just its ranks"
            )

    def reduce(self, parts: list[Tensor], groups: list[str], numbers: list[Tensor]) -> Sums:
        found = self.ranks.reduce_scatter(parts, [self.owners[g] for g in groups])
        if self.replicas is not None:
            sums = iter(self.replicas.all_reduce([part for part in found if part is not None]))
            found = [None if part is None else next(sums) for part in found]
        return found, self.everyone.all_reduce(numbers)

    def complete(self, squares: list[Tensor]) -> list[Tensor]:
        return self.ranks.all_reduce(squares)

    def rows(self, count: int, rank: int | None = None) -> slice:
        """As many for each process, the last ones have fewer or none."""
        each = -(-count // self.ranks.size)
        first = min(count, each * (self.ranks.rank if rank is None else rank))
        return slice(first, min(count, first + each))

    def with_momentum(self, of: LayerBatch | Job) -> list[Layer]:
        """All: some rows of each."""
        return of.members

    def stack(self, layers: list[Layer], get: Callable[[nn.Parameter], Tensor]) -> list[Tensor]:
        kinds = zip(*(layer.parameters for layer in layers), strict=True)
        return [torch.stack([get(p) for p in kind]).to(state_dtype(layers[0].weight.dtype)) for kind in kinds]

    def unstack(self, layers: list[Layer], parts: list[Tensor]) -> Iterator[tuple[Layer, list[Tensor]]]:
        yield from ((layer, [part[place] for part in parts]) for place, layer in enumerate(layers))

    def _pieces(self, jobs: list[Job]) -> list[Piece]:
        """Of every parameter of the jobs' layers what travels."""
        layers = [layer for job in jobs for layer in job.members]
        return [Piece(p.shape, self.owners[layer.name], layer.like) for layer in layers for p in layer.parameters]

    def to_owners(self, jobs: list[Job], parts: list[list[Tensor]]) -> list[Tensor | None]:
        """Rows to whole matrices at each layer's owner."""
        rows = [row for own in parts for layer in zip(*own, strict=True) for row in layer]
        whole, found = iter(self._collect(rows, self._pieces(jobs))), list[Tensor | None]()
        for job, own in zip(jobs, parts, strict=True):
            matrices = []
            for layer in job.members:
                values = [next(whole) for _ in own]
                if self.owners[layer.name] == self.ranks.rank:
                    matrices.append(layer.matrices(values, own[0].dtype))  # type: ignore[arg-type]
            found.append(torch.cat(matrices) if matrices else None)
        return found

    def from_owners(self, jobs: list[Job], updates: list[Tensor | None]) -> list[list[Tensor]]:
        """Whole matrices to rows."""
        whole = list[Tensor | None]()
        for job, update in zip(jobs, updates, strict=True):
            own = iter([] if update is None else update.unflatten(0, (-1, job.batch.units)).unbind(0))
            for layer in job.members:
                mine = self.owners[layer.name] == self.ranks.rank
                whole += layer.like_parameters(next(own)) if mine else [None] * len(layer.parameters)
        rows, found = iter(self._spread(whole, self._pieces(jobs))), list[list[Tensor]]()
        for job in jobs:
            every = [[next(rows) for _ in layer.parameters] for layer in job.members]
            found.append([torch.stack(kind) for kind in zip(*every, strict=True)])
        return found

    def _collect(self, rows: list[Tensor], pieces: list[Piece]) -> list[Tensor | None]:
        """Sharded tensors, each whole on its owner (None elsewhere): one collective for each dtype."""
        found: list[Tensor | None] = [None] * len(rows)
        ranks = range(self.ranks.size)
        for places in by_dtype(rows):
            order = sorted(places, key=lambda i: pieces[i].owner)
            mine = [i for i in order if pieces[i].owner == self.ranks.rank]
            sent = [sum(rows[i].numel() for i in order if pieces[i].owner == rank) for rank in ranks]
            sizes = [[self._numel(pieces[i].shape, rank) for i in mine] for rank in ranks]
            flat = torch.cat([rows[i].reshape(-1) for i in order])
            flat = self.ranks.all_to_all(flat, sent, [sum(own) for own in sizes])
            parts = flat.split([size for own in sizes for size in own])
            for place, i in enumerate(mine):
                found[i] = torch.cat(parts[place :: len(mine)]).view(pieces[i].shape)
        return found

    def _spread(self, whole: list[Tensor | None], pieces: list[Piece]) -> list[Tensor]:
        """The inverse of `_collect`: this process's rows of each tensor."""
        found, ranks = [piece.like for piece in pieces], range(self.ranks.size)
        for places in by_dtype(found):
            order = sorted(places, key=lambda i: pieces[i].owner)
            own = [tensor for i in order if (tensor := whole[i]) is not None]
            parts = [[tensor[self.rows(len(tensor), rank)].reshape(-1) for tensor in own] for rank in ranks]
            sizes = [self._numel(pieces[i].shape, self.ranks.rank) for i in order]
            got = [sum(size for i, size in zip(order, sizes, strict=True) if pieces[i].owner == rank) for rank in ranks]
            flat = torch.cat([part for to in parts for part in to]) if own else found[order[0]]
            flat = self.ranks.all_to_all(flat, [sum(part.numel() for part in to) for to in parts], got)
            for i, piece in zip(order, flat.split(sizes), strict=True):
                rows = self.rows(pieces[i].shape[0])
                found[i] = piece.view(rows.stop - rows.start, *pieces[i].shape[1:])
        return found

    def _numel(self, shape: torch.Size, rank: int) -> int:
        rows = self.rows(shape[0], rank)
        return (rows.stop - rows.start) * math.prod(shape[1:])

    def as_sharded(self, rows: Tensor, shape: torch.Size) -> Any:
        """This process's rows of something in this shape, as a DTensor of their memory."""
        from torch.distributed.tensor import DTensor

        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self.mesh, self._placements, run_check=False, shape=shape, stride=stride)

    def export(self, value: Tensor | None, group: str, shape: torch.Size, like: Tensor) -> Any:
        """Sharded by rows, as parameters are."""
        (own,) = self._spread([value], [Piece(shape, self.owners[group], like)])
        return self.as_sharded(own.clone(), shape)


# Roughly, of a device: operations a second of batched matmuls, and numbers a second that a process receives: they
# decide between two ways to the same numbers. The CPU's are of one thread and gloo between processes of one machine; an
# accelerator's are set by arithmetic at a tenth of a data-centre GPU's peak, and a slow link.
_SPEEDS = {"cpu": (5e10, 1e8), "accelerator": (3e13, 2.5e9)}


def owned_pays(layers: Sequence[Layer], size: int) -> bool:
    """Whether it is quicker to compute each layer's step once and all-gather the updates than to compute all of them
    everywhere: a polar factor takes about 15 matmuls of the narrower side, and each number is received once."""
    if size == 1 or not layers:
        return False
    operations = sum(30.0 * y.units * min(y.m, y.columns) * y.m * y.columns for y in layers)
    numbers = sum(float(y.units * y.m * y.columns) for y in layers)
    matmuls, received = _SPEEDS["cpu" if layers[0].weight.device.type == "cpu" else "accelerator"]
    return operations / matmuls * (1 - 1 / size) > numbers / received


def make_layout(name: str, config: LNGDConfig, layers: Sequence[Layer], group: Any) -> Whole:
    """The layout of this name for whole parameters; ``auto``: owned where it can be and pays. ValueError: an unknown
    name, or owned for options that need every layer's step on every process."""
    if name not in ("whole", "owned", "auto"):
        raise ValueError(f"layout: got {name!r}, accepted: whole, owned, auto")
    ranks = Ranks(group)
    everywhere = config.momentum_on == "update" or config.rate == "adaptive" or config.family == "ekfac"
    if name == "owned" and everywhere:
        raise ValueError(
            "layout: got 'owned', accepted: whole, for momentum_on=update, rate=adaptive and family=ekfac, which need "
            "every layer on every process"
        )
    owned = name == "owned" or (name == "auto" and not everywhere and owned_pays(layers, ranks.size))
    return Owned(ranks) if owned and ranks.size > 1 else Whole(ranks)  # one process owns all


def _check_sharding(name: str, parameter: Tensor, first_name: str, mesh: Any) -> None:
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
