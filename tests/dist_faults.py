"""What the ranks of a pool run where a model is odd: outputs outside the loss, layers that a rank does not call."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hf_lngd import LNGD
from tests.dist_cases import report

ROWS = 8
EXACT: dict[str, Any] = {"lr": 1e-2, "matrix_dtype": "full", "factor_interval": 1, "rate_rows": 1}


class TwoHeads(nn.Module):
    """Returns two outputs. Which of them the loss is made of is the caller's business."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.other = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.head(h), self.other(h)


def train_heads(ranks: int, both_at: tuple[int, ...], steps: int = 5, **fields: Any) -> dict[str, Any]:
    """Two halves of a batch on two ranks, or all of it on one; the second output is in the loss at some steps only."""
    model = TwoHeads().double()
    optimizer = LNGD(model, **{**EXACT, **fields})
    wrapped: Any = DistributedDataParallel(model, find_unused_parameters=True) if ranks > 1 else model
    mine = slice(dist.get_rank() if ranks > 1 else 0, None, ranks)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(ROWS, 4, generator=draw, dtype=torch.float64)[mine]
        labels = torch.randint(0, 3, (ROWS,), generator=draw)[mine]
        first, second = wrapped(x)
        loss = F.cross_entropy(first, labels)
        (loss + F.cross_entropy(second, labels) if step in both_at else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return report(model, optimizer, start, None)


class Unheard(nn.Module):
    """Its first layer is recomputed by a reentrant checkpoint, or called for a look only, and its weight used bare."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.before, self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if self.how == "reentrant":
            return self.head(torch.tanh(checkpoint(self.layer, x, use_reentrant=True)))
        self.seen = self.layer(x).detach().norm()
        return self.head(torch.tanh(F.linear(x, self.layer.weight)))


def train_unheard(how: str) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """The rate of the layer that is not heard, and the weights before and after two steps."""
    model = Unheard(how).double()
    optimizer = LNGD(model, rate="adaptive", weight_decay=0.0, **EXACT)
    wrapped = DistributedDataParallel(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        draw = torch.Generator().manual_seed(2 * step + dist.get_rank())
        x = torch.randn(ROWS, 4, generator=draw, dtype=torch.float64)
        F.cross_entropy(wrapped(x), torch.randint(0, 3, (ROWS,), generator=draw)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer._preconditioner is not None
    banks = optimizer._preconditioner.layer_banks
    rate = next(float(b.rate[i]) for b in banks for i, layer in enumerate(b.layers) if layer.name == "layer")
    return rate, start, {name: p.detach().clone() for name, p in model.named_parameters()}


def train_true(static: bool) -> float:
    """Two steps with the second backward pass of ``fisher="true"``: a gradient's size in the last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = LNGD(model, fisher="true", **EXACT)
    wrapped = DistributedDataParallel(model, static_graph=static)
    torch.manual_seed(dist.get_rank())
    for _ in range(2):
        optimizer.zero_grad()
        logits = wrapped(torch.randn(ROWS, 4))
        optimizer.fisher_backward(logits)
        logits.square().mean().backward()
        optimizer.step()
    gradient = model[0].weight.grad
    assert gradient is not None
    return float(gradient.norm())


class Skipping(nn.Module):
    """A call may leave out the layer in the middle."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.between = between

    def forward(self, x: Tensor, skip: bool) -> Tensor:
        h = self.between(self.first(x))
        return self.last(h if skip else h + torch.tanh(self.middle(h)))


def train_skipping(ranks: int, skips: str, odd: bool = False, **fields: Any) -> dict[str, Any]:
    """Two halves of a batch, on two ranks or one after the other.

    Args:
        skips: the half that leaves the middle layer out, step by step, as in ``1-0``; ``-``: none does.
        odd: rank 1 has another activation behind its first layer.
    """
    halves = [dist.get_rank()] if ranks > 1 else [0, 1]
    model = Skipping(nn.ReLU() if odd and halves == [1] else nn.Tanh()).double()
    optimizer = LNGD(model, **{**EXACT, **fields})
    wrapped: Any = DistributedDataParallel(model, find_unused_parameters=True) if ranks > 1 else model
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, skip in enumerate(skips):
        x = torch.randn(2 * ROWS, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for half in halves:
            loss = wrapped(x[half::2], skip == str(half)).square().sum() / len(x)
            (loss * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    topology = [(g["members"], g["links"]) for g in optimizer._capture.topology.state()]
    return report(model, optimizer, start, None) | {"topology": topology}


class Experts(nn.Module):
    """A call takes one of two experts, which reads rows of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(2))

    def forward(self, x: Tensor, taken: int) -> Tensor:
        h = torch.tanh(self.first(x))
        rows = h[h[:, 0] > 0]
        return self.last(torch.cat([h[h[:, 0] <= 0], rows + self.experts[taken](rows)]))


def train_experts(ranks: int, taken: list[str], **fields: Any) -> dict[str, Any]:
    """Two halves of a batch, on two ranks or one after the other.

    Args:
        taken: of each step the expert of the first half and of the second, as in ``01``.
    """
    halves = [dist.get_rank()] if ranks > 1 else [0, 1]
    model = Experts().double()
    optimizer = LNGD(model, **{**EXACT, **fields})
    wrapped: Any = DistributedDataParallel(model, find_unused_parameters=True) if ranks > 1 else model
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, experts in enumerate(taken):
        x = torch.randn(2 * ROWS, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for half in halves:
            (wrapped(x[half::2], int(experts[half])).square().sum() / len(x) * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    topology = [(g["members"], g["links"]) for g in optimizer._capture.topology.state()]
    return report(model, optimizer, start, None) | {"topology": topology}
