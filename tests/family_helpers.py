"""A layer under each family of Fisher approximations, and what its factors stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_lngd import LNGD

FAMILIES = ["kfac", "ekfac", "tkfac", "ng+"]
# D itself is subtracted, with factors and inverses of every step
PLAIN: dict[str, Any] = {
    "rate": "none",
    "momentum": 0.0,
    "nesterov": False,
    "weight_decay": 0.0,
    "factor_interval": 1,
    "inverse_interval": 1,
    "stagger": False,
    "fallback_lr": 1e-30,
}
WHOLE = 99


class Layer(nn.Module):
    """One linear layer; sees a mask, which the loss has to heed."""

    def __init__(self, d: int, m: int, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(d, m, bias=bias)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.linear(x)


def with_ones(a: Tensor) -> Tensor:
    return torch.cat((a, a.new_ones(*a.shape[:-1], 1)), -1)


def matrix(module: nn.Module, bias: bool, gradient: bool = False) -> Tensor:
    """Weight (or gradient) [groups, m, columns], the bias's column last."""
    parts = [module.weight, *([module.bias] if bias else [])]
    units = getattr(module, "groups", 1)
    picked = [(p.grad if gradient else p).detach() for p in parts]
    return torch.cat([p.reshape(units, p.shape[0] // units, -1) for p in picked], -1)


def observed(model: Layer, x: Tensor, target: Tensor, **fields: Any) -> LNGD:
    """The optimizer after one step at rate 0 with the loss ½ mean |y − target|², whose g is (y − target)/N."""
    optimizer = LNGD(model, lr=0.0, **{"factor_interval": 1, "max_factor_dim": WHOLE, **fields})
    step(model, optimizer, x, target)
    return optimizer


def step(model: Layer, optimizer: LNGD, x: Tensor, target: Tensor) -> Tensor:
    """One step; the gradients g at the layer's output, [N, m]."""
    optimizer.zero_grad()
    y = model(x)
    loss = (y - target).square().sum() / 2 / len(x)
    y.retain_grad()
    loss.backward()
    assert y.grad is not None
    g = y.grad.flatten(0, -2).clone()
    optimizer.step()
    return g


def approximation(found: dict[str, Tensor]) -> Tensor:
    """F̂ of what `LNGD.factors` returns, index (input, output)."""
    if "moments" in found:
        both = torch.kron(found["basis_a"], found["basis_b"])
        return both @ torch.diag(found["moments"].T.flatten()) @ both.T
    if "delta" in found:
        return found["delta"] * torch.kron(found["p"], found["q"])
    if "phi" in found:
        return torch.kron(found["phi"], torch.diag(found["psi"]))
    return torch.kron(found["a"], found["b"])


def drawn(n: int, d: int, m: int, seed: int) -> tuple[Layer, Tensor, Tensor]:
    torch.manual_seed(seed)
    return Layer(d, m).double(), torch.randn(n, d).double(), torch.randn(n, m).double()
