"""What the ranks of a pool run: plain PyTorch loops with DDP and LNGD, and the same loop in one process."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from hf_lngd import LNGD
from tests.core_helpers import IGNORED, core_batch, core_marian

LR = 1e-3
# Marian's own 0.02 leaves attention all but even: the gradients of queries and keys are then differences of near
# equals, and their rounding, which every optimizer that scales its steps blows up, a thousand times as large.
MARIAN: dict[str, Any] = {"init_std": 0.25, "encoder_layers": 1, "decoder_layers": 1}


class Images(nn.Module):
    """A small residual network of convolutions, one of them grouped, and a head; no batch norm."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm([8, 6, 6])
        self.head = nn.Linear(8, 5)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        x = torch.relu(self.first(pixel_values))
        x = x + torch.relu(self.grouped(self.norm(x)))
        return self.head(x.mean((2, 3)))


def image_batch(seed: int, rows: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, 6, 6, generator=draw, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(0, 5, (rows,), generator=draw)}


def make(kind: str, dtype: torch.dtype) -> nn.Module:
    """A model without dropout. Keys' biases, whose gradient is zero but for rounding, are frozen."""
    model: nn.Module = core_marian(**MARIAN) if kind == "marian" else Images()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not name.endswith("k_proj.bias"))
    return model.to(dtype)


