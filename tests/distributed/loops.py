"""What the ranks of a pool run: plain PyTorch loops under each layout, and the same loops in one process.

A layout is ``whole`` or ``owned`` (DDP), or ``rows`` (FSDP2).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from transformers import modeling_utils, trainer_callback, trainer_utils

from hf_lngd import LNGD, load_checkpoint, save_checkpoint
from hf_lngd.parallel.checkpoint import FILE
from hf_lngd.parallel.ranks import ALL_GATHER, REDUCE_SCATTER
from tests.helpers import IGNORED, Images, every_sample, image_batch, layers_of, marian_batch, seeded, tiny_marian

LR = 1e-3
# Marian's own 0.02 leaves attention all but even: the gradients of queries and keys are then differences of near
# equals, and their rounding, which every optimizer that scales its steps blows up, a thousand times as large.
MARIAN: dict[str, Any] = {"init_std": 0.25}
exact = every_sample()


def make(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model without dropout. Keys' biases, whose gradient is zero but for rounding, are frozen."""
    model: nn.Module = tiny_marian(**MARIAN) if kind == "marian" else seeded(Images)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not name.endswith("k_proj.bias"))
    return model.to(dtype)


def batch_of(kind: str, step: int, rows: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A batch; lengths differ from step to step."""
    batch = marian_batch(step, rows, 7 + step % 3, 6 + step % 2) if kind == "marian" else image_batch(step, rows)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def world() -> tuple[int, int]:
    """This rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def micro_batches(batch: dict[str, Tensor], sizes: list[int], trim: bool) -> list[dict[str, Tensor]]:
    """Samples as they come, cut into these sizes; with `trim` a part loses what is padding in all of its samples."""
    parts = [
        dict(zip(batch, part, strict=True)) for part in zip(*(v.split(sizes) for v in batch.values()), strict=True)
    ]
    for part in parts:
        if trim and "attention_mask" in part:
            length, target = (int(m.sum(1).max()) for m in (part["attention_mask"], part["labels"] != IGNORED))
            part |= {name: part[name][:, :length] for name in ("input_ids", "attention_mask")}
            part["labels"] = part["labels"][:, :target].contiguous()
    return parts


def shares(rows: int, ranks: int, accumulation: int, uneven: bool) -> list[list[int]]:
    """Sizes of the micro-batches by rank."""
    if not uneven:
        return [[rows // (ranks * accumulation)] * accumulation for _ in range(ranks)]
    sizes = [[1 + (r + a) % 2 for a in range(accumulation)] for r in range(ranks)]
    sizes[-1][-1] += rows - sum(map(sum, sizes))
    return sizes


def share_of(batch: dict[str, Tensor], sizes: list[list[int]], trim: bool) -> tuple[list[dict[str, Tensor]], Tensor]:
    """This rank's micro-batches of a batch, and the terms of the loss of all of them."""
    rank, _ = world()
    parts, before = micro_batches(batch, [n for own in sizes for n in own], trim), sum(map(len, sizes[:rank]))
    return parts[before : before + len(sizes[rank])], (batch["labels"] != IGNORED).sum()


def backward(model: Any, optimizer: LNGD, part: dict[str, Tensor], terms: Tensor) -> None:
    """The share of the mean loss over all ranks; DDP and FSDP2 divide gradients by their number."""
    output, labels = model(**part), part["labels"]
    logits = getattr(output, "logits", output)
    if optimizer.needs_fisher_pass:
        optimizer.fisher_backward(logits, labels != IGNORED)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    (loss * world()[1] / terms).backward()


def shard(model: nn.Module, how: str = "blocks", **options: Any) -> nn.Module:
    """`fully_shard` around the whole model (``whole``), or its blocks and then the rest (``blocks``)."""
    for name, module in model.named_modules() if how == "blocks" else ():
        if (isinstance(model, Images) and name in ("first", "grouped")) or name.rpartition(".")[0].endswith("layers"):
            fully_shard(module, **options)
    fully_shard(model, **options)
    return model


def full(tensor: Any) -> Tensor:
    """All of a tensor, sharded or not."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def wrap(model: nn.Module, layout: str, how: str = "blocks", **ddp: Any) -> Any:
    """The model under DDP or FSDP2; in one process as it is."""
    if world()[1] == 1:
        return model
    return shard(model, how) if layout == "rows" else DistributedDataParallel(model, **ddp)


def prepare(
    model: nn.Module, layout: str, fields: dict[str, Any], first: str = "optimizer", how: str = "blocks", **more: Any
) -> tuple[Any, LNGD]:
    """The wrapped model and its optimizer. first: what comes first, the ``optimizer`` or what is wrapped around the
    model (``shards``), which LNGD is then given."""
    wrapped = wrap(model, layout, how) if first == "shards" else model
    several = {} if layout == "rows" or world()[1] == 1 else {"layout": layout}
    optimizer = LNGD(wrapped, **{"lr": LR, **fields}, **several, **more)
    return (wrap(model, layout, how) if first == "optimizer" else wrapped), optimizer


def sync(model: Any, last: bool) -> Any:
    """A context of one micro-batch: gradients travel with the last."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    return contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()


@exact
def train(
    kind: str, fields: dict[str, Any], layout: str = "whole", dtype: str = "float64", accumulation: int = 1,
    steps: int = 8, rows: int = 16, uneven: bool = False, trim: bool = True, how: str = "blocks",
    first: str = "optimizer", spoil: int | None = None, clip: float | None = None, resume: Any = None,
    stop: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train on the same batches whatever the number of ranks, and say what came out of it.

    Args:
        how, first: see `shard` and `prepare`.
        spoil: a step in which the last rank's hooks see an infinity, and its gradients do not.
        clip: norm to which gradients are clipped.
        resume: an earlier result with `stop`, to go on from.
        stop: end before this step.
    """
    precision, (rank, ranks) = getattr(torch, dtype), world()
    model = make(kind, precision)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if resume is not None:
        model.load_state_dict(resume["model"])
    wrapped, optimizer = prepare(model, layout, fields, first, how)
    begin = 0
    if resume is not None:
        optimizer.load_state_dict(resume["optimizer"])
        begin = resume["steps"]
    for step in range(begin, steps if stop is None else stop):
        mine, terms = share_of(batch_of(kind, step, rows, precision), shares(rows, ranks, accumulation, uneven), trim)
        for i, part in enumerate(mine):
            if spoil == step and i == 0:  # FSDP2: all ranks take part in a forward pass
                odd = torch.inf if rank == ranks - 1 else 1.0
                bare = model if layout != "rows" else wrapped
                bare(**{k: v * odd if v.is_floating_point() else v for k, v in part.items()}).sum().backward()
                for parameter in model.parameters():
                    parameter.grad.zero_()  # type: ignore[union-attr]
            with sync(wrapped, i == len(mine) - 1):
                backward(wrapped, optimizer, part, terms)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return report(model, optimizer, start, stop)


def report(model: nn.Module, optimizer: LNGD, start: dict[str, Tensor], stop: int | None = None) -> dict[str, Any]:
    """Weights, what they were, the log's numbers, factors, memory; with `stop` the states of both, too."""
    result: dict[str, Any] = {"start": start, "numbers": optimizer.diagnostics(), "memory": optimizer.memory_usage()}
    result["weights"] = {name: full(p) for name, p in model.named_parameters() if p.requires_grad}
    result["factors"] = {name: optimizer.factors(name) for name in layers_of(optimizer)}
    if stop is not None:
        result |= {"model": {name: full(t) for name, t in model.state_dict().items()}, "steps": stop}
        result["optimizer"] = optimizer.state_dict()
    return result


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """‖θ − θ₁‖ / ‖θ₁ − θ₀‖ over all trained parameters; θ₀ is where both began."""
    gap = sum(float((found["weights"][n] - w).double().square().sum()) for n, w in expected["weights"].items())
    way = sum(float((w - expected["start"][n]).double().square().sum()) for n, w in expected["weights"].items())
    return (gap / way) ** 0.5


# Odd models: what a rank does not call, hear or have

ROWS = 8


class Uneven(nn.Module):
    """Matrices with fewer rows than ranks, and with rows that ranks do not divide; a token table of six rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3)
        self.first, self.second, self.last = nn.Linear(3, 5), nn.Linear(5, 3, bias=False), nn.Linear(3, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(self.table(ids))))))


class Skipping(nn.Module):
    """A call may leave out the layer in the middle; `between` follows the first one."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.between = between or nn.Tanh()

    def forward(self, x: Tensor, how: str) -> Tensor:
        h = self.between(self.first(x))
        return self.last(h if how == "skip" else h + torch.tanh(self.middle(h)))


class Dropping(nn.Module):
    """A call may leave out two layers in the middle that read the same tensor, as layerdrop does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, how: str) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h if how == "skip" else h + torch.tanh(self.query(h) * self.key(h)))


class Experts(nn.Module):
    """A call takes one of two experts, which reads rows of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(2))

    def forward(self, x: Tensor, how: str) -> Tensor:
        h = torch.tanh(self.first(x))
        rows = h[h[:, 0] > 0]
        return self.last(torch.cat([h[h[:, 0] <= 0], rows + self.experts[int(how)](rows)]))


class TwoHeads(nn.Module):
    """Returns two outputs, of which the loss may take only the first: its other layer's gradient is undefined then."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.other = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor, how: str) -> Any:
        h = torch.tanh(self.body(x))
        outputs = self.head(h), self.other(h)
        return outputs if how == "one" else (torch.cat(outputs),)


ODD: dict[str, Callable[[], nn.Module]] = {
    "skipping": Skipping, "dropping": Dropping, "experts": Experts, "heads": TwoHeads,
}  # fmt: skip


def train_odd(
    kind: str, calls: list[list[str]], layout: str = "whole", odd: bool = False, **fields: Any
) -> dict[str, Any]:
    """Two halves of a batch, on two ranks or one after the other.

    Args:
        calls: of each step, how the first half and the second half call the model.
        odd: rank 1 has another activation behind its first layer.
    """
    rank, ranks = world()
    halves = [rank] if ranks > 1 else [0, 1]
    build = (lambda: Skipping(nn.ReLU())) if odd and rank == 1 else ODD[kind]
    model: Any = seeded(build).double()
    optimizer = LNGD(model, **{"lr": 1e-2, "factor_interval": 1, **fields})
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped = wrap(model, layout, "whole", **({} if layout == "rows" else {"find_unused_parameters": True}))
    if layout == "rows" and ranks > 1:
        model.set_reduce_scatter_unused_params(True)
    for step, how in enumerate(calls):
        x = torch.randn(2 * ROWS, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for half in halves:
            output = wrapped(x[half::2], how[half])
            output = output[0] if isinstance(output, tuple) else output
            (output.square().sum() / len(x) * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    return report(model, optimizer, start) | {"routes": [str(route) for route in optimizer.routing()]}


def train_uneven(fields: dict[str, Any], mesh: tuple[int, ...] = (), steps: int = 5) -> dict[str, Any]:
    """FSDP2 over all ranks, or (`mesh`) over such a mesh of copies and rows; in one process nothing of it."""
    rank, ranks = world()
    model = seeded(Uneven).double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = LNGD(model, lr=1e-2, factor_interval=2, **fields)
    if ranks > 1:
        options = {"mesh": init_device_mesh("cpu", mesh, mesh_dim_names=("copies", "rows"))} if mesh else {}
        shard(model, "whole", **options)
    for step in range(steps):
        ids = torch.randint(0, 6, (8, 4), generator=torch.Generator().manual_seed(step))
        model(ids[rank::ranks]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return report(model, optimizer, start)


class Unheard(nn.Module):
    """Its middle layer is called for a look only, and its weight used bare."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        self.seen = self.layer(x).detach().norm()
        return self.head(torch.tanh(F.linear(x, self.layer.weight)))


def train_unheard() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after two steps at adaptive rates."""
    model = seeded(Unheard).double()
    fields = {"rate": "adaptive", "weight_decay": 0.0, "factor_interval": 1}
    wrapped, optimizer = prepare(model, "whole", {"lr": 1e-2, **fields})
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        draw = torch.Generator().manual_seed(2 * step + dist.get_rank())
        x = torch.randn(ROWS, 4, generator=draw, dtype=torch.float64)
        F.cross_entropy(wrapped(x), torch.randint(0, 3, (ROWS,), generator=draw)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return start, {name: p.detach().clone() for name, p in model.named_parameters()}


def train_true(static: bool) -> float:
    """Two steps with the second backward pass of ``fisher="true"``: a gradient's size in the last."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    optimizer = LNGD(model, fisher="true", factor_interval=1)
    wrapped = DistributedDataParallel(model, static_graph=static)
    torch.manual_seed(dist.get_rank())
    for _ in range(2):
        optimizer.zero_grad()
        logits = wrapped(torch.randn(ROWS, 4))
        optimizer.fisher_backward(logits)
        logits.square().mean().backward()
        optimizer.step()
    return float(model[0].weight.grad.norm())


def make_differently(what: str) -> None:
    """Rank 1 makes another optimizer, loads another state, or meets another model in its first step."""
    odd = what if dist.get_rank() == 1 else ""
    torch.manual_seed(0)
    first, last = nn.Linear(4, 5 if odd == "shape" else 6), nn.Linear(5 if odd == "shape" else 6, 2)
    named = {"0": first, "1": nn.ReLU() if odd == "topology" else nn.Identity(), "2": last}
    model = nn.Sequential()
    for name, module in sorted(named.items(), reverse=odd == "order"):
        model.add_module(name, module)
    model = model.double() if odd == "dtype" else model
    fields = {"direction": "natural", "damping": 0.5 if odd == "config" else 1.0}
    optimizer = LNGD(model, lr=2e-3 if odd == "lr" else 1e-3, **fields)
    x = torch.ones(3, 4, dtype=first.weight.dtype)
    for step in range(3):
        if what == "load" and step == 2:
            fresh = LNGD(model, lr=1e-3, **fields).state_dict()  # of a run that has not made a step
            optimizer.load_state_dict(fresh if odd else optimizer.state_dict())
        model(x).sum().backward()
        optimizer.step()


def factors_by_draw(fisher: str, steps: int) -> dict[str, Tensor]:
    """Φ and v = Ψ tr Φ of every step; the steps change nothing."""
    rank, ranks = world()
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    optimizer = LNGD(model, lr=0.0, fisher=fisher, direction="natural", factor_interval=1, ema_decay=0.0)
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine = x if ranks == 1 else x[:4] if rank == 0 else x[4:]
    found: dict[str, list[Tensor]] = {"phi": [], "v": []}
    for _ in range(steps):
        logits = model(mine)
        if optimizer.needs_fisher_pass:
            optimizer.fisher_backward(logits)
        logits.square().mean().backward()
        optimizer.step()
        own = optimizer.factors("0")
        found["phi"].append(own["phi"])
        found["v"].append(own["psi"] * own["phi"].trace())
        optimizer.zero_grad()
    return {name: torch.stack(values) for name, values in found.items()}


def alone() -> dict[str, Any]:
    """Each rank trains a model of its own, in a group of its own."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    rank = dist.get_rank()
    model = make("images")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = LNGD(model, lr=LR * (1 + rank), process_group=groups[rank])
    for step in range(3 + rank):
        batch = batch_of("images", step, 4)
        F.cross_entropy(model(**batch), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return report(model, optimizer, start)


# Costs


@contextlib.contextmanager
def traffic() -> Iterator[dict[str, int]]:
    """Bytes that are handed to each kind of collective here, and how often (``<kind> calls``)."""
    sent: dict[str, int] = {}
    places = {
        "all_to_all_single": 1,
        REDUCE_SCATTER: 1,
        "all_reduce": 0,
        ALL_GATHER: 1,
        "broadcast": 0,
    }

    def counting(name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            tensor = args[places[name]]
            sent[name] = sent.get(name, 0) + tensor.numel() * tensor.element_size()
            sent[f"{name} calls"] = sent.get(f"{name} calls", 0) + 1
            return function(*args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        for name in places:
            stack.enter_context(patch.object(dist, name, counting(name, getattr(dist, name))))
        yield sent


def costs(layout: str, steps: int = 3, **fields: Any) -> tuple[list[dict[str, int]], list[int]]:
    """Traffic, step by step, and floating-point operations of `step()` on this rank."""
    model, optimizer = prepare(make("marian"), layout, {"factor_interval": 3, "inverse_interval": 3, **fields})
    sent, flops = [], []
    for step in range(steps):
        model(**batch_of("marian", step, 4)).loss.backward()
        counter = FlopCounterMode(display=False)
        with traffic() as bytes_sent, counter:
            optimizer.step()
        optimizer.zero_grad()
        sent.append(bytes_sent)
        flops.append(counter.get_total_flops())
    return sent, flops


# FSDP2


def train_half(policy: bool) -> dict[str, Any]:
    """Steps of a Marian with a bf16 policy, or with none: weights, dtypes of the state."""
    model = make("marian", torch.float32)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if policy else {}
    shard(model, "blocks", **options)
    optimizer = LNGD(model, lr=LR)
    for step in range(4):
        (part,), _ = share_of(batch_of("marian", step, 16, torch.float32), [[8], [8]], False)
        model(**part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    kinds = {str(v.dtype) for own in optimizer.state.values() for v in own.values() if isinstance(v, Tensor)}
    return report(model, optimizer, start) | {"kinds": kinds}


def train_spoiled(layout: str, names: list[str]) -> tuple[dict[str, Tensor], float]:
    """Three steps, in the second of which a number of each named gradient is none: the last rank's, or everyone's."""
    rank, ranks = world()
    model = make("marian")
    wrapped, optimizer = prepare(model, layout, {})
    for step in range(3):
        (part,), terms = share_of(batch_of("marian", step, 16), [[16 // ranks]] * ranks, False)
        backward(wrapped, optimizer, part, terms)
        for name, parameter in model.named_parameters():
            if step == 1 and name in names and (rank == ranks - 1 or layout != "rows"):
                grad: Any = parameter.grad
                (grad.to_local() if hasattr(grad, "to_local") else grad).view(-1)[-1] = torch.nan
        optimizer.step()
        optimizer.zero_grad()
    return {name: full(p) for name, p in model.named_parameters()}, optimizer.diagnostics()["skipped_gradients"]


def shard_later(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two whole steps with DDP, then sharded ones; and all of them with DDP."""
    found = []
    for later in (True, False):
        model = make("marian")
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        wrapped, optimizer = prepare(model, "whole", fields)
        for step in range(5):
            if step == 2 and later:
                wrapped = shard(model, "blocks")
            (part,), _ = share_of(batch_of("marian", step, 16), [[8], [8]], False)
            wrapped(**part).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(report(model, optimizer, start))
    return found[0], found[1]


def train_scaled(
    first: str, spoil: int | None = None, looked: bool = False, name: str = "model.encoder.layers.0.fc1.weight"
) -> tuple[dict[str, Any], float]:
    """Four steps of FSDP2 with a gradient scaler, and its scale after them.

    Args:
        first: see `prepare`.
        spoil: the step in which the last rank's rows of the gradient of `name` hold an infinity.
        looked: a forward pass comes before LNGD is made, which leaves parameters gathered.
    """
    model = make("marian", torch.float32)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if looked:
        shard(model)(**batch_of("marian", 0, 4, torch.float32))
        optimizer = LNGD(model, lr=LR, factor_interval=2)
    else:
        _, optimizer = prepare(model, "rows", {"factor_interval": 2}, first)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        (part,), _ = share_of(batch_of("marian", step, 16, torch.float32), [[8], [8]], False)
        scaler.scale(model(**part).loss).backward()
        if step == spoil and dist.get_rank() == dist.get_world_size() - 1:
            model.get_parameter(name).grad.to_local().view(-1)[-1] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return report(model, optimizer, start), scaler.get_scale()


def gradient_of_true(fisher: str) -> Tensor:
    """A gradient of the first step, before it is made."""
    model, optimizer = prepare(make("marian"), "rows", {"fisher": fisher})
    (part,), _ = share_of(batch_of("marian", 0, 16), [[8], [8]], False)
    backward(model, optimizer, part, (part["labels"] != IGNORED).sum())
    return full(model.get_parameter("model.encoder.layers.0.fc1.weight").grad)


# Checkpoints


def _save(tool: str, folder: str, model: Any, optimizer: LNGD) -> None:
    if tool == "lngd":
        save_checkpoint(folder, model, optimizer)
        return
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def _load(tool: str, folder: str, model: Any, optimizer: LNGD) -> None:
    if tool == "lngd":
        load_checkpoint(folder, model, optimizer)
        return
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def load_into_bare() -> tuple[dict[str, Any], dict[str, Any]]:
    """States of LNGD(DDP(model)) after a step and of LNGD(model) that has loaded it."""
    model = make("images")
    wrapped = DistributedDataParallel(model)
    optimizer = LNGD(wrapped, lr=LR)
    (part,), terms = share_of(batch_of("images", 0, 16), [[8], [8]], False)
    backward(wrapped, optimizer, part, terms)
    optimizer.step()
    bare = LNGD(make("images"), lr=LR)
    state = optimizer.state_dict()
    bare.load_state_dict(state)
    return state, bare.state_dict()


@exact
def checkpointed(
    folder: str, kind: str, fields: dict[str, Any], steps: int = 3, layout: str = "rows", tool: str = "lngd",
    load: bool = False, last: int | None = None, dtype: str = "float64", victim: int | None = None, event: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Train for some steps, write a checkpoint, train on for as many; or (`load`) go on from it: what came out.

    Args:
        tool: ``lngd`` (`save_checkpoint`) or ``dcp`` (torch's own functions).
        last: the number of steps in all.
        victim: the rank that is killed at `event` of a checkpoint that is written over when the first step was made.
    """
    precision, (rank, ranks) = getattr(torch, dtype), world()
    model = make(kind, precision)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if load:  # what is loaded has to come from the checkpoint
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    wrapped, optimizer = prepare(model, layout, {**fields, "lr": 0.3 if load else LR})
    bare = wrapped if layout == "rows" or tool == "dcp" else model
    if load:
        _load(tool, folder, bare, optimizer)
    for step in range(steps if load else 0, 2 * steps if last is None else last):
        if step == steps and not load:
            _save(tool, folder, bare, optimizer)
        (part,), terms = share_of(batch_of(kind, step, 16, precision), [[16 // ranks]] * ranks, False)
        backward(wrapped, optimizer, part, terms)
        optimizer.step()
        optimizer.zero_grad()
        if victim is not None:
            if rank == victim:
                kill_at(event, os.sep)
            _save(tool, folder, bare, optimizer)
    return report(model, optimizer, start)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(event: str, place: str) -> None:
    """From now on this process is killed when a file that ends in `event`, in a folder of `place`, is half written.

    Args:
        event: or ``rotation``: a checkpoint is half removed; ``swap``: the new file was put in the place of the old.
    """

    def half(path: Any) -> None:
        if place in str(path) and str(path).endswith(event):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def killed_by(write: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = write(*args, **kwargs)
            for given in (*args, *kwargs.values()):
                if isinstance(given, (str, Path)):
                    half(given)
            return result

        return wrapped

    create, replace = FileSystem.create_stream, Path.replace

    @contextlib.contextmanager
    def stream(self: Any, path: Any, mode: str) -> Iterator[Any]:
        with create(self, path, mode) as opened:
            yield opened
        half(path)

    def remove_half(path: Any, *args: Any, **kwargs: Any) -> None:
        (Path(path) / "trainer_state.json").unlink()
        die()

    def replace_and_die(path: Path, target: Any) -> Any:
        replace(path, target)
        if Path(target).name == FILE:
            die()

    FileSystem.create_stream = stream  # type: ignore[method-assign]
    torch.save = killed_by(torch.save)
    Path.write_text = killed_by(Path.write_text)  # type: ignore[method-assign]
    modeling_utils.safe_save_file = killed_by(modeling_utils.safe_save_file)
    state = trainer_callback.TrainerState
    state.save_to_json = killed_by(state.save_to_json)  # type: ignore[method-assign]
    if event == "rotation":
        trainer_utils.shutil.rmtree = remove_half
    if event == "swap":
        Path.replace = replace_and_die  # type: ignore[method-assign]
