"""What the ranks of a pool run with FSDP2: the loops of `dist_cases`, with `fully_shard` in place of DDP."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hf_lngd import LNGD, load_checkpoint, save_checkpoint
from tests.core_helpers import IGNORED, core_batch, core_marian
from tests.dist_cases import LR, Branches, Images, backward, batch_of, deal, make, micro_batches, share_of


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
        mine, terms = share_of(batch, rank, deal(rows, ranks, accumulation, uneven), trim)
        for i, part in enumerate(mine):
            wrapped.set_requires_gradient_sync(i == len(mine) - 1)
            if spoil == step and i == 0:  # all ranks have to take part in a forward pass
                factor = torch.inf if rank == ranks - 1 else 1.0
                wrapped(**{k: v * factor if v.is_floating_point() else v for k, v in part.items()})
            backward(wrapped, optimizer, part, terms, ranks, False)
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


class Uneven(nn.Module):
    """Matrices with fewer rows than ranks, and with rows that ranks do not divide; a token table of six rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(6, 3)
        self.first, self.second, self.last = nn.Linear(3, 5), nn.Linear(5, 3, bias=False), nn.Linear(3, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(self.table(ids))))))


def train_uneven(
    fields: dict[str, Any], many: bool = True, mesh: tuple[int, ...] = (), steps: int = 5
) -> dict[str, Any]:
    """A batch over all ranks, or in one process.

    Args:
        mesh: its shape; none: all ranks in a row.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if many else (1, 0)
    model = Uneven().double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = LNGD(model, lr=1e-2, matrix_dtype="full", factor_interval=2, **fields)
    if many:
        options = {"mesh": init_device_mesh("cpu", mesh, mesh_dim_names=("copies", "rows"))} if mesh else {}
        shard(model, "whole", **options)
    for step in range(steps):
        ids = torch.randint(0, 6, (8, 4), generator=torch.Generator().manual_seed(step))
        model(ids[rank::ranks]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return report(model, optimizer, start, None)


def train_branches(unseen_at: tuple[int, ...], steps: int = 6, **fields: Any) -> dict[str, Any]:
    """As `dist_cases.train_branches`: the second rank leaves a layer out at some steps."""
    model: Any = Branches().double()
    optimizer = LNGD(model, lr=1e-2, factor_interval=1, matrix_dtype="full", **fields)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    shard(model, "whole")
    model.set_reduce_scatter_unused_params(True)
    for step in range(steps):
        x = torch.randn(10, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        part = x[:7] if dist.get_rank() == 0 else x[7:]
        both = dist.get_rank() == 0 or step not in unseen_at
        (model(part, both=both).square().sum() / 10 * 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return report(model, optimizer, start, None)


def train_half(policy: bool) -> dict[str, Any]:
    """Steps of a Marian with a bf16 policy, or with none: weights, dtypes of the state."""
    model = make("marian", torch.float32)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if policy else {}
    shard(model, "blocks", **options)
    optimizer = LNGD(model, lr=LR)
    for step in range(4):
        part = micro_batches(batch_of("marian", step, 16, torch.float32), [8, 8], False)[dist.get_rank()]
        model(**part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()["lngd"]
    kinds = {
        str(t.dtype) for kind in ("groups", "layers") for own in state.get(kind, {}).values() for t in own.values()
    }
    return report(model, optimizer, start, None) | {"kinds": kinds}


def train_bf16(folder: str, mode: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
    """Four steps of a Marian in bfloat16, and four in which a checkpoint was gone on from after two: weights; bytes of
    what rounding took off, of each way of state."""
    found = []
    for stop in (4, 2):
        model = make("marian", torch.bfloat16)
        optimizer = LNGD(model, lr=LR, bf16_update=mode)
        shard(model, "blocks")
        for step in range(4):
            if step == stop:
                save_checkpoint(folder, model, optimizer)
                model = make("marian", torch.bfloat16)
                optimizer = LNGD(model, lr=LR, bf16_update=mode)
                shard(model, "blocks")
                load_checkpoint(folder, model, optimizer)
            part = micro_batches(batch_of("marian", step, 16, torch.float32), [8, 8], False)[dist.get_rank()]
            model(**part).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append({name: gathered(p.detach()).clone() for name, p in model.named_parameters()})
    state = optimizer.state_dict()["lngd"].get("rounding", {})
    whole_bytes = sum(own["lost"].numel() * own["lost"].element_size() for own in state.values())
    return found[0], found[1], [optimizer.memory_usage()["rounding"], whole_bytes]


def train_spoiled(names: list[str]) -> tuple[dict[str, Tensor], float]:
    """Three steps, in the second of which one number of each named gradient is none, in the last rank's rows."""
    model = make("marian", torch.float64)
    optimizer = LNGD(model, lr=LR, matrix_dtype="full")
    many = dist.is_initialized() and dist.get_world_size() > 1
    if many:
        shard(model, "blocks")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
    for step in range(3):
        batch = batch_of("marian", step, 16, torch.float64)
        part = micro_batches(batch, [16 // ranks] * ranks, False)[rank]
        backward(model, optimizer, part, (batch["labels"] != IGNORED).sum(), ranks, False)
        for name, parameter in model.named_parameters():
            if step == 1 and name in names and rank == ranks - 1:
                grad: Any = parameter.grad
                (grad.to_local() if hasattr(grad, "to_local") else grad).view(-1)[-1] = torch.nan
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: gathered(p.detach()).clone() for name, p in model.named_parameters()}
    return weights, optimizer.diagnostics()["skipped_gradients"]


def shard_later(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two whole steps with DDP, then sharded ones; and all of them with DDP."""
    found = []
    for later in (True, False):
        model = make("marian", torch.float64)
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer = LNGD(model, lr=LR, **fields)
        wrapped: Any = nn.parallel.DistributedDataParallel(model)
        for step in range(5):
            if step == 2 and later:
                wrapped = shard(model, "blocks")
            part = micro_batches(batch_of("marian", step, 16, torch.float64), [8, 8], False)[dist.get_rank()]
            wrapped(**part).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(report(model, optimizer, start, None))
    return found[0], found[1]


def train_scaled(first: str, spoil: int | None = None, looked: bool = False) -> tuple[dict[str, Any], float]:
    """Four steps with a gradient scaler, and its scale after them.

    Args:
        first: what comes first, the ``optimizer`` or the ``shards``.
        spoil: the step in which the last rank's rows of a gradient hold an infinity.
        looked: a forward pass comes before LNGD is made, which leaves parameters gathered.
    """
    model = make("marian", torch.float32)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if first == "shards":
        shard(model, "blocks")
    if looked:
        model(**batch_of("marian", 0, 4, torch.float32))
    optimizer = LNGD(model, lr=LR, matrix_dtype="full", factor_interval=2)
    if first == "optimizer":
        shard(model, "blocks")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        part = micro_batches(batch_of("marian", step, 16, torch.float32), [8, 8], False)[dist.get_rank()]
        scaler.scale(model(**part).loss).backward()
        if step == spoil and dist.get_rank() == dist.get_world_size() - 1:
            model.get_parameter("model.encoder.layers.0.fc1.weight").grad.to_local().view(-1)[-1] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return report(model, optimizer, start, None), scaler.get_scale()


def gradient_of_true(fisher: str) -> Tensor:
    """A gradient of the first step, before it is made."""
    model = make("marian", torch.float64)
    optimizer = LNGD(model, fisher=fisher)
    shard(model, "blocks")
    part = micro_batches(batch_of("marian", 0, 16, torch.float64), [8, 8], False)[dist.get_rank()]
    backward(model, optimizer, part, (part["labels"] != IGNORED).sum(), 1, False)
    gradient = gathered(model.get_parameter("model.encoder.layers.0.fc1.weight").grad)
    optimizer.step()
    return gradient


def topology(how: str | None) -> list[dict[str, Any]]:
    """Of a Marian whose source and target are as long, with two decoder layers that read one encoder output."""
    model = core_marian()
    optimizer = LNGD(model, chain="full")
    if how is not None:
        shard(model, how)
    model(**core_batch(0, 4, 6, 6)).loss.backward()
    optimizer.step()
    return optimizer._capture.topology.state()


def counted(fields: dict[str, Any], steps: int) -> tuple[list[dict[str, int]], int]:
    """Bytes that this rank hands to each kind of collective, step by step, and of its rows of the layers; under
    ``all_reduce calls`` and so on how often it did."""
    model = make("marian", torch.float64)
    optimizer = LNGD(model, lr=LR, early_factors=False, **fields)
    shard(model, "blocks")
    sent: list[dict[str, int]] = []
    names = {"all_to_all_single": 1, "reduce_scatter_single": 1, "all_reduce": 0, "all_gather_single": 1}

    def counting(name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            sent[-1][name] = sent[-1].get(name, 0) + args[names[name]].numel() * args[names[name]].element_size()
            sent[-1][f"{name} calls"] = sent[-1].get(f"{name} calls", 0) + 1
            return function(*args, **kwargs)

        return run

    for step in range(steps):
        model(**batch_of("marian", step, 4, torch.float64)).loss.backward()
        sent.append({})
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(patch.object(dist, name, counting(name, getattr(dist, name))))
            optimizer.step()
        optimizer.zero_grad()
    rows = sum(layer.weight.to_local().nbytes for layer in optimizer._routing.layers)
    return sent, rows