def batch_of(kind: str, step: int, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    # lengths differ from step to step
    batch = core_batch(step, rows, 7 + step % 3, 6 + step % 2) if kind == "marian" else image_batch(step, rows)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def micro_batches(batch: dict[str, Tensor], sizes: list[int], trim: bool) -> list[dict[str, Tensor]]:
    """Rows as they come, cut into these sizes; with `trim` a part loses what is padding in all of its rows."""
    parts = [
        dict(zip(batch, part, strict=True))
        for part in zip(*(value.split(sizes) for value in batch.values()), strict=True)
    ]
    for part in parts:
        if trim and "attention_mask" in part:
            length = int(part["attention_mask"].sum(1).max())
            part |= {name: part[name][:, :length] for name in ("input_ids", "attention_mask")}
            target = int((part["labels"] != IGNORED).sum(1).max())
            part["labels"] = part["labels"][:, :target].contiguous()
    return parts


def deal(rows: int, ranks: int, accumulation: int, uneven: bool) -> list[list[int]]:
    """Sizes of the micro-batches by rank."""
    if not uneven:
        size = rows // (ranks * accumulation)
        return [[size] * accumulation for _ in range(ranks)]
    sizes = [[1 + (r + a) % 2 for a in range(accumulation)] for r in range(ranks)]
    sizes[-1][-1] += rows - sum(map(sum, sizes))
    return sizes


def train(
    kind: str, fields: dict[str, Any], dtype: str = "float64", ranks: int = 1, accumulation: int = 1, steps: int = 20,
    rows: int = 16, uneven: bool = False, trim: bool = True, spoil: int | None = None, resume: Any = None,
    stop: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train on the same batches whatever the number of ranks, and say what came out of it.

    Args:
        spoil: a step in which the last rank's inputs hold an infinity.
        resume: an earlier result with `stop`, to go on from.
        stop: end before this step.
    """
    precision = getattr(torch, dtype)
    rank = dist.get_rank() if ranks > 1 else 0
    model = make(kind, precision)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = LNGD(model, lr=LR, **fields)
    first = 0
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        first = resume["steps"]
    wrapped: Any = DistributedDataParallel(model) if ranks > 1 else model
    for step in range(first, steps if stop is None else stop):
        batch = batch_of(kind, step, rows, precision)
        mine, terms = share_of(batch, rank, deal(rows, ranks, accumulation, uneven), trim)
        for i, part in enumerate(mine):
            spoiled = spoil == step and rank == ranks - 1 and i == 0
            last = i == len(mine) - 1
            with contextlib.nullcontext() if last or ranks == 1 else wrapped.no_sync():
                backward(wrapped, optimizer, part, terms, ranks, spoiled)
        optimizer.step()
        optimizer.zero_grad()
    return report(model, optimizer, start, stop)


def share_of(
    batch: dict[str, Tensor], rank: int, sizes: list[list[int]], trim: bool
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """A rank's micro-batches of a batch, and the terms of the loss of all of them. sizes: rows of each, by rank."""
    parts = micro_batches(batch, [size for own in sizes for size in own], trim)
    before = sum(len(own) for own in sizes[:rank])
    return parts[before : before + len(sizes[rank])], (batch["labels"] != IGNORED).sum()


def backward(model: Any, optimizer: LNGD, part: dict[str, Tensor], terms: Tensor, ranks: int, spoiled: bool) -> None:
    """The share of the mean loss over all ranks; DDP divides gradients by their number."""
    if spoiled:
        # seen by the hooks, not by the gradient
        bare = getattr(model, "module", model)
        bare(**{k: v * torch.inf if v.is_floating_point() else v for k, v in part.items()})
    output = model(**part)
    logits = output if isinstance(output, Tensor) else output.logits
    labels = part["labels"]
    if optimizer.needs_fisher_pass:
        optimizer.fisher_backward(logits, labels != IGNORED)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    (loss * ranks / terms).backward()


def report(model: nn.Module, optimizer: LNGD, start: dict[str, Tensor], stop: int | None) -> dict[str, Any]:
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    result: dict[str, Any] = {"weights": weights, "start": start, "numbers": optimizer.diagnostics()}
    result["factors"] = {name: optimizer.factors(name) for name in optimizer._capture.layers}
    result["memory"] = optimizer.memory_usage()
    if stop is not None:
        result |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": stop}
    return result


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """‖θ − θ₁‖ / ‖θ₁ − θ₀‖ over all trained parameters; θ₀ is where both began."""
    gap = sum(float((found["weights"][n] - w).double().square().sum()) for n, w in expected["weights"].items())
    way = sum(float((w - expected["start"][n]).double().square().sum()) for n, w in expected["weights"].items())
    return (gap / way) ** 0.5


class Branches(nn.Module):
    """Two layers beside each other, of which a call may leave out the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(4, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.second(x)) if both else h)


def train_branches(ranks: int, unseen_at: tuple[int, ...], steps: int = 6, **fields: Any) -> dict[str, Any]:
    """Two halves of a batch, on two ranks or one after the other; the second half leaves a layer out at some steps."""
    model = Branches().double()
    optimizer = LNGD(model, lr=1e-2, factor_interval=1, matrix_dtype="full", **fields)
    wrapped: Any = DistributedDataParallel(model, find_unused_parameters=True) if ranks > 1 else model
    halves = [dist.get_rank()] if ranks > 1 else [0, 1]
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(steps):
        x = torch.randn(10, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for half in halves:
            part = x[:7] if half == 0 else x[7:]
            loss = wrapped(part, both=half == 0 or step not in unseen_at).square().sum() / 10
            (loss * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    return report(model, optimizer, start, None)


def make_differently(what: str) -> None:
    """Rank 1 makes another optimizer, loads another state, or meets another model in its first step."""
    odd = what if dist.get_rank() == 1 else ""
    torch.manual_seed(0)
    width = 5 if odd == "shape" else 6
    between = nn.ReLU() if odd == "topology" else nn.Identity()
    first, last = nn.Linear(4, width), nn.Linear(width, 2)
    named = {"0": first, "1": between, "2": last}
    model = nn.Sequential(OrderedDict(sorted(named.items(), reverse=odd == "order")))
    rho = 0.5 if odd == "config" else 1.0
    model = model.double() if odd == "dtype" else model
    optimizer = LNGD(model, lr=2e-3 if odd == "lr" else 1e-3, damping_rho=rho)
    x = torch.ones(3, 4, dtype=first.weight.dtype)
    for step in range(3):
        if (what, step) == ("load later", 2) or (odd, step) == ("load", 0):  # there all ranks do, here one alone
            state = optimizer.state_dict()
            state["lngd"]["steps"] += bool(odd)
            optimizer.load_state_dict(state)
        model(x).sum().backward()
        optimizer.step()


def factors_by_draw(fisher: str, steps: int, ranks: int = 2) -> dict[str, Tensor]:
    """The mean of Φ and of v = Ψ tr Φ over steps that change nothing, and this rank's last draws."""
    rank = dist.get_rank() if ranks > 1 else 0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = LNGD(model, lr=0.0, fisher=fisher, factor_interval=1, ema_decay=0.0)
    x = torch.randn(6, 4, dtype=torch.float64)
    mine = x if ranks == 1 else x[:4] if rank == 0 else x[4:]
    values: dict[str, list[Tensor]] = {"phi": [], "v": []}
    streams = []
    for _ in range(steps):
        logits = model(mine)
        if optimizer.needs_fisher_pass:
            optimizer.fisher_backward(logits)
        logits.square().mean().backward()
        optimizer.step()
        found = optimizer.factors("0")
        values["phi"].append(found["phi"])
        values["v"].append(found["psi"] * found["phi"].trace())
        optimizer.zero_grad()
        streams.append(optimizer._capture.source._stream)
    result = {name: torch.stack(list_) for name, list_ in values.items()}
    return result | {"streams": torch.tensor(streams)}


def alone(steps: int = 3) -> dict[str, Any]:
    """Each rank trains a model of its own, in a group of its own."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    rank = dist.get_rank()
    model = make("images", torch.float64)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = LNGD(model, lr=LR * (1 + rank), process_group=groups[rank])
    for step in range(steps + rank):
        batch = batch_of("images", step, 4, torch.float64)
        F.cross_entropy(model(**batch), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return report(model, optimizer, start, None)


def no_inverse(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place of `inverse`: none of them is to be used."""
    return matrix, torch.zeros(matrix.shape[:-2], dtype=torch.bool), matrix[..., 0, 0]


def with_failing_inverses(placement: str) -> float:
    """How many inverses failed in a step in which all four did."""
    model = make("images", torch.float64)
    optimizer = LNGD(model, lr=LR, direction="natural", placement=placement, conv_rows=1)
    batch = batch_of("images", 0, 4, torch.float64)
    F.cross_entropy(model(**batch), batch["labels"]).backward()
    with patch("hf_lngd.curvature.factor_bank.inverse", no_inverse):
        optimizer.step()
    return optimizer.diagnostics()["failed_inverses"]
