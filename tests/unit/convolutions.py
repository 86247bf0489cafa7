"""Convolutions of every kind, and their patches by another way than slicing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CASES: dict[str, tuple[type[nn.Module], dict[str, object]]] = {
    "3x3": (nn.Conv2d, {"kernel_size": 3}),
    "stride, padding": (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "unlike sides": (nn.Conv2d, {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    "dilation": (nn.Conv2d, {"kernel_size": 2, "dilation": 3}),
    "1x1": (nn.Conv2d, {"kernel_size": 1}),
    "1x1, stride": (nn.Conv2d, {"kernel_size": 1, "stride": 2}),
    "patch embedding": (nn.Conv2d, {"kernel_size": 4, "stride": 4}),
    "grouped": (nn.Conv2d, {"kernel_size": 3, "groups": 2, "padding": 1}),
    "depthwise": (nn.Conv2d, {"kernel_size": 3, "groups": 4}),
    "depthwise, two each": (nn.Conv2d, {"kernel_size": 2, "groups": 4, "multiplier": 2}),
    "same": (nn.Conv2d, {"kernel_size": (2, 3), "padding": "same"}),
    "same, even, dilated": (nn.Conv2d, {"kernel_size": 4, "padding": "same", "dilation": 2}),
    "valid": (nn.Conv2d, {"kernel_size": 3, "padding": "valid"}),
    "reflect": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "replicate": (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"}),
    "circular": (nn.Conv2d, {"kernel_size": 3, "padding": "same", "padding_mode": "circular"}),
    "1d": (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 2}),
    "1d, grouped": (nn.Conv1d, {"kernel_size": 3, "groups": 2}),
    "3d": (nn.Conv3d, {"kernel_size": 2, "stride": (1, 2, 1)}),
}


def convolution(case: str, bias: bool = True) -> tuple[nn.Module, Tensor]:
    """The module in float64, and an input."""
    kind, fields = CASES[case]
    fields = dict(fields)
    out = 4 * int(fields.pop("multiplier", 1))
    torch.manual_seed(0)
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    sizes = {1: (9,), 2: (8, 9), 3: (3, 4, 3)}[dims]
    return kind(4, out, bias=bias, **fields).double(), torch.randn(3, 4, *sizes, dtype=torch.float64)


def patches_of(module: nn.Module, x: Tensor) -> Tensor:
    """[groups, N, d], position by position: what the module's output there depends on, without slicing.

    Each column is the output of the same convolution with one weight set to one.
    """
    groups, columns = module.groups, module.weight[0].numel()
    found = []
    for column in range(columns):
        weight = torch.zeros_like(module.weight)
        weight.view(weight.shape[0], -1)[:, column] = 1
        output = module._conv_forward(x, weight, None)
        found.append(output.movedim(1, -1).reshape(-1, groups, output.shape[1] // groups)[..., 0])
    return torch.stack(found, -1).transpose(0, 1)
