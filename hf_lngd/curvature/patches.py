"""The inputs of a convolution as rows of a matrix: one row a position, never more of them at once than is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

MIB_OF_FLOATS = 1 << 18


@dataclass(frozen=True)
class Window:
    """How a convolution looks at its input, one number a spatial dimension.

    Attributes:
        padding: as `torch.nn.functional.pad` takes it: two numbers a dimension, the last one first.
        mode: zeros, reflect, replicate or circular.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    mode: str

    @classmethod
    def of(cls, module: torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d) -> Window:
        """The window of a convolution."""
        if module.padding == "same":  # torch pads one more behind where it cannot be even
            total = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
            pairs = [(t // 2, t - t // 2) for t in total]
        elif module.padding == "valid":
            pairs = [(0, 0)] * len(module.kernel_size)
        else:
            pairs = [(p, p) for p in module.padding]  # type: ignore[misc]
        padding = tuple(number for pair in reversed(pairs) for number in pair)
        return cls(module.kernel_size, module.stride, module.dilation, padding, module.padding_mode)  # type: ignore[arg-type]


def windows(x: Tensor, window: Window) -> Tensor:
    """x [B, C, *spatial] → [B, C, *out, *kernel], a view of x (padded, where there is padding)."""
    if any(window.padding):
        mode = "constant" if window.mode == "zeros" else window.mode
        x = torch.nn.functional.pad(x, window.padding, mode)
    for i, (k, s, d) in enumerate(zip(window.kernel, window.stride, window.dilation, strict=True)):
        x = x.unfold(2 + i, (k - 1) * d + 1, s)[..., ::d]
    return x


def as_rows(view: Tensor, units: int) -> Tensor:
    """[B, C, *out, *kernel] → [units, B·out, C/units·kernel]: a row a position, columns as in the weight."""
    n = (view.dim() - 2) // 2
    grouped = view.unflatten(1, (units, view.shape[1] // units))
    order = (1, 0, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n))
    columns = view.shape[1] // units * prod(view.shape[2 + n :])
    return grouped.permute(order).reshape(units, -1, columns)


def chunks(x: Tensor, window: Window, units: int, most: int) -> Iterator[tuple[Tensor, slice]]:
    """Rows of x [B, C, *spatial] in pieces of at most `most` numbers (but a line of positions at least).

    Yields:
        rows [units, n, C/units·kernel], and which of all B·out positions they are.
    """
    view = windows(x, window)
    lines, per_line = view.shape[2], prod(view.shape[3 : 2 + len(window.kernel)])
    size = view.shape[1] * prod(window.kernel) * per_line
    images, start = max(1, most // max(1, size * lines)), 0
    step = lines if size * lines <= most else max(1, most // size)
    for image in range(0, view.shape[0], images):
        for line in range(0, lines, step):
            rows = as_rows(view[image : image + images, :, line : line + step], units)
            yield rows, slice(start, start + rows.shape[1])
            start += rows.shape[1]
