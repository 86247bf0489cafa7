"""What the ranks of a pool run with FSDP2: the loops of `dist_cases`, with `fully_shard` in place of DDP."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from hf_lngd import LNGD
from tests.core_helpers import IGNORED
from tests.dist_cases import LR, Images, backward, batch_of, deal, make, micro_batches


def shard(model: nn.Module, how: str, **options: Any) -> nn.Module:
    """`fully_shard` around the whole model (``whole``), or its blocks and then the rest (``blocks``)."""
    if how == "blocks":
        for name, module in model.named_modules():
            block = isinstance(model, Images) and name in ("first", "grouped")
            if block or name.rpartition(".")[0].endswith("layers"):
                fully_shard(module, **options)
    fully_shard(model, **options)
    return model


def train(
    kind: str, fields: dict[str, Any], dtype: str = "float64", accumulation: int = 1, steps: int = 20, rows: int = 16,
    uneven: bool = False, trim: bool = True, how: str = "blocks", first: str = "optimizer", spoil: int | None = None,
    resume: Any = None, stop: int | None = None, clip: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """As `dist_cases.train`, on all ranks of the pool.

    Args:
        how: see `shard`.
        first: what comes first, the ``optimizer`` or the ``shards``.
        clip: norm to which gradients are clipped.
    """
    precision, ranks, rank = getattr(torch, dtype), dist.get_world_size(), dist.get_rank()
    model = make(kind, precision)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if resume is not None:
        model.load_state_dict(resume["model"])
    wrapped: Any = shard(model, how) if first == "shards" else model
    optimizer = LNGD(model, lr=LR, **fields)
    if first == "optimizer":
        wrapped = shard(model, how)
    begin = 0
    if resume is not None:
        optimizer.load_state_dict(resume["optimizer"])
        begin = resume["steps"]
    for step in range(begin, steps if stop is None else stop):
        batch = batch_of(kind, step, rows, precision)
        terms = (batch["labels"] != IGNORED).sum()
        sizes = deal(rows, ranks, accumulation, uneven)
        parts = micro_batches(batch, [size for own in sizes for size in own], trim)
        mine = parts[rank * accumulation : (rank + 1) * accumulation]
        for i, part in enumerate(mine):
            wrapped.set_requires_gradient_sync(i == len(mine) - 1)
            backward(wrapped, optimizer, part, terms, ranks, spoil == step and rank == ranks - 1 and i == 0)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return report(model, optimizer, start, stop)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The state of a sharded model, gathered."""
    return {name: gathered(t) for name, t in model.state_dict().items()}


def gathered(tensor: Any) -> Tensor:
    """All of it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def report(model: nn.Module, optimizer: LNGD, start: dict[str, Tensor], stop: int | None) -> dict[str, Any]:
    """As `dist_cases.report`: what is gathered of all ranks."""
    weights = {n: gathered(p.detach()).clone() for n, p in model.named_parameters() if p.requires_grad}
    result: dict[str, Any] = {"weights": weights, "start": start, "numbers": optimizer.diagnostics()}
    result["factors"] = {name: optimizer.factors(name) for name in optimizer._capture.layers}
    result["memory"] = optimizer.memory_usage()
    if stop is not None:
        result |= {"model": whole(model), "optimizer": optimizer.state_dict(), "steps": stop}
    return result


def save(
    folder: str, kind: str, fields: dict[str, Any], steps: int, how: str = "blocks", **more: Any
) -> dict[str, Any]:
    """Train for some steps, write a distributed checkpoint, train on for as many: what came out."""
    return _go(folder, kind, fields, range(steps), range(steps, 2 * steps), how, **more)


def load(
    folder: str, kind: str, fields: dict[str, Any], steps: int, how: str = "blocks", **more: Any
) -> dict[str, Any]:
    """Go on from that checkpoint."""
    return _go(folder, kind, fields, range(0), range(steps, 2 * steps), how, **more)


def _go(folder: str, kind: str, fields: dict[str, Any], before: range, after: range, how: str, spread: bool = True,
        dtype: str = "float64", seed: int = 0) -> dict[str, Any]:  # fmt: skip
    from hf_lngd import load_checkpoint, save_checkpoint

    many = dist.is_initialized()
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if many else (1, 0)
    model = make(kind, getattr(torch, dtype))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if not before:  # what is loaded has to come from the checkpoint
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    optimizer = LNGD(model, lr=LR if before else 1.0, **fields)
    wrapped: Any = model
    if many:
        wrapped = shard(model, how) if spread else nn.parallel.DistributedDataParallel(model)
    if not before:
        load_checkpoint(folder, model, optimizer)
    for steps in (before, after):
        for step in steps:
            part = micro_batches(batch_of(kind, step, 16, getattr(torch, dtype)), [16 // ranks] * ranks, False)[rank]
            terms = (batch_of(kind, step, 16, getattr(torch, dtype))["labels"] != IGNORED).sum()
            backward(wrapped, optimizer, part, terms, ranks, False)
            optimizer.step()
            optimizer.zero_grad()
        if steps is before and before:
            save_checkpoint(folder, model, optimizer)
    return report(model, optimizer, start, None)
