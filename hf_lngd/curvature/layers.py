"""Which modules LNGD can own, and the tensors of one call of them in a canonical form.

A layer is one weight matrix. Two modules that share it (tied) are one layer, whose statistics are pooled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .factors import block_layout

# Modules that apply one function to each entry: φ'(s) is the derivative of that function. By module of
# definition, so that transformers' GELUs count and this package need not import transformers.
_ELEMENTWISE_HOMES = ("torch.nn.modules.activation", "transformers.activations")
_NOT_ELEMENTWISE = ("Softmax", "LogSoftmax", "Softmax2d", "Softmin", "GLU", "MultiheadAttention", "PReLU", "RReLU")

# Below this width a whole Φ costs next to nothing, so `max_factor_dim="auto"` does not cut further.
_SMALLEST_BLOCK = 64


@dataclass
class Layer:
    """A linear map owned by LNGD: weight [m, d], with the bias as column d + 1 of the factor if `bias_name`."""

    name: str
    weight_name: str
    bias_name: str | None
    out_features: int
    in_features: int
    modules: list[tuple[str, nn.Module]] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """Columns of the layer's gradient matrix: d, or d + 1 with the bias."""
        return self.in_features + (self.bias_name is not None)

    @property
    def module(self) -> nn.Module:
        """The first of the modules that share the weight."""
        return self.modules[0][1]

    @property
    def weight(self) -> nn.Parameter:
        """The weight as it is now: wrappers (FSDP2) replace parameters after the optimizer is made."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, if it is part of the factor."""
        return None if self.bias_name is None else self.module.bias  # type: ignore[return-value]

    def inputs(self, a: Tensor) -> Tensor:
        """A call's input [..., d] → [N, columns] in at least float32, detached, ones for the bias."""
        flat = a.detach().reshape(-1, a.shape[-1])
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        if self.bias_name is not None:
            flat = torch.cat((flat, flat.new_ones(flat.shape[0], 1)), 1)
        return flat


def factor_blocks(layers: list[Layer], max_factor_dim: int | str) -> tuple[int, int]:
    """(k, b) of the Φ that these layers share; `auto`: the widest that any of them allows."""
    columns = layers[0].columns
    if isinstance(max_factor_dim, int):
        return block_layout(columns, max_factor_dim)
    extra = columns - layers[0].in_features
    limit = max(min(layer.in_features, layer.out_features) for layer in layers) + extra
    return block_layout(columns, max(limit, _SMALLEST_BLOCK))


def is_linear(module: nn.Module) -> bool:
    """A linear map whose forward is nn.Linear's own, with a plain weight (no parametrization)."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain and "weight" in module._parameters


def is_elementwise(module: nn.Module) -> bool:
    """An activation module that works entry by entry and has no parameters."""
    kind = type(module)
    return (
        kind.__module__ in _ELEMENTWISE_HOMES
        and kind.__name__ not in _NOT_ELEMENTWISE
        and next(module.parameters(), None) is None
    )


def activation_derivative(activation: nn.Module, s: Tensor) -> Tensor:
    """φ'(s), entry by entry: s [..., m] → [N, m] in at least float32. The module's own hooks do not run.

    Forward mode: reverse mode saves tensors, which non-reentrant checkpointing counts when this runs within it.
    Reentrant checkpointing, which does not, switches forward mode off: then reverse mode it is.
    """
    # a copy for the module: an in-place activation may not change the caller's tensor
    value = s.detach().to(torch.promote_types(s.dtype, torch.float32), copy=True)
    with torch.no_grad(), forward_ad.dual_level():
        output = activation.forward(forward_ad.make_dual(value, torch.ones_like(value)))
        derivative = forward_ad.unpack_dual(output).tangent
    if derivative is None:
        with torch.enable_grad():
            leaf = s.detach().to(value.dtype).requires_grad_()
            (derivative,) = torch.autograd.grad(activation.forward(leaf.clone()).sum(), leaf)
    return derivative.detach().reshape(-1, s.shape[-1])


def call_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input tensor of a module's call, positional or by name."""
    value = args[0] if args else kwargs.get("input")
    return value if isinstance(value, Tensor) else None
